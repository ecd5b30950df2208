"""What is trained on, and in which order."""

import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LEAST_TOKENS = 256  # of a batch
EPOCH_STEPS = 32  # wanted at least: small sets learn little from few large steps


@dataclass(frozen=True)
class Tokens:
    """An example as the model sees it: token ids of prompt and answer, end-of-turn included."""

    prompt: "array[int]"
    answer: "array[int]"
    held_out: bool
    probe: bool

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def read(path: Path) -> list[Tokens]:
    """Return the examples of a training.jsonl, in order."""
    examples = []
    with path.open() as lines:
        for line in lines:
            fields = json.loads(line)
            prompt, answer = array("i", fields["prompt"]), array("i", fields["answer"])
            examples.append(Tokens(prompt, answer, fields["held_out"], fields["probe"]))
    return examples


def batch_tokens(examples: Sequence[Tokens], most: int) -> int:
    """Return how many tokens a batch may have: enough steps an epoch, but at most `most` tokens."""
    return min(most, max(LEAST_TOKENS, sum(map(len, examples)) // EPOCH_STEPS))


def batches(examples: Sequence[Tokens], budget: int) -> list[list[Tokens]]:
    """Group examples of like lengths, so that a batch padded to its longest has at most `budget`
    tokens; an example that is longer than that is a batch of its own."""
    groups: list[list[Tokens]] = []
    for example in sorted(examples, key=len):
        if not groups or len(example) * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(example)
    return groups


def schedule(batches: int, epochs: int, seed: int) -> list[int]:
    """Return the order of the batches in all epochs: each epoch has each once, in an order that the
    seed fixes. Training goes on after a restart by skipping what was done."""
    order = []
    for epoch in range(epochs):
        indices = list(range(batches))
        random.Random(f"{seed} {epoch}").shuffle(indices)
        order += indices
    return order


def sample(examples: Sequence[Tokens], most: int, seed: int) -> list[Tokens]:
    """Return all examples, or `most` of them that the seed fixes."""
    return random.Random(seed).sample(examples, min(most, len(examples)))
