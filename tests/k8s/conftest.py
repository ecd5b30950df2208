"""One cluster for each way to install, with the manifests applied as they are shipped.

A test that asks for `installed` runs once for each overlay of k8s/overlays; it must leave the
cluster as it found it. `empty` is a cluster with nothing on it, to test the tests.
"""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.k8s.cluster import Cluster, Node, running, until
from tests.k8s.manifests import K8S, Object, name, of_kind, reference, render, replicas, workloads
from tests.k8s.programs import definitions

NAMESPACE = "tworoads"
MACHINES = tuple(Node(f"node-{zone}{number}", zone) for zone in "abc" for number in (1, 2))


@dataclass(frozen=True)
class Way:
    """A way to install: an overlay, the components beside it, and the nodes of the cluster.

    `overlay` and `components` are folders of k8s/.
    `on_gpus` names the workloads that get a GPU.
    """

    overlay: str
    components: tuple[str, ...]
    nodes: tuple[Node, ...]
    on_gpus: frozenset[str] = frozenset()


WAYS = (
    Way("overlays/kind", (), (Node("kind-control-plane"),)),
    Way(
        "overlays/cpu",
        (
            "components/cert-manager",
            "components/backup",
            "components/load-balancer",
            "components/training-job",
        ),
        MACHINES,
    ),
    Way(
        "overlays/gpu",
        (
            "components/cert-manager",
            "components/keda",
            "components/model-volume",
            "components/model-download",
            "monitoring",
            "monitoring/traces",
        ),
        MACHINES + tuple(Node(f"gpu-{zone}", zone, gpus=4) for zone in "abc"),
        frozenset({"generation", "tuning"}),
    ),
)


_BUCKET = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "weaviate-bucket", "namespace": NAMESPACE},
    "stringData": {"BACKUP_S3_BUCKET": "copies"},
}


@dataclass(frozen=True)
class Installed:
    """What runs on a cluster: its objects, and the API server's warnings when they came."""

    cluster: Cluster
    way: Way
    objects: list[Object]
    warnings: str

    def workloads(self) -> list[Object]:
        """Return what keeps pods running, as it is now."""
        return [
            self.cluster.get(reference(each), "-n", NAMESPACE) for each in workloads(self.objects)
        ]

    def pods(self) -> list[Object]:
        """Return what runs; not what has ended."""
        selector = "--field-selector=status.phase!=Succeeded"
        return list(self.cluster.get("pods", "-n", NAMESPACE, selector))

    def is_ready(self) -> bool:
        """Tell whether every workload has its pods, and the autoscaler its least number."""
        least = {
            scaler["spec"]["scaleTargetRef"]["name"]: scaler["spec"]["minReplicas"]
            for scaler in of_kind(self.objects, "HorizontalPodAutoscaler")
        }
        for each in self.workloads():
            status = each["status"]
            numbers = [status.get(f"{what}Replicas") for what in ("ready", "updated")]
            if (
                status.get("observedGeneration") != each["metadata"]["generation"]
                or replicas(each) < least.get(name(each), 1)
                or {*numbers, status.get("replicas")} != {replicas(each)}
            ):
                return False
        return True


@pytest.fixture(scope="session", params=WAYS, ids=lambda way: Path(way.overlay).name)
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    way: Way = request.param
    objects = render(_kustomization(way, tmp_path_factory.mktemp("way")))
    with running(way.nodes) as cluster:
        for file in definitions():
            cluster.kubectl("create", "-f", str(file))
        cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=120s")
        if of_kind(objects, "Certificate"):
            _follow_the_guide(cluster, tmp_path_factory.mktemp("guide"))
        cluster.apply(of_kind(objects, "Namespace"))
        # What would be refused as a pod is only warned of in a Deployment, if the label says so.
        cluster.kubectl(
            "label", "ns", NAMESPACE, "--overwrite", "pod-security.kubernetes.io/warn=restricted"
        )
        cluster.apply(_certified(objects))
        if "components/backup" in way.components:
            cluster.apply([_BUCKET])
        warnings = cluster.apply(objects)
        installed = Installed(cluster, way, objects, warnings)
        until(installed.is_ready, 180, f"every pod ready\n{warnings}")
        yield installed


def _kustomization(way: Way, folder: Path) -> Path:
    """Write what a user writes, the overlay and the components beside it, into a folder."""

    def within(part: str) -> str:
        return os.path.relpath(K8S / part, folder.resolve())

    content = {
        "resources": [within(way.overlay)],
        "components": [within(component) for component in way.components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return folder


def _follow_the_guide(cluster: Cluster, folder: Path) -> None:
    """Make the secrets by the commands of the guide, as they stand there."""
    guide = (K8S.parent / "docs" / "operations.md").read_text()
    _, _, rest = guide.partition("Make the secrets that nothing else makes:\n\n")
    commands = re.match(r"(?: {7}.*\n)+", rest)
    assert commands
    programs = folder / "bin"
    programs.mkdir()
    for program in (Path(cluster.command()[0]), Path(sys.executable).with_name("tworoads")):
        (programs / program.name).symlink_to(program)
    done = subprocess.run(
        ["bash", "-eu", "-c", textwrap.dedent(commands[0])],
        cwd=folder,
        env=os.environ
        | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "KUBECONFIG": str(cluster.folder / "kubeconfig"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def _certified(objects: Iterable[Object]) -> Iterator[Object]:
    """Yield the secrets that cert-manager makes of its Certificates."""
    for certificate in of_kind(objects, "Certificate"):
        yield {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": certificate["spec"]["secretName"], "namespace": NAMESPACE},
            "stringData": dict.fromkeys(("tls.crt", "tls.key", "ca.crt"), "of a test"),
        }


@pytest.fixture(scope="session")
def empty() -> Iterator[Cluster]:
    """A cluster with only a namespace, in which pods are held to the restricted standard."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"name": NAMESPACE, "labels": labels}
    with running(MACHINES) as cluster:
        cluster.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}])
        account = ("serviceaccount/default", "-n", NAMESPACE)
        cluster.kubectl("wait", "--for=create", *account, "--timeout=120s")
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show beside a failure what the cluster said."""
    report = yield
    if report.failed and call.when == "call":
        for found in item.funcargs.values():
            cluster = found.cluster if isinstance(found, Installed) else found
            if isinstance(cluster, Cluster):
                report.sections.append(("cluster", cluster.story()))
    return report
