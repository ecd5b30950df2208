"""Every container of the manifests, started as its manifest says; then a question through them all.

What a kubelet and an image do is in container.py. Weaviate runs alone, as in the overlay `kind`.
"""

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tworoads.v1 import embedding_pb2
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub

from clients.client import Client, TworoadsError
from clients.documents import NewDocument
from services.gateway.keys import add
from services.retrieval.stores.weaviate_server import find_binary
from tests.certificates import Authority
from tests.manifests import Object, render
from tests.real.container import Image, Network, Pod, ended, ours, weaviate

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root gives containers their own file systems"),
]

SERVICES = ("gateway", "embedding", "retrieval", "generation", "tuning", "evaluation")
READY_SECONDS = 600.0
CALL_SECONDS = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING
DOCUMENT = "The full-time employees get 27 days of paid leave a year."


@dataclass
class Cluster:
    """The running containers by pod. `key` opens the gateway, `ca` is the file that knows it."""

    network: Network
    pods: Mapping[str, Pod]
    key: str
    authority: Authority
    ca: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def client(self, key: str = "") -> Client:
        address = f"localhost:{self.network.port('gateway', 50050)}"
        return Client(address, key=key or self.key, ca=self.ca)


def container(pod: Pod) -> Any:
    [found] = pod.spec["containers"]
    return found


def workloads(folder: str) -> dict[str, Object]:
    kinds = ("Deployment", "StatefulSet")
    return {one["metadata"]["name"]: one for one in render(folder) if one["kind"] in kinds}


def secrets(authority: Authority, keys: Path) -> dict[str, dict[str, bytes]]:
    """Return the Secrets that the base asks for, the certificates as cert-manager would make."""
    found = {
        "tworoads-keys": {"keys.json": keys.read_bytes()},
        "weaviate-key": {"key": b"retrieval-key\n", "admin": b"admin-key\n"},
    }
    for one in render("overlays/cpu", "components/cert-manager"):
        if one["kind"] == "Certificate" and not one["spec"].get("isCA"):
            certificate, private = authority.issue(*one["spec"]["dnsNames"])
            files = {"tls.crt": certificate, "tls.key": private, "ca.crt": authority.pem}
            found[one["spec"]["secretName"]] = files
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    keys = folder / "keys.json"
    _, key = add(keys, "acme", "ann", "admin")
    authority = Authority()
    ca = folder / "ca.crt"
    ca.write_bytes(authority.pem)
    found = {**workloads("overlays/cpu"), "weaviate": workloads("overlays/kind")["weaviate"]}
    ports = {
        name: [port["containerPort"] for port in _container(one)["ports"]]
        for name, one in found.items()
    }
    network = Network(ports)
    made = secrets(authority, keys)
    pods = {name: Pod(one, folder, network, made) for name, one in found.items()}
    running = Cluster(network, pods, key, authority, ca)
    images = {name: ours(name) for name in (*SERVICES, "model")}
    images["weaviate"] = weaviate(await find_binary(say=print))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)  # each has a model of its own

        def start(pod: Pod, one: Any, image: Image) -> subprocess.Popen[bytes]:
            process = pod.start(one, image)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        async def start_all(pod: Pod) -> None:
            for first in pod.spec.get("initContainers", ()):
                image = images["model" if first["name"] == "model" else pod.name]
                code = await asyncio.to_thread(start(pod, first, image).wait, READY_SECONDS)
                assert code == 0, pod.log(first["name"]).read_text()
            running.processes[pod.name] = start(pod, container(pod), images[pod.name])

        await asyncio.gather(*map(start_all, pods.values()))
        until = time.monotonic() + READY_SECONDS
        for name, pod in pods.items():
            while not await answers(running, name, container(pod)["readinessProbe"]):
                late = time.monotonic() > until or running.processes[name].poll() is not None
                assert not late, f"{name} is not ready: {pod.log(name).read_text()}"
                await asyncio.sleep(0.1)
        yield running


def _container(workload: Object) -> Any:
    [found] = workload["spec"]["template"]["spec"]["containers"]
    return found


async def answers(cluster: Cluster, name: str, probe: Any) -> bool:
    """Probe a pod as a kubelet does: without certificate or key."""
    if "httpGet" in probe:
        named = {port["name"]: port for port in container(cluster.pods[name])["ports"]}
        port = named[probe["httpGet"]["port"]]["containerPort"]
        url = f"http://{cluster.network.address(name, port)}{probe['httpGet']['path']}"
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(url)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False
    address = cluster.network.address(name, probe["grpc"]["port"])
    async with grpc.aio.insecure_channel(address) as channel:
        asked = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
        try:
            said = await HealthStub(channel).Check(asked, timeout=probe.get("timeoutSeconds", 1))
        except grpc.aio.AioRpcError:
            return False
        return bool(said.status == SERVING)


async def test_every_container_answers_all_of_its_probes(cluster: Cluster) -> None:
    for name, pod in cluster.pods.items():
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            of = container(pod)[probe]  # a kubelet, too, takes one that is late for none
            assert any([await answers(cluster, name, of) for _ in range(3)]), (name, probe)


async def test_every_container_runs_without_rights_on_a_read_only_root(cluster: Cluster) -> None:
    for name, process in cluster.processes.items():
        proc = Path("/proc") / str(process.pid)
        status = dict(
            line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
        )
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}, name
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, name
        assert status["NoNewPrivs"].strip() == "1", name
        writable = {
            fields[4]
            for fields in map(str.split, (proc / "mountinfo").read_text().splitlines())
            if "rw" in fields[5].split(",") and not fields[4].startswith(("/proc", "/dev/"))
        }
        mounts = container(cluster.pods[name])["volumeMounts"]
        asked = {one["mountPath"] for one in mounts if not one.get("readOnly")}
        assert writable == {path for path in asked if not path.startswith("/dev/")}, name


async def test_every_container_shows_its_metrics(cluster: Cluster) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        for name in cluster.pods:
            url = f"http://{cluster.network.address(name, 9090)}/metrics"
            text = (await client.get(url, timeout=CALL_SECONDS)).text
            assert "# TYPE" in text, name
            if name == "generation":
                assert "vllm:num_requests_waiting" in text and "vllm:kv_cache_usage_perc" in text


async def test_a_question_is_answered_by_all_of_them_over_tls(cluster: Cluster) -> None:
    async with cluster.client() as client:
        await client.create_corpus("handbook")
        document = NewDocument("leave", DOCUMENT.encode())
        async for _ in client.ingest("handbook", [document]):
            pass
        question = "How many days of paid leave do full-time employees get?"
        answer = await client.ask(question, corpus="handbook", path="rag", timeout=CALL_SECONDS)
        assert "27" in answer.text
        assert answer.passages[0].document == "leave"
        assert await client.jobs() == []
        assert await client.comparisons() == []


async def test_the_backup_at_night_asks_weaviate_as_its_administrator(
    cluster: Cluster, tmp_path: Path
) -> None:
    [job] = [one for one in render("overlays/cpu", "components/backup") if one["kind"] == "CronJob"]
    workload = {"metadata": job["metadata"], "spec": job["spec"]["jobTemplate"]["spec"]}
    tmp_path.chmod(0o755)
    made = {"weaviate-key": {"admin": b"admin-key\n"}}
    pod = Pod(workload, tmp_path, cluster.network, made)
    one = container(pod)
    code = await asyncio.to_thread(pod.start(one, ours("retrieval")).wait, READY_SECONDS)
    # It may, but this Weaviate has no bucket.
    said = pod.log(one["name"]).read_text()
    assert code == 1 and "Weaviate refused" in said and "s3 not found" in said, said


async def test_a_wrong_key_is_refused(cluster: Cluster) -> None:
    async with cluster.client("trk_00000000_wrong") as client:
        with pytest.raises(TworoadsError) as refused:
            await client.search("leave", "handbook")
    assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_service_behind_the_gateway_takes_its_callers_alone(cluster: Cluster) -> None:
    address = cluster.network.address("embedding", 50051)
    kind = embedding_pb2.EMBED_KIND_QUERY
    request = embedding_pb2.EmbedRequest(texts=["leave"], kind=kind)
    for caller, code in (
        ("retrieval", None),
        ("tuning", grpc.StatusCode.UNAUTHENTICATED),
        ("", grpc.StatusCode.UNAVAILABLE),
    ):
        async with _channel(cluster, address, caller) as channel:
            call = EmbeddingServiceStub(channel).Embed(request, timeout=CALL_SECONDS)
            if code is None:
                await call
                continue
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is code, caller


def _channel(cluster: Cluster, address: str, caller: str) -> grpc.aio.Channel:
    """Return a channel to embedding that shows the certificate of `caller`, or none at all."""
    certificate, key = cluster.authority.issue(caller) if caller else (None, None)
    credentials = grpc.ssl_channel_credentials(cluster.authority.pem, key, certificate)
    options = [("grpc.ssl_target_name_override", "embedding")]
    return grpc.aio.secure_channel(address, credentials, options)


async def test_the_key_of_retrieval_may_not_do_more_than_it_must(cluster: Cluster) -> None:
    base = f"http://{cluster.network.address('weaviate', 8080)}/v1"
    async with httpx.AsyncClient(trust_env=False, timeout=CALL_SECONDS) as client:
        for key, method, path, code in (
            ("", "GET", "/schema", 401),
            ("wrong", "GET", "/schema", 401),
            ("retrieval-key", "GET", "/schema/TworoadsRecords", 200),
            ("retrieval-key", "DELETE", "/schema/TworoadsRecords", 403),
            ("retrieval-key", "GET", "/nodes", 403),
            ("admin-key", "GET", "/nodes", 200),
        ):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            said = await client.request(method, base + path, headers=headers)
            assert said.status_code == code, (key, method, path, said.text)


async def test_every_container_ends_in_order_when_it_is_told_to(cluster: Cluster) -> None:
    """Last: nothing runs after this."""
    processes = [cluster.processes[name] for name in (*SERVICES, "weaviate")]
    codes = await asyncio.gather(*(asyncio.to_thread(ended, one, 60.0) for one in processes))
    assert codes == [0] * len(codes)
