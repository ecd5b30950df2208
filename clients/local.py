"""A stack on this machine: where it keeps its things, whether it runs, and its address."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

DEFAULT_PORT = 50050
LOGS_KEPT = 3  # older logs of a service, beside the current one

Status = Literal["waiting", "starting", "ready", "down", "done"]


class LocalError(Exception):
    """Something went wrong on this machine; the message is a sentence for the user."""


class AlreadyRunning(LocalError):
    """Another stack holds the data folder."""


@dataclass(frozen=True)
class ServiceState:
    """One service of a stack. `since` is when it got its status, in seconds since 1970."""

    name: str
    status: Status
    since: float
    seconds: float = 0.0
    """How long it took to get ready."""
    pid: int | None = None
    address: str = ""
    health: str = ""
    """What to ask for its health: the full name of a gRPC service, or a URL."""
    metrics: str = ""
    started: float = 0.0
    """When its process was started, in seconds since 1970."""
    restarts: int = 0


@dataclass(frozen=True)
class StackState:
    """What `state.json` says about the stack of a data folder. `pid` is its supervisor's."""

    pid: int
    address: str
    store: str
    model: str
    services: tuple[ServiceState, ...] = ()

    @property
    def ready(self) -> bool:
        return bool(self.services) and all(s.status in ("ready", "done") for s in self.services)


def data_folder() -> Path:
    """Return TWOROADS_DATA_DIR, or the user's data folder for tworoads."""
    given = os.environ.get("TWOROADS_DATA_DIR")
    return Path(given).absolute() if given else _user_folder("XDG_DATA_HOME", ".local/share")


def cache_folder() -> Path:
    """Return the folder for what every data folder shares and what can be made again."""
    return _user_folder("XDG_CACHE_HOME", ".cache")


def address() -> str:
    """Return where clients find the server, HOST:PORT.

    TWOROADS_ADDRESS, else the stack of the default data folder, else port 50050 of this machine.
    """
    given = os.environ.get("TWOROADS_ADDRESS")
    if given:
        return given
    state = read_state(data_folder())
    return state.address if state else f"127.0.0.1:{DEFAULT_PORT}"


def write_state(folder: Path, state: StackState) -> None:
    """Replace the state of the data folder, all at once."""
    path = folder / "state.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(asdict(state), indent=1))
    new.replace(path)


def read_state(folder: Path) -> StackState | None:
    """Return the state of the data folder, None if there is none that can be read."""
    try:
        fields: dict[str, Any] = json.loads((folder / "state.json").read_text())
        services = tuple(ServiceState(**service) for service in fields.pop("services"))
        return StackState(**fields, services=services)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove_state(folder: Path) -> None:
    """Forget the state of a stack that has stopped."""
    (folder / "state.json").unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Own the data folder while the block runs; makes it if need be.

    Raises AlreadyRunning if another process owns it, LocalError if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise LocalError(
            f"Cannot write to {folder} ({error.strerror}); choose another folder with --data."
        ) from error
    with file:
        if not _acquire(file.fileno()):
            raise AlreadyRunning(
                f"A stack already runs on {folder} (process {holder(folder)}); "
                f"stop it with `{command('down', folder)}`, or choose another folder with --data."
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def holder(folder: Path) -> int | None:
    """Return the process id of the stack that runs on the data folder, None if none does."""
    while True:
        try:
            with (folder / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pid = (folder / "lock").read_text()
        except OSError:
            return None
        if pid:
            return int(pid)
        time.sleep(0.01)  # it has just taken the lock and is about to write its number


def rotate(log: Path) -> None:
    """Move a log and its older ones by one, so that a new one can begin."""
    for age in range(LOGS_KEPT, 0, -1):
        older = log.with_name(f"{log.name}.{age}")
        newer = log.with_name(f"{log.name}.{age - 1}") if age > 1 else log
        if newer.exists():
            newer.replace(older)


def command(words: str, folder: Path) -> str:
    """Return the command line `tworoads WORDS` for this data folder."""
    return f"tworoads {words}" + ("" if folder == data_folder() else f" --data {folder}")


def _acquire(file: int) -> bool:
    for _ in range(10):  # `holder` takes the lock for an instant to see whether it is free
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return True
    return False


def _user_folder(variable: str, default: str) -> Path:
    parent = os.environ.get(variable)
    return (Path(parent) if parent else Path.home() / default) / "tworoads"
