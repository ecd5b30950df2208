"""The adapters that are kept: files that never change, named by their hash, and a row for each.

An adapter exists when its row does, and the row is written last. A folder without one is what a
crash has left; a row whose files are no longer what was registered is passed over.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from services.runtime import disk
from services.runtime.database import Database
from services.runtime.disk import File
from services.runtime.errors import Conflict, InvalidInput, NotFound, NotReady
from services.tuning.adapters import files as adapter_files
from services.tuning.adapters.verifying import LEAST_PROBES, Measured, measurable
from services.tuning.job import Adapter, Manifest, Probe

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SHORT = 12  # digits of the hash in an adapter's id
ID = re.compile(rf"{NAME.pattern}@[0-9a-f]{{{SHORT}}}")
MANIFEST = "manifest.json"
EXAMPLES = "examples.jsonl"
PROBES = "probes.json"
DAY = 24 * 60 * 60.0
ROWS = 100  # that are read at once
LAST = 2**63 - 1  # the highest number of a row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What the database has of an adapter. `beside` are the files that generation does not load."""

    adapter: Adapter
    beside: tuple[File, ...]

    def files(self) -> tuple[File, ...]:
        return (*self.adapter.manifest.files, *self.beside)


RECORD = TypeAdapter(Record)
PROBE_LIST = TypeAdapter(list[Probe])


def check_name(name: str) -> None:
    """Raise InvalidInput (ADAPTER_NAME_INVALID) unless an adapter may be called so."""
    if not NAME.fullmatch(name):
        raise _bad_name()


def check_id(id: str) -> None:
    """Raise InvalidInput (ADAPTER_NAME_INVALID) unless it is NAME@HASH."""
    if not ID.fullmatch(id):
        raise _bad_name()


def etag(adapter: Adapter) -> str:
    """Return a text that changes whenever anything about the adapter does."""
    return hashlib.sha256(_json(adapter)).hexdigest()[:16]


_etag = etag  # where an argument has that name


class Registry:
    """Keeps adapters in FOLDER/adapters and `database`. All methods block and may run in threads.

    What belongs to another tenant, was deleted or altered does not exist: NotFound
    (ADAPTER_NOT_FOUND). Whatever writes raises Overloaded (STORE_FULL) when the disk is full, and
    leaves nothing behind then. `clock` gives seconds since 1970.
    """

    def __init__(
        self, folder: Path, database: Database, clock: Callable[[], float] = time.time
    ) -> None:
        self._adapters = folder / "adapters"
        self._tmp = folder / "tmp"
        self._database = database
        self._clock = clock
        self._placing = threading.Lock()
        self._checked: dict[Path, tuple[object, bool]] = {}
        self._adapters.mkdir(parents=True, exist_ok=True)
        self._tmp.mkdir(exist_ok=True)

    def add(
        self,
        tenant: str,
        manifest: Manifest,
        source: Path,
        examples: Iterable[bytes] | None,
        probes: Sequence[Probe],
        *,
        job: str = "",
        held_out_loss: float | None = None,
        training_seconds: float | None = None,
    ) -> Adapter:
        """Register the checked adapter in the folder `source`, which stays. `manifest.files` is
        filled in here; `examples` are those that it was trained on, None if they are unknown.

        Returns the adapter as it stands if it is there already. One that was deleted is registered
        anew. Raises InvalidInput (ADAPTER_NAME_INVALID).
        """
        check_name(manifest.name)
        stage = self._tmp / uuid.uuid4().hex
        try:
            with disk.space():
                stage.mkdir()
                files = tuple(
                    disk.write(stage / name, disk.read(source / name))
                    for name in adapter_files.NAMES
                )
                manifest = replace(manifest, files=files)
                described = disk.write(stage / MANIFEST, [_json(manifest)])
                digest = described.sha256
                measured_by = [PROBE_LIST.dump_json(list(probes))]
                beside = [described, disk.write(stage / PROBES, measured_by)]
                if examples is not None:
                    beside.append(disk.write(stage / EXAMPLES, examples))
                disk.sync(stage)
                enough = len(measurable(probes)) >= LEAST_PROBES
                adapter = Adapter(
                    id=f"{manifest.name}@{digest[:SHORT]}",
                    tenant=tenant,
                    hash=digest,
                    manifest=manifest,
                    state="verifying" if enough else "unmeasured",
                    reason="" if enough else "TOO_FEW_PROBES",
                    job=job,
                    held_out_loss=held_out_loss,
                    training_seconds=training_seconds,
                    created=self._clock(),
                )
                return self._commit(Record(adapter, tuple(beside)), stage)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def get(self, tenant: str, asked: str) -> Adapter:
        """Return the adapter NAME@HASH, or the newest NAME that is served, or else the newest.

        Raises InvalidInput (ADAPTER_NAME_INVALID).
        """
        if ID.fullmatch(asked):
            return self._record(tenant, asked).adapter
        check_name(asked)
        newest: Adapter | None = None
        for _, record in self._rows("tenant = ? AND name = ?", tenant, asked):
            if self._intact(record):
                if record.adapter.served:
                    return record.adapter
                newest = newest or record.adapter
        if newest is None:
            raise _unknown()
        return newest

    def page(self, tenant: str, size: int, token: str) -> tuple[list[Adapter], str]:
        """Return up to `size` adapters, the newest first, from where `token` says, and the token of
        the next page; empty ones are the beginning and the end.

        Raises InvalidInput (PAGE_TOKEN_INVALID).
        """
        found: list[Adapter] = []
        last = _number(token)
        for number, record in self._rows("tenant = ?", tenant, before=last):
            if self._intact(record):
                if len(found) == size:
                    return found, _token(last)
                found.append(record.adapter)
                last = number
        return found, ""

    def verifying(self) -> list[Adapter]:
        """Return the adapters of all tenants that are still to be measured."""
        state = "json_extract(adapter, '$.adapter.state') = ?"
        rows = self._rows(state, "verifying")
        return [record.adapter for _, record in rows if self._intact(record)]

    def unmeasured(self, reason: str) -> list[Adapter]:
        """Return the adapters of all tenants that are UNMEASURED for this reason."""
        state = "json_extract(adapter, '$.adapter.state') = 'unmeasured'"
        rows = self._rows(f"{state} AND json_extract(adapter, '$.adapter.reason') = ?", reason)
        return [record.adapter for _, record in rows if self._intact(record)]

    def probes(self, adapter: Adapter) -> list[Probe]:
        """Return what to measure an adapter by."""
        self._record(adapter.tenant, adapter.id)
        return PROBE_LIST.validate_json((self._place(adapter) / PROBES).read_bytes())

    def measured(self, adapter: Adapter, measured: Measured) -> Adapter:
        """Keep what was measured, and return the adapter as it stands now."""
        return self._change(
            adapter.tenant,
            adapter.id,
            lambda standing: replace(
                standing,
                state=measured.state,
                reason=measured.reason,
                fidelity=measured.fidelity,
                speeds=measured.speeds,
            ),
        )

    def accept(self, tenant: str, id: str, by: str, etag: str) -> Adapter:
        """Let an UNFAITHFUL adapter be served. `id` is NAME@HASH, `by` who says so.

        Raises InvalidInput (ADAPTER_NAME_INVALID), NotReady (ADAPTER_NOT_UNFAITHFUL) and Conflict
        (ETAG_MISMATCH) if the adapter has another etag than this, which may be empty.
        """

        def accepted(standing: Adapter) -> Adapter:
            if etag and etag != _etag(standing):
                raise Conflict("ETAG_MISMATCH", "the adapter has changed since it was read")
            if standing.state != "unfaithful":
                raise NotReady("ADAPTER_NOT_UNFAITHFUL", "only an UNFAITHFUL adapter is accepted")
            if standing.accepted_by:
                return standing
            return replace(standing, accepted_by=by, accepted=self._clock())

        check_id(id)
        self._record(tenant, id)
        return self._change(tenant, id, accepted)

    def delete(self, tenant: str, id: str) -> None:
        """Hide the adapter NAME@HASH; `sweep` removes its files a day later.

        Raises InvalidInput (ADAPTER_NAME_INVALID).
        """
        check_id(id)
        with self._database.transaction() as rows:
            _live(rows, tenant, id)
            rows.execute(
                "UPDATE adapters SET deleted = ? WHERE tenant = ? AND id = ?",
                (self._clock(), tenant, id),
            )

    def read(
        self, adapter: Adapter, content: Literal["files", "examples"], offset: int
    ) -> Iterator[tuple[int, bytes]]:
        """Return the content from `offset` on: blocks of 1 byte to 1 MiB, and where each begins.

        Raises NotFound (EXAMPLES_NOT_FOUND), InvalidInput (OFFSET_OUT_OF_RANGE), and NotReady
        (ADAPTER_ALTERED) at once, or before the last block of a file that is read from its start.
        """
        with self._database.transaction() as rows:
            record = _live(rows, adapter.tenant, adapter.id)
        files = adapter.manifest.files
        if content == "examples":
            files = tuple(file for file in record.beside if file.name == EXAMPLES)
            if not files:
                raise NotFound("EXAMPLES_NOT_FOUND", "this adapter came without its examples")
        size = sum(file.size for file in files)
        if not 0 <= offset <= size:
            raise InvalidInput(
                "OFFSET_OUT_OF_RANGE", f"the content has {size} bytes", size=str(size)
            )
        if not self._intact(record):
            raise _altered()
        return self._blocks(record, files, offset)

    def sweep(self) -> None:
        """Remove what was deleted a day ago, and what a crash has left a day ago."""
        before = self._clock() - DAY
        old: list[Path] = []
        try:
            with self._placing:
                self._put_old_aside(before, old)
        finally:  # what was put aside makes room, even if the database has none left
            for path in old:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _put_old_aside(self, before: float, old: list[Path]) -> None:
        old += [path for path in self._tmp.iterdir() if _older(path, before)]
        with self._database.transaction() as rows:
            records = [
                (row["number"], row["deleted"], RECORD.validate_json(row["adapter"]))
                for row in rows.execute("SELECT number, deleted, adapter FROM adapters")
            ]
        kept = {self._place(record.adapter) for _, _, record in records}
        for place in self._adapters.glob("*/*/*"):
            if place not in kept and _older(place, before):
                old += self._put_aside(place)
        for number, deleted, record in records:
            if 0 < deleted < before:
                old += self._put_aside(self._place(record.adapter))
                with self._database.transaction() as rows:
                    rows.execute("DELETE FROM adapters WHERE number = ?", (number,))
        for empty in (*self._adapters.glob("*/*"), *self._adapters.glob("*")):
            with suppress(OSError):
                empty.rmdir()

    def _commit(self, record: Record, stage: Path) -> Adapter:
        """Move the files to their place, then write the row; undo the first if the second fails."""
        adapter = record.adapter
        place = self._place(adapter)
        with self._placing:
            with self._database.transaction() as rows:
                standing = _find(rows, adapter.tenant, adapter.id)
            if standing is not None:
                if standing.adapter.hash != adapter.hash:
                    raise InvalidInput(
                        "ADAPTER_NAME_INVALID", f"there is another {adapter.id}: choose a new name"
                    )
                if self._intact(standing):
                    return standing.adapter
                record = replace(record, adapter=standing.adapter)  # its files are mended
            place.parent.mkdir(parents=True, exist_ok=True)
            aside = self._put_aside(place)  # deleted, altered, or without a row
            try:
                stage.rename(place)
                for folder in (place.parent, place.parent.parent, self._adapters):
                    disk.sync(folder)
                with self._database.transaction() as rows:
                    _store(rows, record, standing=standing is not None)
            except BaseException:
                if place.exists():
                    place.rename(stage)
                for path in aside:
                    path.rename(place)
                raise
        for path in aside:
            shutil.rmtree(path, ignore_errors=True)
        return record.adapter

    def _put_aside(self, place: Path) -> list[Path]:
        """Move a folder to where it can be removed bit by bit; return where, if it was there."""
        aside = self._tmp / uuid.uuid4().hex
        try:
            place.rename(aside)
        except FileNotFoundError:
            return []
        self._checked.pop(place, None)
        return [aside]

    def _record(self, tenant: str, id: str) -> Record:
        """Return an adapter that is there and as it was registered. Raises NotFound."""
        with self._database.transaction() as rows:
            record = _live(rows, tenant, id)
        if not self._intact(record):
            raise _unknown()
        return record

    def _rows(
        self, where: str, *values: object, before: int = LAST
    ) -> Iterator[tuple[int, Record]]:
        """Return numbers and records of what is not deleted, the newest first."""
        while True:
            with self._database.transaction() as rows:
                found = rows.execute(
                    f"SELECT number, adapter FROM adapters WHERE {where} AND deleted = 0"
                    " AND number < ? ORDER BY number DESC LIMIT ?",
                    (*values, before, ROWS),
                ).fetchall()
            for row in found:
                yield row["number"], RECORD.validate_json(row["adapter"])
            if len(found) < ROWS:
                return
            before = found[-1]["number"]

    def _change(self, tenant: str, id: str, change: Callable[[Adapter], Adapter]) -> Adapter:
        with self._database.transaction() as rows:
            record = _live(rows, tenant, id)
            record = replace(record, adapter=change(record.adapter))
            _store(rows, record, standing=True)
            return record.adapter

    def folder(self, tenant: str) -> Path:
        """Return the folder of a tenant's adapters, in which the deleted ones are for a day."""
        return self._adapters / hashlib.sha256(tenant.encode()).hexdigest()

    def _place(self, adapter: Adapter) -> Path:
        return self.folder(adapter.tenant) / adapter.manifest.name / adapter.hash

    def _intact(self, record: Record) -> bool:
        """Say whether the files are what was registered. They are read again only when they were
        touched since, as their times of change say, which nobody can set."""
        place = self._place(record.adapter)
        seen = _seen(place, record.files())
        known = self._checked.get(place)
        if known is not None and known[0] == seen:
            return known[1]
        intact = seen is not None and all(
            _sha256(place / file.name) == file.sha256 for file in record.files()
        )
        if not intact:
            log.error("the files of %s are not those that were registered", record.adapter.id)
        self._checked[place] = (seen, intact)
        return intact

    def _blocks(
        self, record: Record, files: Sequence[File], offset: int
    ) -> Iterator[tuple[int, bytes]]:
        place = self._place(record.adapter)
        begin = 0  # of the file, in the whole
        for file in files:
            at, end = max(offset, begin), begin + file.size
            if at < end:
                from_start = at == begin
                digest = hashlib.sha256()
                with (place / file.name).open("rb") as opened:
                    opened.seek(at - begin)
                    while at < end:
                        block = opened.read(min(disk.BLOCK, end - at))
                        digest.update(block)
                        whole = from_start and at + len(block) == end
                        if not block or (whole and digest.hexdigest() != file.sha256):
                            self._checked[place] = (_seen(place, record.files()), False)
                            raise _altered()
                        yield at, block
                        at += len(block)
            begin = end


def _find(rows: sqlite3.Connection, tenant: str, id: str) -> Record | None:
    row = rows.execute(
        "SELECT adapter FROM adapters WHERE tenant = ? AND id = ? AND deleted = 0", (tenant, id)
    ).fetchone()
    return None if row is None else RECORD.validate_json(row["adapter"])


def _live(rows: sqlite3.Connection, tenant: str, id: str) -> Record:
    record = _find(rows, tenant, id)
    if record is None:
        raise _unknown()
    return record


def _store(rows: sqlite3.Connection, record: Record, standing: bool) -> None:
    """Write a record: over the one that stands, or as a new one in the place of a deleted one."""
    adapter = record.adapter
    value = RECORD.dump_json(record).decode()
    if standing:
        rows.execute(
            "UPDATE adapters SET adapter = ? WHERE tenant = ? AND id = ?",
            (value, adapter.tenant, adapter.id),
        )
        return
    rows.execute("DELETE FROM adapters WHERE tenant = ? AND id = ?", (adapter.tenant, adapter.id))
    rows.execute(
        "INSERT INTO adapters (tenant, id, name, adapter) VALUES (?, ?, ?, ?)",
        (adapter.tenant, adapter.id, adapter.manifest.name, value),
    )


def _json(value: Manifest | Adapter) -> bytes:
    """Return the one JSON that a value has."""
    return json.dumps(asdict(value), sort_keys=True, separators=(",", ":")).encode()


def _seen(place: Path, files: Sequence[File]) -> object:
    """Return what changes when somebody writes to the files; None if one is missing."""
    try:
        states = [os.lstat(place / file.name) for file in files]
    except OSError:
        return None
    return [(state.st_ino, state.st_size, state.st_ctime_ns) for state in states]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _older(path: Path, than: float) -> bool:
    try:
        return path.stat().st_mtime < than
    except FileNotFoundError:  # whoever made it has removed it
        return False


def _token(number: int) -> str:
    return base64.urlsafe_b64encode(str(number).encode()).decode()


def _number(token: str) -> int:
    if not token:
        return LAST
    try:
        number = int(base64.b64decode(token, altchars=b"-_", validate=True))
        if 0 < number <= LAST:
            return number
    except (binascii.Error, ValueError):
        pass
    raise InvalidInput("PAGE_TOKEN_INVALID", "there is no page of this token")


def _unknown() -> NotFound:
    return NotFound("ADAPTER_NOT_FOUND", "there is no adapter of this name")


def _bad_name() -> InvalidInput:
    return InvalidInput(
        "ADAPTER_NAME_INVALID",
        "an adapter's name is 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a letter or a"
        f" digit; an adapter is NAME@HASH, with {SHORT} digits of its hash",
    )


def _altered() -> NotReady:
    return NotReady("ADAPTER_ALTERED", "the adapter's files were altered: it is served no more")
