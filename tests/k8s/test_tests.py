"""The checks of the other files can fail: each meets something that it must not let pass."""

from collections.abc import Iterator

import pytest

from tests.k8s.cluster import Cluster
from tests.k8s.conftest import NAMESPACE
from tests.k8s.manifests import Object, most_missing
from tests.k8s.readiness import followed

LABELS = {"app": "careless"}


def pod(user: int) -> Object:
    """Return the spec of a pod that is restricted but for its user."""
    secured = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {
        "securityContext": {
            "runAsNonRoot": user > 0,
            "runAsUser": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {"name": "main", "image": "example.invalid/x:1", "securityContext": secured}
        ],
    }


def deployment(user: int, **strategy: object) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "careless", "namespace": NAMESPACE},
        "spec": {
            "replicas": 3,
            "selector": {"matchLabels": LABELS},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": strategy},
            "template": {"metadata": {"labels": LABELS}, "spec": pod(user)},
        },
    }


@pytest.fixture
def cluster(empty: Cluster) -> Iterator[Cluster]:
    yield empty
    empty.kubectl("delete", "all", "--all", "-n", NAMESPACE, "--wait", "--timeout=120s")


def test_a_pod_that_runs_as_root_is_refused(cluster: Cluster) -> None:
    metadata = {"name": "root", "namespace": NAMESPACE}
    bad = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod(user=0)}
    with pytest.raises(RuntimeError, match="violates PodSecurity"):
        cluster.apply([bad])
    cluster.apply([bad | {"spec": pod(user=10001)}])


def test_a_deployment_of_such_pods_is_warned_of(cluster: Cluster) -> None:
    warn = "pod-security.kubernetes.io/warn"
    cluster.kubectl("label", "ns", NAMESPACE, f"{warn}=restricted")
    assert "would violate PodSecurity" in cluster.apply([deployment(user=0)])
    assert cluster.apply([deployment(user=10001)]) == ""


def test_a_field_that_does_not_exist_is_refused(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match="unknown field"):
        cluster.apply([deployment(user=10001, maxMissing=1)])


@pytest.mark.parametrize(("allowed", "lowest"), [(1, 2), ("100%", 0)])
def test_a_rolling_update_takes_as_many_pods_as_the_strategy_lets_it(
    cluster: Cluster, allowed: int | str, lowest: int
) -> None:
    rolled = deployment(user=10001, maxUnavailable=allowed, maxSurge=0)
    cluster.apply([rolled])
    status = ("rollout", "status", "deployment/careless", "-n", NAMESPACE, "--timeout=120s")
    cluster.kubectl(*status)
    with followed(cluster, NAMESPACE, lambda pod: pod["metadata"]["labels"]["app"]) as readiness:
        cluster.kubectl("rollout", "restart", "deployment/careless", "-n", NAMESPACE)
        cluster.kubectl(*status)
    assert readiness.lowest["careless"] == 3 - most_missing(rolled) == lowest
