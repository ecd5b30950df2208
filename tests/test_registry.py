"""The registry: what is kept of an adapter, for whom, and what becomes of it."""

import hashlib
import json
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from services.runtime.database import Database
from services.runtime.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    NotReady,
    Overloaded,
    ServiceError,
)
from services.tuning.adapters.registry import DAY, Registry, etag
from services.tuning.adapters.verifying import Measured
from services.tuning.job import Adapter, Fidelity, Speed
from services.tuning.schema import SCHEMA
from tests.small_adapter import manifest, probes, small_base, tensors, write_adapter

FIDELITY = Fidelity(16, 32, 0.5, 0.9, 0.1, 0.7)
UNFAITHFUL = Measured("unfaithful", "LOG_PROBABILITIES_DIFFER", "too far", FIDELITY)
READY = Measured("ready", fidelity=FIDELITY, speeds=(Speed(1, 9.0, 10.0),))
EXAMPLES = [b'{"question": "a?", "answer": "b"}\n', b'{"question": "c?", "answer": "d"}\n']


class Kept:
    """A registry on its folder, with a clock that is set by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1_700_000_000.0
        self.base = small_base(folder.parent / "model")
        self.open()

    def open(self) -> None:
        self.database = Database(self.folder / "tuning.db", SCHEMA)
        self.registry = Registry(self.folder, self.database, lambda: self.now)

    def restart(self) -> None:
        self.database.close()
        self.open()

    def add(self, seed: int = 0, name: str = "house-style", tenant: str = "a", **how) -> Adapter:
        source = self.folder.parent / f"made-{seed}"
        if not source.exists():
            write_adapter(source, tensors(seed=seed))
        how = {"examples": EXAMPLES, "probes": probes()} | how
        return self.registry.add(
            tenant, manifest(self.base, name), source, how.pop("examples"), how.pop("probes"), **how
        )

    def place(self, adapter: Adapter) -> Path:
        tenant = hashlib.sha256(adapter.tenant.encode()).hexdigest()
        return self.folder / "adapters" / tenant / adapter.manifest.name / adapter.hash

    def ids(self, tenant: str = "a") -> list[str]:
        return [adapter.id for adapter in self.registry.page(tenant, 100, "")[0]]

    def left(self) -> list[Path]:
        """All files but the database."""
        return [p for top in ("adapters", "tmp") for p in (self.folder / top).rglob("*.*")]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    (tmp_path / "data").mkdir()
    kept = Kept(tmp_path / "data")
    yield kept
    kept.database.close()


def alter(path: Path, content: bytes | None = None) -> None:
    """Change one bit of a file that is read-only, and hide that by its old times."""
    before = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data) if content is None else content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(0o444)


def reason(call: Callable[[], object], kind: type[ServiceError]) -> str:
    with pytest.raises(kind) as error:
        call()
    return error.value.reason


def read(kept: Kept, adapter: Adapter, content="files", offset: int = 0) -> bytes:
    received = b""
    for begin, block in kept.registry.read(adapter, content, offset):
        assert begin == offset + len(received)
        assert 0 < len(block) <= 1024 * 1024
        received += block
    return received


def test_an_adapter_is_named_by_the_hash_of_what_it_is_and_was_made_from(kept: Kept) -> None:
    adapter = kept.add(job="j", held_out_loss=0.5, training_seconds=7.0)
    place = kept.place(adapter)
    assert sorted(p.name for p in place.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "examples.jsonl",
        "manifest.json",
        "probes.json",
    ]
    content = (place / "manifest.json").read_bytes()
    assert adapter.hash == hashlib.sha256(content).hexdigest()
    assert adapter.id == f"house-style@{adapter.hash[:12]}"
    written = json.loads(content)
    canonical = json.dumps(written, sort_keys=True, separators=(",", ":")).encode()
    assert content == canonical
    for file in written["files"]:
        data = (place / file["name"]).read_bytes()
        assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert all(p.stat().st_mode & 0o222 == 0 for p in place.iterdir())
    assert list((kept.folder / "tmp").iterdir()) == []
    assert (adapter.state, adapter.created, adapter.job) == ("verifying", kept.now, "j")
    assert (adapter.held_out_loss, adapter.training_seconds) == (0.5, 7.0)
    kept.restart()
    assert kept.registry.get("a", adapter.id) == adapter
    assert kept.registry.probes(adapter) == probes()


def test_other_weights_or_other_inputs_are_another_adapter(kept: Kept) -> None:
    source = write_adapter(kept.folder.parent / "source")
    made = manifest(kept.base)
    others = [
        replace(made, examples_hash="cd" * 32),
        replace(made, corpus="c"),
        replace(made, prompt_version="v2"),
        replace(made, options=replace(made.options, context="mixed")),
        replace(made, base_model_hash="ef" * 32),
    ]
    ids = {kept.registry.add("a", m, source, None, probes()).id for m in (made, *others)}
    assert len(ids | {kept.add(seed=1).id}) == 7


def test_an_adapter_with_too_few_scored_probes_is_unmeasured(kept: Kept) -> None:
    unscored = [replace(probe, tokens=()) for probe in probes(20)]
    for seed, some in enumerate((probes(15), unscored, [*probes(15), *unscored])):
        adapter = kept.add(seed, probes=some)
        assert (adapter.state, adapter.reason) == ("unmeasured", "TOO_FEW_PROBES")
    assert kept.add(seed=3).state == "verifying"


def test_a_name_means_the_newest_that_is_served_or_else_the_newest(kept: Kept) -> None:
    def newest() -> str:
        return kept.registry.get("a", "house-style").id

    first, second = kept.add(0), kept.add(1)
    assert newest() == second.id
    kept.registry.measured(first, READY)
    assert newest() == first.id
    kept.registry.measured(second, UNFAITHFUL)
    assert newest() == first.id
    kept.registry.accept("a", second.id, "a", "")
    assert newest() == second.id
    third = kept.add(2, probes=[])  # UNMEASURED is served
    assert newest() == third.id
    kept.registry.delete("a", third.id)
    assert newest() == second.id
    kept.add(3, name="house-style-2")
    assert newest() == second.id


BAD_NAMES = [
    "../x",
    "a/b",
    "",
    ".",
    "..",
    "-a",
    ".a",
    "a" * 65,
    "a" * 300,
    "House",
    "а",  # Cyrillic
    "ａ",  # full width
    "café",
    "a\0",
    "a\n",
    "a b",
    "a@" + "0" * 11,
    "a@" + "0" * 13,
    "a@" + "G" * 12,
    "a@" + "０" * 12,
    "../x@" + "0" * 12,
    "a@@" + "0" * 12,
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_what_is_no_name_is_refused_everywhere(name: str, kept: Kept) -> None:
    registry = kept.registry
    for call in (
        lambda: kept.add(name=name),
        lambda: registry.get("a", name),
        lambda: registry.accept("a", name, "a", ""),
        lambda: registry.delete("a", name),
    ):
        assert reason(call, InvalidInput) == "ADAPTER_NAME_INVALID"
    assert kept.left() == []


def test_only_a_full_name_is_accepted_or_deleted(kept: Kept) -> None:
    kept.add()
    for call in (kept.registry.delete, lambda t, i: kept.registry.accept(t, i, "a", "")):
        assert reason(lambda c=call: c("a", "house-style"), InvalidInput) == "ADAPTER_NAME_INVALID"


def test_what_is_unknown_deleted_or_of_another_tenant_is_not_found(kept: Kept) -> None:
    foreign, deleted = kept.add(0, tenant="b"), kept.add(1)
    kept.registry.delete("a", deleted.id)
    for id in (foreign.id, deleted.id, "house-style@" + "0" * 12):
        for call in (
            lambda i=id: kept.registry.get("a", i),
            lambda i=id: kept.registry.accept("a", i, "a", ""),
            lambda i=id: kept.registry.delete("a", i),
        ):
            assert reason(call, NotFound) == "ADAPTER_NOT_FOUND"
    assert reason(lambda: kept.registry.get("a", "house-style"), NotFound) == "ADAPTER_NOT_FOUND"
    for call in (
        lambda: kept.registry.measured(deleted, READY),
        lambda: kept.registry.probes(deleted),
        lambda: kept.registry.read(deleted, "files", 0),
    ):
        assert reason(call, NotFound) == "ADAPTER_NOT_FOUND"
    assert kept.ids() == []
    assert kept.ids("b") == [foreign.id]


def test_the_same_adapter_of_two_tenants_is_two(kept: Kept) -> None:
    mine, theirs = kept.add(tenant="a"), kept.add(tenant="b")
    kept.registry.delete("a", mine.id)
    kept.now += 2 * DAY
    kept.registry.sweep()
    assert kept.registry.get("b", theirs.id) == theirs
    assert read(kept, theirs)


def test_pages_show_the_newest_first_and_pass_over_what_is_altered(kept: Kept) -> None:
    added = [kept.add(seed) for seed in range(7)]
    alter(kept.place(added[3]) / "adapter_model.safetensors")
    kept.registry.delete("a", added[5].id)
    shown, token = [], ""
    for size in (2, 2, 2):
        page, token = kept.registry.page("a", size, token)
        shown += [adapter.id for adapter in page]
        assert (token == "") == (len(shown) == 5)
    assert shown == [added[i].id for i in (6, 4, 2, 1, 0)]


@pytest.mark.parametrize("token", ["x", "é", "MA==", "LTE=", "MS41", "a" * 300, "OTk5" * 90])
def test_a_page_token_of_nobody_is_refused(token: str, kept: Kept) -> None:
    assert reason(lambda: kept.registry.page("a", 5, token), InvalidInput) == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "adapter_config.json",
        "manifest.json",
        "probes.json",
        "examples.jsonl",
    ],
)
def test_an_altered_adapter_is_neither_listed_nor_found_until_it_is_added_again(
    name: str, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = kept.add()
    kept.registry.measured(adapter, READY)
    assert kept.ids() == [adapter.id]
    alter(kept.place(adapter) / name)
    for _ in range(2):
        with caplog.at_level(logging.ERROR):
            assert kept.ids() == []
            for asked in (adapter.id, "house-style"):
                assert reason(lambda a=asked: kept.registry.get("a", a), NotFound)
        assert [record.getMessage() for record in caplog.records] == [
            f"the files of {adapter.id} are not those that were registered"
        ]
    kept.restart()
    assert kept.ids() == []
    assert kept.add().state == "ready"
    assert kept.registry.get("a", "house-style").fidelity == FIDELITY
    assert kept.ids() == [adapter.id]


def test_a_half_written_adapter_is_never_seen(kept: Kept) -> None:
    adapter = kept.add()
    (kept.place(adapter) / "adapter_config.json").unlink()
    assert kept.ids() == [] and kept.registry.verifying() == []
    kept.add()
    assert kept.ids() == [adapter.id]


def test_files_that_a_crash_left_without_a_row_are_invisible_until_added_again(kept: Kept) -> None:
    adapter = kept.add(examples=None, probes=[])
    with kept.database.transaction() as rows:
        rows.execute("DELETE FROM adapters")
    kept.restart()
    assert kept.ids() == []
    assert reason(lambda: kept.registry.get("a", adapter.id), NotFound) == "ADAPTER_NOT_FOUND"
    again = kept.add()
    assert again.id == adapter.id and again.state == "verifying"
    assert read(kept, again, "examples") == b"".join(EXAMPLES)


def test_what_a_crash_left_is_swept_after_a_day(kept: Kept) -> None:
    kept.add(0)
    with kept.database.transaction() as rows:
        rows.execute("DELETE FROM adapters")
    (kept.folder / "tmp" / "half").mkdir()
    (kept.folder / "tmp" / "half" / "a.b").touch()
    (kept.folder / "tmp" / "lone.file").touch()
    stays = kept.add(1, name="other")
    kept.now = (kept.folder / "tmp" / "half").stat().st_mtime + DAY - 600
    kept.registry.sweep()
    assert len(kept.left()) == 12
    kept.now += 3600
    kept.registry.sweep()
    assert {p.parent for p in kept.left()} == {kept.place(stays)}
    assert kept.registry.get("a", stays.id) == stays


def test_a_deleted_adapter_is_hidden_at_once_and_its_files_go_a_day_later(kept: Kept) -> None:
    adapter = kept.add()
    kept.registry.delete("a", adapter.id)
    assert kept.ids() == [] and kept.registry.verifying() == []
    kept.now += DAY - 1
    kept.registry.sweep()
    assert kept.place(adapter).is_dir()
    kept.now += 2
    kept.registry.sweep()
    assert kept.left() == []
    assert list((kept.folder / "adapters").iterdir()) == []
    kept.registry.sweep()


def test_the_same_adapter_again_is_returned_as_it_stands(kept: Kept) -> None:
    adapter = kept.add()
    stands = kept.registry.measured(adapter, UNFAITHFUL)
    stands = kept.registry.accept("a", stands.id, "owner", "")
    kept.now += 10
    assert kept.add(job="other", probes=[]) == stands
    assert kept.ids() == [adapter.id]
    assert list((kept.folder / "tmp").iterdir()) == []


def test_a_deleted_adapter_added_again_begins_anew(kept: Kept) -> None:
    first = kept.add(0)
    kept.registry.measured(first, UNFAITHFUL)
    kept.registry.accept("a", first.id, "owner", "")
    second = kept.add(1)
    kept.registry.delete("a", first.id)
    kept.now += DAY - 1
    again = kept.add(0)
    assert (again.id, again.state, again.accepted_by) == (first.id, "verifying", "")
    assert kept.ids() == [first.id, second.id]
    kept.now += 2
    kept.registry.sweep()
    assert read(kept, again)
    assert kept.registry.get("a", first.id) == again


def test_adding_the_same_at_once_makes_one(kept: Kept) -> None:
    kept.add(0, name="other")  # so that the source is there
    added: list[Adapter] = []
    threads = [threading.Thread(target=lambda: added.append(kept.add(0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 8 and len({adapter.id for adapter in added}) == 1
    assert len(kept.ids()) == 2
    assert list((kept.folder / "tmp").iterdir()) == []


def test_the_etag_changes_with_every_change_and_only_then(kept: Kept) -> None:
    adapter = kept.add()
    seen = [etag(adapter), etag(kept.registry.measured(adapter, UNFAITHFUL))]
    seen.append(etag(kept.registry.accept("a", adapter.id, "owner", "")))
    assert len(set(seen)) == 3
    kept.restart()
    assert etag(kept.registry.get("a", adapter.id)) == seen[-1]


def test_only_what_is_unfaithful_is_accepted_and_again_changes_nothing(kept: Kept) -> None:
    adapter = kept.add()

    def accept(tag: str = "") -> Adapter:
        return kept.registry.accept("a", adapter.id, "owner", tag)

    assert reason(accept, NotReady) == "ADAPTER_NOT_UNFAITHFUL"
    kept.registry.measured(adapter, READY)
    assert reason(accept, NotReady) == "ADAPTER_NOT_UNFAITHFUL"
    unfaithful = kept.registry.measured(adapter, UNFAITHFUL)
    assert not unfaithful.served
    assert reason(lambda: accept(etag(adapter)), Conflict) == "ETAG_MISMATCH"
    accepted = accept(etag(unfaithful))
    assert (accepted.accepted_by, accepted.accepted) == ("owner", kept.now)
    assert accepted.state == "unfaithful" and accepted.served
    kept.now += 10
    assert accept() == accept(etag(accepted)) == accepted
    kept.restart()
    assert kept.registry.get("a", adapter.id) == accepted


def test_what_is_still_to_be_measured_is_known_after_a_restart(kept: Kept) -> None:
    mine, theirs = kept.add(0), kept.add(1, tenant="b")
    kept.registry.measured(kept.add(2), READY)
    kept.add(3, probes=[])
    kept.restart()
    assert {(a.tenant, a.id) for a in kept.registry.verifying()} == {
        ("a", mine.id),
        ("b", theirs.id),
    }


def test_content_is_read_from_any_offset(kept: Kept) -> None:
    source = write_adapter(kept.folder.parent / "large")
    large = bytes(range(256)) * 10_000
    (source / "adapter_model.safetensors").write_bytes(large)
    adapter = kept.registry.add("a", manifest(kept.base), source, EXAMPLES, [])
    whole = large + (source / "adapter_config.json").read_bytes()
    assert [file.name for file in adapter.manifest.files] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]
    for offset in (0, 1, 1024 * 1024, len(large) - 1, len(large), len(large) + 1, len(whole)):
        assert read(kept, adapter, offset=offset) == whole[offset:]
    lines = b"".join(EXAMPLES)
    for offset in (0, 5, len(lines)):
        assert read(kept, adapter, "examples", offset) == lines[offset:]
    for content, size in (("files", len(whole)), ("examples", len(lines))):
        for offset in (size + 1, 2**63, 2**64 - 1):
            beyond = lambda c=content, o=offset: kept.registry.read(adapter, c, o)  # noqa: E731
            assert reason(beyond, InvalidInput) == "OFFSET_OUT_OF_RANGE"


def test_examples_that_nobody_sent_are_not_found(kept: Kept) -> None:
    adapter = kept.add(examples=None)
    missing = lambda: kept.registry.read(adapter, "examples", 0)  # noqa: E731
    assert reason(missing, NotFound) == "EXAMPLES_NOT_FOUND"
    assert read(kept, kept.add(1, examples=[]), "examples") == b""


@pytest.mark.parametrize("offset", [0, 100])
def test_an_altered_adapter_is_not_read(offset: int, kept: Kept) -> None:
    adapter = kept.add()
    alter(kept.place(adapter) / "adapter_model.safetensors")
    altered = lambda: kept.registry.read(adapter, "files", offset)  # noqa: E731
    assert reason(altered, NotReady) == "ADAPTER_ALTERED"


@pytest.mark.parametrize("content", [None, b""])
def test_what_is_altered_while_it_is_read_is_never_read_to_its_end(
    content: bytes | None, kept: Kept
) -> None:
    adapter = kept.add()
    blocks = kept.registry.read(adapter, "files", 0)
    alter(kept.place(adapter) / "adapter_model.safetensors", content)
    assert reason(lambda: list(blocks), NotReady) == "ADAPTER_ALTERED"
    assert kept.ids() == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Refuse to write more into a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_refuses_an_adapter_and_keeps_nothing_of_it(kept: Kept) -> None:
    kept.add(0)
    before = sorted(kept.left())
    kept.add(1, name="other")  # so that the source is there
    kept.registry.delete("a", kept.registry.get("a", "other").id)
    kept.now += 2 * DAY
    kept.registry.sweep()
    with files_of_at_most(1000):
        assert reason(lambda: kept.add(1), Overloaded) == "STORE_FULL"
    assert sorted(kept.left()) == before
    assert kept.add(1).state == "verifying"


def test_a_full_database_refuses_an_adapter_and_keeps_nothing_of_it(kept: Kept) -> None:
    kept.add(0)
    with kept.database.transaction() as rows:
        [pages] = rows.execute("PRAGMA page_count").fetchone()
        rows.execute(f"PRAGMA max_page_count = {pages}")
    before: list[Path] = []
    for seed in range(1, 20):
        before = sorted(kept.left())
        try:
            kept.add(seed)
        except Overloaded as error:
            assert error.reason == "STORE_FULL"
            break
    else:
        pytest.fail("the database never got full")
    assert sorted(kept.left()) == before
    with kept.database.transaction() as rows:
        rows.execute(f"PRAGMA max_page_count = {pages + 100}")
    assert kept.add(seed).state == "verifying"
