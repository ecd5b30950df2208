"""Adapters as plain values, and the files that they are made of."""

import hashlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from tworoads.v1 import tuning_pb2 as pb

from clients.files import FileError
from clients.jobs import Options
from clients.messages import enum_name, optional, same, time
from clients.uploads import CHUNK, Source, chunks

FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class AdapterFile:
    """One file of an adapter: bytes, and SHA-256 in lower-case hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Fidelity:
    """How generation agrees with the trainer: mean differences of the log-probabilities of answer
    tokens, in nats."""

    probes: int
    tokens: int
    trainer_difference: float
    trainer_difference_max: float
    bound: float
    base_difference: float


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all streams together, with the adapter and without."""

    streams: int
    adapter_tokens_per_second: float
    base_tokens_per_second: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, `id` NAME@HASH. `state` is "verifying", "ready", "unfaithful" or
    "unmeasured"; the loss is in nats per answer token; what is unknown is None or empty."""

    id: str
    name: str
    hash: str
    state: str
    reason: str
    base_model: str
    base_model_hash: str
    prompt_version: str
    corpus: str
    options: Options | None
    examples_hash: str
    files: tuple[AdapterFile, ...]
    job: str
    held_out_loss: float | None
    training_seconds: float | None
    fidelity: Fidelity | None
    speeds: tuple[Speed, ...]
    accepted_by: str
    accepted: datetime | None
    created: datetime | None
    etag: str

    @classmethod
    def of(cls, adapter: pb.Adapter) -> "Adapter":
        return same(
            cls,
            adapter,
            state=enum_name(pb.AdapterState, adapter.state),
            options=Options.of(adapter.options) if adapter.HasField("options") else None,
            files=tuple(same(AdapterFile, file) for file in adapter.files),
            fidelity=same(Fidelity, adapter.fidelity) if adapter.HasField("fidelity") else None,
            speeds=tuple(same(Speed, speed) for speed in adapter.speeds),
            accepted=time(adapter, "accept_time"),
            created=time(adapter, "create_time"),
            **optional(adapter, "held_out_loss", "training_seconds"),
        )

    @property
    def served(self) -> bool:
        return self.state in ("ready", "unmeasured") or bool(self.accepted_by)


def files_of(folder: Path) -> list[AdapterFile]:
    """Return the two files of an adapter as peft saves it. Blocks.

    Raises FileError if the folder does not hold them; others in it are not looked at.
    """
    found = []
    for name in FILES:
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                found.append(AdapterFile(name, file.tell(), digest))
        except OSError as error:
            raise FileError(
                f"{folder} is no adapter as peft saves it: {name}: {error.strerror}"
            ) from error
    return found


async def import_requests(
    start: pb.ImportAdapterStart,
    folder: Path,
    files: Sequence[AdapterFile],
    examples: Source | None,
) -> AsyncIterator[pb.ImportAdapterRequest]:
    """Yield the requests that import an adapter."""
    yield pb.ImportAdapterRequest(start=start)
    for file in files:
        yield pb.ImportAdapterRequest(
            file=pb.AdapterFile(name=file.name, size=file.size, sha256=file.sha256)
        )
        async for chunk in chunks(folder / file.name):
            yield pb.ImportAdapterRequest(chunk=chunk)
    if examples is not None:
        async for chunk in chunks(examples):
            yield pb.ImportAdapterRequest(examples=chunk)
    yield pb.ImportAdapterRequest(end=pb.ImportAdapterEnd())


def unpack(content: BinaryIO, files: Sequence[AdapterFile], folder: Path) -> None:
    """Write files that stand one after the other in `content` into a new folder. Blocks.

    The folder appears when every hash is right. Raises FileError, or OSError if it cannot be made.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=parent) as making:
        new = Path(making) / "adapter"
        new.mkdir()
        for file in files:
            if file.name not in FILES or _copy(content, new / file.name, file) != file.sha256:
                raise FileError(f"{file.name} did not arrive as it was sent: download it again")
        new.rename(folder)


def _copy(content: BinaryIO, path: Path, file: AdapterFile) -> str:
    """Write the next bytes of `content` to a file and return their SHA-256."""
    digest, left = hashlib.sha256(), file.size
    with path.open("xb") as out:
        while piece := content.read(min(left, CHUNK)):
            digest.update(piece)
            out.write(piece)
            left -= len(piece)
    return digest.hexdigest()
