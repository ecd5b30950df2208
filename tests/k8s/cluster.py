"""A Kubernetes control plane on loopback: the real API server, controllers and scheduler.

Nodes are simulated: kwok says of every pod that has a node that it runs and, a second later, that
it is ready. So admission, scheduling, autoscaling, disruption budgets and rolling updates are real;
images, commands, probes, DNS and network policies are not.
"""

import json
import re
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from clients.stack import free_addresses
from tests.k8s.programs import programs

STAGES = Path(__file__).parent / "stages.yaml"
START_SECONDS = 300
ERROR = re.compile(r"^[EF]\d{4} |error|panic", re.IGNORECASE).search
AUDIENCE = "https://kubernetes.default.svc"


@dataclass(frozen=True)
class Node:
    """A simulated machine. An empty `zone` is none; one with `gpus` is tainted, as clouds do."""

    name: str
    zone: str = ""
    gpus: int = 0

    def manifest(self) -> dict[str, Any]:
        labels = {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux"}
        room = {"cpu": "16", "memory": "64Gi", "ephemeral-storage": "500Gi", "pods": "110"}
        spec: dict[str, Any] = {}
        if self.zone:
            labels["topology.kubernetes.io/zone"] = self.zone
        if self.gpus:
            labels["nvidia.com/gpu.present"] = "true"
            room["nvidia.com/gpu"] = str(self.gpus)
            spec["taints"] = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "spec": spec,
            "status": {"allocatable": room, "capacity": room},
        }


class Cluster:
    """A running control plane. `folder` has its state and its logs."""

    def __init__(self, folder: Path, kubectl: Path) -> None:
        self.folder = folder
        self._kubectl = kubectl

    def command(self, *arguments: str) -> list[str]:
        return [str(self._kubectl), f"--kubeconfig={self.folder / 'kubeconfig'}", *arguments]

    def run(self, *arguments: str, given: str = "") -> "subprocess.CompletedProcess[str]":
        """Run kubectl, with `given` as its input, whether it succeeds or not."""
        return subprocess.run(
            self.command(*arguments), input=given, capture_output=True, text=True, timeout=300
        )

    def kubectl(self, *arguments: str, given: str = "") -> str:
        """Return what kubectl prints. Raises RuntimeError with its errors if it fails."""
        done = self.run(*arguments, given=given)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """Return an object, or the items of a list, as parsed JSON."""
        found = json.loads(self.kubectl("get", "-o", "json", *arguments))
        return found["items"] if found["kind"].endswith("List") else found

    def apply(self, objects: Iterable[dict[str, Any]]) -> str:
        """Apply objects; an unknown field is an error. Return the API server's warnings."""
        items = list(objects)
        if not items:
            return ""
        given = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        done = self.run("apply", "--validate=strict", "-f", "-", given=given)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return done.stderr.strip()

    def watch(self, path: str, since: str) -> "subprocess.Popen[str]":
        """Follow a list by its API path from a version on; prints a JSON event a line."""
        query = f"watch=1&resourceVersion={since}"
        command = self.command("get", "--raw", f"{path}?{query}")
        return subprocess.Popen(_mortal(command), stdout=subprocess.PIPE, text=True)

    def story(self, lines: int = 8) -> str:
        """Return the last events and the last errors in the logs, for who looks for a failure."""
        events = self.run("get", "events", "-A", "--sort-by=.lastTimestamp").stdout.splitlines()
        parts = ["events", *events[-4 * lines :]]
        for log in sorted(self.folder.glob("*.log")):
            errors = [line for line in log.read_text(errors="replace").splitlines() if ERROR(line)]
            parts += [log.name, *errors[-lines:]]
        return "\n".join(parts)


def until(is_true: Callable[[], Any], seconds: float, what: str) -> Any:
    """Ask until the answer is true, and return it. Raises TimeoutError that says `what`."""
    deadline = time.monotonic() + seconds
    while not (answer := is_true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {seconds} s: {what}")
        time.sleep(0.2)
    return answer


@contextmanager
def running(nodes: Iterable[Node]) -> Iterator[Cluster]:
    """Run a control plane with these nodes while the block runs; everything of it is on loopback.

    There are a default StorageClass and 16 volumes of 1 TiB, for any way of access.
    Raises RuntimeError or TimeoutError if it does not start; the ends of the logs are its notes.
    """
    tools = programs()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kube-")))
        (folder / "sa.key").write_bytes(_key())

        def start(name: str, *flags: str) -> "subprocess.Popen[bytes]":
            log = stack.enter_context(open(folder / f"{name}.log", "wb"))
            return stack.enter_context(_process([str(tools / name), *flags], folder, log))

        store, peer, server, simulator = free_addresses(4)
        start(
            "etcd",
            f"--data-dir={folder / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls=http://{store}",
            f"--advertise-client-urls=http://{store}",
            f"--listen-peer-urls=http://{peer}",
            f"--initial-advertise-peer-urls=http://{peer}",
            f"--initial-cluster=default=http://{peer}",
        )
        token = secrets.token_hex()
        (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
        host, _, port = server.rpartition(":")
        process = start(
            "kube-apiserver",
            f"--etcd-servers=http://{store}",
            f"--bind-address={host}",
            f"--secure-port={port}",
            f"--cert-dir={folder / 'certs'}",  # where it writes a certificate of its own
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=RBAC",
            "--token-auth-file=tokens.csv",
            f"--service-account-issuer={AUDIENCE}",
            "--service-account-key-file=sa.key",
            "--service-account-signing-key-file=sa.key",
        )
        (folder / "kubeconfig").write_text(_kubeconfig(server, token))
        cluster = Cluster(folder, tools / "kubectl")

        def answers() -> bool:
            if process.poll() is not None:
                raise RuntimeError("the API server ended")
            return cluster.run("get", "--raw", "/readyz").returncode == 0

        try:
            until(answers, START_SECONDS, "an API server that is ready")
            start(
                "kube-controller-manager",
                *_as_client(),
                "--service-account-private-key-file=sa.key",
                "--root-ca-file=certs/apiserver.crt",
                "--horizontal-pod-autoscaler-sync-period=1s",  # production: 15 s
                "--pvclaimbinder-sync-period=1s",
            )
            start("kube-scheduler", *_as_client())
            start(
                "kwok",
                "--kubeconfig=kubeconfig",
                "--manage-all-nodes=true",
                f"--server-address={simulator}",
                f"--config={STAGES}",
                "--node-lease-duration-seconds=40",
            )
            cluster.apply([*(node.manifest() for node in nodes), *_storage(16)])
            cluster.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=120s")
            yield cluster
        except Exception as error:
            error.add_note(cluster.story())
            raise


def _mortal(command: list[str]) -> list[str]:
    """Return the command line of a process that dies with this one."""
    return ["setpriv", "--pdeathsig=KILL", "--", *command]


@contextmanager
def _process(
    command: list[str], folder: Path, log: IO[bytes]
) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(_mortal(command), cwd=folder, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()  # nothing of its state is kept
        process.wait()


def _as_client() -> tuple[str, ...]:
    """Return the flags of a controller that serves nothing itself."""
    return "--kubeconfig=kubeconfig", "--secure-port=0", "--leader-elect=false"


def _key() -> bytes:
    """Return a private key, PEM, that signs the tokens of service accounts."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def _kubeconfig(server: str, token: str) -> str:
    cluster = {"server": f"https://{server}", "certificate-authority": "certs/apiserver.crt"}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }
    )


def _storage(volumes: int) -> Iterator[dict[str, Any]]:
    yield {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": "test",
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }
    for number in range(volumes):
        yield {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"volume-{number}"},
            "spec": {
                "capacity": {"storage": "1Ti"},
                "accessModes": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"],
                "storageClassName": "test",
                "hostPath": {"path": "/nonexistent"},
            },
        }
