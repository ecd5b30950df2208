"""A tuning service that keeps its adapters in memory, and misbehaves when it is told to."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import accumulate

import grpc
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.tuning_pb2_grpc import (
    TuningServiceServicer,
    add_TuningServiceServicer_to_server,
)

from services.runtime import call
from services.runtime.errors import InvalidInput, NotFound, ServiceError, Unavailable
from services.runtime.server import running
from services.runtime.settings import ServerSettings

TUNING = pb.DESCRIPTOR.services_by_name["TuningService"].full_name
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_HASH = "ab" * 32
SERVED = (pb.ADAPTER_STATE_READY, pb.ADAPTER_STATE_UNMEASURED)


@dataclass
class Kept:
    """An adapter and its files. A test may change the message, such as its state."""

    tenant: str
    adapter: pb.Adapter
    files: dict[str, bytes]


class FakeTuning(TuningServiceServicer):
    """Has GetAdapter, ListAdapters and DownloadAdapter.

    Set `error` to fail every call, `altered` to send wrong bytes, `cuts` to break off that many
    bytes into each of the next downloads, and clear `open` to hold downloads before their first
    chunk. `asked` has the names of GetAdapter, `downloads` what was downloaded and from which
    offset.
    """

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self.asked: list[str] = []
        self.downloads: list[tuple[str, int]] = []
        self.error: ServiceError | None = None
        self.altered = False
        self.cuts: list[int] = []
        self.chunk = 64 * 1024
        self.open = asyncio.Event()
        self.open.set()
        self.began = asyncio.Event()

    def add(
        self,
        name: str,
        state: pb.AdapterState.ValueType = pb.ADAPTER_STATE_READY,
        *,
        tenant: str = call.DEFAULT_TENANT,
        base_model_hash: str = BASE_HASH,
        prompt_version: str = "v1",
        rank: int = 8,
        context: pb.TrainingContext.ValueType = pb.TRAINING_CONTEXT_NONE,
        accepted_by: str = "",
        files: Mapping[str, bytes] | None = None,
    ) -> pb.Adapter:
        """Keep an adapter, the newest of its name; `files` are made up if none are given."""
        made_up = {WEIGHTS: f"weights {len(self.kept)}".encode() * 20, CONFIG: b"{}"}
        contents = dict(made_up if files is None else files)
        sums = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        seed = repr((name, base_model_hash, prompt_version, rank, context, sorted(sums.items())))
        digest = hashlib.sha256(seed.encode()).hexdigest()
        adapter = pb.Adapter(
            id=f"{name}@{digest[:12]}",
            name=name,
            hash=digest,
            state=state,
            base_model="tiny",
            base_model_hash=base_model_hash,
            prompt_version=prompt_version,
            options=pb.TrainingOptions(context=context, rank=rank),
            files=[
                pb.AdapterFile(name=file, size=len(content), sha256=sums[file])
                for file, content in contents.items()
            ],
            accepted_by=accepted_by,
        )
        self.kept.append(Kept(tenant, adapter, contents))
        return adapter

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetAdapterResponse:
        self.asked.append(request.adapter)
        return pb.GetAdapterResponse(adapter=self._find(request.adapter).adapter)

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdaptersResponse:
        if self.error is not None:
            raise self.error
        mine = [kept.adapter for kept in reversed(self.kept) if kept.tenant == call.tenant()]
        return pb.ListAdaptersResponse(adapters=mine)

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        self.downloads.append((request.adapter, request.offset))
        kept = self._find(request.adapter)
        cut = self.cuts.pop(0) if self.cuts else None
        yield pb.DownloadAdapterResponse(adapter=kept.adapter)
        self.began.set()
        await self.open.wait()
        content = b"".join(kept.files[file.name] for file in kept.adapter.files)
        if self.altered:
            content = bytes([content[0] ^ 1]) + content[1:]
        end = len(content) if cut is None else min(len(content), request.offset + cut)
        steps = [self.chunk] * ((end - request.offset) // self.chunk)
        for start in accumulate(steps, initial=request.offset):
            data = content[start : min(start + self.chunk, end)]
            if data:
                chunk = pb.DownloadChunk(offset=start, data=data)
                yield pb.DownloadAdapterResponse(chunk=chunk)
        if cut is not None:
            raise Unavailable("STOPPING", "the download broke off")

    def _find(self, asked: str) -> Kept:
        if self.error is not None:
            raise self.error
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}(@[0-9a-f]{12})?", asked):
            raise InvalidInput("ADAPTER_NAME_INVALID", "this is no name of an adapter")
        mine = [kept for kept in reversed(self.kept) if kept.tenant == call.tenant()]
        found = [kept for kept in mine if asked in (kept.adapter.id, kept.adapter.name)]
        if not found:
            raise NotFound("ADAPTER_NOT_FOUND", "there is no adapter of this name")
        served = [k for k in found if k.adapter.state in SERVED or k.adapter.accepted_by]
        return (served or found)[0]


@asynccontextmanager
async def serving(tuning: FakeTuning) -> AsyncIterator[str]:
    """Serve it while the block runs; yields the address."""
    async with running(ServerSettings(grace_seconds=0), [TUNING]) as server:
        await server.serve(lambda s: add_TuningServiceServicer_to_server(tuning, s))
        yield f"127.0.0.1:{server.port}"
