"""Counts the answers of each candidate while they come."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.evaluation.comparison import Candidate, CandidateProgress

GIVEN_UP = 20  # failures with one reason and no answer, after which a candidate is not asked again


@dataclass
class _Counts:
    total: int = 0
    done: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    strict: float = 0.0
    blind: float = 0.0
    timed: int = 0
    ms: float = 0.0


class Tally:
    """What has come of each candidate, and what is still to come."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._of = {candidate.id: _Counts() for candidate in candidates}

    def expect(self, candidate: str, total: int) -> None:
        """Say how many answers a candidate is asked for, in all phases."""
        self._of[candidate].total = total

    def add(
        self,
        candidate: str,
        strict: float | None,
        format_blind: float | None,
        error: str,
        total_ms: float = 0.0,
    ) -> None:
        """Count an answer; one that took no time says nothing of the time that is left."""
        counts = self._of[candidate]
        counts.done += 1
        if error:
            counts.failed[error] += 1
        else:
            counts.strict += strict or 0.0
            counts.blind += format_blind or 0.0
        if total_ms:
            counts.timed += 1
            counts.ms += total_ms

    def given_up(self, candidate: str) -> str:
        """Return the reason why a candidate is not asked any more, empty if it is."""
        counts = self._of[candidate]
        [(reason, count)] = counts.failed.most_common(1) or [("", 0)]
        return reason if count >= GIVEN_UP and count == counts.done else ""

    def progress(self, concurrency: int) -> tuple[CandidateProgress, ...]:
        """Return how far each candidate has come, `concurrency` questions at a time."""
        return tuple(_progress(id, counts, concurrency) for id, counts in self._of.items())


def _progress(candidate: str, counts: _Counts, concurrency: int) -> CandidateProgress:
    failed = counts.failed.total()
    scored, left = counts.done - failed, counts.total - counts.done
    seconds = 0.0 if left <= 0 else None
    if left > 0 and counts.timed:
        seconds = left * counts.ms / counts.timed / 1e3 / concurrency
    return CandidateProgress(
        candidate,
        counts.done,
        counts.total,
        failed,
        seconds,
        counts.strict / scored if scored else None,
        counts.blind / scored if scored else None,
    )
