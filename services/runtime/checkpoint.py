"""A checkpoint on disk: what it must and must not hold, and its identity."""

import hashlib
import json
from pathlib import Path
from typing import Any

KINDS = (".safetensors", ".json", ".jinja", ".txt", ".model")


class Unfit(ValueError):
    """The folder is not a checkpoint that may be served."""


def check(folder: Path) -> None:
    """Raise Unfit unless `folder` holds safetensors, a configuration and no code of its own."""
    if not (folder / "config.json").is_file():
        raise Unfit(f"{folder} has no config.json: it is not a model's checkpoint")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _json(folder / name):
            raise Unfit(f"{folder / name} asks for code of its own (auto_map): refused")
    if not any(folder.glob("*.safetensors")):
        raise Unfit(f"{folder} has no weights as .safetensors, and others are not loaded")
    index = _json(folder / "model.safetensors.index.json")
    missing = {n for n in index.get("weight_map", {}).values() if not (folder / n).is_file()}
    if missing:
        raise Unfit(f"{folder} lacks {', '.join(sorted(missing))}")


def context_length(folder: Path, at_most: int) -> int:
    """Return how many tokens the model can read and write together, not more than `at_most`."""
    config = _json(folder / "config.json")
    text = config.get("text_config", config)
    return min(at_most, int(text.get("max_position_embeddings", at_most)))


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 over names and bytes of weights, configuration and tokenizer, in hex."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in KINDS and path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            total.update(path.name.encode() + b"\0" + digest)
    return total.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise Unfit(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
