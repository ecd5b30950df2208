"""Adapters on disk: a folder for each, with its two files and what is known of it.

FOLDER/TENANT_SHA256/HASH/ never changes but for adapter.json; FOLDER/tmp/ is for what is half made.
Nothing is forced to the disk: whatever a power cut leaves, hashes are checked before it is used.
"""

import errno
import fcntl
import hashlib
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self

from pydantic import TypeAdapter

from services.runtime.errors import NotReady, Overloaded

WEIGHTS, CONFIG, ABOUT = "adapter_model.safetensors", "adapter_config.json", "adapter.json"
MOST_BYTES = {WEIGHTS: 4 * 1024**3, CONFIG: 1024**2}
SHA256 = re.compile("[0-9a-f]{64}")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

State = Literal["verifying", "ready", "unfaithful", "unmeasured"]


@dataclass(frozen=True)
class File:
    """One file of an adapter: bytes, and SHA-256 in lower-case hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class About:
    """What is known of an adapter. Only `state` and `accepted` ever change.

    Raises ValueError for what no adapter can be: paths are made of `hash` and the files' names.
    """

    id: str
    hash: str
    base_model: str
    base_model_hash: str
    prompt_version: str
    rank: int
    files: tuple[File, ...]
    state: State
    accepted: bool

    def __post_init__(self) -> None:
        if not SHA256.fullmatch(self.hash) or not self.id.endswith(f"@{self.hash[:12]}"):
            raise ValueError("the adapter's hash is not that of its name")
        if sorted(file.name for file in self.files) != sorted(MOST_BYTES):
            raise ValueError(f"an adapter has the files {WEIGHTS} and {CONFIG}")
        for file in self.files:
            if not 0 < file.size <= MOST_BYTES[file.name]:
                raise ValueError(f"{file.name} has {file.size} bytes")

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def served(self) -> bool:
        return self.state in ("ready", "unmeasured") or self.accepted


ABOUTS = TypeAdapter(About)


class AdapterStore:
    """The adapters of one replica. All methods block; those that write raise Overloaded
    (STORE_FULL)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._tmp = self._folder / "tmp"

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Self]:
        """Open the folder, which is created if need be. Raises NotReady (STORE_IN_USE) if another
        process has it open: each would remove what the other uses."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise NotReady("STORE_IN_USE", f"another process uses {folder}") from None
            store = cls(folder)
            shutil.rmtree(store._tmp, ignore_errors=True)
            store._tmp.mkdir(exist_ok=True)
            yield store

    def place(self, tenant: str, about: About) -> Path:
        """Return where an adapter belongs. `tenant` is the tenant's SHA-256."""
        place = self._folder / tenant / about.hash
        if not place.resolve().is_relative_to(self._folder):
            raise RuntimeError(f"{place} leads out of {self._folder}")
        return place

    def kept(self) -> list[tuple[str, About]]:
        """Return the adapters that are there, with their tenants' SHA-256, the oldest first.

        What is not in order is removed. The files' content is not looked at.
        """
        found: list[tuple[float, str, About]] = []
        for tenant in self._folder.iterdir():
            if not SHA256.fullmatch(tenant.name):
                continue
            for place in tenant.iterdir():
                try:
                    about = ABOUTS.validate_json((place / ABOUT).read_bytes())
                    if about.hash != place.name or place.is_symlink():
                        raise ValueError("it is not what its place says")
                    found.append((place.stat().st_mtime, tenant.name, about))
                except (OSError, ValueError):
                    self.remove(place)
            with suppress(OSError):  # there are others in it
                tenant.rmdir()
        found.sort(key=lambda each: each[0])
        return [(tenant, about) for _, tenant, about in found]

    def intact(self, place: Path, about: About) -> bool:
        """Return whether the files are what they were."""
        try:
            return all(_sha256(place / file.name) == file.sha256 for file in about.files)
        except OSError:
            return False

    def incoming(self, about: About) -> "Incoming":
        """Begin to take in an adapter's files."""
        with _translated():
            return Incoming(self._tmp / uuid.uuid4().hex, about)

    def remember(self, place: Path, about: About) -> None:
        """Write down what is known of an adapter that is there."""
        new = self._tmp / uuid.uuid4().hex
        with _translated():
            try:
                new.write_bytes(ABOUTS.dump_json(about))
                new.replace(place / ABOUT)
            finally:
                new.unlink(missing_ok=True)

    def remove(self, place: Path) -> None:
        """Remove an adapter, or what is in its place: all of it at once, as others see it."""
        gone = self._tmp / uuid.uuid4().hex
        with suppress(FileNotFoundError):
            place.rename(gone)
        if gone.is_dir() and not gone.is_symlink():
            shutil.rmtree(gone)
        else:
            gone.unlink(missing_ok=True)


class Incoming:
    """Takes the bytes of an adapter's files, one file after the other, and checks them.

    Its methods block and raise Overloaded (STORE_FULL) and NotReady (ADAPTER_ALTERED). Nothing of
    it is left after `close` unless it was kept.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.received = 0
        self._folder = folder
        self._about = about
        self._left = list(about.files)
        self._out: BinaryIO | None = None
        self._sum = hashlib.sha256()
        folder.mkdir(mode=0o700)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        with _translated():
            while rest:
                if not self._left:
                    raise altered("more came than its files have")
                file = self._left[0]
                if self._out is None:
                    self._out = (self._folder / file.name).open("wb")
                    self._sum = hashlib.sha256()
                part = rest[: file.size - self._out.tell()]
                self._out.write(part)
                self._sum.update(part)
                self.received += len(part)
                rest = rest[len(part) :]
                if self._out.tell() == file.size:
                    self._end(file)

    def keep(self, place: Path) -> None:
        """Put the files, which are whole, into their place; what a failed removal left goes."""
        old = self._folder.with_suffix(".old")
        with _translated():
            (self._folder / ABOUT).write_bytes(ABOUTS.dump_json(self._about))
            place.parent.mkdir(mode=0o700, exist_ok=True)
            with suppress(FileNotFoundError):
                place.rename(old)
            self._folder.rename(place)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self._out is not None:
            with suppress(OSError):  # what a full disk did not take
                self._out.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, file: File) -> None:
        assert self._out is not None
        self._out.close()
        self._out = None
        if self._sum.hexdigest() != file.sha256:
            raise altered(f"{file.name} has another hash than it should")
        del self._left[0]


def altered(what: str) -> NotReady:
    """Return what to raise for an adapter whose content is not what its name promises."""
    return NotReady("ADAPTER_ALTERED", f"the adapter was altered: {what}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Overloaded("STORE_FULL", "the disk for adapters is full") from error
