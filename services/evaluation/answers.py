"""The answers of a comparison: one ComparisonAnswer as protobuf JSON a line."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import get_args

from google.protobuf.json_format import MessageToJson, Parse
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1.answer_pb2 import ANSWER_FINISH_REASON_NO_EVIDENCE

from services.evaluation.comparison import Answer, Phase, Quote

PHASES: dict[Phase, pb.ComparisonPhase.ValueType] = {
    phase: pb.ComparisonPhase.Value(f"COMPARISON_PHASE_{phase.upper()}")
    for phase in get_args(Phase)
}
PHASE_OF = {number: phase for phase, number in PHASES.items()}
MOST_PAGE = 1024 * 1024  # bytes


class AnswerFile:
    """Appends answers. What an interrupted write left of a last line is cut off at first."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Blocks, as all methods do. Raises OSError."""
        self.last = 0  # the sequence number given last
        self._file = path.open("a+b")
        _cut_torn_line(path)
        for answer in _read(path):
            self.last = answer.sequence

    def add(self, answers: list[pb.ComparisonAnswer]) -> None:
        """Write answers that last when this returns; their sequence is that of the comparison."""
        lines = b"".join(_line(answer) for answer in answers)
        whole = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(whole)
            raise
        self.last = max(self.last, *(answer.sequence for answer in answers))

    def close(self) -> None:
        self._file.close()


def load(path: Path) -> list[Answer]:
    """Return all answers as they are analysed. Blocks."""
    return [plain(answer) for answer in _read(path)]


def page(
    path: Path, after: int, candidate: str, phase: pb.ComparisonPhase.ValueType, size: int
) -> tuple[list[pb.ComparisonAnswer], bool]:
    """Return at most `size` answers, and about 1 MiB, with sequence numbers behind `after`, of one
    candidate and one phase if these are given; and whether more follow. Blocks."""
    found: list[pb.ComparisonAnswer] = []
    filled = 0
    for answer in _read(path, after):
        if candidate and answer.candidate != candidate:
            continue
        if phase and answer.phase != phase:
            continue
        filled += answer.ByteSize()
        if found and (len(found) == size or filled > MOST_PAGE):
            return found, True
        found.append(answer)
    return found, False


def plain(answer: pb.ComparisonAnswer) -> Answer:
    """Return what is analysed of an answer."""
    finished = answer.finished
    return Answer(
        sequence=answer.sequence,
        candidate=answer.candidate,
        phase=PHASE_OF[answer.phase],
        line=answer.line,
        time=answer.time.ToMicroseconds() / 1e6,
        total_ms=answer.total_ms,
        text=answer.text,
        documents=tuple(answer.documents),
        quotes=tuple(
            Quote(quote.answer_start, quote.answer_end, quote.document_id, quote.quote)
            for quote in answer.citations
        ),
        unsupported=len(answer.unsupported),
        input_tokens=finished.input_tokens,
        output_tokens=finished.output_tokens,
        first_text_ms=answer.first_text_ms if answer.HasField("first_text_ms") else None,
        degraded=tuple(finished.degraded),
        no_evidence=finished.reason == ANSWER_FINISH_REASON_NO_EVIDENCE,
        strict=answer.strict if answer.HasField("strict") else None,
        format_blind=answer.format_blind if answer.HasField("format_blind") else None,
        judge=answer.judge if answer.HasField("judge") else None,
        error=answer.error,
    )


def _line(answer: pb.ComparisonAnswer) -> bytes:
    return MessageToJson(answer, preserving_proto_field_name=True, indent=None).encode() + b"\n"


def _read(path: Path, after: int = 0) -> Iterator[pb.ComparisonAnswer]:
    """Yield the answers behind a sequence number, which is the number of the line."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in islice(lines, after, None):
            if line.endswith(b"\n"):  # else it is being written
                yield Parse(line, pb.ComparisonAnswer())


def _cut_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        tail = b""
        while start > 0 and b"\n" not in tail:
            step = min(start, 65_536)
            start -= step
            file.seek(start)
            tail = file.read(step) + tail
        file.truncate(start + tail.rfind(b"\n") + 1)
