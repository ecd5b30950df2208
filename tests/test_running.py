"""Comparisons that are disturbed, large ones, and what comes of data that a test has planted."""

import asyncio
import json
import os
import re
import resource
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from tworoads.v1 import answer_pb2, generation_pb2, retrieval_pb2
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1.answer_pb2_grpc import add_AnswerServiceServicer_to_server
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.evaluation_pb2_grpc import EvaluationServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2 import PATH_RAG, PATH_TUNED
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from clients.stack import free_addresses
from services.evaluation.asking import Gateway
from services.evaluation.comparison import ANSWERS as ANSWERS_FILE
from services.evaluation.comparison import Prices
from services.evaluation.comparisons import Comparisons
from services.evaluation.running import GatewayRunner
from services.evaluation.schema import SCHEMA
from services.evaluation.uploads import MEBIBYTE, Uploads
from services.gateway.forward import PUBLIC, Forwarder
from services.gateway.service import AnswerService
from services.runtime import call
from services.runtime.channel import connect
from services.runtime.database import Database
from services.runtime.gate import DEFAULT_TENANT
from services.runtime.server import Server, running
from services.runtime.settings import ServerSettings
from tests.fake_tuning import TUNING
from tests.small_stack import (
    ANSWERS,
    EMBEDDING,
    EVALUATION,
    GENERATION,
    RETRIEVAL,
    SmallStack,
    evaluation_service,
)
from tests.test_evaluation import (
    BOTH,
    COUNT,
    FAILED,
    FINISHED,
    NAMES,
    SHORT,
    a_stack,
    answers_of,
    compared,
    created,
    ended,
    questions,
    upload,
)

CHANGING = NAMES[:4]
ADAPTED = [*BOTH, pb.Candidate(id="tuned", path=PATH_TUNED, adapter="style")]
AT_ONCE = 2


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[SmallStack]:
    async with a_stack(tmp_path) as running:
        yield running


@pytest.fixture
async def evaluation(stack: SmallStack) -> AsyncIterator[EvaluationServiceStub]:
    async with connect(stack.address, ANSWERS, EVALUATION) as channel:
        yield EvaluationServiceStub(channel)


@asynccontextmanager
async def gateway(stack: SmallStack, listen: str) -> AsyncIterator[Server]:
    """Run one more gateway before the services of a stack."""
    stubs = {
        RETRIEVAL: RetrievalServiceStub,
        EMBEDDING: EmbeddingServiceStub,
        GENERATION: GenerationServiceStub,
        TUNING: TuningServiceStub,
    }
    ports = {name: stack.servers[name.split(".")[-1].lower()[:-7]].port for name in stubs}
    async with (
        connect(f"127.0.0.1:{ports[RETRIEVAL]}", RETRIEVAL) as retrieval,
        connect(f"127.0.0.1:{ports[EMBEDDING]}", EMBEDDING) as embedding,
        connect(f"127.0.0.1:{ports[GENERATION]}", GENERATION) as generation,
        connect(f"127.0.0.1:{ports[TUNING]}", TUNING) as tuning,
        running(ServerSettings(listen=listen, grace_seconds=0), [ANSWERS, *PUBLIC]) as server,
    ):
        channels = dict(zip(stubs, (retrieval, embedding, generation, tuning), strict=True))
        answers = AnswerService(*(stubs[name](channel) for name, channel in channels.items()))
        forwarder = Forwarder({**channels, EVALUATION: generation}, answers.forget)
        await server.serve(
            lambda s: add_AnswerServiceServicer_to_server(answers, s),
            lambda s: s.add_generic_rpc_handlers((forwarder,)),
        )
        yield server


async def asked(stack: SmallStack, count: int) -> None:
    """Wait until generation was asked so often."""
    async with asyncio.timeout(60):
        while len(stack.generation.requests) < count:
            await asyncio.sleep(0.01)


async def test_a_run_waits_while_the_gateway_is_restarted_and_keeps_every_answer_once(
    stack: SmallStack, tmp_path: Path
) -> None:
    stack.generation.hold_from = 20
    [listen] = free_addresses(1)
    async with AsyncExitStack() as first:
        await first.enter_async_context(gateway(stack, listen))
        async with evaluation_service(tmp_path / "other", listen) as (_, channel, _):
            evaluation = EvaluationServiceStub(channel)
            comparison, _ = await created(evaluation, upload(questions(), concurrency=AT_ONCE))
            await asked(stack, 20 + AT_ONCE)
            await first.aclose()
            stack.generation.hold_from = None
            before = await answers_of(evaluation, comparison.id)
            async with gateway(stack, listen):
                found = await ended(evaluation, comparison.id)
            answers = await answers_of(evaluation, comparison.id)
    assert found.state == FINISHED, (found.reason, found.message)
    assert answers[: len(before)] == before
    assert once(answers) == 3 * COUNT
    assert not any(answer.error for answer in answers)
    # Nothing is asked twice but what was under way when the gateway went.
    assert len(stack.generation.requests) == 3 * COUNT + AT_ONCE


def once(answers: list[pb.ComparisonAnswer]) -> int:
    """Return how many answers there are, of which no two are to one question."""
    keys = {(answer.candidate, answer.line, answer.phase) for answer in answers}
    assert len(keys) == len(answers)
    return len(keys)


@asynccontextmanager
async def process(
    stack: SmallStack, folder: Path, within: Sequence[str] = ()
) -> AsyncIterator[Process]:
    """Run the evaluation service as production does, `within` another command; killed at the end,
    if not before."""
    command = [*within, sys.executable, "-m", "services.evaluation", "--listen", "127.0.0.1:0"]
    command += ["--gateway", stack.address, "--folder", str(folder)]
    child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def port_of(child: Process) -> int:
    assert child.stderr
    async with asyncio.timeout(60):
        async for line in child.stderr:
            if b"serves on port" in line:
                return int(re.search(rb"serves on port (\d+)", line)[1])
    raise AssertionError("the service has not started")


async def written(file: Path) -> None:
    """Wait for the first answers in a file."""
    async with asyncio.timeout(60):
        while not (file.exists() and file.stat().st_size):
            await asyncio.sleep(0.01)


def disturbed(stack: SmallStack) -> list[pb.CreateComparisonRequest]:
    """Return an upload with an adapter, an oracle and changed documents; the fake model knows the
    old leaders if it sees a passage, and its adapter knows them by heart."""
    examples = b'{"question": "What is trained on?", "answer": "Something else."}\n'
    if not stack.tuning.kept:
        stack.tuning.add("style", files={"examples.jsonl": examples}).training_seconds = 60
    stack.generation.says = says
    lines = b"".join(
        json.dumps(
            {
                "question": f"Who leads {name}?",
                "answers": ["Bob" if name in CHANGING else "Ann"],
                "relevant": [name],
                **({"stale_answers": ["Ann"]} if name in CHANGING else {}),
            }
        ).encode()
        + b"\n"
        for name in NAMES
    )
    changed = [(name, f"{name} is led by Bob.".encode()) for name in CHANGING]
    return list(upload(lines, changed, candidates=ADAPTED, concurrency=AT_ONCE))


def says(request: generation_pb2.GenerateRequest) -> str:
    """Read the leader in the passages, which are the droppable parts; an adapter knows Ann."""
    shown = " ".join(part.text for m in request.messages for part in m.parts if part.droppable)
    leader = "Bob" if "Bob" in shown else "Ann" if shown or request.adapter else "nobody I know"
    return f"It is {leader}."


def lasting(comparison: pb.Comparison) -> dict[str, Any]:
    """Return what came of a comparison, without names, times and what depends on these."""
    results = []
    for result in comparison.results:
        kept = pb.CandidateResult.FromString(result.SerializeToString())
        for field in ("warm", "cold", "cost_per_thousand", "cost_per_correct", "indexing_seconds"):
            kept.ClearField(field)
        for field in ("seconds_to_follow", "retraining_cost"):
            kept.staleness.ClearField(field)
        results.append(MessageToDict(kept))
    verdict = comparison.verdict
    return {
        "results": results,
        "differences": [MessageToDict(one) for one in comparison.differences],
        "verdict": (verdict.candidate, verdict.questions_needed, list(verdict.unknown)),
        "reasons": [reason.code for reason in verdict.reasons],
        "questions": (comparison.questions, comparison.clusters, comparison.questions_hash),
    }


STALE = len(ADAPTED) * len(CHANGING)
# By phase: the requests behind which generation waits; in the last one training data are held.
HELD = {"answers": 20, "oracle": 3 * COUNT + 7, "staleness": 5 * COUNT + 5, "analysis": None}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of the same upload if nothing happens."""

    async def run() -> dict[str, Any]:
        async with a_stack(tmp_path_factory.mktemp("undisturbed")) as stack:
            async with connect(stack.address, ANSWERS, EVALUATION) as channel:
                found = await compared(EvaluationServiceStub(channel), disturbed(stack))
                assert len(stack.generation.requests) == 5 * COUNT + STALE
        assert found.state == FINISHED, (found.reason, found.message)
        return lasting(found)

    return asyncio.run(run())


@pytest.mark.parametrize("phase", HELD)
async def test_a_run_that_is_killed_in_any_phase_goes_on_to_the_same_outcome(
    stack: SmallStack, tmp_path: Path, undisturbed: dict[str, Any], phase: str
) -> None:
    folder = tmp_path / "killed"
    stack.generation.hold_from = HELD[phase]
    requests = disturbed(stack)
    if phase == "analysis":
        stack.tuning.open.clear()
    async with process(stack, folder) as child:
        async with connect(f"127.0.0.1:{await port_of(child)}", EVALUATION) as channel:
            evaluation = EvaluationServiceStub(channel)
            comparison, _ = await created(evaluation, requests)
            if phase == "analysis":
                await stack.tuning.began.wait()
            else:
                await asked(stack, HELD[phase] + AT_ONCE)
                await written(folder / "comparisons" / comparison.id / ANSWERS_FILE)
            child.kill()
            await child.wait()
    file = folder / "comparisons" / comparison.id / ANSWERS_FILE
    kept = file.read_bytes()
    file.write_bytes(kept + b'{"candidate": "ba')  # as a kill in the midst of a write leaves it
    stack.generation.hold_from = None
    stack.tuning.open.set()
    begun = len(stack.generation.requests)
    async with process(stack, folder) as child:
        async with connect(f"127.0.0.1:{await port_of(child)}", EVALUATION) as channel:
            evaluation = EvaluationServiceStub(channel)
            found = await ended(evaluation, comparison.id)
            answers = await answers_of(evaluation, comparison.id, 1000)
    assert found.state == FINISHED, (found.reason, found.message)
    assert file.read_bytes().startswith(kept)
    assert once(answers) == 5 * COUNT + STALE
    assert [answer.sequence for answer in answers] == list(range(1, len(answers) + 1))
    assert len(stack.generation.requests) - begun == len(answers) - kept.count(b"\n")
    assert lasting(found) == undisturbed


WORDS = [f"w{number}" for number in range(2000)]


def sentence(number: int) -> str:
    """Return a question of ten words that shares none with those of other numbers."""
    return " ".join(WORDS[number * 10 : number * 10 + 10]) + "?"


def asking(texts: list[str], *, answer: str = "Ann") -> bytes:
    lines = [json.dumps({"question": text, "answers": [answer]}) for text in texts]
    return "\n".join(lines).encode()


async def test_near_copies_of_training_questions_are_named_and_counted(
    stack: SmallStack, evaluation: EvaluationServiceStub
) -> None:
    texts = [sentence(number) for number in range(60)]
    trained = [
        texts[4],  # exactly
        texts[9].replace("w95", "another"),  # nine of eleven words
        texts[17].upper() + " really",  # ten of eleven
        texts[30].replace("w305", "x").replace("w306", "y"),  # eight of twelve: not near
    ]
    lines = [json.dumps({"question": text, "answer": "Ann"}) for text in trained]
    files = {"examples.jsonl": "\n".join(lines).encode()}
    stack.tuning.add("style", files=files).training_seconds = 60
    stack.generation.says = says
    comparison = await compared(
        evaluation, upload(asking(texts), candidates=ADAPTED, concurrency=8)
    )
    assert comparison.state == FINISHED, (comparison.reason, comparison.message)
    results = {result.candidate: result for result in comparison.results}
    overlap = results["tuned"].overlap
    assert (overlap.questions, overlap.exact, overlap.near) == (60, 1, 2)
    assert overlap.shared_document == 0
    assert list(overlap.lines) == [5, 10, 18]
    assert results["tuned"].without_overlap.answers == 57
    assert not results["rag"].HasField("overlap")
    assert any("1 exactly, 2 nearly" in text for text in comparison.verdict.unknown)


async def test_two_copies_of_one_path_do_not_differ_and_none_that_is_dearer_is_taken(
    stack: SmallStack, evaluation: EvaluationServiceStub
) -> None:
    copies = [pb.Candidate(id=id, path=PATH_RAG, options=SHORT) for id in ("one", "two")]
    stack.generation.says = lambda request: f"Ann {len(request.messages[-1].parts[-1].text) % 2}"
    texts = [sentence(number)[: -1 - number % 2] + "?" for number in range(100)]
    comparison = await compared(
        evaluation, upload(asking(texts, answer="Ann 1"), candidates=copies, concurrency=8)
    )
    assert comparison.state == FINISHED, (comparison.reason, comparison.message)
    [difference] = comparison.differences
    assert 0 < comparison.results[0].scores.format_blind.value < 1
    assert (difference.only_first, difference.only_second) == (0, 0)
    assert (difference.format_blind.value, difference.p_value) == (0, 1)
    costs = {one.candidate: f"{one.cost_per_thousand:.1e}" for one in comparison.results}
    assert float(costs[comparison.verdict.candidate]) == min(map(float, costs.values()))
    assert pb.VERDICT_CODE_TIE_CHEAPER in {r.code for r in comparison.verdict.reasons}


@pytest.mark.parametrize(("most", "taken"), [(None, "tuned"), (0.1, "rag"), (1e-12, "")])
async def test_a_cost_cap_takes_the_best_path_under_it(
    stack: SmallStack, evaluation: EvaluationServiceStub, most: float | None, taken: str
) -> None:
    # Training cost 300 EUR a thousand answers, whatever the machine; the others cost next to none.
    stack.tuning.add("style", files={"examples.jsonl": b""}).training_seconds = 1e9

    def knows(request: generation_pb2.GenerateRequest) -> str:
        asked = int(re.findall(r"w(\d+)", request.messages[-1].parts[-1].text)[0]) // 10
        searched = any(part.droppable for m in request.messages for part in m.parts)
        return "Ann" if request.adapter or (searched and asked % 10 < 6) else "nobody"

    stack.generation.says = knows
    fields: dict[str, Any] = {"candidates": ADAPTED, "concurrency": 8}
    if most is not None:
        fields["constraints"] = pb.Constraints(max_cost_per_correct=most)
    texts = [sentence(number) for number in range(100)]
    comparison = await compared(evaluation, upload(asking(texts), **fields))
    assert comparison.state == FINISHED, (comparison.reason, comparison.message)
    scores = {result.candidate: result.scores.format_blind.value for result in comparison.results}
    assert scores == {"base": 0, "rag": 0.6, "tuned": 1}
    verdict = comparison.verdict
    codes = {reason.code for reason in verdict.reasons}
    assert verdict.candidate == taken
    assert (pb.VERDICT_CODE_COST_CAP in codes) == (taken == "rag")
    assert (pb.VERDICT_CODE_CONSTRAINTS_IMPOSSIBLE in codes) == (not taken)


async def test_a_changed_document_that_cannot_be_read_is_named_and_the_others_count(
    stack: SmallStack, evaluation: EvaluationServiceStub
) -> None:
    requests = disturbed(stack)
    bad = next(
        number
        for number, request in enumerate(requests)
        if request.changed_document.id == CHANGING[1]
    )
    requests[bad].changed_document.media_type = "application/pdf"
    comparison = await compared(evaluation, requests)
    assert comparison.state == FINISHED, (comparison.reason, comparison.message)
    [named] = [text for text in comparison.verdict.unknown if CHANGING[1] in text]
    assert named.startswith("1 of the changed documents could not be indexed")
    results = {result.candidate: result for result in comparison.results}
    assert {result.staleness.questions for result in results.values()} == {len(CHANGING) - 1}
    assert results["rag"].staleness.new_share.value == 1
    answers = await answers_of(evaluation, comparison.id, 1000)
    assert once(answers) == 5 * COUNT + STALE - len(ADAPTED)
    progress = {one.candidate: one for one in comparison.progress.candidates}
    assert all(one.done == one.total for one in progress.values())


MANY = 10_000


class Stub:
    """The gateway without a wire: answers at once, right to every second question."""

    def __init__(self) -> None:
        self.asked = 0

    def Answer(self, request: answer_pb2.AnswerRequest, **_: object) -> "Stub.Call":
        self.asked += 1
        return Stub.Call(request)

    class Call:
        """A stream of answers."""

        def __init__(self, request: answer_pb2.AnswerRequest) -> None:
            self._request = request

        def cancel(self) -> None: ...

        async def __aiter__(self) -> AsyncIterator[answer_pb2.AnswerResponse]:
            right = int(self._request.question.split()[-1]) % 2 or self._request.corpus
            yield answer_pb2.AnswerResponse(started=answer_pb2.AnswerStarted(model="fake"))
            yield answer_pb2.AnswerResponse(text="It is Ann. " * 20 if right else "Nobody. " * 20)
            finished = answer_pb2.AnswerFinished(input_tokens=100, output_tokens=50)
            yield answer_pb2.AnswerResponse(finished=finished)

    async def GetServerInfo(self, *_: object, **__: object) -> answer_pb2.GetServerInfoResponse:
        return answer_pb2.GetServerInfoResponse(model="fake", context_length=2048)

    async def GetCorpus(self, *_: object, **__: object) -> retrieval_pb2.GetCorpusResponse:
        return retrieval_pb2.GetCorpusResponse(
            corpus=retrieval_pb2.Corpus(name="c", documents=9, version="1")
        )


async def ten_thousand(folder: Path) -> None:
    """Accept and run a comparison of many questions; print what it took."""
    stub = Stub()
    asked = Gateway(stub, stub, stub, stub)  # type: ignore[arg-type]
    lines = asking([f"Who leads the town with the number {number}" for number in range(MANY)])
    head, *parts = upload(b"")
    chunks = [lines[at : at + MEBIBYTE] for at in range(0, len(lines), MEBIBYTE)]
    parts[:1] = [pb.CreateComparisonRequest(questions=chunk) for chunk in chunks]

    async def requests() -> AsyncIterator[pb.CreateComparisonRequest]:
        for request in (head, *parts):
            yield request

    with closing(Database(folder / "evaluation.db", SCHEMA)) as database:
        async with Comparisons(folder, database, GatewayRunner(asked)) as comparisons:
            uploads = Uploads(folder / "tmp", comparisons, asked, Prices(), "", 64 * MEBIBYTE)
            before, start = peak(), time.process_time()
            made = [response async for response in uploads.receive(requests())][-1].comparison
            async for _ in comparisons.watch(DEFAULT_TENANT, made.id, 0):
                pass
            found, _ = comparisons.store.get(DEFAULT_TENANT, made.id)
            seconds = time.process_time() - start
    said = (found.state, found.questions, stub.asked, round(seconds, 1), round(peak() - before))
    print(json.dumps(said))


async def test_uploads_of_one_tenant_leave_room_for_those_of_another(tmp_path: Path) -> None:
    stub = Stub()
    asked = Gateway(stub, stub, stub, stub)  # type: ignore[arg-type]

    async def slow() -> AsyncIterator[pb.CreateComparisonRequest]:
        yield next(iter(upload(b"")))
        await asyncio.Event().wait()

    async def begin(tenant: str) -> None:
        call.current.set(call.Call(request_id="r", tenant=tenant))
        async for _ in uploads.receive(slow()):
            pass

    with closing(Database(tmp_path / "evaluation.db", SCHEMA)) as database:
        async with Comparisons(tmp_path, database, GatewayRunner(asked)) as comparisons:
            uploads = Uploads(tmp_path / "tmp", comparisons, asked, Prices(), "", MEBIBYTE)
            left: set[asyncio.Task[None]] = set()
            for tenant in ("b", "a"):
                tasks = [asyncio.create_task(begin(tenant)) for _ in range(3)]
                done, going = await asyncio.wait(
                    tasks, timeout=20, return_when=asyncio.FIRST_COMPLETED
                )
                left |= going
                assert [getattr(task.exception(), "reason", "") for task in done] == ["QUEUE_FULL"]
            for task in left:
                task.cancel()
            await asyncio.wait(left)


def peak() -> float:
    """Return the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def test_ten_thousand_questions_take_little_time_and_memory(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from tests import test_running;"
        " asyncio.run(test_running.ten_thousand(Path(sys.argv[1])))"
    )
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
    state, count, asked, seconds, mebibytes = json.loads(out)
    assert (state, count, asked) == ("finished", MANY, 2 * MANY)
    assert seconds < 40, "on a machine of which others want little"
    assert mebibytes < 400


SMALL_DISK = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"')


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_a_disk_too_full_for_the_report_fails_the_comparison_and_keeps_its_answers(
    stack: SmallStack, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    stack.tuning.open.clear()
    requests = disturbed(stack)
    requests[-2].chunk += b" " * 200_000  # which makes room once it is not needed any more
    async with process(stack, folder, (*SMALL_DISK, str(folder))) as child:
        async with connect(f"127.0.0.1:{await port_of(child)}", EVALUATION) as channel:
            evaluation = EvaluationServiceStub(channel)
            comparison, _ = await created(evaluation, requests)
            await stack.tuning.began.wait()  # the analysis has begun
            disk = Path(f"/proc/{child.pid}/root{folder}")
            with pytest.raises(OSError, match="No space left"):
                (disk / "full").write_bytes(bytes(4 * MEBIBYTE))
            stack.tuning.open.set()
            found = await ended(evaluation, comparison.id)
            assert (found.state, found.reason) == (FAILED, "STORE_FULL")
            answers = await answers_of(evaluation, comparison.id, 1000)
            assert once(answers) == 5 * COUNT + STALE
            left = {path.name for path in (disk / "comparisons" / comparison.id).iterdir()}
            assert not {name for name in left if name.startswith(("report", "outcome", "changed/"))}
            assert not {name for name in left if name.endswith(".part")}
