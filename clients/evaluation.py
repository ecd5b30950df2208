"""The client's methods for comparing the paths, and for the policies that come of it."""

import asyncio
import hashlib
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict, ParseError
from tworoads.v1 import answer_pb2
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1 import retrieval_pb2 as retrieval
from tworoads.v1.evaluation_pb2_grpc import EvaluationServiceStub
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from clients import files
from clients.applying import hindrance
from clients.comparisons import (
    Candidate,
    Comparison,
    ComparisonAnswer,
    ComparisonEvent,
    ComparisonPath,
    Constraints,
    Phase,
    ReportFormat,
    Scoring,
    answer_of,
    event_of_watch,
    news_of_check,
)
from clients.documents import Ingested, NewDocument, header_of
from clients.errors import TworoadsError, translated
from clients.files import FileError
from clients.jobs import CheckProgress, Finding
from clients.messages import plain
from clients.policies import Policy, Router, TypePath, policy_of, router_message
from clients.streams import resumed, sent
from clients.uploads import CHUNK, Source, can_be_read_again, chunks

PAGE = 500
SECONDS = 60.0
FORMATS: dict[str, ReportFormat] = {".html": "html", ".md": "markdown", ".json": "json"}

Changed = Iterable[NewDocument | Ingested | str | Path]
"""Documents as they become: values, or files and folders of them as `tworoads ingest` takes."""


class EvaluationMethods:
    """What a Client does with comparisons and policies.

    The methods raise TworoadsError, and FileError for a file that cannot be used.
    """

    address: str
    _evaluation: EvaluationServiceStub
    _retrieval: RetrievalServiceStub

    async def create_comparison(
        self,
        questions: Source,
        corpus: str = "",
        adapters: Sequence[str] = (),
        *,
        candidates: Sequence[Candidate] = (),
        changed: Changed = (),
        examples: Sequence[tuple[str, str]] = (),
        shots: int | None = None,
        scoring: Scoring | None = None,
        constraints: Constraints | None = None,
        concurrency: int = 0,
        margin: float | None = None,
        seed: int | None = None,
        idempotency_key: str = "",
    ) -> AsyncIterator[Finding | CheckProgress | Comparison]:
        """Queue a comparison; yield what the check finds, and the comparison last.

        `questions` are JSON Lines. Without `candidates`, BASE, few-shot BASE, RAG if there is a
        corpus, and TUNED and HYBRID for each adapter are compared. `examples` are pairs of question
        and answer for few-shot BASE; `changed` replaces documents half-way. What is left out is
        chosen by the service. What can be read again is sent again if the connection breaks, under
        a key that makes one comparison of it.
        """
        told: set[Finding] = set()
        again = can_be_read_again(questions) and iter(changed) is not changed
        with translated(self.address):
            start = pb.CreateComparisonStart(
                corpus=corpus,
                adapters=adapters,
                candidates=[_candidate(candidate) for candidate in candidates],
                examples=[answer_pb2.Turn(question=asked, answer=said) for asked, said in examples],
                shots=shots,
                scoring=_scoring(scoring) if scoring else None,
                constraints=pb.Constraints(**vars(constraints)) if constraints else None,
                concurrency=concurrency,
                margin=margin,
                seed=seed,
                idempotency_key=idempotency_key or uuid.uuid4().hex,
            )

            def requests() -> AsyncIterator[pb.CreateComparisonRequest]:
                return _create_requests(start, questions, changed)

            method = self._evaluation.CreateComparison
            async with aclosing(sent(method, requests, again)) as responses:
                async for response in responses:
                    news = news_of_check(response)
                    if isinstance(news, Finding):
                        if news in told:
                            continue
                        told.add(news)
                    if news:
                        yield news

    async def compare(self, questions: Source, *arguments: Any, **options: Any) -> Comparison:
        """Compare the paths and return the comparison when it has ended, whichever way.

        The arguments are those of `create_comparison`. Leaving early does not stop the comparison.
        """
        async for news in self.create_comparison(questions, *arguments, **options):
            if isinstance(news, Comparison):
                async for _ in self.watch_comparison(news.id):
                    pass
                return await self.comparison(news.id)
        raise AssertionError("a check ends with a comparison or an error")

    async def comparison(self, id: str) -> Comparison:
        """Return a comparison."""
        with translated(self.address):
            response = await self._evaluation.GetComparison(
                pb.GetComparisonRequest(id=id), timeout=SECONDS
            )
        return plain(Comparison, response.comparison)

    async def comparisons(self) -> list[Comparison]:
        """Return all comparisons, the newest first, without what was measured."""
        found: list[Comparison] = []
        token = ""
        with translated(self.address):
            while True:
                response = await self._evaluation.ListComparisons(
                    pb.ListComparisonsRequest(page_size=PAGE, page_token=token), timeout=SECONDS
                )
                found += [plain(Comparison, comparison) for comparison in response.comparisons]
                token = response.next_page_token
                if not token:
                    return found

    async def watch_comparison(
        self, id: str, after_sequence: int = 0
    ) -> AsyncIterator[ComparisonEvent]:
        """Yield what happens to a comparison, from its beginning or after an event, to its end.

        Goes on where it was if the connection breaks. Leaving the loop does not stop the
        comparison.
        """
        last = after_sequence

        def watch() -> Any:
            return self._evaluation.WatchComparison(
                pb.WatchComparisonRequest(id=id, after_sequence=last)
            )

        with translated(self.address):
            async with aclosing(resumed(watch)) as responses:
                async for response in responses:
                    event = event_of_watch(response)
                    if event:
                        last = event.sequence
                        yield event

    async def cancel_comparison(self, id: str) -> Comparison:
        """Stop a comparison; its answers are kept."""
        with translated(self.address):
            response = await self._evaluation.CancelComparison(
                pb.CancelComparisonRequest(id=id), timeout=SECONDS
            )
        return plain(Comparison, response.comparison)

    async def comparison_answers(
        self, id: str, candidate: str = "", phase: Phase | None = None
    ) -> AsyncIterator[ComparisonAnswer]:
        """Yield every answer of a comparison so far, or those of a candidate or a phase."""
        token = ""
        asked = pb.ComparisonPhase.Value(f"COMPARISON_PHASE_{(phase or 'unspecified').upper()}")
        with translated(self.address):
            while True:
                response = await self._evaluation.ListAnswers(
                    pb.ListAnswersRequest(
                        comparison=id,
                        candidate=candidate,
                        phase=asked,
                        page_size=PAGE,
                        page_token=token,
                    ),
                    timeout=SECONDS,
                )
                for answer in response.answers:
                    yield answer_of(answer)
                token = response.next_page_token
                if not token:
                    return

    async def report(self, id: str, format: ReportFormat = "html") -> bytes:
        """Return the report of a finished comparison; its hash is checked.

        Goes on where it was if the connection breaks.
        """
        content, file = bytearray(), pb.ReportFile()

        def download() -> Any:
            return self._evaluation.DownloadReport(
                pb.DownloadReportRequest(
                    comparison=id,
                    format=pb.ReportFormat.Value(f"REPORT_FORMAT_{format.upper()}"),
                    offset=len(content),
                )
            )

        with translated(self.address):
            async with aclosing(resumed(download)) as responses:
                async for response in responses:
                    if response.HasField("file"):
                        file = response.file
                    else:
                        content += response.chunk.data
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise FileError("the report did not arrive as it was sent: download it again")
        return bytes(content)

    async def download_report(
        self, id: str, file: str | Path, format: ReportFormat | None = None
    ) -> None:
        """Write the report of a finished comparison; the format is that of the file's name, else
        HTML. An older file of this name is replaced."""
        path = Path(file)
        content = await self.report(id, format or FORMATS.get(path.suffix.lower(), "html"))
        try:
            await asyncio.to_thread(_write, path, content)
        except OSError as error:
            raise FileError(f"cannot write to {path}: {error.strerror}") from error

    async def policies(self) -> list[Policy]:
        """Return all policies by the names of their corpora."""
        found: list[Policy] = []
        token = ""
        with translated(self.address):
            while True:
                response = await self._retrieval.ListPolicies(
                    retrieval.ListPoliciesRequest(page_size=PAGE, page_token=token),
                    timeout=SECONDS,
                )
                found += map(policy_of, response.policies)
                token = response.next_page_token
                if not token:
                    return found

    async def policy(self, corpus: str) -> Policy:
        """Return the policy of a corpus: which path AUTO takes for it."""
        with translated(self.address):
            response = await self._retrieval.GetPolicy(
                retrieval.GetPolicyRequest(corpus=corpus), timeout=SECONDS
            )
        return policy_of(response.policy)

    async def set_policy(
        self,
        corpus: str,
        path: ComparisonPath,
        adapter: str = "",
        *,
        comparison: str = "",
        types: Sequence[TypePath] = (),
        router: Router | None = None,
        etag: str = "",
    ) -> Policy:
        """Let AUTO take a path for a corpus, and others for `types`, which `router` tells apart.

        `comparison` is what proves it; with `etag`, only if the policy is still as it was seen.
        """
        with translated(self.address):
            request = retrieval.SetPolicyRequest(
                corpus=corpus,
                path=_path(path),
                adapter=adapter,
                comparison=comparison,
                types=[
                    retrieval.TypePath(type=one.type, path=_path(one.path), adapter=one.adapter)
                    for one in types
                ],
                router=router_message(router) if router else None,
                etag=etag,
            )
            response = await self._retrieval.SetPolicy(request, timeout=SECONDS)
        return policy_of(response.policy)

    async def apply(self, comparison: Comparison | str, etag: str = "") -> Policy:
        """Let AUTO follow the verdict of a comparison, by type of question if a router is worth it.

        Raises TworoadsError with COMPARISON_NOT_FINISHED, VERDICT_OPEN if it names no candidate, or
        POLICY_IMPOSSIBLE if a policy cannot say what the candidate does, such as few-shot examples.
        """
        if isinstance(comparison, str):
            comparison = await self.comparison(comparison)
        reason, message = hindrance(comparison)
        if reason:
            raise TworoadsError(grpc.StatusCode.FAILED_PRECONDITION, reason, message)
        verdict = comparison.verdict
        assert verdict  # or there is a hindrance
        types = verdict.types if verdict.router else ()
        return await self.set_policy(
            comparison.start.corpus,
            verdict.path,  # type: ignore[arg-type]
            verdict.adapter,
            comparison=comparison.id,
            types=[TypePath(one.type, one.path, one.adapter) for one in types],
            router=verdict.router if types else None,
            etag=etag,
        )


def _path(path: str) -> retrieval.Path.ValueType:
    return retrieval.Path.Value(f"PATH_{path.upper()}")


def _scorer(name: str) -> pb.Scorer.ValueType:
    return pb.Scorer.Value(f"SCORER_{(name or 'unspecified').upper()}")


def _scoring(scoring: Scoring) -> pb.ScoringOptions:
    return pb.ScoringOptions(
        strict=_scorer(scoring.strict),
        format_blind=_scorer(scoring.format_blind),
        numeric_tolerance=scoring.numeric_tolerance,
        judge=scoring.judge,
        strict_decides=scoring.strict_decides,
    )


def _candidate(candidate: Candidate) -> pb.Candidate:
    try:
        options = ParseDict(dict(candidate.options), answer_pb2.AnswerOptions())
    except ParseError as error:
        raise TworoadsError(
            grpc.StatusCode.INVALID_ARGUMENT, "CANDIDATE_INVALID", f"{candidate.id}: {error}"
        ) from error
    return pb.Candidate(
        id=candidate.id,
        path=_path(candidate.path),
        adapter=candidate.adapter,
        corpus=candidate.corpus,
        options=options,
    )


async def _create_requests(
    start: pb.CreateComparisonStart, questions: Source, changed: Changed
) -> AsyncIterator[pb.CreateComparisonRequest]:
    yield pb.CreateComparisonRequest(start=start)
    async for chunk in chunks(questions):
        yield pb.CreateComparisonRequest(questions=chunk)
    documents = _documents(changed)
    while (document := await asyncio.to_thread(next, documents, None)) is not None:
        if isinstance(document, Ingested):
            raise FileError(f"cannot use {document.id}: {document.message}")
        try:
            header = header_of(document)
        except (TypeError, ValueError, AttributeError) as error:
            raise FileError(f"cannot use {document.id}: {error}") from error
        yield pb.CreateComparisonRequest(changed_document=header)
        for at in range(0, len(document.content), CHUNK):
            yield pb.CreateComparisonRequest(chunk=document.content[at : at + CHUNK])
    yield pb.CreateComparisonRequest(end=pb.CreateComparisonEnd())


def _documents(changed: Changed) -> Iterator[NewDocument | Ingested]:
    paths = []
    for item in changed:
        if isinstance(item, str | Path):
            paths.append(Path(item))
        else:
            yield item
    yield from files.documents(files.find(paths))


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".report-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
