"""The upload that creates a job: checked while it comes in, and kept only if it is in order."""

import asyncio
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.prompts.rendering import Renderer
from services.prompts.words import DEFAULT_VERSION
from services.questions.news import News
from services.runtime import disk
from services.runtime.call import tenant
from services.runtime.errors import InvalidInput, Overloaded
from services.runtime.threads import in_thread
from services.tuning import checks
from services.tuning.adapters.base_model import BaseModel
from services.tuning.data import examples
from services.tuning.data.examples import Examples, Finding, Questions
from services.tuning.data.preparing import check_references
from services.tuning.job import Job
from services.tuning.jobs import Jobs
from services.tuning.messages import job_message

MEBIBYTE = 1024 * 1024
MOST_CHUNK = MEBIBYTE
AT_ONCE = 4  # uploads, each of which holds its examples in memory
OF_TENANT = 2  # of them: slow ones of one tenant must not keep the others out


class Uploads:
    """Takes uploads of at most `most_bytes` bytes for `jobs`; half-made ones lie in `tmp`."""

    def __init__(
        self,
        tmp: Path,
        jobs: Jobs,
        base: BaseModel,
        renderer: Renderer,
        retrieval: RetrievalServiceStub,
        max_rank: int,
        gpu: bool,
        most_bytes: int,
    ) -> None:
        self._tmp = tmp
        self._jobs = jobs
        self._base = base
        self._renderer = renderer
        self._retrieval = retrieval
        self._max_rank = max_rank
        self._gpu = gpu
        self._most_bytes = most_bytes
        self._running: Counter[str] = Counter()

    async def receive(
        self, requests: AsyncIterator[pb.CreateJobRequest]
    ) -> AsyncGenerator[pb.CreateJobResponse, None]:
        """Yield what is found in an upload while it comes in, how far that has come, and the job.

        Raises what the proto says of CreateJob.
        """
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "start":
            raise InvalidInput("START_MISSING", "the first message says what to train")
        start = checks.start(first.start, self._base, self._max_rank, self._gpu)
        if not await in_thread(self._jobs.store.known, tenant(), start.idempotency_key):
            await self._jobs.room(tenant())
            await self._jobs.space(tenant())
        mine = tenant()
        if self._running.total() >= AT_ONCE or self._running[mine] >= OF_TENANT:
            raise Overloaded("QUEUE_FULL", "too many uploads are under way; try again later")
        self._running[mine] += 1
        folder = self._tmp / uuid.uuid4().hex
        try:
            upload = _Upload(folder, self._renderer, self._base.context_length, self._most_bytes)
            work = asyncio.create_task(self._work(upload, start, requests))
            try:
                async for fields in upload.news.until(work):
                    yield pb.CreateJobResponse(**fields)
                job, ahead = await work
                yield pb.CreateJobResponse(job=job_message(job, ahead))
            finally:
                work.cancel()
                await asyncio.wait([work])
                upload.close()
                await in_thread(shutil.rmtree, folder, True)
        finally:
            self._running[mine] -= 1

    async def _work(
        self, upload: "_Upload", start: checks.Start, requests: AsyncIterator[pb.CreateJobRequest]
    ) -> tuple[Job, int]:
        with disk.space():
            await in_thread(upload.open)
            ended = False
            async for request in requests:
                part = request.WhichOneof("part")
                if part == "end" and not ended:
                    ended = True
                elif part == "examples" and upload.questions is None and not ended:
                    await in_thread(upload.add_examples, _checked(request.examples))
                elif part == "questions" and not ended:
                    await in_thread(upload.add_questions, _checked(request.questions))
                else:
                    raise InvalidInput(
                        "PART_OUT_OF_ORDER",
                        "after `start` come the examples, then the questions, then `end`",
                    )
            if not ended:
                raise InvalidInput("END_MISSING", "the upload broke off: it ends with `end`")
            await in_thread(upload.end)
        upload_hash = _hash(start, upload)
        key = start.idempotency_key
        if before := await in_thread(self._jobs.store.same, tenant(), key, upload_hash):
            return await in_thread(self._jobs.store.get, tenant(), before.id)
        taken = upload.examples.examples
        context = start.options.context
        upload.found(await check_references(self._retrieval, taken, start.corpus, context))
        upload.refuse_errors()
        job = await in_thread(self._job, upload, start)
        return await self._jobs.add(job, upload.folder, key, upload_hash)

    def _job(self, upload: "_Upload", start: checks.Start) -> Job:
        options = start.options
        held_out = examples.held_out(upload.examples.examples, options.held_out_share, options.seed)
        return Job(
            id=uuid.uuid4().hex,
            tenant=tenant(),
            name=start.name,
            state="queued",
            base_model=self._base.id,
            base_model_hash=self._base.hash,
            corpus=start.corpus,
            options=options,
            prompt_version=DEFAULT_VERSION,
            data=examples.report(upload.examples, upload.questions, held_out),
            created=time.time(),
        )


class _Upload:
    """One upload: its examples in a file of `folder` and checked, what was found in `news`.

    `open`, `add_examples`, `add_questions` and `end` block, and come from one thread at a time.
    """

    def __init__(self, folder: Path, renderer: Renderer, length: int, most_bytes: int) -> None:
        self.folder = folder
        self.examples = Examples(renderer, length, DEFAULT_VERSION)
        self.questions: Questions | None = None
        self.news = News(lambda: self.progress)
        self._left = most_bytes
        self._most_bytes = most_bytes
        self._errors: set[str] = set()
        self._file: BinaryIO | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """Lines received and lines checked, of both files."""
        received, checked = self.examples.received, self.examples.checked
        if self.questions:
            received += self.questions.received
            checked += self.questions.checked
        return received, checked

    def open(self) -> None:
        self.folder.mkdir(parents=True)
        self._file = (self.folder / "examples.jsonl").open("wb")

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # what could not be written has been reported
                self._file.close()

    def add_examples(self, chunk: bytes) -> None:
        self._count(chunk)
        assert self._file
        self._file.write(chunk)
        self.found(self.examples.feed(chunk))

    def add_questions(self, chunk: bytes) -> None:
        self._count(chunk)
        if self.questions is None:
            self._end_examples()
            self.questions = Questions()
        self.found(self.questions.feed(chunk))

    def end(self) -> None:
        if self.questions is None:
            self._end_examples()
        else:
            self.found(self.questions.close())
        self.refuse_errors()

    def found(self, findings: list[Finding]) -> None:
        for finding in findings:
            if finding.severity == "error":
                self._errors.add(finding.file)
        self.news.found(findings)

    def refuse_errors(self) -> None:
        """Raise InvalidInput (EXAMPLES_INVALID, QUESTIONS_INVALID) if an error was found."""
        for file, reason in (("examples", "EXAMPLES_INVALID"), ("questions", "QUESTIONS_INVALID")):
            if file in self._errors:
                raise InvalidInput(reason, f"some lines of the {file} are not in order")

    def _end_examples(self) -> None:
        try:
            self.found(self.examples.close())
        except InvalidInput:
            self.refuse_errors()  # too few are in order: what is wrong with the others says more
            raise
        assert self._file
        self._file.flush()
        os.fsync(self._file.fileno())

    def _count(self, chunk: bytes) -> None:
        self._left -= len(chunk)
        if self._left < 0:
            most = self._most_bytes // MEBIBYTE
            raise InvalidInput("EXAMPLES_TOO_LARGE", f"an upload has at most {most} MiB")


def _checked(chunk: bytes) -> bytes:
    if len(chunk) > MOST_CHUNK:
        raise InvalidInput("CHUNK_TOO_LARGE", "a chunk has at most 1 MiB")
    return chunk


def _hash(start: checks.Start, upload: _Upload) -> str:
    """Return what tells one upload from another, the idempotency key aside."""
    asked = [start.name, start.corpus, asdict(start.options)]
    sent = [upload.examples.hash, upload.questions.hash if upload.questions else ""]
    return hashlib.sha256(json.dumps(asked + sent).encode()).hexdigest()
