"""Turns requests into plain values, and refuses those that can never succeed."""

import base64
import binascii
import math
import re
from dataclasses import dataclass

from google.protobuf.json_format import MessageToJson
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1.generation_pb2 import GenerateOptions
from tworoads.v1.retrieval_pb2 import PATH_BASE, PATH_HYBRID, PATH_RAG, PATH_TUNED, SearchMode

from services.evaluation.comparison import Candidate, Constraints, PathName, ScorerName
from services.prompts.options import MOST_TOKENS, MOST_TURNS, check_examples, check_options
from services.runtime.errors import InvalidInput

ID = re.compile(r"[a-z0-9._-]{1,64}")
KEY = re.compile(r"[ -~]{0,64}")
PATHS: dict[int, PathName] = {
    PATH_BASE: "base",
    PATH_RAG: "rag",
    PATH_TUNED: "tuned",
    PATH_HYBRID: "hybrid",
}
SCORERS: dict[int, ScorerName | None] = {
    pb.SCORER_UNSPECIFIED: None,
    pb.SCORER_EXACT_MATCH: "exact_match",
    pb.SCORER_TOKEN_F1: "token_f1",
    pb.SCORER_CONTAINS: "contains",
    pb.SCORER_LABEL: "label",
    pb.SCORER_JSON: "json",
    pb.SCORER_REGEX: "regex",
    pb.SCORER_NUMERIC: "numeric",
}
MOST_CANDIDATES = 16
MOST_ADAPTERS = 6
MOST_PASSAGES = 50
MOST_CONCURRENCY = 64
MOST_MARGIN = 0.5
DEFAULT_CONCURRENCY = 4
DEFAULT_MARGIN = 0.05
DEFAULT_SHOTS = 4
MOST_PAGE = 1000
DEFAULT_PAGE = 100
MOST_NUMBER = 2**63 - 1  # SQLite's integers


@dataclass(frozen=True)
class Start:
    """What a CreateComparisonStart asks for. Adapters are as they were given, NAME or NAME@HASH;
    `scoring` is what scoring.chosen takes behind the questions."""

    corpus: str
    candidates: tuple[Candidate, ...]
    adapters: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    shots: int
    scoring: tuple[ScorerName | None, ScorerName | None, float, bool, bool | None]
    constraints: Constraints
    concurrency: int
    margin: float
    seed: int
    idempotency_key: str


def start(given: pb.CreateComparisonStart) -> Start:
    """Return what to compare. Raises InvalidInput as the proto says."""
    if not KEY.fullmatch(given.idempotency_key):
        raise InvalidInput(
            "IDEMPOTENCY_KEY_INVALID", "an idempotency key is at most 64 printable ASCII characters"
        )
    if len(given.candidates) > MOST_CANDIDATES:
        raise InvalidInput("TOO_MANY_CANDIDATES", f"at most {MOST_CANDIDATES} are compared")
    if len(given.adapters) > MOST_ADAPTERS:
        raise InvalidInput("TOO_MANY_CANDIDATES", f"at most {MOST_ADAPTERS} adapters are compared")
    if given.candidates and given.adapters:
        raise InvalidInput("CANDIDATE_INVALID", "adapters are named in the candidates, or alone")
    candidates = tuple(candidate(one, given.corpus) for one in given.candidates)
    if len({one.id for one in candidates}) < len(candidates):
        raise InvalidInput("CANDIDATE_INVALID", "two candidates have the same id")
    concurrency = given.concurrency or DEFAULT_CONCURRENCY
    if concurrency > MOST_CONCURRENCY:
        raise InvalidInput("CONCURRENCY_OUT_OF_RANGE", f"from 1 to {MOST_CONCURRENCY}")
    margin = given.margin if given.HasField("margin") else DEFAULT_MARGIN
    if not 0 <= margin <= MOST_MARGIN:
        raise InvalidInput("MARGIN_OUT_OF_RANGE", f"a margin is from 0 to {MOST_MARGIN}")
    shots = given.shots if given.HasField("shots") else DEFAULT_SHOTS
    if shots > MOST_TURNS:
        raise InvalidInput("EXAMPLES_INVALID", f"at most {MOST_TURNS} examples are shown")
    check_examples(given.examples)
    examples = tuple((turn.question.strip(), turn.answer.strip()) for turn in given.examples)
    return Start(
        corpus=given.corpus,
        candidates=candidates,
        adapters=tuple(dict.fromkeys(given.adapters)),
        examples=examples,
        shots=shots,
        scoring=_scoring(given.scoring),
        constraints=_constraints(given.constraints),
        concurrency=concurrency,
        margin=margin,
        seed=given.seed,
        idempotency_key=given.idempotency_key,
    )


def candidate(given: pb.Candidate, corpus: str) -> Candidate:
    """Return a candidate as it was asked for. Raises InvalidInput (CANDIDATE_INVALID,
    CORPUS_MISSING, ADAPTER_MISSING, EXAMPLES_INVALID)."""
    if not ID.fullmatch(given.id):
        raise InvalidInput(
            "CANDIDATE_INVALID", "a candidate's id is 1 to 64 of a-z, 0-9, '.', '_' and '-'"
        )
    path = PATHS.get(given.path)
    if path is None:
        raise InvalidInput("CANDIDATE_INVALID", f"{given.id} names no path that can be compared")
    if path in ("tuned", "hybrid") and not given.adapter:
        raise InvalidInput("ADAPTER_MISSING", f"{given.id} needs an adapter")
    if path in ("base", "rag") and given.adapter:
        raise InvalidInput("CANDIDATE_INVALID", f"{given.id} takes no adapter")
    searches = path in ("rag", "hybrid")
    searched = (given.corpus or corpus) if searches else ""
    if searches and not searched:
        raise InvalidInput("CORPUS_MISSING", f"{given.id} needs a corpus to search")
    options = given.options
    if options.pinned_documents:
        raise InvalidInput("CANDIDATE_INVALID", "pinned documents are not compared")
    if options.limit > MOST_PASSAGES:
        raise InvalidInput("CANDIDATE_INVALID", f"{given.id} asks for too many passages")
    if options.search_mode not in SearchMode.values():
        raise InvalidInput("CANDIDATE_INVALID", f"{given.id} names no search mode")
    check_examples(options.examples)
    check_writing(given.id, options.generate)
    text = MessageToJson(options, preserving_proto_field_name=True, indent=None)
    return Candidate(given.id, path, given.adapter, searched, text)


def check_writing(id: str, given: GenerateOptions, context_length: int = MOST_TOKENS) -> None:
    """Raise InvalidInput (CANDIDATE_INVALID) if a candidate can never write like this."""
    try:
        check_options(given, context_length)
    except InvalidInput as error:
        raise InvalidInput("CANDIDATE_INVALID", f"{id}: {error} ({error.reason})") from None


def page_size(given: int) -> int:
    """Return how many entries a page has. Raises InvalidInput (PAGE_SIZE_OUT_OF_RANGE)."""
    if given > MOST_PAGE:
        raise InvalidInput("PAGE_SIZE_OUT_OF_RANGE", f"a page has from 1 to {MOST_PAGE} entries")
    return given or DEFAULT_PAGE


def page_token(number: int) -> str:
    """Return the token of the page behind an entry's number."""
    return base64.urlsafe_b64encode(str(number).encode()).decode()


def number_of(token: str, otherwise: int) -> int:
    """Return the number in a page token. Raises InvalidInput (PAGE_TOKEN_INVALID)."""
    if not token:
        return otherwise
    try:
        number = int(base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii"))
    except (binascii.Error, ValueError):
        number = -1
    if not 0 <= number <= MOST_NUMBER:
        raise InvalidInput("PAGE_TOKEN_INVALID", "this is no page token of ours")
    return number


def _scoring(
    given: pb.ScoringOptions,
) -> tuple[ScorerName | None, ScorerName | None, float, bool, bool | None]:
    if given.strict not in SCORERS or given.format_blind not in SCORERS:
        raise InvalidInput("SCORER_INVALID", "there is no such scorer")
    decides = given.strict_decides if given.HasField("strict_decides") else None
    return (
        SCORERS[given.strict],
        SCORERS[given.format_blind],
        given.numeric_tolerance,
        given.judge,
        decides,
    )


def _constraints(given: pb.Constraints) -> Constraints:
    def one(name: str) -> float | None:
        value: float = getattr(given, name)
        if not given.HasField(name):  # type: ignore[arg-type]
            return None
        if not (math.isfinite(value) and value >= 0):
            raise InvalidInput("CONSTRAINT_INVALID", f"{name} is a number from 0 on")
        return value

    constraints = Constraints(one("max_cost_per_correct"), one("max_p95_ms"), one("min_quality"))
    if constraints.min_quality is not None and constraints.min_quality > 1:
        raise InvalidInput("CONSTRAINT_INVALID", "min_quality is from 0 to 1")
    return constraints
