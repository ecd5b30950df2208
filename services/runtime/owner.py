"""One process owns a data folder: two queues would do everything twice."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def owned(folder: Path) -> Iterator[Path]:
    """Make the folder if need be and keep other processes from it while the block runs.

    Raises OSError if another process has it. The kernel frees it however a process ends.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process uses {folder}") from None
        yield folder
