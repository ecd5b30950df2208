"""Adapters on a generation replica: real service and store, fake engine, fake tuning service."""

import asyncio
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from tworoads.v1 import generation_pb2 as pb
from tworoads.v1 import tuning_pb2
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from services.generation import adapters as module
from services.generation.adapter_store import AdapterStore
from services.generation.settings import Settings
from services.runtime.call import TENANT
from services.runtime.channel import connect
from services.runtime.errors import NotReady, Unavailable, error_info
from tests import fake_tuning
from tests.fake_engine import NAME, FakeEngine, serving
from tests.fake_tuning import CONFIG, WEIGHTS, FakeTuning

ANYONE = "default"


@dataclass
class Replica:
    """A generation replica that can be stopped and started on the same folder."""

    folder: Path
    tuning: FakeTuning
    tuning_address: str
    most: int = 32
    engine: FakeEngine = field(default_factory=FakeEngine)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Replica"]:
        self.engine = FakeEngine()
        async with serving(self.engine, self.folder, self.tuning_address, self.most) as (
            _,
            address,
        ):
            async with connect(address, NAME) as channel:
                self.stub = GenerationServiceStub(channel)
                yield self

    async def ask(self, adapter: str, tenant: str = ANYONE, measuring: bool = False) -> str:
        request = asks(adapter, measuring)
        responses = self.stub.Generate(request, metadata=((TENANT, tenant),), timeout=20)
        return "".join([response.text async for response in responses])

    async def score(self, adapter: str, tenant: str = ANYONE) -> None:
        request = pb.ScoreRequest(messages=asks("").messages, continuation="x", adapter=adapter)
        await self.stub.Score(request, metadata=((TENANT, tenant),), timeout=20)

    async def adapters(self, tenant: str = ANYONE) -> list[str]:
        request = pb.GenerationServiceGetModelRequest()
        return list((await self.stub.GetModel(request, metadata=((TENANT, tenant),))).adapters)

    def kept(self) -> list[Path]:
        """Return all files of the folder but its lock."""
        return [path for path in self.folder.rglob("*") if path.is_file() and path.name != "lock"]


def asks(adapter: str, measuring: bool = False) -> pb.GenerateRequest:
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="Who?")])
    return pb.GenerateRequest(messages=[message], adapter=adapter, measuring=measuring)


async def refused(call: Awaitable[Any]) -> tuple[str, grpc.StatusCode]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    info = error_info(error.value)
    assert info is not None
    return info.reason, error.value.code()


@pytest.fixture
def tuning() -> FakeTuning:
    return FakeTuning()


@pytest.fixture
async def stopped(tuning: FakeTuning, tmp_path: Path) -> AsyncIterator[Replica]:
    async with fake_tuning.serving(tuning) as address:
        yield Replica(tmp_path / "adapters", tuning, address)


@pytest.fixture
async def replica(stopped: Replica) -> AsyncIterator[Replica]:
    async with stopped.running():
        yield stopped


async def test_an_adapter_is_pulled_loaded_and_used(replica: Replica, tuning: FakeTuning) -> None:
    adapter = tuning.add("tone")
    assert await replica.ask(adapter.id) == "Ada wrote"
    lora = replica.engine.asked[0][3]
    assert lora is not None and replica.engine.loads == [lora]
    assert lora.folder.name == adapter.hash
    for file in (WEIGHTS, CONFIG):
        assert (lora.folder / file).read_bytes() == tuning.kept[0].files[file]
    assert await replica.adapters() == [adapter.id]
    await replica.score(adapter.id)
    assert replica.engine.scored[0][2] == lora


async def test_the_second_request_asks_nobody(replica: Replica, tuning: FakeTuning) -> None:
    adapter = tuning.add("tone")
    for _ in range(3):
        await replica.ask(adapter.id)
    assert tuning.asked == [adapter.id]
    assert tuning.downloads == [(adapter.id, 0)]
    assert len(replica.engine.loads) == 1


async def test_the_base_model_needs_no_tuning_service(replica: Replica, tuning: FakeTuning) -> None:
    tuning.error = Unavailable("STOPPING", "away")
    assert await replica.ask("") == "Ada wrote"
    assert replica.engine.asked[0][3] is None
    assert replica.kept() == []


async def test_twenty_callers_at_once_are_one_download_and_one_load(
    replica: Replica, tuning: FakeTuning
) -> None:
    adapter = tuning.add("tone")
    answers = await asyncio.gather(*(replica.ask(adapter.id) for _ in range(20)))
    assert answers == ["Ada wrote"] * 20
    assert len(tuning.downloads) == len(replica.engine.loads) == 1


async def test_a_caller_that_leaves_does_not_stop_the_download_for_the_others(
    replica: Replica, tuning: FakeTuning
) -> None:
    adapter = tuning.add("tone")
    tuning.open.clear()
    first = asyncio.ensure_future(replica.ask(adapter.id))
    await tuning.began.wait()
    others = [asyncio.ensure_future(replica.ask(adapter.id)) for _ in range(3)]
    await until(lambda: generating() == 4)
    first.cancel()
    await until(lambda: generating() == 3)
    tuning.open.set()
    assert await asyncio.gather(*others) == ["Ada wrote"] * 3
    assert len(tuning.downloads) == len(replica.engine.loads) == 1


async def test_adapters_and_the_base_model_are_used_side_by_side(
    replica: Replica, tuning: FakeTuning
) -> None:
    ids = ["", tuning.add("tone").id, tuning.add("style").id]
    await asyncio.gather(*(replica.ask(id) for id in ids))
    used = [lora.name.split("/")[1] if lora else "" for *_, lora in replica.engine.asked]
    assert sorted(used) == sorted(ids)
    numbers = [lora.number for lora in replica.engine.loads]
    assert sorted(numbers) == [1, 2]


async def test_a_tenants_adapter_does_not_exist_for_another(
    replica: Replica, tuning: FakeTuning
) -> None:
    adapter = tuning.add("tone", tenant="a")
    await replica.ask(adapter.id, "a")
    assert await refused(replica.ask(adapter.id, "b")) == (
        "ADAPTER_NOT_FOUND",
        grpc.StatusCode.NOT_FOUND,
    )
    assert (await replica.adapters("a"), await replica.adapters("b")) == ([adapter.id], [])


async def test_the_same_adapter_of_two_tenants_is_two(replica: Replica, tuning: FakeTuning) -> None:
    files = {WEIGHTS: b"the same", CONFIG: b"{}"}
    ids = {tuning.add("tone", tenant=tenant, files=files).id for tenant in ("a", "b")}
    (adapter,) = ids
    for tenant in ("a", "b"):
        await replica.ask(adapter, tenant)
    one, other = replica.engine.loads
    assert one.name != other.name and one.folder != other.folder


VERIFYING, READY = tuning_pb2.ADAPTER_STATE_VERIFYING, tuning_pb2.ADAPTER_STATE_READY
UNFAITHFUL = tuning_pb2.ADAPTER_STATE_UNFAITHFUL
UNMEASURED = tuning_pb2.ADAPTER_STATE_UNMEASURED

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"state": VERIFYING}, "ADAPTER_VERIFYING"),
    ({"state": UNFAITHFUL}, "ADAPTER_NOT_ACCEPTED"),
    ({"base_model_hash": "cd" * 32}, "ADAPTER_INCOMPATIBLE"),
    ({"rank": 17}, "ADAPTER_INCOMPATIBLE"),
    ({"files": {WEIGHTS: b"x"}}, "ADAPTER_ALTERED"),
    ({"files": {WEIGHTS: b"x", CONFIG: b""}}, "ADAPTER_ALTERED"),
    ({"files": {WEIGHTS: b"x", CONFIG: b"{}", "evil.py": b"x"}}, "ADAPTER_ALTERED"),
    ({"files": {WEIGHTS: b"x", "../../x": b"{}"}}, "ADAPTER_ALTERED"),
    ({"files": {WEIGHTS: b"x", CONFIG: b" " * (2**20 + 1)}}, "ADAPTER_ALTERED"),
]


@pytest.mark.parametrize(("what", "reason"), REFUSED)
async def test_refuses_before_anything_is_downloaded(
    replica: Replica, tuning: FakeTuning, what: dict[str, Any], reason: str
) -> None:
    adapter = tuning.add("tone", **what)
    code = grpc.StatusCode.FAILED_PRECONDITION
    assert await refused(replica.ask(adapter.id)) == (reason, code)
    assert tuning.downloads == [] and replica.kept() == [] and replica.engine.loads == []


async def test_what_tuning_says_cannot_lead_out_of_the_folder(
    replica: Replica, tuning: FakeTuning
) -> None:
    adapter = tuning.add("tone")
    for hash in ("../../../x", "ab" * 32, adapter.hash.upper(), ""):
        tuning.kept[0].adapter.hash = hash
        assert (await refused(replica.ask(adapter.id)))[0] == "ADAPTER_ALTERED"
    assert tuning.downloads == [] and replica.kept() == []


@pytest.mark.parametrize(
    ("state", "accepted_by"), [(READY, ""), (UNMEASURED, ""), (UNFAITHFUL, "its owner")]
)
async def test_serves_in_these_states(
    replica: Replica, tuning: FakeTuning, state: Any, accepted_by: str
) -> None:
    adapter = tuning.add("tone", state, accepted_by=accepted_by)
    assert await replica.ask(adapter.id)


async def test_measuring_takes_any_state_and_opens_the_adapter_to_nobody_else(
    stopped: Replica, tuning: FakeTuning
) -> None:
    adapter = tuning.add("tone", VERIFYING)
    async with stopped.running() as replica:
        await replica.score(adapter.id)
        await replica.ask(adapter.id, measuring=True)
        for _ in range(2):
            assert (await refused(replica.ask(adapter.id)))[0] == "ADAPTER_VERIFYING"
        tuning.error = Unavailable("STOPPING", "away")
        assert (await refused(replica.ask(adapter.id)))[0] == "TUNING_UNAVAILABLE"
        tuning.error = None
        adapter.state = READY
        await replica.ask(adapter.id)
        asked = len(tuning.asked)
        await replica.ask(adapter.id)
        assert len(tuning.asked) == asked
        assert len(tuning.downloads) == len(replica.engine.loads) == 1
    tuning.error = Unavailable("STOPPING", "away")
    async with stopped.running() as replica:  # that it is served outlives the replica
        assert await replica.ask(adapter.id)


async def test_what_is_cached_serves_after_a_restart_with_tuning_away(
    stopped: Replica, tuning: FakeTuning
) -> None:
    cached, other = tuning.add("tone"), tuning.add("other")
    async with stopped.running() as replica:
        await replica.ask(cached.id)
    tuning.error = Unavailable("STOPPING", "away")
    async with stopped.running() as replica:
        assert await replica.adapters() == []
        assert await replica.ask(cached.id)
        assert await replica.adapters() == [cached.id]
        assert await refused(replica.ask(other.id)) == (
            "TUNING_UNAVAILABLE",
            grpc.StatusCode.UNAVAILABLE,
        )
        assert (await refused(replica.ask(cached.id, "foreign")))[0] == "TUNING_UNAVAILABLE"
    assert tuning.downloads == [(cached.id, 0)]


async def test_a_replica_that_is_not_there_is_no_tuning_service(
    tuning: FakeTuning, tmp_path: Path
) -> None:
    replica = Replica(tmp_path / "adapters", tuning, f"unix:{tmp_path}/nobody")
    async with replica.running():
        assert (await refused(replica.ask(tuning.add("tone").id)))[0] == "TUNING_UNAVAILABLE"


@pytest.mark.parametrize("how", ["altered", "longer", "gone"])
async def test_what_was_altered_on_disk_is_downloaded_anew(
    stopped: Replica, tuning: FakeTuning, how: str
) -> None:
    adapter = tuning.add("tone")
    async with stopped.running() as replica:
        await replica.ask(adapter.id)
        (weights,) = stopped.folder.rglob(WEIGHTS)
    content = weights.read_bytes()
    if how == "gone":
        weights.unlink()
    else:
        weights.write_bytes(content + b"x" if how == "longer" else b"X" + content[1:])
    async with stopped.running() as replica:
        assert await replica.ask(adapter.id)
        assert replica.engine.loads[0].folder / WEIGHTS == weights
    assert weights.read_bytes() == content
    assert len(tuning.downloads) == 2


async def test_what_lies_in_the_place_of_an_adapter_gives_way(
    replica: Replica, tuning: FakeTuning
) -> None:
    adapter, other = tuning.add("tone"), tuning.add("other")
    await replica.ask(other.id)
    (tenant,) = {path.parent.parent for path in replica.kept()}
    (tenant / adapter.hash).mkdir()
    (tenant / adapter.hash / "left").write_bytes(b"x")  # by a removal that failed
    assert await replica.ask(adapter.id)
    assert len(replica.kept()) == 6  # three of each


@pytest.mark.parametrize("about", [b"", b"{", b"{}", b'{"id": 1}'])
async def test_a_folder_without_a_proper_description_is_removed(
    stopped: Replica, tuning: FakeTuning, about: bytes
) -> None:
    adapter = tuning.add("tone")
    async with stopped.running() as replica:
        await replica.ask(adapter.id)
    (description,) = stopped.folder.rglob("adapter.json")
    description.write_bytes(about)
    (stopped.folder / "tmp" / "half").write_bytes(b"x")
    async with stopped.running() as replica:
        assert replica.kept() == []
        assert await replica.ask(adapter.id)


async def test_a_broken_download_goes_on_where_it_broke(
    replica: Replica, tuning: FakeTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", (0, 0, 0))
    adapter = tuning.add("tone", files={WEIGHTS: bytes(range(256)) * 10, CONFIG: b"{}"})
    tuning.chunk = 100
    tuning.cuts = [250, 2300, 5]
    assert await replica.ask(adapter.id)
    assert [offset for _, offset in tuning.downloads] == [0, 250, 2550, 2555]
    tuning.cuts = [10] * 4
    other = tuning.add("other")
    assert (await refused(replica.ask(other.id)))[0] == "TUNING_UNAVAILABLE"
    assert len(replica.kept()) == 3  # all of them the first one's
    assert await replica.ask(other.id)


async def test_altered_bytes_are_never_loaded(replica: Replica, tuning: FakeTuning) -> None:
    adapter = tuning.add("tone")
    tuning.altered = True
    assert (await refused(replica.ask(adapter.id)))[0] == "ADAPTER_ALTERED"
    assert replica.engine.loads == [] and replica.kept() == []
    tuning.altered = False
    assert await replica.ask(adapter.id)


async def test_a_download_that_stalls_ends(
    replica: Replica, tuning: FakeTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", ())
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.2)
    adapter = tuning.add("tone")
    tuning.open.clear()
    assert (await refused(replica.ask(adapter.id)))[0] == "TUNING_UNAVAILABLE"
    tuning.open.set()
    assert await replica.ask(adapter.id)


async def test_a_failed_load_is_an_error_for_its_callers_alone(
    replica: Replica, tuning: FakeTuning
) -> None:
    good, bad = tuning.add("good"), tuning.add("bad")
    await replica.ask(good.id)
    replica.engine.load_error = NotReady("ADAPTER_INCOMPATIBLE", "it does not fit")
    results = await asyncio.gather(
        *(refused(replica.ask(bad.id)) for _ in range(5)), replica.ask(good.id), replica.ask("")
    )
    assert results[:5] == [("ADAPTER_INCOMPATIBLE", grpc.StatusCode.FAILED_PRECONDITION)] * 5
    assert results[5:] == ["Ada wrote"] * 2
    assert not [path for path in replica.kept() if bad.hash in str(path)]
    replica.engine.load_error = None
    assert await replica.ask(bad.id)
    assert await replica.adapters() == sorted([good.id, bad.id])


async def test_the_least_recently_used_one_goes(stopped: Replica, tuning: FakeTuning) -> None:
    stopped.most = 2
    one, two, three = (tuning.add(name) for name in ("one", "two", "three"))
    async with stopped.running() as replica:
        for adapter in (one, two, one, three):
            await replica.ask(adapter.id)
        assert await replica.adapters() == sorted([one.id, three.id])
        loaded = {lora.folder.name for lora in replica.engine.loaded.values()}
        assert loaded == {one.hash, three.hash}
        assert {path.parent.name for path in replica.kept()} == loaded
        await replica.ask(two.id)  # comes back
        assert await replica.adapters() == sorted([two.id, three.id])
    stopped.most = 1
    async with stopped.running():
        assert len(stopped.kept()) == 3


async def test_one_in_use_never_goes(stopped: Replica, tuning: FakeTuning) -> None:
    stopped.most = 2
    one, two, three = (tuning.add(name) for name in ("one", "two", "three"))
    async with stopped.running() as replica:
        replica.engine.waits = True
        calls = [replica.stub.Generate(asks(adapter.id)) for adapter in (one, two)]
        for call in calls:
            assert (await call.read()).text == "Ada"
        assert await refused(replica.ask(three.id)) == (
            "ADAPTERS_FULL",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )
        assert await replica.adapters() == sorted([one.id, two.id])
        replica.engine.idle.clear()
        calls[1].cancel()
        await replica.engine.idle.wait()
        replica.engine.waits = False
        assert await replica.ask(three.id)
        assert await replica.adapters() == sorted([one.id, three.id])
        calls[0].cancel()


async def test_many_adapters_take_turns_in_little_room(
    stopped: Replica, tuning: FakeTuning
) -> None:
    stopped.most = 3
    ids = [tuning.add(f"a{i}").id for i in range(8)]

    async def patiently(id: str) -> None:
        while True:
            try:
                await replica.ask(id)
                return
            except grpc.aio.AioRpcError as error:
                info = error_info(error)
                assert info is not None and info.reason == "ADAPTERS_FULL"

    async with stopped.running() as replica:
        await asyncio.gather(*(patiently(id) for id in ids * 4))
        assert len(replica.engine.loaded) == 3
        assert len({path.parent for path in replica.kept()}) == 3


async def test_a_full_disk_is_said_and_leaves_nothing(replica: Replica, tuning: FakeTuning) -> None:
    adapter = tuning.add("tone", files={WEIGHTS: bytes(200_000), CONFIG: b"{}"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert await refused(replica.ask(adapter.id)) == (
            "STORE_FULL",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert replica.kept() == [] and replica.engine.loads == []
    assert await replica.ask(adapter.id)


async def test_a_folder_serves_one_replica(replica: Replica, tuning: FakeTuning) -> None:
    with pytest.raises(NotReady, match="another process uses"), AdapterStore.open(replica.folder):
        pass


async def test_loads_are_counted(stopped: Replica, tuning: FakeTuning) -> None:
    def loads(source: str) -> float:
        return REGISTRY.get_sample_value("tworoads_adapter_loads_total", {"source": source}) or 0

    before = loads("download"), loads("disk")
    adapter = tuning.add("tone")
    for _ in range(2):
        async with stopped.running() as replica:
            await replica.ask(adapter.id)
            await replica.ask(adapter.id)
    assert (loads("download"), loads("disk")) == (before[0] + 1, before[1] + 1)


def test_as_many_are_kept_as_share_a_step() -> None:
    with pytest.raises(ValueError, match="max_adapters"):
        Settings(model="x", max_loras=4, max_adapters=3)


def generating() -> float:
    method = {"method": f"/{NAME}/Generate"}
    return REGISTRY.get_sample_value("tworoads_calls_running", method) or 0


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)
