"""Training tokens per second, against a bare loop over peft with the same batches.

    python -m benchmarks.training [FILE] [--rounds 3] [--steps 4] [--model FOLDER]

FILE is a training.jsonl as tuning prepares it; without it, examples of mixed lengths are made up.
Tokens are those of the examples: padding does not count, what prompts share counts each time. Both
take the same optimizer steps on the same batches, one after the other in a round; a ratio is taken
within a round.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig

from benchmarks.ratios import ratios, spread
from services.generation.prepare import DEFAULT, prepare
from services.prompts.rendering import Renderer
from services.prompts.words import Shown, conversation
from services.runtime.processor import this_processor
from services.tuning.job import Options
from services.tuning.training.batches import Tokens, batches, read
from services.tuning.training.reporting import Reporter
from services.tuning.training.run import CPU_BATCH_TOKENS, arguments
from services.tuning.training.sft import AnswerTrainer

MODELS = Path.home() / ".cache" / "tworoads" / "models"
GOAL = 0.9
CONTEXT = 2048
WORDS = "river stone garden window letter silver market winter coffee engine".split()
IGNORED = -100
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def made_up(model: Path, count: int = 200) -> list[Tokens]:
    """Return examples, the same ones each time; a third of them has passages."""
    renderer = Renderer(AutoTokenizer.from_pretrained(model))
    chance = random.Random(0)

    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words)) + "."

    examples = []
    for i in range(count):
        passages = [Shown(str(n), "", text(60)) for n in range(3)] if i % 3 == 0 else None
        messages = conversation(text(chance.randint(4, 30)), passages)
        rendered, answer = renderer.exchange(messages, text(chance.randint(2, 40)), CONTEXT)
        examples.append(Tokens(rendered.token_ids, answer, False, False))
    return examples


def adapted(model: Path, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return get_peft_model(base, LORA)


class Bare:
    """What a person writes who has peft and an afternoon."""

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self._model = adapted(model, dtype)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4)

    def seconds(self, groups: list[list[Tokens]]) -> float:
        start = time.perf_counter()
        self._model.train()
        for group in groups:
            self._model(**padded(group), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return time.perf_counter() - start


def padded(group: list[Tokens]) -> dict[str, torch.Tensor]:
    longest = max(map(len, group))
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(group):
        length = len(example)
        ids[row, :length] = torch.tensor([*example.prompt, *example.answer])
        labels[row, len(example.prompt) : length] = torch.tensor(list(example.answer))
        mask[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class Clock(TrainerCallback):
    """Takes the time of the steps, as the bare loop's is: loading and saving do not count."""

    seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._start = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.seconds = time.perf_counter() - self._start


class Ours:
    """The trainer as jobs run it."""

    def __init__(self, model: Path, dtype: torch.dtype, groups: list[list[Tokens]]) -> None:
        self._clock = Clock()
        self._folder = tempfile.TemporaryDirectory()
        options = Options(learning_rate=1e-4)
        order = list(range(len(groups)))
        wanted = arguments(Path(self._folder.name), options, len(order), len(order), False, False)
        self._trainer = AnswerTrainer(
            groups,
            order,
            [],
            Reporter(lambda news: None, 1e9, 0.0, 0.0),
            model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
            args=SFTConfig(**wanted | {"save_strategy": "no"}, gradient_checkpointing=False),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=LORA,
            callbacks=[self._clock],
        )

    def seconds(self, groups: list[list[Tokens]]) -> float:
        self._trainer.train()
        return self._clock.seconds


def measure(model: Path, file: Path | None, rounds: int, steps: int) -> None:
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    half = this_processor().dtype("auto") == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    all_groups = batches(read(file) if file else made_up(model), CPU_BATCH_TOKENS)
    groups = random.Random(0).sample(all_groups, min(steps, len(all_groups)))
    tokens = sum(len(example) for group in groups for example in group)
    parties: dict[str, Callable[[list[list[Tokens]]], float]] = {
        "bare loop": Bare(model, dtype).seconds,
        "trainer": Ours(model, dtype, groups).seconds,
    }
    rates: dict[str, list[float]] = {name: [] for name in parties}
    for party in parties.values():
        party(groups[:1])
    for _ in range(rounds):
        for name, party in parties.items():
            rates[name].append(tokens / party(groups))
    rows = sum(map(len, groups))
    print(f"{len(groups)} batches, {rows} examples, {tokens} tokens, {dtype}, {threads} threads")
    print(f"tokens/s, {rounds} rounds; median (least to most)")
    for name, values in rates.items():
        line = f"{name:10} {spread(values, 0):20}"
        if name == "trainer":
            compared = spread(ratios(values, rates["bare loop"]))
            line += f" : bare loop {compared}   goal >= {GOAL}"
        print(line)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default=DEFAULT)
    chosen = parser.parse_args()
    folder = prepare(chosen.model, MODELS)
    measure(folder, chosen.file, chosen.rounds, chosen.steps)
