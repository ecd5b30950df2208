"""The model that adapters are for: what it is, and which of its layers may be adapted."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from services.runtime import checkpoint
from services.runtime.errors import InvalidInput

MOST_TARGETS = 32
# A matrix of a numbered decoder layer. Experts are left out, since peft adapts them in a form of
# its own, and so is what reads pictures or sound, which vLLM adapts only when told to.
LINEAR = re.compile(r"((?:.+\.)?(?:layers|h|blocks)\.\d+\.(?!.*\bexperts\b).+)\.weight")
OTHER_SENSES = re.compile(r"vision|visual|audio|speech")


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint. `id` and `hash` are those of GenerationServiceGetModelResponse.

    `layers` has the shape (out, in) of each linear layer by its module path, `context_length` is in
    tokens, `parameters` are counted as they are stored.
    """

    id: str
    hash: str
    folder: Path
    context_length: int
    layers: Mapping[str, tuple[int, int]]
    parameters: int

    @property
    def targets(self) -> tuple[str, ...]:
        """The names that its linear layers have within each decoder layer."""
        return tuple(sorted({path.rpartition(".")[2] for path in self.layers}))

    def check_targets(self, targets: Sequence[str]) -> None:
        """Raise InvalidInput (TARGETS_INVALID) unless all name linear layers; none means all."""
        if len(targets) > MOST_TARGETS:
            raise InvalidInput("TARGETS_INVALID", f"at most {MOST_TARGETS} targets")
        for target in targets:
            if target not in self.targets:
                known = ", ".join(self.targets)
                raise InvalidInput(
                    "TARGETS_INVALID", f"no layers are called {target!r}; there are {known}"
                )


def load(folder: Path, name: str, context_length: int) -> BaseModel:
    """Read what there is to know of a checkpoint, but not its weights into memory.

    An empty `name` means the folder's; `context_length` limits the model's own. Blocks for as long
    as hashing the files takes. Raises checkpoint.Unfit.
    """
    checkpoint.check(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="numpy") as tensors:
                for key in tensors.keys():
                    shapes[key] = tuple(tensors.get_slice(key).get_shape())
        except SafetensorError as error:
            raise checkpoint.Unfit(f"{path} is damaged: {error}") from error
    layers = {
        match[1]: (shape[0], shape[1])
        for key, shape in shapes.items()
        if len(shape) == 2 and (match := LINEAR.fullmatch(key)) and not OTHER_SENSES.search(key)
    }
    if not layers:
        raise checkpoint.Unfit(f"{folder} has no linear layers that an adapter could be for")
    return BaseModel(
        id=name or folder.resolve().name,
        hash=checkpoint.fingerprint(folder),
        folder=folder,
        context_length=checkpoint.context_length(folder, context_length),
        layers=layers,
        parameters=sum(map(prod, shapes.values())),
    )


def _files(folder: Path) -> list[Path]:
    """Return the files that hold the weights: those of the index, where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))
