"""An evaluation service whose comparisons go as a test has written them down, and the policies."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1 import retrieval_pb2 as retrieval
from tworoads.v1 import tuning_pb2 as tuning
from tworoads.v1.evaluation_pb2_grpc import (
    EvaluationServiceServicer,
    add_EvaluationServiceServicer_to_server,
)
from tworoads.v1.retrieval_pb2_grpc import (
    RetrievalServiceServicer,
    add_RetrievalServiceServicer_to_server,
)

from services.runtime.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    NotReady,
    ServiceError,
    Unavailable,
)
from services.runtime.server import running
from services.runtime.settings import ServerSettings

ANSWERS = "tworoads.v1.AnswerService"
PAGE = 2
STEPS = 4


@dataclass
class Uploaded:
    """What came of an upload."""

    start: pb.CreateComparisonStart
    questions: bytes = b""
    largest: int = 0
    documents: list[tuple[retrieval.PutDocumentsDocument, bytes]] = field(default_factory=list)


class FakeEvaluation(EvaluationServiceServicer):
    """Takes any questions, and has all events of a comparison ready once it is created.

    `findings` are sent of the next uploads, which fail if one is an error. `refusals` fail the next
    uploads when they are complete. `ends` is the last state of new comparisons, `verdict` and
    `results` what comes of them. `breaks` cuts each of the next watches after so many events,
    `held_after` lets every one wait for ever after so many. `cuts` breaks off each of the next
    downloads after so many bytes, `altered` sends wrong ones.
    """

    def __init__(self) -> None:
        self.uploads: list[Uploaded] = []
        self.findings: list[tuning.DataFinding] = []
        self.refusals: list[ServiceError] = []
        self.ends = pb.COMPARISON_STATE_FINISHED
        self.candidates = [
            pb.Candidate(id="base", path=retrieval.PATH_BASE),
            pb.Candidate(id="rag", path=retrieval.PATH_RAG, corpus="handbook"),
        ]
        self.verdict = decided()
        self.results = [result("base", 0.25), result("rag", 0.75)]
        self.breaks: list[int] = []
        self.held_after: int | None = None
        self.watched: list[int] = []  # after which sequence
        self.events: dict[str, list[pb.WatchComparisonResponse]] = {}
        self.answers = [answer(1, "base", "I do not know."), answer(2, "rag", "27 days"), FAILED]
        self.content = b"<!doctype html>" + bytes(range(256)) * 400
        self.cuts: list[int] = []
        self.altered = False
        self.downloads: list[tuple[str, int, int]] = []  # comparison, format, offset

    async def CreateComparison(self, requests, context):
        upload = Uploaded(pb.CreateComparisonStart())
        self.uploads.append(upload)
        async for request in requests:
            match request.WhichOneof("part"):
                case "start":
                    upload.start = request.start
                    for finding in self.findings:
                        yield pb.CreateComparisonResponse(finding=finding)
                case "questions":
                    upload.questions += request.questions
                    upload.largest = max(upload.largest, len(request.questions))
                    lines = upload.questions.count(b"\n")
                    progress = tuning.CheckProgress(received=lines, checked=lines)
                    yield pb.CreateComparisonResponse(progress=progress)
                case "changed_document":
                    upload.documents.append((request.changed_document, b""))
                case "chunk":
                    upload.largest = max(upload.largest, len(request.chunk))
                    document, content = upload.documents[-1]
                    upload.documents[-1] = document, content + request.chunk
        if self.refusals:
            raise self.refusals.pop(0)
        if any(f.severity == tuning.FINDING_SEVERITY_ERROR for f in self.findings):
            raise InvalidInput("QUESTIONS_INVALID", "some questions are not in order")
        yield pb.CreateComparisonResponse(comparison=self.create(upload))

    def create(self, upload: Uploaded) -> pb.Comparison:
        """Write down how a comparison goes; return it as it is at first."""
        comparison = pb.Comparison(
            id=f"comparison-{len(self.events)}",
            state=pb.COMPARISON_STATE_QUEUED,
            start=upload.start,
            questions=upload.questions.count(b"\n"),
            clusters=3,
            changed_documents=len(upload.documents),
            model="tiny",
            prices=pb.Prices(currency="EUR", answering_second=0.01),
            author="default",
            create_time=Timestamp(seconds=1_800_000_000 + len(self.events)),
        )
        comparison.start.ClearField("idempotency_key")
        if not comparison.start.candidates:
            comparison.start.candidates.extend(self.candidates)
        queued = pb.Comparison.FromString(comparison.SerializeToString())
        events: list[pb.Comparison | pb.ComparisonProgress] = [queued]

        def then(state: pb.ComparisonState.ValueType, **fields: object) -> None:
            comparison.MergeFrom(pb.Comparison(state=state, **fields))
            events.append(pb.Comparison.FromString(comparison.SerializeToString()))

        then(pb.COMPARISON_STATE_RUNNING, start_time=Timestamp(seconds=1_800_000_100))
        for step in range(1, STEPS + 1):
            events.append(progress(comparison.start.candidates, step))
        comparison.progress.CopyFrom(events[-1])
        end = Timestamp(seconds=1_800_000_192)
        if self.ends == pb.COMPARISON_STATE_FAILED:
            message = "every candidate failed \x1b[2J"
            then(self.ends, end_time=end, reason="EVERY_CANDIDATE_FAILED", message=message)
        else:
            then(self.ends, end_time=end, results=self.results, verdict=self.verdict)
        self.events[comparison.id] = [
            pb.WatchComparisonResponse(sequence=sequence, **{_kind(event): event})
            for sequence, event in enumerate(events, 1)
        ]
        return queued

    async def WatchComparison(self, request, context):
        self.watched.append(request.after_sequence)
        count = self.breaks.pop(0) if self.breaks else None
        events = self._events(request.id)[request.after_sequence :]
        for number, event in enumerate(events):
            if number == count:
                raise Unavailable("STOPPING", "this replica stops")
            if request.after_sequence + number == self.held_after:
                await asyncio.Event().wait()
            yield event
            yield pb.WatchComparisonResponse(
                sequence=event.sequence, heartbeat=tuning.WatchHeartbeat()
            )

    async def GetComparison(self, request, context):
        return pb.GetComparisonResponse(comparison=self._comparison(request.id))

    async def ListComparisons(self, request, context):
        ids = list(reversed(self.events))
        start = int(request.page_token or 0)
        page = [self._comparison(id) for id in ids[start : start + PAGE]]
        more = str(start + PAGE) if start + PAGE < len(ids) else ""
        return pb.ListComparisonsResponse(comparisons=page, next_page_token=more)

    async def CancelComparison(self, request, context):
        events = self._events(request.id)
        if self.held_after is None:
            raise NotReady("COMPARISON_ENDED", "the comparison has ended already")
        cancelled = pb.Comparison.FromString(events[0].comparison.SerializeToString())
        cancelled.state = pb.COMPARISON_STATE_CANCELLED
        last = pb.WatchComparisonResponse(sequence=self.held_after + 1, comparison=cancelled)
        events[self.held_after :] = [last]
        return pb.CancelComparisonResponse(comparison=cancelled)

    async def ListAnswers(self, request, context):
        self._events(request.comparison)
        found = [
            answer
            for answer in self.answers
            if request.candidate in ("", answer.candidate)
            and request.phase in (pb.COMPARISON_PHASE_UNSPECIFIED, answer.phase)
        ]
        start = int(request.page_token or 0)
        more = str(start + PAGE) if start + PAGE < len(found) else ""
        return pb.ListAnswersResponse(answers=found[start : start + PAGE], next_page_token=more)

    async def DownloadReport(self, request, context):
        self.downloads.append((request.comparison, request.format, request.offset))
        if self._comparison(request.comparison).state != pb.COMPARISON_STATE_FINISHED:
            raise NotReady("COMPARISON_NOT_FINISHED", "there is no report yet")
        digest = hashlib.sha256(self.content).hexdigest()
        file = pb.ReportFile(media_type="text/html", size=len(self.content), sha256=digest)
        yield pb.DownloadReportResponse(file=file)
        content = b"?" + self.content[1:] if self.altered else self.content
        end = request.offset + self.cuts.pop(0) if self.cuts else None
        for start in range(request.offset, len(content[:end]), 10_000):
            data = content[start : min(start + 10_000, len(content[:end]))]
            chunk = tuning.DownloadChunk(offset=start, data=data)
            yield pb.DownloadReportResponse(chunk=chunk)
        if end is not None:
            raise Unavailable("STOPPING", "the download broke off")

    def _events(self, id: str) -> list[pb.WatchComparisonResponse]:
        if id not in self.events:
            raise NotFound("COMPARISON_NOT_FOUND", f"there is no comparison {id!r}")
        return self.events[id]

    def _comparison(self, id: str) -> pb.Comparison:
        """The comparison as its last event, up to where it is held, left it."""
        events = self._events(id)[: self.held_after]
        return [event.comparison for event in events if event.HasField("comparison")][-1]


class FakePolicies(RetrievalServiceServicer):
    """Keeps policies as they are set; the corpora are "handbook" and "other"."""

    def __init__(self) -> None:
        self.kept: dict[str, retrieval.Policy] = {}

    async def SetPolicy(self, request, context):
        if request.corpus not in ("handbook", "other"):
            raise NotFound("CORPUS_NOT_FOUND", f"there is no corpus {request.corpus!r}")
        before = self.kept.get(request.corpus)
        if request.etag and (before is None or before.etag != request.etag):
            raise Conflict("ETAG_MISMATCH", "the policy has changed")
        policy = retrieval.Policy(
            corpus=request.corpus,
            path=request.path,
            adapter=request.adapter,
            comparison=request.comparison,
            author="default",
            update_time=Timestamp(seconds=1_800_000_300),
            etag=f"{before.etag}+" if before else "etag",
            types=request.types,
        )
        if request.HasField("router"):
            policy.router.CopyFrom(request.router)
        self.kept[request.corpus] = policy
        return retrieval.SetPolicyResponse(policy=policy)

    async def GetPolicy(self, request, context):
        if request.corpus not in self.kept:
            raise NotFound("POLICY_NOT_FOUND", "this corpus has no policy")
        return retrieval.GetPolicyResponse(policy=self.kept[request.corpus])

    async def ListPolicies(self, request, context):
        names = sorted(self.kept)
        start = int(request.page_token or 0)
        more = str(start + 1) if start + 1 < len(names) else ""
        page = [self.kept[name] for name in names[start : start + 1]]
        return retrieval.ListPoliciesResponse(policies=page, next_page_token=more)


@dataclass
class Serving:
    """Both fakes at one address."""

    address: str
    evaluation: FakeEvaluation
    policies: FakePolicies


@asynccontextmanager
async def serving() -> AsyncIterator[Serving]:
    """Serve the fakes while the block runs, as the gateway would."""
    evaluation, policies = FakeEvaluation(), FakePolicies()
    names = [ANSWERS, "tworoads.v1.EvaluationService", "tworoads.v1.RetrievalService"]
    async with running(ServerSettings(grace_seconds=0), names) as server:
        await server.serve(
            lambda s: add_EvaluationServiceServicer_to_server(evaluation, s),
            lambda s: add_RetrievalServiceServicer_to_server(policies, s),
        )
        yield Serving(f"127.0.0.1:{server.port}", evaluation, policies)


def progress(candidates: list[pb.Candidate], step: int) -> pb.ComparisonProgress:
    return pb.ComparisonProgress(
        phase=pb.COMPARISON_PHASE_ANSWERS if step < STEPS else pb.COMPARISON_PHASE_ANALYSIS,
        seconds_left=80 - 20 * step,
        candidates=[
            pb.CandidateProgress(
                candidate=candidate.id,
                done=step * 3,
                total=3 * STEPS,
                failed=step // STEPS,
                seconds_left=40 - 10 * step,
                strict=0.25 * number,
                format_blind=0.5 + 0.25 * number,
            )
            for number, candidate in enumerate(candidates)
        ],
    )


def estimate(value: float) -> pb.Estimate:
    return pb.Estimate(value=value, low=value - 0.125, high=value + 0.125)


def result(candidate: str, score: float) -> pb.CandidateResult:
    return pb.CandidateResult(
        candidate=candidate,
        scores=pb.Scores(answers=12, strict=estimate(score - 0.125), format_blind=estimate(score)),
        warm=pb.Latency(answers=8, concurrency=4, total_p50_ms=600, total_p95_ms=1234.5),
        cost_per_thousand=0.125,
        cost_per_correct=0.0005,
        errors={"GENERATION_UNAVAILABLE": 1} if candidate == "rag" else {},
        failures=[pb.FailureShare(kind=pb.FAILURE_KIND_READING_FAILURE, answers=3, examples=[2])],
    )


def decided(**fields: object) -> pb.Verdict:
    """A verdict for RAG."""
    verdict = {
        "path": retrieval.PATH_RAG,
        "candidate": "rag",
        "summary": "Take RAG: it answers 50 points more questions than the model alone.",
        "reasons": [
            pb.VerdictReason(
                code=pb.VERDICT_CODE_KNOWLEDGE_GAP, message="9 of 12 need the documents."
            )
        ],
        "would_change": ["A price of 2 EUR for 1,000 answers."],
        "unknown": ["Whether the questions are like those of users."],
    }
    return pb.Verdict(**{**verdict, **fields})


def undecided() -> pb.Verdict:
    """A verdict of too few questions."""
    return pb.Verdict(
        summary="There is not enough evidence.",
        reasons=[
            pb.VerdictReason(
                code=pb.VERDICT_CODE_NOT_ENOUGH_EVIDENCE, message="12 questions are too few."
            )
        ],
        questions_needed=1288,
    )


def router() -> retrieval.Router:
    return retrieval.Router(
        embedder_hash="fake-1",
        classes=[
            retrieval.RouterClass(type="label", weights=[0.5, -1.0], bias=0.25),
            retrieval.RouterClass(type="fact", weights=[-0.5, 1.0]),
        ],
    )


def answer(sequence: int, candidate: str, text: str) -> pb.ComparisonAnswer:
    """What a candidate answered to the first question: right if it is "27 days"."""
    right = text == "27 days"
    kept = pb.ComparisonAnswer(
        sequence=sequence,
        candidate=candidate,
        phase=pb.COMPARISON_PHASE_ANSWERS,
        line=1,
        question="How many days of leave?",
        right_answers=["27 days", "27"],
        text=text,
        first_text_ms=100,
        total_ms=600,
        strict=float(right),
        format_blind=float(right),
        failure=pb.FAILURE_KIND_UNSPECIFIED if right else pb.FAILURE_KIND_KNOWLEDGE_GAP,
        time=Timestamp(seconds=1_800_000_110),
    )
    kept.started.path = retrieval.PATH_RAG
    kept.started.reason = "ASKED"
    kept.citations.add(answer_end=7, document_id="leave.md", quote="27 days")
    kept.finished.output_tokens = 5
    return kept


FAILED = pb.ComparisonAnswer(
    sequence=3,
    candidate="rag",
    phase=pb.COMPARISON_PHASE_ORACLE,
    line=2,
    question="Who?\x1b[2J",
    text="half an",
    error="GENERATION_UNAVAILABLE",
)


def _kind(event: pb.Comparison | pb.ComparisonProgress) -> str:
    return "comparison" if isinstance(event, pb.Comparison) else "progress"
