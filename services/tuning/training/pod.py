"""What the pod of a training job runs: `python -m` this module, with the job's FOLDER.

It trains as the service would, by the FOLDER/plan.json that the service wrote. What a process would
tell its parent is in FOLDER/news.json: the latest progress, or why it failed.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from contextlib import aclosing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.runtime.errors import Overloaded
from services.tuning.job import Progress
from services.tuning.training.trainer import ChildTrainer, TrainingFailed, read_plan

NEWS = "news.json"
CHILD = "services.tuning.training.child"


async def main(folder: Path, module: str) -> int:
    """Train; return the exit status. `module` is what the child runs."""
    task = asyncio.current_task()
    assert task
    # The first process of a container is not ended by a signal that it does not handle.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    plan, options = read_plan(folder)
    try:
        async with aclosing(ChildTrainer(**plan, module=module).train(folder, options)) as news:
            async for item in news:
                if isinstance(item, Progress):
                    _say(folder, asdict(item))
    except TrainingFailed as error:
        _say(folder, error.__dict__)
        return 1
    except Overloaded as error:
        _say(folder, {"reason": error.reason, "message": str(error)})
        return 1
    return 0


def _say(folder: Path, news: Mapping[str, Any]) -> None:
    """Raises FileNotFoundError when the service has removed the folder: nobody waits any more."""
    half = folder / f"{NEWS}.half"
    half.write_text(json.dumps(news))
    half.replace(folder / NEWS)


if __name__ == "__main__":
    with suppress(asyncio.CancelledError):
        sys.exit(asyncio.run(main(Path(sys.argv[1]), (sys.argv[2:] or [CHILD])[0])))
    sys.exit(128 + signal.SIGTERM)
