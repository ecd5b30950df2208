"""The citation checker on edited source sentences, a table per kind of edit.

    python -m benchmarks.citations [FOLDER] [--half held-out|development] [--failures KIND]

FOLDER (or TWOROADS_DATA) holds corpus.jsonl {id, title, text}. Each edited sentence is checked
against its own passage and four others, in random order. An edit that keeps the statement should
be supported, by a quote that overlaps its sentence; one that changes it should be unsupported.
"""

import argparse
import json
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.citation_edits import CHANGING, KEEPING, Case
from services.gateway.citations.checker import Citation, CitationChecker, Source, Unsupported

DISTRACTORS = 4
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def sentences(text: str) -> list[tuple[int, int, str]]:
    """Whole prose sentences of 6 to 45 words: (start, end, text with single spaces)."""
    found, start = [], 0
    for piece in SENTENCE.split(text):
        start = text.index(piece, start)
        end = start + len(piece)
        plain = " ".join(piece.split())
        prose = not re.search(r">>>|[={}]|\n\n", piece) and plain.count('"') % 2 == 0
        balanced = plain.count("(") == plain.count(")")
        begins = start == 0 or text[:start].rstrip()[-1:] in ".!?"
        if prose and balanced and begins and re.match(r'["“(]?[A-Z].*[a-z0-9)"”%][.!?]$', plain):
            if 6 <= len(plain.split()) <= 45:
                found.append((start, end, plain))
        start = end
    return found


def supported(verdicts: list[Any], document: str, start: int, end: int, text: str) -> bool:
    """Whether a sentence (which the checker may have split) is cited, from where it was taken.

    Or from a passage that says the same word for word.
    """
    cited = [v for v in verdicts if isinstance(v, Citation)]
    found = any(
        (v.document_id == document and v.source_start < end and start < v.source_end)
        or text in " ".join(v.quote.split())
        for v in cited
    )
    return found and len(cited) == len(verdicts)


def measure(corpus: list[dict[str, str]], half: str, show: str | None) -> None:
    rng = random.Random(7)
    mine = corpus[0::2] if half == "development" else corpus[1::2]
    right: Counter[str] = Counter()
    count: Counter[str] = Counter()
    seconds: list[float] = []
    for document in mine:
        others = rng.sample([d for d in corpus if d is not document], 3 * DISTRACTORS)
        shown = [document, *others[:DISTRACTORS]]
        rng.shuffle(shown)
        sources = [Source(d["id"], d["id"], 0, d["text"]) for d in shown]
        elsewhere = "\n".join(d["text"] for d in others[DISTRACTORS:])
        edited: list[tuple[str, str, int, int, str]] = []
        for start, end, text in sentences(document["text"]):
            case = Case(text, document["text"], elsewhere, rng)
            for kind, edit in (KEEPING | CHANGING).items():
                if new := edit(case):
                    edited.append((kind, new, start, end, text))
        checker = CitationChecker(sources)
        for kind, new, start, end, text in edited:
            began = time.process_time()
            verdicts = checker.feed(f"{new}\n- ")  # one item of a list after the other
            seconds.append(time.process_time() - began)
            good = supported(verdicts, document["id"], start, end, text)
            if kind in CHANGING:
                good = any(isinstance(v, Unsupported) for v in verdicts)
            right[kind] += good
            count[kind] += 1
            if show and kind.startswith(show) and not good:
                print(f"{kind} ({document['id']})\n  from {text}\n  to   {new}\n  {verdicts}\n")
    for title, kinds in (("supported", KEEPING), ("unsupported", CHANGING)):
        print(f"{'kind':28}{'n':>6}{title:>14}")
        for kind in kinds:
            if count[kind]:
                print(f"{kind:28}{count[kind]:6}{right[kind] / count[kind]:14.1%}")
        print()
    quantiles = statistics.quantiles(seconds, n=100)
    print(f"CPU per sentence: median {statistics.median(seconds) * 1e3:.2f} ms, "
          f"99 % under {quantiles[-1] * 1e3:.2f} ms (n={len(seconds)})")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", default=os.environ.get("TWOROADS_DATA"))
    parser.add_argument("--half", choices=["held-out", "development"], default="held-out")
    parser.add_argument("--failures", metavar="KIND", help="print the wrong verdicts of a kind")
    arguments = parser.parse_args()
    path = Path(arguments.folder or ".") / "corpus.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is missing: name a folder that holds corpus.jsonl, or set TWOROADS_DATA")
    with path.open(encoding="utf-8") as lines:
        measure([json.loads(line) for line in lines], arguments.half, arguments.failures)


if __name__ == "__main__":
    main()
