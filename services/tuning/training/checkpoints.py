"""Checkpoints that are whole or not there, and files that a full disk does not leave by halves."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.runtime import disk
from services.tuning.training.trainer import TrainingFailed

SEAL = "whole.json"  # a checkpoint's last file: the sizes of the others
FULL = ("No space left", "os error 28", "os error 27", "os error 122", "PytorchStreamWriter failed")


@contextmanager
def saving() -> Iterator[None]:
    """Turn a full disk, however a library says it, into TrainingFailed (STORE_FULL)."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno in disk.FULL
        if known or any(words in str(error) for words in FULL):
            raise TrainingFailed(
                "STORE_FULL", "the disk is full: what was trained cannot be saved"
            ) from error
        raise


def seal(checkpoint: Path, **facts: Any) -> None:
    """Say that a checkpoint is whole, once all of it is on the disk. `facts` come back from
    `newest`."""
    sizes = {}
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    write_json(checkpoint / SEAL, {**facts, "sizes": sizes})
    disk.sync(checkpoint.parent)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its facts, None without one. Removes the others that
    are not whole."""
    found = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step):
        facts = _facts(checkpoint)
        if facts is None:
            shutil.rmtree(checkpoint)
        else:
            found = checkpoint, facts
    return found


def keep(folder: Path, *wanted: str | Path | None) -> None:
    """Remove all checkpoints but these."""
    names = {Path(path).name for path in wanted if path}
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name not in names:
            shutil.rmtree(checkpoint)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is whole or not there."""
    half = path.with_suffix(".half")
    with half.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    half.rename(path)
    disk.sync(path.parent)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _facts(checkpoint: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads((checkpoint / SEAL).read_text())
        sizes = facts.pop("sizes")
        whole = all((checkpoint / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError):
        return None
    return facts if whole else None
