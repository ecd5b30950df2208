"""The adapters that a replica serves: pulled from tuning on first use, checked, loaded, put out."""

import asyncio
import hashlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import grpc
from prometheus_client import Counter, Gauge
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.generation.adapter_store import About, AdapterStore, File, Incoming, State, altered
from services.generation.checks import adapter_id
from services.runtime import call
from services.runtime.call import outgoing
from services.runtime.errors import NotReady, Overloaded, Unavailable, downstream

STATES: dict[int, State] = {
    pb.ADAPTER_STATE_READY: "ready",
    pb.ADAPTER_STATE_UNFAITHFUL: "unfaithful",
    pb.ADAPTER_STATE_UNMEASURED: "unmeasured",
}
ASK_SECONDS = 5.0
IDLE_SECONDS = 30.0  # without a chunk, a download is broken off
PAUSES = (0.1, 0.5, 2.0)  # seconds before a download goes on where it broke off

LOADED = Gauge("tworoads_adapters_loaded", "Adapters that are loaded.")
LOADS = Counter("tworoads_adapter_loads", "Adapters that were loaded.", ["source"])

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """An adapter as the engine knows it: a name and a number that no other has, and its folder."""

    name: str
    number: int
    folder: Path


class Loader(Protocol):
    """What this module needs of the engine.

    Both raise Unavailable (ENGINE_DEAD). `load_lora` raises NotReady (ADAPTER_INCOMPATIBLE), and
    nothing of the adapter is in the engine then.
    """

    async def load_lora(self, lora: Lora) -> None: ...

    async def unload_lora(self, lora: Lora) -> None: ...


@dataclass(eq=False)
class Entry:
    """An adapter that is in the store, or on its way there.

    `stored` is what the store says of it, None while it is not there. `placed` entries count
    against the limit. `preparing` ends with the adapter loaded, or takes the entry out.
    """

    about: About
    folder: Path
    stored: About | None = None
    placed: bool = False
    users: int = 0
    lora: Lora | None = None
    preparing: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        under_way = self.preparing is not None and not self.preparing.done()
        return self.placed and not self.users and not under_way


class Adapters:
    """Gives out adapters that are loaded, at most `most` at once, of rank `max_rank` at most.

    `model_hash` is that of the engine's model. Before it is used, `start` finds what the store has;
    `close` ends what is under way.
    """

    def __init__(
        self,
        store: AdapterStore,
        tuning: TuningServiceStub,
        engine: Loader,
        model_hash: str,
        most: int,
        max_rank: int,
    ) -> None:
        self._store = store
        self._tuning = tuning
        self._engine = engine
        self._model_hash = model_hash
        self._most = most
        self._max_rank = max_rank
        # By tenant's SHA-256 and NAME@HASH, the least recently used first.
        self._entries: OrderedDict[tuple[str, str], Entry] = OrderedDict()
        self._making_room = asyncio.Lock()
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        """Find the adapters of an earlier run; the oldest go if there are more than `most`."""
        kept = await asyncio.to_thread(self._store.kept)
        for i, (tenant, about) in enumerate(kept):
            folder = self._store.place(tenant, about)
            if i < len(kept) - self._most:
                await asyncio.to_thread(self._store.remove, folder)
            else:
                self._entries[tenant, about.id] = Entry(about, folder, stored=about, placed=True)

    async def close(self) -> None:
        """Break off what is under way."""
        tasks = [entry.preparing for entry in self._entries.values() if entry.preparing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def loaded(self) -> list[str]:
        """Return the NAME@HASH of the caller's adapters that are loaded."""
        mine = _sha256(call.tenant())
        entries = self._entries.items()
        return sorted(id for (tenant, id), entry in entries if tenant == mine and entry.lora)

    @asynccontextmanager
    async def using(self, id: str, measuring: bool = False) -> AsyncIterator[Lora | None]:
        """Keep an adapter of the caller's tenant loaded while the block runs; "" yields None.

        `measuring` takes it in any state. Raises InvalidInput (ADAPTER_NAME_INVALID), NotFound
        (ADAPTER_NOT_FOUND), NotReady (ADAPTER_VERIFYING, ADAPTER_NOT_ACCEPTED, ADAPTER_ALTERED,
        ADAPTER_INCOMPATIBLE), Overloaded (ADAPTERS_FULL, STORE_FULL) and Unavailable
        (TUNING_UNAVAILABLE, ENGINE_DEAD).
        """
        if not id:
            yield None
            return
        adapter_id(id)
        key = _sha256(call.tenant()), id
        entry = self._entries.get(key)
        about = entry.about if entry else None
        if about is None or not (measuring or about.served):
            about = await self._ask(id)
        self._check(about, measuring)
        # Another call may have put it in or out meanwhile.
        entry = self._entries.get(key) or Entry(about, self._store.place(key[0], about))
        if entry.about.hash != about.hash:
            raise altered("it is not the one of this name that is kept here")
        self._entries[key] = entry
        self._entries.move_to_end(key)
        entry.about = about
        entry.users += 1
        try:
            if entry.lora is None:
                await self._prepared(key, entry)
            if entry.stored != entry.about:
                await self._remember(entry)
            yield entry.lora
        finally:
            entry.users -= 1

    def _check(self, about: About, measuring: bool) -> None:
        if not (measuring or about.served):
            if about.state == "unfaithful":
                raise NotReady(
                    "ADAPTER_NOT_ACCEPTED",
                    "the adapter does not do here what it did in training;"
                    " look at its fidelity, and accept it or train it anew",
                )
            raise NotReady("ADAPTER_VERIFYING", "the adapter is being measured; try again later")
        if about.base_model_hash != self._model_hash:
            raise NotReady(
                "ADAPTER_INCOMPATIBLE",
                f"the adapter belongs to the model {about.base_model}, and another one runs here",
                base_model_hash=about.base_model_hash,
                model_hash=self._model_hash,
            )
        if about.rank > self._max_rank:
            raise NotReady(
                "ADAPTER_INCOMPATIBLE",
                f"the adapter has rank {about.rank}, and this replica serves {self._max_rank}"
                " at most",
                rank=str(about.rank),
                limit=str(self._max_rank),
            )

    async def _ask(self, id: str) -> About:
        """Return what tuning says of an adapter now."""
        with downstream("tuning"):
            response = await self._tuning.GetAdapter(
                pb.GetAdapterRequest(adapter=id), **outgoing(ASK_SECONDS)
            )
        about = _about(response.adapter)
        if about.id != id:
            raise altered("tuning knows it by another name")
        return about

    async def _prepared(self, key: tuple[str, str], entry: Entry) -> None:
        """Wait until the entry is loaded: one task does it for all callers, whoever leaves."""
        if entry.preparing is None:
            entry.preparing = asyncio.create_task(self._prepare(key, entry))
            # All callers may have left before it fails.
            entry.preparing.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(entry.preparing)

    async def _prepare(self, key: tuple[str, str], entry: Entry) -> None:
        # Whoever came first may leave; the others have time.
        call.current.set(replace(call.current.get(), deadline=None))
        try:
            if not entry.placed:
                await self._make_room(entry)
            source = "disk"
            if not (entry.stored and await self._intact(entry)):
                source = "download"
                await self._download(entry)
            lora = Lora(f"{key[0]}/{key[1]}", next(self._numbers), entry.folder)
            try:
                await self._engine.load_lora(lora)
            except NotReady:
                await asyncio.to_thread(self._store.remove, entry.folder)
                raise
        except BaseException:
            del self._entries[key]
            raise
        entry.lora = lora
        LOADED.inc()
        LOADS.labels(source).inc()
        log.info("adapter %s is loaded", key[1])

    async def _make_room(self, entry: Entry) -> None:
        """Put out the least recently used adapters until there is room for this one."""
        async with self._making_room:
            while sum(other.placed for other in self._entries.values()) >= self._most:
                idle = [key for key, other in self._entries.items() if other.idle]
                if not idle:
                    raise Overloaded(
                        "ADAPTERS_FULL", "all adapters of this replica are in use; try again later"
                    )
                oldest = self._entries.pop(idle[0])
                if oldest.lora:
                    await self._engine.unload_lora(oldest.lora)
                    LOADED.dec()
                await asyncio.to_thread(self._store.remove, oldest.folder)
            entry.placed = True

    async def _intact(self, entry: Entry) -> bool:
        """Check what an earlier run left; remove it if it was altered."""
        if await asyncio.to_thread(self._store.intact, entry.folder, entry.about):
            return True
        log.warning("adapter %s was altered on disk", entry.about.id)
        entry.stored = None
        await asyncio.to_thread(self._store.remove, entry.folder)
        return False

    async def _download(self, entry: Entry) -> None:
        about = entry.about
        incoming = await asyncio.to_thread(self._store.incoming, about)
        try:
            for pause in (*PAUSES, None):
                try:
                    await self._receive(about, incoming)
                    break
                except Unavailable:
                    if pause is None:
                        raise
                    await asyncio.sleep(pause)
            await asyncio.to_thread(incoming.keep, entry.folder)
            entry.stored = about
        finally:
            await asyncio.to_thread(incoming.close)

    async def _receive(self, about: About, incoming: Incoming) -> None:
        """Take the rest of the files. Raises Unavailable where the download breaks off."""
        request = pb.DownloadAdapterRequest(
            adapter=about.id, content=pb.ADAPTER_CONTENT_FILES, offset=incoming.received
        )
        at, writing = incoming.received, None
        with _downloading():
            stream = self._tuning.DownloadAdapter(request, **outgoing())
            try:
                head = _about((await _read(stream)).adapter)
                if (head.hash, head.files) != (about.hash, about.files):
                    raise altered("tuning sends another one")
                while at < about.size:
                    chunk = (await _read(stream)).chunk
                    if chunk.offset != at or not chunk.data:
                        raise altered("a part of it is missing")
                    at += len(chunk.data)
                    if writing:
                        await writing
                    # Meanwhile the next one comes.
                    writing = asyncio.create_task(asyncio.to_thread(incoming.write, chunk.data))
            finally:
                stream.cancel()
                if writing:
                    await writing

    async def _remember(self, entry: Entry) -> None:
        entry.stored = entry.about
        try:
            await asyncio.to_thread(self._store.remember, entry.folder, entry.about)
        except Overloaded:
            log.warning("no room to write down that %s is served", entry.about.id)


@contextmanager
def _downloading() -> Iterator[None]:
    try:
        with downstream("tuning"):
            yield
    except TimeoutError as error:
        raise Unavailable("TUNING_UNAVAILABLE", "the tuning service stopped sending") from error


async def _read(stream: Any) -> pb.DownloadAdapterResponse:
    async with asyncio.timeout(IDLE_SECONDS):
        response = await stream.read()
    if response is grpc.aio.EOF:
        raise altered("tuning sends less of it than there should be")
    assert isinstance(response, pb.DownloadAdapterResponse)
    return response


def _about(adapter: pb.Adapter) -> About:
    try:
        return About(
            id=adapter.id,
            hash=adapter.hash,
            base_model=adapter.base_model,
            base_model_hash=adapter.base_model_hash,
            prompt_version=adapter.prompt_version,
            rank=adapter.options.rank,
            files=tuple(File(file.name, file.size, file.sha256) for file in adapter.files),
            state=STATES.get(adapter.state, "verifying"),
            accepted=bool(adapter.accepted_by),
        )
    except ValueError as error:
        raise altered(str(error)) from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
