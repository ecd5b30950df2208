"""The upload that brings an adapter: spooled, put through the checks of one that is trained here,
then registered."""

import hashlib
import math
import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tworoads.v1 import tuning_pb2 as pb

from services.prompts.words import VERSIONS
from services.questions import fields
from services.questions.lines import CheckedFile, Finding
from services.runtime import disk
from services.runtime.call import tenant
from services.runtime.errors import InvalidInput, NotReady, Overloaded
from services.runtime.threads import in_thread
from services.tuning.adapters import files as adapter_files
from services.tuning.adapters.base_model import BaseModel
from services.tuning.adapters.registry import EXAMPLES, Registry, check_name
from services.tuning.job import Adapter, Manifest, Options
from services.tuning.messages import context_of, probe_of

MEBIBYTE = 1024 * 1024
MOST_CHUNK = MEBIBYTE
AT_ONCE = 4  # imports, each of which holds its probes and examples in memory
OF_TENANT = 2  # of them: slow ones of one tenant must not keep the others out
MOST_PROBES = 256
MOST_PROBE_BYTES = 8 * MEBIBYTE  # of all probes
MOST_EXAMPLE_BYTES = 256 * MEBIBYTE
MOST_EPOCHS = 100
MOST_LEARNING_RATE = 0.1
MOST_HELD_OUT = 0.5
ROUNDING = 1e-3  # a probability of 1 may come out a little higher

under_way: dict[Path, str] = {}  # the folders of this process's imports, and whose they are


@dataclass(frozen=True)
class Start:
    """What an ImportAdapterStart says."""

    name: str
    prompt_version: str
    options: Options
    held_out_loss: float | None
    training_seconds: float | None


async def receive(
    requests: AsyncIterator[pb.ImportAdapterRequest],
    registry: Registry,
    base: BaseModel,
    max_rank: int,
    tmp: Path,
) -> Adapter:
    """Take an adapter for the calling tenant. What is half received lies in `tmp`, until the end.

    Raises what the proto says of ImportAdapter.
    """
    first = await anext(requests, None)
    if first is None or first.WhichOneof("part") != "start":
        raise InvalidInput("START_MISSING", "the first message says what is imported")
    start = _start(first.start, base)
    mine = list(under_way.values()).count(tenant())
    if len(under_way) >= AT_ONCE or mine >= OF_TENANT:
        raise Overloaded("QUEUE_FULL", "too many imports are under way; try again later")
    folder = tmp / uuid.uuid4().hex
    under_way[folder] = tenant()
    upload = _Upload(folder, base, max_rank)
    try:
        await in_thread(upload.open)
        ended = False
        async for request in requests:
            if ended:
                raise InvalidInput("PART_OUT_OF_ORDER", "nothing follows `end`")
            ended = request.WhichOneof("part") == "end"
            if not ended:
                await in_thread(upload.take, request)
        if not ended:
            raise InvalidInput("END_MISSING", "the upload broke off: it ends with `end`")
        return await in_thread(upload.register, registry, tenant(), start)
    finally:
        try:
            await in_thread(upload.close)
        finally:
            del under_way[folder]


class _Upload:
    """One upload. All methods block, and come from one thread at a time."""

    def __init__(self, folder: Path, base: BaseModel, max_rank: int) -> None:
        self._folder = folder
        self._base = base
        self._max_rank = max_rank
        self._limits = {
            adapter_files.WEIGHTS: adapter_files.most_bytes(base, max_rank),
            adapter_files.CONFIG: adapter_files.MOST_CONFIG,
        }
        self._received: set[str] = set()
        self._file: _File | None = None
        self._examples: _Examples | None = None
        self._probes: list[pb.AdapterProbe] = []
        self._probe_bytes = 0

    def open(self) -> None:
        with disk.space():
            self._folder.mkdir(parents=True)

    def take(self, request: pb.ImportAdapterRequest) -> None:
        part = request.WhichOneof("part")
        with disk.space():
            if part == "file" and not self._probes and not self._examples:
                self._begin(request.file)
            elif part == "chunk" and self._file:
                self._file.add(_checked(request.chunk))
            elif part == "probe" and self._received:
                self._end_file()
                self._add_probe(request.probe)
            elif part == "examples" and self._received:
                self._end_file()
                self._examples = self._examples or _Examples(self._folder / EXAMPLES)
                self._examples.add(_checked(request.examples))
            else:
                raise InvalidInput(
                    "PART_OUT_OF_ORDER",
                    "after `start` come the files, each with its chunks, then probes and examples",
                )

    def register(self, registry: Registry, tenant: str, start: Start) -> Adapter:
        """Check the whole and register it."""
        with disk.space():
            self._end_file()
            if self._examples:
                self._examples.end()
        for name in adapter_files.NAMES:
            if name not in self._received:
                raise InvalidInput("FILE_MISSING", f"there is no {name}")
        rank, alpha, targets = adapter_files.check(self._folder, self._base, self._max_rank)
        options = start.options
        manifest = Manifest(
            name=start.name,
            base_model=self._base.id,
            base_model_hash=self._base.hash,
            prompt_version=start.prompt_version,
            corpus="",
            examples_hash=self._examples.hash if self._examples else "",
            options=Options(
                context=options.context,
                rank=rank,
                alpha=alpha,
                epochs=options.epochs,
                learning_rate=options.learning_rate,
                targets=targets,
                seed=options.seed,
                quantized=options.quantized,
                held_out_share=options.held_out_share,
            ),
            files=(),
        )
        return registry.add(
            tenant,
            manifest,
            self._folder,
            disk.read(self._folder / EXAMPLES) if self._examples else None,
            [probe_of(probe) for probe in self._probes],
            held_out_loss=start.held_out_loss,
            training_seconds=start.training_seconds,
        )

    def close(self) -> None:
        """Remove what was received."""
        with suppress(OSError):  # what could not be written has been reported
            if self._file:
                self._file.close()
        with suppress(OSError):
            if self._examples:
                self._examples.file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, given: pb.AdapterFile) -> None:
        self._end_file()
        if given.name not in self._limits:
            names = " and ".join(adapter_files.NAMES)
            raise InvalidInput("FILE_UNKNOWN", f"the files of an adapter are {names}")
        if given.name in self._received:
            raise InvalidInput("PART_OUT_OF_ORDER", f"{given.name} was sent before")
        most = self._limits[given.name]
        if given.size > most:
            raise InvalidInput(
                "FILE_TOO_LARGE",
                f"{given.name} has at most {most} bytes for this model",
                limit=str(most),
            )
        self._received.add(given.name)
        self._file = _File(self._folder / given.name, given.size, given.sha256)

    def _end_file(self) -> None:
        if self._file:
            self._file.end()
            self._file = None

    def _add_probe(self, probe: pb.AdapterProbe) -> None:
        self._probe_bytes += probe.ByteSize()
        if len(self._probes) == MOST_PROBES or self._probe_bytes > MOST_PROBE_BYTES:
            raise InvalidInput(
                "TOO_MANY_PROBES",
                f"at most {MOST_PROBES} probes of {MOST_PROBE_BYTES // MEBIBYTE} MiB together",
            )
        _check_probe(probe)
        self._probes.append(probe)


class _File:
    """A file of the adapter, of the size and hash that were announced."""

    def __init__(self, path: Path, size: int, sha256: str) -> None:
        self._name = path.name
        self._left = size
        self._sha256 = sha256
        self._digest = hashlib.sha256()
        self._file = path.open("xb")

    def add(self, chunk: bytes) -> None:
        self._left -= len(chunk)
        if self._left < 0:
            raise self._mismatch()
        self._digest.update(chunk)
        self._file.write(chunk)

    def end(self) -> None:
        self.close()
        if self._left or self._digest.hexdigest() != self._sha256:
            raise self._mismatch()

    def close(self) -> None:
        self._file.close()

    def _mismatch(self) -> InvalidInput:
        return InvalidInput(
            "FILE_HASH_MISMATCH", f"{self._name} is not of the size and hash that were announced"
        )


class _Examples(CheckedFile):
    """The examples in a file, of which each line must be one."""

    def __init__(self, path: Path) -> None:
        super().__init__("examples", "EXAMPLES_INVALID", MOST_EXAMPLE_BYTES)
        self._left = MOST_EXAMPLE_BYTES
        self.file = path.open("xb")

    def add(self, chunk: bytes) -> None:
        self._left -= len(chunk)
        if self._left < 0:
            most = MOST_EXAMPLE_BYTES // MEBIBYTE
            raise InvalidInput("EXAMPLES_INVALID", f"the examples have at most {most} MiB")
        self.file.write(chunk)
        _refuse(self.feed(chunk))

    def end(self) -> None:
        self.file.close()
        _refuse(self.close())

    def use(self, line: int, value: dict[str, Any]) -> int:
        fields.example(line, value)
        return 0


def _start(given: pb.ImportAdapterStart, base: BaseModel) -> Start:
    check_name(given.name)
    if given.base_model_hash not in ("", base.hash):
        raise NotReady("BASE_MODEL_MISMATCH", f"generation runs {base.id}, another base model")
    version = given.prompt_version or VERSIONS[-1]
    if version not in VERSIONS:
        raise InvalidInput(
            "PROMPT_VERSION_UNKNOWN", f"the prompt versions are {', '.join(VERSIONS)}"
        )
    return Start(
        name=given.name,
        prompt_version=version,
        options=_options(given.options),
        held_out_loss=_measured(given, "held_out_loss"),
        training_seconds=_measured(given, "training_seconds"),
    )


def _options(given: pb.TrainingOptions) -> Options:
    """Return how it was trained, as far as is known: 0 is what is not."""
    share = given.held_out_share if given.HasField("held_out_share") else None
    if not (
        given.epochs <= MOST_EPOCHS
        and 0 <= given.learning_rate <= MOST_LEARNING_RATE
        and (share is None or 0 <= share <= MOST_HELD_OUT)
    ):
        raise InvalidInput("CONFIG_INVALID", "`options` are not those of a training")
    return Options(
        context=context_of(given.context) if given.context else "unknown",
        epochs=given.epochs,
        learning_rate=given.learning_rate,
        seed=given.seed,
        quantized=given.quantized,
        held_out_share=share,
    )


def _measured(
    given: pb.ImportAdapterStart, name: Literal["held_out_loss", "training_seconds"]
) -> float | None:
    if not given.HasField(name):
        return None
    value = getattr(given, name)
    if not 0 <= value < math.inf:
        raise InvalidInput("CONFIG_INVALID", f"`{name}` is 0 or more")
    return float(value)


def _check_probe(given: pb.AdapterProbe) -> None:
    """Refuse now what generation would refuse later."""
    messages = probe_of(given).messages
    turns = messages[1:] if messages[0].role == "system" else messages
    for index, turn in enumerate(turns):
        if turn.role != ("assistant" if index % 2 else "user"):
            raise InvalidInput("PROBE_INVALID", "in a probe, user and assistant speak in turn")
    if any(part.droppable and not part.id for turn in messages for part in turn.parts):
        raise InvalidInput("PROBE_INVALID", "a droppable part has an id")
    scores = [token.log_probability for token in given.tokens]
    if not all(math.isfinite(score) and score <= ROUNDING for score in scores):
        raise InvalidInput("PROBE_INVALID", "a log-probability is a finite number up to 0")


def _checked(chunk: bytes) -> bytes:
    if len(chunk) > MOST_CHUNK:
        raise InvalidInput("CHUNK_TOO_LARGE", "a chunk has at most 1 MiB")
    return chunk


def _refuse(findings: list[Finding]) -> None:
    for finding in findings:
        raise InvalidInput("EXAMPLES_INVALID", f"line {finding.line}: {finding.message}")
