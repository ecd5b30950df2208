"""The process that trains: `python -m` this module, with a FOLDER and the PARENT's process id.

It reads plan.json and training.jsonl, keeps checkpoints, and leaves adapter/ and result.json. On
standard output it says how far it has come, a line of JSON about once a second, and at last, if so,
why it failed: {"reason", "message"}. Everything else goes to standard error.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from services.runtime.child import die_with_parent
from services.tuning.training.trainer import TrainingFailed

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch's words
TOO_LITTLE = "there is not enough memory to train"


def main(folder: Path, parent: int) -> int:
    """Train; return the exit status."""
    start = time.monotonic()
    die_with_parent(parent)
    # What a library prints must not get between the lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        from services.tuning.training.run import train  # takes seconds

        train(folder, lambda news: _say(out, news), start)
    except TrainingFailed as error:
        return _fail(out, error.reason, error.message)
    except MemoryError:
        return _fail(out, "OUT_OF_MEMORY", TOO_LITTLE)
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        print(error, file=sys.stderr)
        return _fail(out, "OUT_OF_MEMORY", TOO_LITTLE)
    return 0


def _say(out: IO[str], news: dict[str, Any]) -> None:
    print(json.dumps(news), file=out, flush=True)


def _fail(out: IO[str], reason: str, message: str) -> int:
    _say(out, {"reason": reason, "message": message})
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
