"""What each example is shown, as at answer time, and the tokens that the trainer reads."""

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from tworoads.v1.retrieval_pb2 import Passage
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.prompts.rendering import Renderer
from services.prompts.words import Shown, conversation
from services.questions.lines import Findings
from services.runtime.disk import space, sync
from services.runtime.errors import InvalidInput, NotFound
from services.runtime.threads import in_thread
from services.tuning.data.examples import Example, Finding
from services.tuning.data.retrieval import Retrieval, all_of
from services.tuning.job import Context, Options, Probe

PASSAGES = 3  # as many as an answer is shown unless it asks for more
MOST_QUERY = 8192  # code points
PLAIN_SHARE = 1 / 3  # of MIXED examples
MOST_PROBES = 32
FEWEST_PROBES = 16
WINDOW = 64  # examples that are searched, then rendered and written


@dataclass(frozen=True)
class _Sight:
    """The passages that an example is shown, and the ids of those that should answer it."""

    passages: tuple[Shown, ...] = ()
    gold: frozenset[str] = frozenset()


async def check_references(
    retrieval: RetrievalServiceStub, examples: Sequence[Example], corpus: str, context: Context
) -> list[Finding]:
    """Return a finding for each line that names a corpus or a document that does not exist. Without
    context nothing is looked up.

    Raises InvalidInput (CORPUS_MISSING) if a line names no corpus and `corpus` is empty, NotFound
    (CORPUS_NOT_FOUND) if it is needed and does not exist, Unavailable (RETRIEVAL_UNAVAILABLE).
    """
    if context == "none":
        return []
    wanted: dict[str, set[str]] = {}
    for example in examples:
        name = example.corpus or corpus
        if not name:
            raise InvalidInput(
                "CORPUS_MISSING", f"line {example.line} names no corpus, and none was given"
            )
        wanted.setdefault(name, set()).update(example.relevant)
    looked_up = await all_of(map(Retrieval(retrieval).documents, wanted, wanted.values()))
    known = dict(zip(wanted, looked_up, strict=True))
    if corpus in wanted and known[corpus] is None and not all(e.corpus for e in examples):
        raise NotFound("CORPUS_NOT_FOUND", f"there is no corpus {corpus}")
    findings = Findings("examples")
    for example in examples:
        name = example.corpus or corpus
        there = known[name]
        if there is None:
            findings.add(example.line, "error", "CORPUS_NOT_FOUND", f"there is no corpus {name}")
        elif missing := [id for id in example.relevant if id not in there]:
            message = f"corpus {name} has no document {', '.join(missing[:3])}"
            findings.add(example.line, "error", "DOCUMENT_NOT_FOUND", message)
    return findings.take() + findings.close()


async def prepare(
    folder: Path,
    examples: Sequence[Example],
    held_out: Collection[int],
    options: Options,
    corpus: str,
    version: str,
    renderer: Renderer,
    context_length: int,
    retrieval: RetrievalServiceStub,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Probe]:
    """Write FOLDER/training.jsonl, an example a line: {"prompt": [ids], "answer": [ids],
    "held_out", "probe"}, and return the probes, in the order of their lines.

    Raises Unavailable (RETRIEVAL_UNAVAILABLE), NotFound (CORPUS_NOT_FOUND), Overloaded
    (STORE_FULL); then nothing is left of it.
    """
    searched = Retrieval(retrieval)
    plain = _plain(len(examples), options)
    probed = _probed(len(examples), held_out, options.seed)
    probes: list[Probe] = []
    part = folder / "training.jsonl.part"

    async def sight(index: int) -> _Sight:
        if index in plain:
            return _Sight()
        return await _sight(searched, examples[index], corpus, options.seed)

    def write(file: BinaryIO, window: range, sights: list[_Sight]) -> None:
        for index, sight in zip(window, sights, strict=True):
            rendered = _render(examples[index], sight, version, renderer, context_length)
            line = {
                "prompt": rendered.prompt,
                "answer": rendered.answer,
                "held_out": index in held_out,
                "probe": index in probed,
            }
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            if index in probed:
                probes.append(rendered.probe)

    def finish(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, folder / "training.jsonl")
        sync(folder)

    with space():
        try:
            with part.open("wb") as file:
                for start in range(0, len(examples), WINDOW):
                    window = range(start, min(start + WINDOW, len(examples)))
                    sights = await all_of(map(sight, window))
                    await in_thread(write, file, window, sights)
                    progress(window.stop, len(examples))
                await in_thread(finish, file)
        finally:
            part.unlink(missing_ok=True)
    return probes


def _plain(count: int, options: Options) -> frozenset[int]:
    """Return the indices of the examples that are shown no passages."""
    if options.context == "none":
        return frozenset(range(count))
    without = round(count * PLAIN_SHARE) if options.context == "mixed" else 0
    return frozenset(random.Random(options.seed).sample(range(count), without))


def _probed(count: int, held_out: Collection[int], seed: int) -> frozenset[int]:
    """Return the indices of the examples that the adapter is measured by: held-out ones, and others
    only where there are too few of these."""
    chosen = random.Random(seed)
    probes = chosen.sample(sorted(held_out), min(MOST_PROBES, len(held_out)))
    others = [index for index in range(count) if index not in held_out]
    few = max(0, FEWEST_PROBES - len(probes))
    return frozenset(probes + chosen.sample(others, min(few, len(others))))


async def _sight(retrieval: Retrieval, example: Example, corpus: str, seed: int) -> _Sight:
    """Return what an example is shown: what a search finds, the last of it replaced by the best
    passages of the example's documents where these are missing. Then the order is by chance, so
    that the place of a passage says nothing."""
    corpus = example.corpus or corpus
    query = _query(example)
    found = await retrieval.search(corpus, query, PASSAGES)
    gold: list[Passage] = []
    for id in example.relevant[:PASSAGES]:
        of_document = [passage for passage in found if passage.document_id == id]
        gold += of_document[:1] or await retrieval.search(corpus, query, 1, id)
    shown = {passage.id: passage for passage in [*gold, *found]}
    passages = list(shown.values())[:PASSAGES]
    if gold:
        random.Random(f"{seed} {example.line}").shuffle(passages)
    return _Sight(
        tuple(Shown(passage.id, passage.title, passage.text) for passage in passages),
        frozenset(passage.id for passage in gold),
    )


def _query(example: Example) -> str:
    """Return the words that the gateway searches: the last question before, and the question."""
    last = [asked for asked, _ in example.history[-1:]]
    return "\n".join([*last, example.question])[-MOST_QUERY:]


@dataclass(frozen=True)
class _Rendered:
    prompt: list[int]
    answer: list[int]
    probe: Probe


def _render(
    example: Example, sight: _Sight, version: str, renderer: Renderer, context_length: int
) -> _Rendered:
    """Render an example as Score does. Passages that do not fit are left out, those that should
    answer it last; without any, it is asked as if it had none."""
    passages = list(sight.passages)
    while True:
        messages = conversation(
            example.question, passages or None, example.history, version=version
        )
        rendered, answer = renderer.exchange(messages, example.answer, context_length)
        used = set(rendered.used_parts)
        gold = {passage.id for passage in passages} & sight.gold
        if not passages or (used and gold <= used):
            break
        others = [passage for passage in passages if passage.id not in gold]
        passages.remove((others or passages)[-1])
    kept = tuple(
        replace(m, parts=tuple(p for p in m.parts if not p.droppable or p.id in used))
        for m in messages
    )
    ids = rendered.token_ids
    prompt_hash = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
    return _Rendered(ids, answer, Probe(kept, example.answer, prompt_hash=prompt_hash))
