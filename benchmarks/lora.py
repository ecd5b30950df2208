"""Tokens per second with adapters: by the service's grouped LoRA, and by vLLM's own.

    python -m benchmarks.lora [MODEL] [--rounds 3] [--tokens 32]

MODEL is the folder of a checkpoint; without it the one that the service prepares by default. Three
engines with the service's settings, each in a process of its own, idle while another works: with
grouped LoRA, with vLLM's, and with LoRA off. New questions each time at 1, 8 and 16 streams, from
the first request to the last token, each answer as long as it may be: of the base model, of one
adapter, of one for every other stream, and of four. The adapters are random, of rank 16 on all
linear layers. A ratio is taken within a round. For processors with a GPU it has nothing to say.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

import numpy
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.generation import questions
from benchmarks.ratios import ratios, spread
from benchmarks.stack import leashed
from services.generation.engine import BLOCK
from services.generation.prepare import DEFAULT, prepare
from services.generation.processor import environment, executor
from services.generation.settings import Settings
from services.prompts.rendering import Renderer
from services.prompts.words import conversation
from services.runtime.processor import this_processor

MODELS = Path.home() / ".cache" / "tworoads" / "models"
STREAMS = (1, 8, 16)
RANK = 16
ADAPTERS = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARTIES = {  # the engine, and the adapters of its streams in turn; 0 is none
    "grouped, base": ("grouped", (0,)),
    "grouped, one adapter": ("grouped", (1,)),
    "grouped, half adapted": ("grouped", (0, 1)),
    "grouped, four adapters": ("grouped", (1, 2, 3, 4)),
    "vLLM's, base": ("stock", (0,)),
    "vLLM's, one adapter": ("stock", (1,)),
    "LoRA off": ("off", (0,)),
}
RATIOS = (  # over what, and the goals
    ("grouped, one adapter", "vLLM's, one adapter", "goal at 16 >= 4 with AMX, 2.3 with AVX2"),
    ("grouped, one adapter", "grouped, base", "goal >= 0.8"),
    ("grouped, half adapted", "grouped, base", ""),
    ("grouped, four adapters", "grouped, base", ""),
    ("grouped, base", "LoRA off", ""),
    ("vLLM's, base", "LoRA off", ""),
)


def make_adapter(model: Path, folder: Path, seed: int) -> None:
    """Write an adapter of random weights as peft writes it."""
    draw = numpy.random.default_rng(seed)
    weights = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "numpy") as checkpoint:
            for name in checkpoint.keys():
                layer = name.removesuffix(".weight")
                if layer.endswith(TARGETS):
                    wide, narrow = checkpoint.get_slice(name).get_shape()
                    for part, shape in (("A", (RANK, narrow)), ("B", (wide, RANK))):
                        values = draw.normal(0, 0.02, shape).astype(numpy.float32)
                        weights[f"base_model.model.{layer}.lora_{part}.weight"] = values
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Engine:
    """An engine, as the process that started it sees it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the engine's process ended")
        return line

    def rate(self, asked: list[str], adapters: list[int], tokens: int) -> float:
        """Return the tokens per second of all streams together."""
        assert self._process.stdin
        command = {"questions": asked, "adapters": adapters, "tokens": tokens}
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return float(self.line())


@contextmanager
def running_engine(kind: str, model: Path, adapters: Path) -> Iterator[Engine]:
    """Run an engine while the block runs; it is loaded before."""
    command = leashed("benchmarks.lora", str(model), "--engine", kind, "--adapters", str(adapters))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            engine = Engine(process)
            engine.line()
            yield engine
        finally:
            process.kill()


def serve(kind: str, model: Path, adapters: Path, out: IO[str]) -> None:
    """Be the engine: say when it is loaded, then answer each line of standard input."""
    settings = Settings(model=str(model))
    processor = this_processor()
    how = executor(processor, settings.executor)
    os.environ.update(environment(processor, how, settings.threads, cache_gib=1))
    os.environ["VLLM_PLUGINS"] = "tworoads" if kind == "grouped" else ""

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {"max_loras": ADAPTERS, "max_lora_rank": RANK}
    llm = LLM(
        str(model),
        dtype=processor.dtype(settings.dtype),
        distributed_executor_backend=how,
        max_model_len=settings.context_length,
        max_num_seqs=settings.max_sequences,
        enable_prefix_caching=True,
        block_size=BLOCK,
        enforce_eager=True,
        **({} if kind == "off" else {"enable_lora": True} | lora),
    )
    renderer = Renderer(llm.get_tokenizer())
    print("loaded", file=out, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        prompts = [
            {
                "prompt_token_ids": renderer.render(
                    conversation(q), settings.context_length
                ).token_ids
            }
            for q in command["questions"]
        ]
        requests = [
            LoRARequest(str(i), i, str(adapters / str(i))) if i else None
            for i in command["adapters"]
        ]
        params = SamplingParams(
            temperature=0, max_tokens=command["tokens"], ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=requests)
        seconds = time.perf_counter() - start
        written = sum(len(output.outputs[0].token_ids) for output in outputs)
        if written != len(prompts) * command["tokens"]:
            raise RuntimeError(f"{written} tokens")
        print(written / seconds, file=out, flush=True)


def measure(model: Path, rounds: int, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        adapters = Path(folder)
        for i in range(1, ADAPTERS + 1):
            make_adapter(model, adapters / str(i), seed=i)
        kinds = dict.fromkeys(kind for kind, _ in PARTIES.values())
        engines = {k: stack.enter_context(running_engine(k, model, adapters)) for k in kinds}

        def rate(party: str, streams: int, mark: str) -> float:
            kind, of_streams = PARTIES[party]
            asked = [f"({mark} {party}) {question}" for question in questions(streams)]
            return engines[kind].rate(asked, list(islice(cycle(of_streams), streams)), tokens)

        for party in PARTIES:  # the adapters are loaded from here on
            rate(party, ADAPTERS, "first")
        print(f"tokens/s, {tokens} tokens each, {rounds} rounds; median (least to most)")
        for streams in STREAMS:
            rates: dict[str, list[float]] = {party: [] for party in PARTIES}
            for i in range(rounds):
                for party, values in rates.items():
                    values.append(rate(party, streams, f"{i} of {streams}"))
            for party, values in rates.items():
                print(f"{streams:2} streams  {party:24} {spread(values, 1)}")
            for ours, theirs, goal in RATIOS:
                ratio = spread(ratios(rates[ours], rates[theirs]))
                print(f"{streams:2} streams  {ours} : {theirs}  {ratio}  {goal}", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.engine:
        # What a library prints goes to standard error; standard output is for the one who asks.
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(chosen.engine, chosen.model, chosen.adapters, answers)
    else:
        measure(chosen.model or prepare(DEFAULT, MODELS), chosen.rounds, chosen.tokens)
