"""Checks what callers ask of the gateway."""

from collections.abc import Sequence

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1.retrieval_pb2 import (
    PATH_HYBRID,
    PATH_RAG,
    PATH_TUNED,
    Path,
)

from services.runtime.errors import InvalidInput, NotReady

MOST_QUESTION = 8192
MOST_TURNS = 32
MOST_TURNS_TEXT = 262_144
MOST_PASSAGES = 50
DEFAULT_PASSAGES = 3


def check(request: pb.AnswerRequest) -> None:
    """Raise InvalidInput for a request that can never be answered, NotReady (ADAPTER_MISSING) if it
    does not say with which adapter; what the services behind check themselves is left to them."""
    if len(request.question) > MOST_QUESTION:
        raise InvalidInput(
            "QUESTION_TOO_LONG", f"a question has at most {MOST_QUESTION} characters"
        )
    if not request.question.strip():
        raise InvalidInput("QUESTION_EMPTY", "the question is empty")
    if request.path not in Path.values():
        raise InvalidInput("PATH_UNKNOWN", "there is no such path")
    if request.path in (PATH_RAG, PATH_HYBRID) and not request.corpus:
        raise InvalidInput("CORPUS_MISSING", "this path needs a corpus to search")
    if request.path in (PATH_TUNED, PATH_HYBRID) and not request.adapter:
        raise NotReady("ADAPTER_MISSING", "this path needs an adapter: say which one")
    _check_turns(request.history, "HISTORY_TOO_LONG")
    options = request.options
    _check_turns(options.examples, "EXAMPLES_INVALID")
    if any(not turn.question.strip() or not turn.answer.strip() for turn in options.examples):
        raise InvalidInput("EXAMPLES_INVALID", "an example has a question and an answer")
    if options.limit > MOST_PASSAGES:
        raise InvalidInput("LIMIT_OUT_OF_RANGE", f"limit is from 1 to {MOST_PASSAGES}")
    if len(options.pinned_documents) > MOST_PASSAGES:
        raise InvalidInput("TOO_MANY_PINNED", f"at most {MOST_PASSAGES} documents can be pinned")


def _check_turns(turns: Sequence[pb.Turn], reason: str) -> None:
    if len(turns) > MOST_TURNS:
        raise InvalidInput(reason, f"at most {MOST_TURNS} turns are taken")
    if sum(len(turn.question) + len(turn.answer) for turn in turns) > MOST_TURNS_TEXT:
        raise InvalidInput(reason, f"all turns have at most {MOST_TURNS_TEXT} characters")
