"""The client's methods for training adapters and for keeping them."""

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from clients.adapters import Adapter, files_of, import_requests, unpack
from clients.errors import translated
from clients.files import FileError
from clients.jobs import CheckProgress, Context, Finding, Job, JobEvent, event_of, news_of_check
from clients.streams import resumed, sent
from clients.uploads import Source, Upload, can_be_read_again, chunks
from services.runtime.status import real_status

PAGE = 500
SECONDS = 60.0


class TuningMethods:
    """What a Client does with jobs and adapters.

    The methods raise TworoadsError, and FileError for a file that cannot be used.
    """

    address: str
    _tuning: TuningServiceStub

    async def create_job(
        self,
        name: str,
        examples: Source,
        *,
        questions: Source | None = None,
        corpus: str = "",
        base_model: str = "",
        context: Context = "none",
        idempotency_key: str = "",
        **options: Any,
    ) -> AsyncIterator[Finding | CheckProgress | Job]:
        """Queue the training of an adapter; yield what the check finds, and the job last.

        `examples` and `questions` are JSON Lines. `options` are the other fields of TrainingOptions
        (rank, alpha, epochs, learning_rate, targets, seed, quantized, held_out_share). What can be
        read again is sent again if the connection breaks, under a key that makes one job of it.
        """
        start = pb.CreateJobStart(
            name=name,
            base_model=base_model,
            corpus=corpus,
            options=pb.TrainingOptions(
                context=pb.TrainingContext.Value(f"TRAINING_CONTEXT_{context.upper()}"), **options
            ),
            idempotency_key=idempotency_key or uuid.uuid4().hex,
        )
        again = can_be_read_again(examples) and (questions is None or can_be_read_again(questions))
        told: set[Finding] = set()

        def requests() -> AsyncIterator[pb.CreateJobRequest]:
            return _create_requests(start, examples, questions)

        with translated(self.address):
            async with aclosing(sent(self._tuning.CreateJob, requests, again)) as responses:
                async for response in responses:
                    news = news_of_check(response)
                    if news and news not in told:
                        yield news
                    if isinstance(news, Finding):
                        told.add(news)

    async def tune(self, name: str, examples: Source, **arguments: Any) -> Job:
        """Train an adapter and return its job when that has ended, whichever way.

        The arguments are those of `create_job`. Leaving early does not stop the job.
        """
        async for news in self.create_job(name, examples, **arguments):
            if isinstance(news, Job):
                async for _ in self.watch_job(news.id):
                    pass
                return await self.job(news.id)
        raise AssertionError("a check ends with a job or an error")

    async def job(self, id: str) -> Job:
        """Return a job."""
        with translated(self.address):
            response = await self._tuning.GetJob(pb.GetJobRequest(id=id), timeout=SECONDS)
        return Job.of(response.job)

    async def jobs(self) -> list[Job]:
        """Return all jobs, the newest first, without the ends of their logs."""
        found: list[Job] = []
        token = ""
        with translated(self.address):
            while True:
                response = await self._tuning.ListJobs(
                    pb.ListJobsRequest(page_size=PAGE, page_token=token), timeout=SECONDS
                )
                found += map(Job.of, response.jobs)
                token = response.next_page_token
                if not token:
                    return found

    async def watch_job(self, id: str, after_sequence: int = 0) -> AsyncIterator[JobEvent]:
        """Yield what happens to a job, from its beginning or after an event, until it has ended.

        Goes on where it was if the connection breaks. Leaving the loop does not stop the job.
        """
        last = after_sequence

        def watch() -> Any:
            return self._tuning.WatchJob(pb.WatchJobRequest(id=id, after_sequence=last))

        with translated(self.address):
            async with aclosing(resumed(watch)) as responses:
                async for response in responses:
                    event = event_of(response)
                    if event:
                        last = event.sequence
                        yield event

    async def cancel_job(self, id: str) -> Job:
        """Stop a job."""
        with translated(self.address):
            response = await self._tuning.CancelJob(pb.CancelJobRequest(id=id), timeout=SECONDS)
        return Job.of(response.job)

    async def adapters(self) -> list[Adapter]:
        """Return all adapters, the newest first."""
        found: list[Adapter] = []
        token = ""
        with translated(self.address):
            while True:
                response = await self._tuning.ListAdapters(
                    pb.ListAdaptersRequest(page_size=PAGE, page_token=token), timeout=SECONDS
                )
                found += map(Adapter.of, response.adapters)
                token = response.next_page_token
                if not token:
                    return found

    async def adapter(self, adapter: str) -> Adapter:
        """Return an adapter: NAME@HASH, or NAME for the newest version that is served."""
        with translated(self.address):
            response = await self._tuning.GetAdapter(
                pb.GetAdapterRequest(adapter=adapter), timeout=SECONDS
            )
        return Adapter.of(response.adapter)

    async def import_adapter(
        self,
        folder: Path,
        name: str,
        *,
        base_model_hash: str = "",
        prompt_version: str = "",
        context: Context | None = None,
        examples: Source | None = None,
    ) -> Adapter:
        """Take an adapter that peft has saved into `folder`; sending it again is safe.

        What it was trained on and how need not be known. It is UNMEASURED, since this sends no
        answers to measure it by.
        """
        options = pb.TrainingOptions()
        if context:
            options.context = pb.TrainingContext.Value(f"TRAINING_CONTEXT_{context.upper()}")
        start = pb.ImportAdapterStart(
            name=name,
            base_model_hash=base_model_hash,
            prompt_version=prompt_version,
            options=options,
        )
        files = await asyncio.to_thread(files_of, folder)
        upload = Upload(import_requests(start, folder, files, examples))
        with translated(self.address), upload.raising():
            call = self._tuning.ImportAdapter(upload.requests())
            async with real_status(call):
                response = await call
        return Adapter.of(response.adapter)

    async def download_adapter(self, id: str, folder: Path) -> Adapter:
        """Write an adapter's files into a new folder, as peft saves them, and check their hashes.

        `id` is NAME@HASH. Goes on where it was if the connection breaks.
        """
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileError(f"{folder} is there already: name a new folder")
        try:
            return await self._download(id, folder)
        except OSError as error:
            raise FileError(f"cannot write to {folder}: {error.strerror}") from error

    async def accept_adapter(self, id: str, etag: str = "") -> Adapter:
        """Let an UNFAITHFUL adapter, NAME@HASH, be served; with `etag`, only as it was seen."""
        with translated(self.address):
            response = await self._tuning.AcceptAdapter(
                pb.AcceptAdapterRequest(adapter=id, etag=etag), timeout=SECONDS
            )
        return Adapter.of(response.adapter)

    async def delete_adapter(self, id: str) -> None:
        """Delete an adapter, NAME@HASH."""
        with translated(self.address):
            await self._tuning.DeleteAdapter(pb.DeleteAdapterRequest(adapter=id), timeout=SECONDS)

    async def _download(self, id: str, folder: Path) -> Adapter:
        adapter: Adapter | None = None
        with tempfile.TemporaryFile() as content, translated(self.address):

            def download() -> Any:
                return self._tuning.DownloadAdapter(
                    pb.DownloadAdapterRequest(
                        adapter=id, content=pb.ADAPTER_CONTENT_FILES, offset=content.tell()
                    )
                )

            async with aclosing(resumed(download)) as responses:
                async for response in responses:
                    if response.HasField("adapter"):
                        adapter = Adapter.of(response.adapter)
                    else:
                        await asyncio.to_thread(content.write, response.chunk.data)
            assert adapter  # it comes first
            content.seek(0)
            await asyncio.to_thread(unpack, content, adapter.files, folder)
        return adapter


async def _create_requests(
    start: pb.CreateJobStart, examples: Source, questions: Source | None
) -> AsyncIterator[pb.CreateJobRequest]:
    yield pb.CreateJobRequest(start=start)
    async for chunk in chunks(examples):
        yield pb.CreateJobRequest(examples=chunk)
    if questions is not None:
        async for chunk in chunks(questions):
            yield pb.CreateJobRequest(questions=chunk)
    yield pb.CreateJobRequest(end=pb.CreateJobEnd())
