"""Prometheus metrics of answers. Labels take few values: never a tenant, never text."""

from prometheus_client import Counter, Histogram
from tworoads.v1 import answer_pb2 as pb
from tworoads.v1.retrieval_pb2 import Path

ANSWERS = Counter("tworoads_answers", "Answers that were written to their end.", ["path", "reason"])
DEGRADED = Counter("tworoads_answers_degraded", "Answers that went without a part.", ["part"])
CITATIONS = Counter("tworoads_citations", "Checks of a sentence.", ["verdict"])
FIRST_TEXT = Histogram(
    "tworoads_first_text_seconds",
    "Time from a question's arrival to the first text, in seconds.",
    ["path"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
VERDICTS = {
    "citation": CITATIONS.labels("supported"),
    "unsupported": CITATIONS.labels("unsupported"),
}


class Answer:
    """Counts one answer by its events."""

    def __init__(self) -> None:
        self._path = ""

    def add(self, event: pb.AnswerResponse) -> None:
        kind = event.WhichOneof("event")
        if kind == "started":
            self._path = _word(Path.Name(event.started.path))
        elif kind in VERDICTS:
            VERDICTS[kind].inc()
        elif kind == "finished":
            finished = event.finished
            reason = pb.AnswerFinishReason.Name(finished.reason).removeprefix("ANSWER_FINISH_")
            ANSWERS.labels(self._path, _word(reason)).inc()
            for part in finished.degraded:
                DEGRADED.labels(part.lower()).inc()
            if finished.timings.first_text:
                FIRST_TEXT.labels(self._path).observe(finished.timings.first_text / 1e3)


def _word(name: str) -> str:
    return name.partition("_")[2].lower()
