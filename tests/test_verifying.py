"""How an adapter is measured, over a fake generation service whose scores can be shifted."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from tworoads.v1 import generation_pb2 as pb
from tworoads.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    GenerationServiceStub,
    add_GenerationServiceServicer_to_server,
)

from services.prompts.words import Message, Part
from services.runtime import call
from services.runtime.channel import connect
from services.runtime.errors import (
    InvalidInput,
    NotFound,
    NotReady,
    Overloaded,
    Stopping,
    TooLate,
    Unavailable,
)
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from services.tuning.adapters.verifying import BOUND, FLOOR, TOKENS, Verifier
from services.tuning.job import Adapter, Manifest, Options, TokenScore
from tests.small_adapter import probes

NAME = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
MANIFEST = Manifest("style", "tiny", "ab" * 32, "v1", "", "", Options(), ())
ADAPTER = Adapter("style@" + "0" * 12, "tenant-a", "0" * 64, MANIFEST, "verifying")


class FakeGeneration(GenerationServiceServicer):
    """Scores as the trainer did in `probes`, plus `shift` with the adapter, less 1 without."""

    def __init__(self) -> None:
        self.shift = 0.0
        self.ids = [7, 2]
        self.scores = [-0.5, -0.25]
        self.prompt_hash = "ab" * 32
        self.errors: list[Exception] = []
        self.writing_error: Exception | None = None
        self.tenants: set[str] = set()
        self.scored: list[pb.ScoreRequest] = []
        self.asked: list[pb.GenerateRequest] = []
        self._all_eight = asyncio.Barrier(8)

    async def Score(self, request, context):
        self.tenants.add(call.tenant())
        if self.errors:
            raise self.errors.pop(0)
        self.scored.append(request)
        shift = self.shift if request.adapter else -1.0
        pairs = zip(self.ids, self.scores, strict=True)
        scores = [pb.TokenScore(id=i, log_probability=s + shift) for i, s in pairs]
        return pb.ScoreResponse(tokens=scores, prompt_hash=self.prompt_hash)

    async def Generate(self, request, context):
        self.tenants.add(call.tenant())
        if self.writing_error:
            raise self.writing_error
        self.asked.append(request)
        if (len(self.asked) - 1) % 54 >= 6:  # those before are alone
            await self._all_eight.wait()
        yield pb.GenerateResponse(text="A", prompt=pb.PromptInfo(tokens=3))
        finish = pb.GenerateFinish(reason=pb.FINISH_REASON_LENGTH, tokens=TOKENS)
        yield pb.GenerateResponse(text="B", finish=finish)


@pytest.fixture
def fake() -> FakeGeneration:
    return FakeGeneration()


@pytest.fixture
async def stub(fake: FakeGeneration) -> AsyncIterator[GenerationServiceStub]:
    async with running(ServerSettings(grace_seconds=0), [NAME]) as server:
        await server.serve(lambda s: add_GenerationServiceServicer_to_server(fake, s))
        async with connect(f"127.0.0.1:{server.port}", NAME) as channel:
            yield GenerationServiceStub(channel)


@pytest.fixture
def verifier(stub: GenerationServiceStub) -> Verifier:
    return Verifier(stub, patience=0.3)


async def test_an_adapter_that_does_what_it_did_in_training_is_ready(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    measured = await verifier.measure(ADAPTER, probes(20))
    assert (measured.state, measured.reason, measured.message) == ("ready", "", "")
    found = measured.fidelity
    assert found is not None
    assert (found.probes, found.tokens, found.bound) == (20, 40, BOUND)
    assert (found.trainer_difference, found.trainer_difference_max) == (0, 0)
    assert found.base_difference == pytest.approx(1)
    asked = [(r.messages[0].parts[0].text, r.continuation, r.adapter) for r in fake.scored]
    assert asked == [
        (f"Question {i}?", "An answer.", adapter) for i in range(20) for adapter in (ADAPTER.id, "")
    ]
    assert fake.tenants == {"tenant-a"}
    assert call.tenant() == call.DEFAULT_TENANT


async def test_the_largest_difference_is_that_of_an_answer_and_not_of_a_token(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    given = probes(16)
    given[3] = replace(given[3], tokens=(TokenScore(7, -0.5), TokenScore(2, -0.85)))
    found = (await verifier.measure(ADAPTER, given)).fidelity
    assert found is not None
    assert found.trainer_difference == pytest.approx(0.6 / 32)
    assert found.trainer_difference_max == pytest.approx(0.3)


@pytest.mark.parametrize("sign", [1, -1])
async def test_log_probabilities_over_the_bound_make_it_unfaithful(
    sign: int, verifier: Verifier, fake: FakeGeneration
) -> None:
    fake.shift = sign * BOUND * 0.99
    assert (await verifier.measure(ADAPTER, probes())).state == "ready"
    fake.shift = sign * BOUND * 1.01
    measured = await verifier.measure(ADAPTER, probes())
    assert (measured.state, measured.reason) == ("unfaithful", "LOG_PROBABILITIES_DIFFER")
    assert str(BOUND) in measured.message
    assert measured.fidelity is not None
    assert measured.fidelity.trainer_difference == pytest.approx(BOUND * 1.01)
    assert [speed.streams for speed in measured.speeds] == [1, 8]


async def test_how_unlikely_a_token_is_that_nobody_would_write_does_not_count(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    fake.scores = [-0.5, FLOOR - 20]
    given = [replace(p, tokens=(TokenScore(7, -0.5), TokenScore(2, FLOOR - 2))) for p in probes()]
    assert (await verifier.measure(ADAPTER, given)).state == "ready"
    fake.scores = [-0.5, float("nan")]  # must not pass for equal
    assert (await verifier.measure(ADAPTER, probes())).state == "unfaithful"


@pytest.mark.parametrize("what", ["prompt", "answer"])
async def test_another_rendering_makes_it_unfaithful_whatever_the_scores(
    what: str, verifier: Verifier, fake: FakeGeneration
) -> None:
    if what == "prompt":
        fake.prompt_hash = "cd" * 32
    else:
        fake.ids = [7, 3]
    measured = await verifier.measure(ADAPTER, probes())
    assert (measured.state, measured.reason) == ("unfaithful", "RENDERING_MISMATCH")
    assert what in measured.message


async def test_a_longer_answer_is_another_rendering(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    fake.ids, fake.scores = [7, 2, 2], [-0.5, -0.25, -0.1]
    assert (await verifier.measure(ADAPTER, probes())).reason == "RENDERING_MISMATCH"


async def test_a_prompt_of_which_the_hash_is_unknown_is_compared_by_its_scores(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    unknown = [replace(probe, prompt_hash="") for probe in probes()]
    assert (await verifier.measure(ADAPTER, unknown)).state == "ready"


async def test_too_few_scored_answers_are_not_measured(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    unscored = [replace(probe, tokens=()) for probe in probes(30)]
    for given in ([], probes(15), [*probes(15), *unscored]):
        measured = await verifier.measure(ADAPTER, given)
        assert (measured.state, measured.reason) == ("unmeasured", "TOO_FEW_PROBES")
    assert fake.scored == []


async def test_speed_is_measured_in_turn_at_1_and_8_streams_after_a_warm_up(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    long = Message("user", (Part("x" * 100),))
    given = [replace(p, messages=(long,)) for p in probes(8)] + probes(8)
    async with asyncio.timeout(30):
        measured = await verifier.measure(ADAPTER, given)
    assert [speed.streams for speed in measured.speeds] == [1, 8]
    for speed in measured.speeds:
        assert speed.adapter_tokens_per_second > 0 and speed.base_tokens_per_second > 0
    turns = [ADAPTER.id, ""] * 3
    assert [r.adapter for r in fake.asked[:6]] == turns
    assert [r.adapter for r in fake.asked[6::8]] == turns
    assert len(fake.asked) == 6 + 6 * 8
    assert {r.messages[0].parts[0].text for r in fake.asked} == {f"Question {i}?" for i in range(8)}
    for request in fake.asked:
        assert request.measuring
        assert request.options == pb.GenerateOptions(
            min_tokens=TOKENS, max_tokens=TOKENS, priority=pb.PRIORITY_BATCH
        )


async def test_conversations_reach_generation_as_they_are(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    messages = (
        Message("system", (Part("Be brief."),)),
        Message("user", (Part("Hi"),)),
        Message("assistant", (Part("Ho"),)),
        Message("user", (Part("<passage>", "p1", True), Part("Who?"))),
    )
    await verifier.measure(ADAPTER, [replace(probe, messages=messages) for probe in probes()])
    S, U, A = pb.ROLE_SYSTEM, pb.ROLE_USER, pb.ROLE_ASSISTANT
    assert [message.role for message in fake.scored[0].messages] == [S, U, A, U]
    assert list(fake.scored[0].messages[3].parts) == [
        pb.Part(text="<passage>", id="p1", droppable=True),
        pb.Part(text="Who?"),
    ]


async def test_generation_that_comes_back_in_time_is_waited_for(
    stub: GenerationServiceStub, fake: FakeGeneration
) -> None:
    fake.errors = [
        Unavailable("ENGINE_DEAD", "it restarts"),
        Overloaded("QUEUE_FULL", "busy"),
    ]
    assert (await Verifier(stub).measure(ADAPTER, probes())).state == "ready"


HINDERED = [
    (Unavailable("ENGINE_DEAD", "x"), "GENERATION_UNAVAILABLE"),
    (Stopping("STOPPING", "x"), "GENERATION_UNAVAILABLE"),
    (Unavailable("TUNING_UNAVAILABLE", "x"), "GENERATION_UNAVAILABLE"),
    (Overloaded("QUEUE_FULL", "x"), "GENERATION_UNAVAILABLE"),
    (Overloaded("ADAPTERS_FULL", "x"), "ADAPTERS_FULL"),
    (Overloaded("STORE_FULL", "x"), "STORE_FULL"),
    (TooLate("DEADLINE", "x"), "GENERATION_UNAVAILABLE"),
    (RuntimeError("a bug"), "GENERATION_UNAVAILABLE"),
    (NotReady("ADAPTER_INCOMPATIBLE", "of another base model"), "BASE_MODEL_CHANGED"),
    (NotFound("ADAPTER_NOT_FOUND", "deleted"), "ADAPTER_NOT_FOUND"),
    (NotReady("ADAPTER_ALTERED", "altered"), "ADAPTER_ALTERED"),
    (InvalidInput("PROMPT_TOO_LONG", "too long"), "PROMPT_TOO_LONG"),
]


@pytest.mark.parametrize(("error", "reason"), HINDERED, ids=str)
async def test_what_hinders_the_measurement_leaves_it_unmeasured(
    error: Exception, reason: str, verifier: Verifier, fake: FakeGeneration
) -> None:
    fake.errors = [error] * 100
    measured = await verifier.measure(ADAPTER, probes())
    assert (measured.state, measured.reason) == ("unmeasured", reason)
    assert measured.message
    assert (measured.fidelity, measured.speeds) == (None, ())


async def test_no_generation_at_all_leaves_it_unmeasured() -> None:
    async with connect("127.0.0.1:1", NAME) as channel:
        verifier = Verifier(GenerationServiceStub(channel), patience=0.5)
        measured = await verifier.measure(ADAPTER, probes())
    assert (measured.state, measured.reason) == ("unmeasured", "GENERATION_UNAVAILABLE")


async def test_fidelity_that_was_measured_is_kept_when_speed_cannot_be(
    verifier: Verifier, fake: FakeGeneration
) -> None:
    fake.writing_error = Unavailable("ENGINE_DEAD", "x")
    measured = await verifier.measure(ADAPTER, probes())
    assert (measured.state, measured.speeds) == ("ready", ())
    assert measured.fidelity is not None
    fake.shift = 1.0
    measured = await verifier.measure(ADAPTER, probes())
    assert (measured.state, measured.reason) == ("unfaithful", "LOG_PROBABILITIES_DIFFER")


async def test_a_measurement_can_be_cancelled(verifier: Verifier, fake: FakeGeneration) -> None:
    fake.errors = [Unavailable("ENGINE_DEAD", "x")] * 100
    task = asyncio.create_task(verifier.measure(ADAPTER, probes()))
    while not fake.tenants:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
