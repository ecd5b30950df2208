"""All benchmarks, one after the other: `python -m benchmarks`, or `make bench`.

They measure a stack of their own, in a temporary data folder. Those that need a question set run if
TWOROADS_DATA names its folder. Each is a command by itself as well, with a running stack. Not among
them: `benchmarks.tuned`, which trains for half an hour on question sets of its own kinds, and
`benchmarks.comparison`, which takes a question file and a corpus.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.stack import own_stack

BEFORE = (
    "simulated",
    "embedding",
    "start",
    "training",
    "lora",
    "scaling",
    "identity",
)  # without a stack
OF_A_STACK = ("generation", "gateway", "ingest", "first_use")
OF_QUESTIONS = ("retrieval", "answers")  # of a stack as well


def run(name: str) -> bool:
    """Run one benchmark; return whether it came to its end."""
    print(f"\n== {name}", flush=True)
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode == 0


def main() -> None:
    with_questions = bool(os.environ.get("TWOROADS_DATA"))
    if not with_questions:
        print("TWOROADS_DATA names no question set: citations, retrieval and answers are left out.")
    failed = [name for name in (("citations",) if with_questions else ()) if not run(name)]
    failed += [name for name in BEFORE if not run(name)]
    with tempfile.TemporaryDirectory() as folder, own_stack(Path(folder)):
        os.environ["TWOROADS_DATA_DIR"] = folder
        os.environ.pop("TWOROADS_ADDRESS", None)
        failed += [name for name in OF_A_STACK if not run(name)]
        failed += [name for name in (OF_QUESTIONS if with_questions else ()) if not run(name)]
    if failed:
        sys.exit(f"Not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
