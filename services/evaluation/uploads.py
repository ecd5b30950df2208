"""The upload that creates a comparison: checked while it comes in, kept only if it is in order."""

import asyncio
import hashlib
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1 import retrieval_pb2

from services.evaluation import checks
from services.evaluation.asking import Gateway
from services.evaluation.comparison import CHANGED, QUESTIONS, Comparison, Prices
from services.evaluation.comparisons import Comparisons
from services.evaluation.messages import comparison_message
from services.evaluation.planning import Planner
from services.evaluation.questions import QuestionFile
from services.evaluation.scoring import check_patterns
from services.questions.lines import Finding
from services.questions.news import News
from services.runtime.call import author, tenant
from services.runtime.disk import space
from services.runtime.errors import InvalidInput, NotReady, Overloaded
from services.runtime.threads import in_thread

MEBIBYTE = 1024 * 1024
MOST_CHUNK = MEBIBYTE
MOST_DOCUMENTS = 10_000
MOST_ID = 512  # code points
AT_ONCE = 4  # uploads, each of which holds its questions in memory
OF_TENANT = 2  # of them: slow ones of one tenant must not keep the others out


class Uploads:
    """Takes uploads of at most `most_bytes` bytes for `comparisons`; half-made ones lie in `tmp`,
    on the file system of the comparisons. `judge` is the judge's model, empty without one."""

    def __init__(
        self,
        tmp: Path,
        comparisons: Comparisons,
        gateway: Gateway,
        prices: Prices,
        judge: str,
        most_bytes: int,
    ) -> None:
        shutil.rmtree(tmp, ignore_errors=True)
        self._tmp = tmp
        self._comparisons = comparisons
        self._planner = Planner(gateway)
        self._prices = prices
        self._judge = judge
        self._most_bytes = most_bytes
        self._running = Counter[str]()  # by tenant

    async def receive(
        self, requests: AsyncIterator[pb.CreateComparisonRequest]
    ) -> AsyncGenerator[pb.CreateComparisonResponse, None]:
        """Yield what is found in an upload while it comes in, how far that has come, and the
        comparison. Raises what the proto says of CreateComparison."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "start":
            raise InvalidInput("START_MISSING", "the first message says what to compare")
        start = checks.start(first.start)
        if start.scoring[3] and not self._judge:
            raise NotReady("JUDGE_MISSING", "the operator has set up no judge")
        store = self._comparisons.store
        if not await in_thread(store.known, tenant(), start.idempotency_key):
            await self._comparisons.room(tenant())
        mine = tenant()
        if self._running.total() >= AT_ONCE or self._running[mine] >= OF_TENANT:
            raise Overloaded("QUEUE_FULL", "too many uploads are under way; try again later")
        self._running[mine] += 1
        folder = self._tmp / uuid.uuid4().hex
        try:
            asked = hashlib.sha256(first.start.SerializeToString(deterministic=True))
            upload = _Upload(folder, self._most_bytes, asked.digest())
            work = asyncio.create_task(self._work(upload, start, requests))
            try:
                async for fields in upload.news.until(work):
                    yield pb.CreateComparisonResponse(**fields)
                made = comparison_message(await work)
                yield pb.CreateComparisonResponse(comparison=made)
            finally:
                work.cancel()
                await asyncio.wait([work])
                upload.close()
                await in_thread(shutil.rmtree, folder, True)
        finally:
            self._running -= Counter([mine])  # what comes to zero goes

    async def _work(
        self,
        upload: "_Upload",
        start: checks.Start,
        requests: AsyncIterator[pb.CreateComparisonRequest],
    ) -> Comparison:
        with space():
            await in_thread(upload.open)
            async for request in requests:
                await in_thread(upload.add, request)
            await in_thread(upload.end)
        key, upload_hash = start.idempotency_key, upload.hash
        if before := await in_thread(self._comparisons.store.same, tenant(), key, upload_hash):
            return before
        if upload.documents and not start.corpus:
            raise InvalidInput("CORPUS_MISSING", "changed documents belong to a corpus")
        start = await self._planner.resolved(start)
        questions = upload.questions.questions
        plan = await self._planner.plan(start, questions)
        if plan.scoring.strict == "regex":
            upload.found(await in_thread(check_patterns, questions))
            upload.refuse_errors()
        # Late, for scipy is half a second that only this and the analysis need.
        from services.evaluation.statistics import clusters_of

        scored = [question for question in questions if question.line not in set(plan.unscored)]
        comparison = Comparison(
            id=uuid.uuid4().hex,
            tenant=tenant(),
            state="queued",
            plan=plan,
            questions=len(scored),
            clusters=len(set((await in_thread(clusters_of, scored)).tolist())),
            questions_hash=upload.questions.hash,
            created=time.time(),
            author=author(),
            changed_documents=upload.documents,
            judge=self._judge if plan.scoring.judge else "",
            prices=self._prices,
        )
        added, _ = await self._comparisons.add(comparison, upload.folder, key, upload_hash)
        return added


class _Upload:
    """One upload: its files in `folder`, its questions checked, what was found in `news`.

    `open`, `add` and `end` block, and come from one thread at a time.
    """

    def __init__(self, folder: Path, most_bytes: int, asked: bytes) -> None:
        self.folder = folder
        self.questions = QuestionFile()
        self.documents = 0
        self.news = News(lambda: self.progress)
        self._left = most_bytes
        self._most_bytes = most_bytes
        self._ids: set[str] = set()
        self._file: BinaryIO | None = None
        self._ended = self._errors = False
        self._hash = hashlib.sha256(asked)

    @property
    def hash(self) -> str:
        """What tells one upload from another."""
        return self._hash.hexdigest()

    @property
    def progress(self) -> tuple[int, int]:
        """Lines received and lines checked."""
        return self.questions.received, self.questions.checked

    def open(self) -> None:
        self.folder.mkdir(parents=True)
        self._file = (self.folder / QUESTIONS).open("wb")

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # what could not be written has been reported
                self._file.close()

    def add(self, request: pb.CreateComparisonRequest) -> None:
        part = request.WhichOneof("part")
        if self._ended or (part == "chunk" and not self.documents):
            part = None
        match part:
            case "questions" if not self.documents:
                self._write(request.questions)
                self.found(self.questions.feed(request.questions))
            case "changed_document":
                self._begin(request.changed_document)
            case "chunk":
                self._write(request.chunk)
            case "end":
                self._ended = True
            case _:
                raise InvalidInput(
                    "PART_OUT_OF_ORDER",
                    "after `start` come the questions, then each changed document and its chunks,"
                    " then `end`",
                )

    def end(self) -> None:
        """Check what only the whole upload shows."""
        if not self._ended:
            raise InvalidInput("END_MISSING", "the upload broke off: it ends with `end`")
        if not self.documents:
            self._end_questions()
        self._sync()
        self.refuse_errors()

    def found(self, findings: list[Finding]) -> None:
        self._errors = self._errors or any(finding.severity == "error" for finding in findings)
        self.news.found(findings)

    def refuse_errors(self) -> None:
        """Raise InvalidInput (QUESTIONS_INVALID) if an error was found."""
        if self._errors:
            raise InvalidInput("QUESTIONS_INVALID", "some lines of the questions are not in order")

    def _begin(self, document: retrieval_pb2.PutDocumentsDocument) -> None:
        if not self.documents:
            self._end_questions()
            (self.folder / CHANGED).mkdir()
        if not 0 < len(document.id) <= MOST_ID or not document.media_type:
            raise InvalidInput("DOCUMENT_INVALID", "a changed document has an id and a media type")
        if document.id in self._ids:
            raise InvalidInput("DOCUMENT_INVALID", f"{document.id!r} was sent twice")
        if self.documents == MOST_DOCUMENTS:
            raise InvalidInput("TOO_MANY_DOCUMENTS", f"at most {MOST_DOCUMENTS} may change")
        self._ids.add(document.id)
        self._sync()
        self.documents += 1
        header = document.SerializeToString(deterministic=True)
        self._take(header)
        folder = self.folder / CHANGED
        (folder / f"{self.documents}.document").write_bytes(header)
        self._file = (folder / f"{self.documents}.content").open("wb")

    def _end_questions(self) -> None:
        self.found(self.questions.close())

    def _write(self, chunk: bytes) -> None:
        if len(chunk) > MOST_CHUNK:
            raise InvalidInput("CHUNK_TOO_LARGE", "a chunk has at most 1 MiB")
        self._take(chunk)
        assert self._file
        self._file.write(chunk)

    def _take(self, part: bytes) -> None:
        self._left -= len(part)
        if self._left < 0:
            most = self._most_bytes // MEBIBYTE
            raise InvalidInput("UPLOAD_TOO_LARGE", f"an upload has at most {most} MiB")
        self._hash.update(part)

    def _sync(self) -> None:
        assert self._file
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
