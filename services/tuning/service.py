"""TuningService: checks the request, asks, fills the response."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import grpc
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1 import tuning_pb2_grpc as pb_grpc

from services.runtime.call import author, tenant
from services.runtime.errors import InvalidInput
from services.runtime.threads import in_thread
from services.tuning import checks
from services.tuning.adapters import imports
from services.tuning.adapters.base_model import BaseModel
from services.tuning.adapters.registry import Registry, check_id
from services.tuning.job import Job
from services.tuning.jobs import Jobs
from services.tuning.messages import adapter_message, job_message, progress_message, timestamp
from services.tuning.store import Event
from services.tuning.uploads import Uploads


class TuningService(pb_grpc.TuningServiceServicer):
    """Serves `jobs` and the adapters of `registry`. Half-made imports lie in `tmp`."""

    def __init__(
        self,
        jobs: Jobs,
        uploads: Uploads,
        registry: Registry,
        base: BaseModel,
        max_rank: int,
        tmp: Path,
    ) -> None:
        self._jobs = jobs
        self._uploads = uploads
        self._registry = registry
        self._base = base
        self._max_rank = max_rank
        self._tmp = tmp

    async def CreateJob(
        self,
        request_iterator: AsyncIterator[pb.CreateJobRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.CreateJobResponse]:
        async with aclosing(self._uploads.receive(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def GetJob(
        self, request: pb.GetJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetJobResponse:
        job, ahead = await in_thread(self._jobs.store.get, tenant(), request.id)
        return pb.GetJobResponse(job=job_message(job, ahead))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchJobResponse]:
        last = request.after_sequence
        async with aclosing(self._jobs.watch(tenant(), request.id, last)) as events:
            async for event in events:
                if event is None:
                    now = timestamp(time.time())
                    yield pb.WatchJobResponse(
                        sequence=last, time=now, heartbeat=pb.WatchHeartbeat()
                    )
                else:
                    last = event.sequence
                    yield await self._event(event)

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelJobResponse:
        job = await self._jobs.cancel(tenant(), request.id)
        return pb.CancelJobResponse(job=job_message(job, 0))

    async def ListJobs(
        self, request: pb.ListJobsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListJobsResponse:
        size = checks.page_size(request.page_size)
        before = checks.before(request.page_token)
        found = await in_thread(self._jobs.store.page, tenant(), before, size + 1)
        more = len(found) > size
        return pb.ListJobsResponse(
            jobs=[job_message(replace(job, log_tail=""), ahead) for _, job, ahead in found[:size]],
            next_page_token=checks.page_token(found[size - 1][0]) if more else "",
        )

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdaptersResponse:
        size = checks.page_size(request.page_size)
        found, token = await in_thread(self._registry.page, tenant(), size, request.page_token)
        return pb.ListAdaptersResponse(
            adapters=[adapter_message(adapter) for adapter in found], next_page_token=token
        )

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetAdapterResponse:
        adapter = await in_thread(self._registry.get, tenant(), request.adapter)
        return pb.GetAdapterResponse(adapter=adapter_message(adapter))

    async def ImportAdapter(
        self,
        request_iterator: AsyncIterator[pb.ImportAdapterRequest],
        context: grpc.aio.ServicerContext,
    ) -> pb.ImportAdapterResponse:
        await self._jobs.space(tenant())
        try:
            adapter = await imports.receive(
                request_iterator, self._registry, self._base, self._max_rank, self._tmp
            )
        finally:
            self._jobs.measure()  # a caller who leaves now may have imported it
        return pb.ImportAdapterResponse(adapter=adapter_message(adapter))

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        check_id(request.adapter)
        if request.content not in pb.AdapterContent.values():
            raise InvalidInput("CONTENT_UNKNOWN", "an adapter has files and examples")
        adapter = await in_thread(self._registry.get, tenant(), request.adapter)
        of_examples = request.content == pb.ADAPTER_CONTENT_EXAMPLES
        content: Literal["files", "examples"] = "examples" if of_examples else "files"
        blocks = await in_thread(self._registry.read, adapter, content, request.offset)
        yield pb.DownloadAdapterResponse(adapter=adapter_message(adapter))
        while block := await in_thread(next, blocks, None):
            offset, data = block
            yield pb.DownloadAdapterResponse(chunk=pb.DownloadChunk(offset=offset, data=data))

    async def AcceptAdapter(
        self, request: pb.AcceptAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.AcceptAdapterResponse:
        adapter = await in_thread(
            self._registry.accept, tenant(), request.adapter, author(), request.etag
        )
        return pb.AcceptAdapterResponse(adapter=adapter_message(adapter))

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteAdapterResponse:
        await in_thread(self._registry.delete, tenant(), request.adapter)
        return pb.DeleteAdapterResponse()

    async def _event(self, event: Event) -> pb.WatchJobResponse:
        response = pb.WatchJobResponse(sequence=event.sequence, time=timestamp(event.time))
        if isinstance(event.value, Job):
            _, ahead = await in_thread(self._jobs.store.get, tenant(), event.value.id)
            response.job.CopyFrom(job_message(event.value, ahead))
        else:
            response.progress.CopyFrom(progress_message(event.value))
        return response
