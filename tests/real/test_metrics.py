"""vLLM's own metrics are what the alerts, the dashboard and the autoscaler take them for."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from tworoads.v1 import generation_pb2 as pb
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from services.runtime.channel import connect
from tests.real.conftest import GenerationProcess
from tests.vllm_metrics import VLLM

SECONDS = 120


async def test_the_engine_has_every_metric_that_is_asked_for(generation: GenerationProcess) -> None:
    async with connect(generation.address, "tworoads.v1.GenerationService") as channel:
        request = pb.GenerateRequest(
            messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="Say hello.")])],
            options=pb.GenerateOptions(max_tokens=4),
        )
        async for _ in GenerationServiceStub(channel).Generate(request, timeout=SECONDS):
            pass
    with urllib.request.urlopen(f"http://{generation.metrics}/metrics", timeout=SECONDS) as page:
        families = [*text_string_to_metric_families(page.read().decode())]
    seen = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    assert {name: seen.get(name) for name in VLLM} == VLLM
