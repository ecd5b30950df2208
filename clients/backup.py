"""Copies of a stack's data folder, each file with its hash, and back.

A backup is a folder: `data/` as the stack had it, and `manifest.json`, written last, so that one
that broke off is none. What a stack makes again by itself, such as logs and fetched adapters, is
left out.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from clients.local import LocalError

LEFT_OUT = ("generation", "logs", "lock", "state.json", "weaviate.key")  # at the top
TEMPORARY = ("tmp", "lock")  # of a service
MANIFEST = "manifest.json"
BLOCK = 1024 * 1024

Tell = Callable[[int, int], None]  # bytes that are done, of all


@dataclass(frozen=True)
class Copied:
    """A file of a backup; `path` is relative to the data folder, `size` in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a backup has. `created` is in ISO 8601, UTC; `version` that of tworoads."""

    version: str
    created: str
    files: tuple[Copied, ...]

    @property
    def size(self) -> int:
        """All its bytes."""
        return sum(file.size for file in self.files)


def back_up(data: Path, target: Path, tell: Tell) -> Manifest:
    """Copy the folder of a stack that is down into the new folder `target`.

    Raises LocalError if there is nothing to copy, `target` is taken, or the disk is full; then
    nothing is left there.
    """
    if not data.is_dir():
        raise LocalError(f"There is no data in {data}.")
    if target.exists() and any(target.iterdir()):
        raise LocalError(f"{target} is not empty; a backup is written to a new folder.")
    if target.is_relative_to(data):
        raise LocalError(f"{target} is inside of the data folder; write the backup elsewhere.")
    paths = sorted(_kept(data))
    if not paths:
        raise LocalError(f"There is no data in {data}.")
    sizes = [path.stat().st_size for path in paths]
    done, files = 0, list[Copied]()
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / "data").mkdir(mode=0o700)
        for path, size in zip(paths, sizes, strict=True):
            relative = path.relative_to(data)
            digest = _copy(path, target / "data" / relative)
            files.append(Copied(str(relative), size, digest))
            done += size
            tell(done, sum(sizes))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(version("tworoads"), now, tuple(files))
        _write(target / MANIFEST, json.dumps(asdict(manifest), indent=1))
    except BaseException as error:
        shutil.rmtree(target if made else target / "data", ignore_errors=True)
        if isinstance(error, OSError):
            raise LocalError(f"The backup failed: {error.strerror or error}.") from error
        raise
    return manifest


def restore(source: Path, data: Path, tell: Tell) -> Manifest:
    """Make the data folder of a stack from a backup; all of it, or nothing.

    Raises LocalError if `source` is no whole backup, a file of it is not what was written or is a
    link, `data` is there already, or the disk is full.
    """
    manifest = read_manifest(source)
    if data.exists() and any(_kept(data)):
        raise LocalError(f"There is data in {data}; move that folder away first.")
    stage = data.with_name(f".{data.name}.restoring")
    shutil.rmtree(stage, ignore_errors=True)
    done, root = 0, (source / "data").resolve()
    try:
        stage.mkdir(mode=0o700, parents=True)
        for file in manifest.files:
            place = root / file.path
            if place.resolve() != place or (place.exists() and not place.is_file()):
                raise LocalError(f"{file.path} of the backup is no file; nothing was restored.")
            try:
                digest = _copy(place, stage / file.path)
            except FileNotFoundError:
                raise LocalError(f"The backup lacks {file.path}.") from None
            if digest != file.sha256:
                raise LocalError(f"{file.path} of the backup is damaged; nothing was restored.")
            done += file.size
            tell(done, manifest.size)
        data.mkdir(parents=True, exist_ok=True)
        for left in data.iterdir():  # what `_kept` leaves out
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        stage.replace(data)
    except OSError as error:
        raise LocalError(f"Restoring failed: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return manifest


def read_manifest(source: Path) -> Manifest:
    """Return what a backup has. Raises LocalError if it is none."""
    try:
        fields = json.loads((source / MANIFEST).read_text())
        files = tuple(Copied(**file) for file in fields.pop("files"))
        manifest = Manifest(**fields, files=files)
    except (OSError, ValueError, TypeError, KeyError):
        raise LocalError(f"{source} holds no whole backup.") from None
    for file in files:
        if not isinstance(file.path, str) or not isinstance(file.size, int) or "\0" in file.path:
            raise LocalError(f"{source} holds no whole backup.")
        path = Path(file.path)
        if path.is_absolute() or ".." in path.parts:
            raise LocalError(f"{source} names a file outside of it: {file.path}.")
        if not _belongs(path.parts):  # such as a list of processes, which `down` would end
            raise LocalError(f"{source} names a file that no backup has: {file.path!r}.")
    return manifest


def _kept(data: Path) -> Iterator[Path]:
    for path in data.rglob("*"):
        if _belongs(path.relative_to(data).parts) and path.is_file() and not path.is_symlink():
            yield path


def _belongs(parts: tuple[str, ...]) -> bool:
    """Say whether what lies there in a data folder belongs into a backup."""
    temporary = len(parts) > 1 and parts[1] in TEMPORARY
    return bool(parts) and parts[0] not in LEFT_OUT and not temporary


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return the SHA-256 of what was written; it is on the disk then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as old, target.open("wb") as new:
        while block := old.read(BLOCK):
            digest.update(block)
            new.write(block)
        os.fsync(new.fileno())
    target.chmod(source.stat().st_mode & 0o777)  # and never one that runs as its owner
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
