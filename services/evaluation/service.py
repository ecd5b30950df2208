"""EvaluationService: checks the request, asks, fills the response."""

import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from functools import lru_cache
from pathlib import Path

import grpc
from pydantic import TypeAdapter
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1 import evaluation_pb2_grpc as pb_grpc
from tworoads.v1 import tuning_pb2

from services.evaluation import answers, checks
from services.evaluation.comparison import ANSWERS, OUTCOME, REPORT, Comparison, Progress
from services.evaluation.comparisons import Comparisons
from services.evaluation.messages import comparison_message, progress_message, timestamp
from services.evaluation.outcome import FailureKind, Outcome
from services.evaluation.uploads import Uploads
from services.runtime import disk
from services.runtime.call import tenant
from services.runtime.errors import InvalidInput, NotFound, NotReady
from services.runtime.threads import in_thread
from services.runtime.work import Event

OUTCOMES = TypeAdapter(Outcome)
OPENED = 4  # comparisons whose outcome is kept for the next page of their answers
FORMATS = {
    pb.REPORT_FORMAT_HTML: ("html", "text/html; charset=utf-8"),
    pb.REPORT_FORMAT_MARKDOWN: ("md", "text/markdown; charset=utf-8"),
    pb.REPORT_FORMAT_JSON: ("json", "application/json"),
}
FAILURES: dict[FailureKind, pb.FailureKind.ValueType] = {
    "unspecified": pb.FAILURE_KIND_UNSPECIFIED,
    "knowledge_gap": pb.FAILURE_KIND_KNOWLEDGE_GAP,
    "retrieval_miss": pb.FAILURE_KIND_RETRIEVAL_MISS,
    "reading_failure": pb.FAILURE_KIND_READING_FAILURE,
    "behaviour_gap": pb.FAILURE_KIND_BEHAVIOUR_GAP,
}


class EvaluationService(pb_grpc.EvaluationServiceServicer):
    """Serves `comparisons`, which `uploads` creates."""

    def __init__(self, comparisons: Comparisons, uploads: Uploads) -> None:
        self._comparisons = comparisons
        self._uploads = uploads

    async def CreateComparison(
        self,
        request_iterator: AsyncIterator[pb.CreateComparisonRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.CreateComparisonResponse]:
        async with aclosing(self._uploads.receive(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def GetComparison(
        self, request: pb.GetComparisonRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetComparisonResponse:
        return pb.GetComparisonResponse(comparison=await self._whole(await self._get(request.id)))

    async def WatchComparison(
        self, request: pb.WatchComparisonRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchComparisonResponse]:
        last = request.after_sequence
        watched = self._comparisons.watch(tenant(), request.id, last)
        async with aclosing(watched) as events:
            async for event in events:
                if event is None:
                    now = timestamp(time.time())
                    yield pb.WatchComparisonResponse(
                        sequence=last, time=now, heartbeat=tuning_pb2.WatchHeartbeat()
                    )
                else:
                    last = event.sequence
                    yield await self._event(event)

    async def CancelComparison(
        self, request: pb.CancelComparisonRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelComparisonResponse:
        comparison = await self._comparisons.cancel(tenant(), request.id)
        return pb.CancelComparisonResponse(comparison=comparison_message(comparison))

    async def ListComparisons(
        self, request: pb.ListComparisonsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListComparisonsResponse:
        size = checks.page_size(request.page_size)
        before = checks.number_of(request.page_token, checks.MOST_NUMBER)
        store = self._comparisons.store
        found = await in_thread(store.page, tenant(), before, size + 1)
        response = pb.ListComparisonsResponse(
            comparisons=[comparison_message(comparison) for _, comparison, _ in found[:size]],
            next_page_token=checks.page_token(found[size - 1][0]) if len(found) > size else "",
        )
        for comparison in response.comparisons:
            del comparison.start.examples[:]
        return response

    async def ListAnswers(
        self, request: pb.ListAnswersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAnswersResponse:
        size = checks.page_size(request.page_size)
        after = checks.number_of(request.page_token, 0)
        if request.phase not in pb.ComparisonPhase.values():
            raise InvalidInput("PHASE_UNKNOWN", "there is no such phase")
        comparison = await self._get(request.comparison)
        known = {candidate.id for candidate in comparison.plan.candidates}
        if request.candidate and request.candidate not in known:
            raise NotFound("CANDIDATE_NOT_FOUND", f"there is no candidate {request.candidate!r}")
        path = self._comparisons.folder_of(comparison) / ANSWERS
        found, more = await in_thread(
            answers.page, path, after, request.candidate, request.phase, size
        )
        kinds = await self._kinds(comparison)
        for answer in found:
            answer.failure = FAILURES[kinds.get(answer.sequence, "unspecified")]
        token = checks.page_token(found[-1].sequence) if more else ""
        return pb.ListAnswersResponse(answers=found, next_page_token=token)

    async def DownloadReport(
        self, request: pb.DownloadReportRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DownloadReportResponse]:
        if request.format not in FORMATS:
            raise InvalidInput("FORMAT_UNKNOWN", "a report is HTML, Markdown or JSON")
        suffix, media_type = FORMATS[request.format]
        comparison = await self._get(request.comparison)
        if comparison.state != "finished":
            raise NotReady("COMPARISON_NOT_FINISHED", f"the comparison is {comparison.state}")
        path = self._comparisons.folder_of(comparison) / f"{REPORT}.{suffix}"
        content = await in_thread(Path.read_bytes, path)
        if request.offset > len(content):
            raise InvalidInput("OFFSET_OUT_OF_RANGE", f"the report has {len(content)} bytes")
        file = pb.ReportFile(
            media_type=media_type,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        yield pb.DownloadReportResponse(file=file)
        for at in range(request.offset, len(content), disk.BLOCK):
            chunk = tuning_pb2.DownloadChunk(offset=at, data=content[at : at + disk.BLOCK])
            yield pb.DownloadReportResponse(chunk=chunk)

    async def _get(self, id: str) -> Comparison:
        comparison, _ = await in_thread(self._comparisons.store.get, tenant(), id)
        return comparison

    async def _outcome(self, comparison: Comparison) -> Outcome | None:
        if comparison.state != "finished":
            return None
        return await in_thread(_read, self._comparisons.folder_of(comparison) / OUTCOME)

    async def _kinds(self, comparison: Comparison) -> Mapping[int, FailureKind]:
        if comparison.state != "finished":
            return {}
        return await in_thread(_kinds, self._comparisons.folder_of(comparison) / OUTCOME)

    async def _whole(self, comparison: Comparison) -> pb.Comparison:
        return comparison_message(comparison, await self._outcome(comparison))

    async def _event(self, event: Event[Comparison, Progress]) -> pb.WatchComparisonResponse:
        response = pb.WatchComparisonResponse(sequence=event.sequence, time=timestamp(event.time))
        if isinstance(event.value, Comparison):
            response.comparison.CopyFrom(await self._whole(event.value))
        else:
            response.progress.CopyFrom(progress_message(event.value))
        return response


def _read(path: Path) -> Outcome:
    return OUTCOMES.validate_json(path.read_bytes())


@lru_cache(OPENED)
def _kinds(path: Path) -> Mapping[int, FailureKind]:
    """Return why each wrong answer of a finished comparison is wrong: that changes no more."""
    return _read(path).failure_of
