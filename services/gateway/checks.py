"""Checks what callers ask of the gateway."""

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1.retrieval_pb2 import (
    PATH_HYBRID,
    PATH_RAG,
    PATH_TUNED,
    Path,
)

from services.prompts.options import check_examples, check_turns
from services.runtime.errors import InvalidInput, NotReady

MOST_QUESTION = 8192
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
    check_turns(request.history, "HISTORY_TOO_LONG")
    options = request.options
    check_examples(options.examples)
    if options.limit > MOST_PASSAGES:
        raise InvalidInput("LIMIT_OUT_OF_RANGE", f"limit is from 1 to {MOST_PASSAGES}")
    if len(options.pinned_documents) > MOST_PASSAGES:
        raise InvalidInput("TOO_MANY_PINNED", f"at most {MOST_PASSAGES} documents can be pinned")
