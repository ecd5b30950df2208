"""What a caller is told of an upload while its lines are checked."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from tworoads.v1 import tuning_pb2 as pb

from services.questions.lines import Finding

PROGRESS_SECONDS = 0.5  # between two progress messages while lines are checked
HEARTBEAT_SECONDS = 10.0  # between two of them while nothing moves
FILES = {"examples": pb.UPLOADED_FILE_EXAMPLES, "questions": pb.UPLOADED_FILE_QUESTIONS}
SEVERITIES = {
    "error": pb.FINDING_SEVERITY_ERROR,
    "left_out": pb.FINDING_SEVERITY_LEFT_OUT,
    "warning": pb.FINDING_SEVERITY_WARNING,
}


class News:
    """Findings on their way from the thread that checks to the caller who waits for them.
    `progress` returns how many lines were received and how many checked."""

    def __init__(self, progress: Callable[[], tuple[int, int]]) -> None:
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._found: asyncio.Queue[Finding | None] = asyncio.Queue()

    def found(self, findings: Sequence[Finding]) -> None:
        """Tell what was found, from any thread."""
        for finding in findings:
            self._loop.call_soon_threadsafe(self._found.put_nowait, finding)

    async def until(self, work: asyncio.Task[Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield findings as they are made, and how far the check has come, until `work` is done:
        each as the field of a response, `finding` or `progress`. Raises what `work` raises."""
        work.add_done_callback(lambda _: self._found.put_nowait(None))
        sent, sent_at = (-1, -1), 0.0
        while True:
            try:
                async with asyncio.timeout(PROGRESS_SECONDS):
                    finding = await self._found.get()
            except TimeoutError:
                pass
            else:
                if finding is None:
                    break
                yield {"finding": finding_message(finding)}
            seconds = time.monotonic() - sent_at
            now = self._progress()
            if (now != sent and seconds >= PROGRESS_SECONDS) or seconds >= HEARTBEAT_SECONDS:
                sent, sent_at = now, time.monotonic()
                yield _progress(*now)
        await work
        yield _progress(*self._progress())


def finding_message(finding: Finding) -> pb.DataFinding:
    return pb.DataFinding(
        file=FILES[finding.file],
        line=finding.line,
        severity=SEVERITIES[finding.severity],
        reason=finding.reason,
        message=finding.message,
        other_line=finding.other_line,
    )


def _progress(received: int, checked: int) -> dict[str, Any]:
    return {"progress": pb.CheckProgress(received=received, checked=checked)}
