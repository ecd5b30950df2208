"""The real autoscaler takes generation up and down by the metrics that its manifest names."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import pytest

from tests.k8s.cluster import Cluster, until
from tests.k8s.conftest import NAMESPACE, Installed
from tests.k8s.manifests import Object, name, of_kind, reference
from tests.k8s.metrics_api import Metrics, metrics_api

BUSY = 3  # replicas that a test makes work for
SECONDS = 120


@dataclass(frozen=True)
class Autoscaler:
    """What scales generation, in a hurry; `wanted[metric]` is its value for each replica."""

    cluster: Cluster
    metrics: Metrics
    wanted: dict[str, float]
    name: str
    least: int

    def load(self, metric: str, total: float) -> None:
        """Report `total` for one metric, and for the others that there is nothing to do."""
        self.metrics.total.update(dict.fromkeys(self.wanted, 0.0) | {metric: total})

    def replicas(self) -> int:
        found = self.cluster.get("deployment/generation", "-n", NAMESPACE)
        return int(found["status"].get("readyReplicas", 0))

    def is_active(self) -> bool:
        found = self.cluster.get(f"hpa/{self.name}", "-n", NAMESPACE)
        conditions = found["status"].get("conditions", [])
        return any(c["type"] == "ScalingActive" and c["status"] == "True" for c in conditions)


@pytest.fixture(scope="module")
def autoscaler(installed: Installed) -> Iterator[Autoscaler]:
    """Generation's autoscaler as it is shipped, but that it does not wait between its steps."""
    plain = of_kind(installed.objects, "HorizontalPodAutoscaler")
    by_keda = [_as_keda(scaled) for scaled in of_kind(installed.objects, "ScaledObject")]
    (shipped,) = plain + by_keda  # two would fight
    hurried = deepcopy(shipped)
    for direction in ("scaleUp", "scaleDown"):
        behavior = hurried["spec"]["behavior"][direction]
        behavior["stabilizationWindowSeconds"] = 0
        for policy in behavior["policies"]:
            policy["periodSeconds"] = 1
    cluster = installed.cluster
    wanted = {
        metric["external"]["metric"]["name"]: _number(metric["external"]["target"]["averageValue"])
        for metric in shipped["spec"]["metrics"]
    }
    with metrics_api(cluster) as metrics:
        cluster.apply([hurried])
        yield Autoscaler(cluster, metrics, wanted, name(shipped), shipped["spec"]["minReplicas"])
        if plain:
            cluster.apply(plain)
        else:
            cluster.kubectl("delete", reference(shipped), "-n", NAMESPACE)


def test_generation_grows_with_its_load_and_shrinks_again(autoscaler: Autoscaler) -> None:
    for metric, wanted in autoscaler.wanted.items():
        autoscaler.load(metric, 0)
        until(lambda: autoscaler.replicas() == autoscaler.least, SECONDS, "the least replicas")
        autoscaler.load(metric, BUSY * wanted)
        until(lambda: autoscaler.replicas() == BUSY, SECONDS, f"{BUSY} replicas by {metric}")
    autoscaler.load(metric, 0)
    until(lambda: autoscaler.replicas() == autoscaler.least, SECONDS, "the least replicas again")


def test_metrics_that_are_gone_do_not_look_like_no_load(autoscaler: Autoscaler) -> None:
    metric, wanted = next(iter(autoscaler.wanted.items()))
    autoscaler.load(metric, BUSY * wanted)
    until(lambda: autoscaler.replicas() == BUSY, SECONDS, f"{BUSY} replicas")
    autoscaler.metrics.total.clear()
    until(lambda: not autoscaler.is_active(), SECONDS, "an autoscaler without metrics")
    assert autoscaler.replicas() == BUSY
    autoscaler.load(metric, 0)
    until(lambda: autoscaler.replicas() == autoscaler.least, SECONDS, "the least replicas")


def _as_keda(scaled: Object) -> Object:
    """Return the autoscaler that KEDA makes of a ScaledObject (its controllers/keda/hpa.go).

    KEDA itself takes the last replica away and brings the first one back: that is not tested here.
    """
    spec = scaled["spec"]
    metrics = [
        {
            "type": "External",
            "external": {
                "metric": {
                    "name": f"s{number}-{trigger['type']}",
                    "selector": {"matchLabels": {"scaledobject.keda.sh/name": name(scaled)}},
                },
                "target": {
                    "type": trigger.get("metricType", "AverageValue"),
                    "averageValue": trigger["metadata"]["threshold"],
                },
            },
        }
        for number, trigger in enumerate(spec["triggers"])
    ]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": f"keda-hpa-{name(scaled)}", "namespace": NAMESPACE},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment"}
            | spec["scaleTargetRef"],
            "minReplicas": max(1, spec["minReplicaCount"]),
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
            "metrics": metrics,
        },
    }


def _number(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
