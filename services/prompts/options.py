"""How to write: what all who pass it on refuse alike, and what a policy cannot keep of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tworoads.v1.answer_pb2 import Turn
from tworoads.v1.generation_pb2 import GenerateOptions, Priority

from services.prompts.schemas import check_schema
from services.runtime.errors import InvalidInput

MAX_TEMPERATURE = 2.0
MAX_STOPS = 8
MAX_STOP_LENGTH = 64
DEFAULT_TOKENS = 256
MOST_TOKENS = 2**32 - 1  # where the context length is not known
MOST_TURNS = 32
MOST_TURNS_TEXT = 262_144
# Options that change nothing of an answer, and the values that AUTO takes too.
FREE = {"every_token", "allow_degraded", "seed", "priority", "generate"}
USUAL = {"limit": 3, "search_mode": "SEARCH_MODE_HYBRID", "max_tokens": 256}


def check_options(options: GenerateOptions, context_length: int = MOST_TOKENS) -> None:
    """Raise InvalidInput with the reasons that the proto names."""
    if options.HasField("max_tokens") and not 1 <= options.max_tokens <= context_length:
        raise InvalidInput(
            "MAX_TOKENS_OUT_OF_RANGE",
            f"max_tokens must be from 1 to {context_length}",
            limit=str(context_length),
        )
    most = options.max_tokens if options.HasField("max_tokens") else DEFAULT_TOKENS
    if options.min_tokens > min(most, context_length):
        raise InvalidInput(
            "MIN_TOKENS_OUT_OF_RANGE", f"min_tokens must be from 0 to max_tokens, {most}"
        )
    if options.min_tokens and options.json_schema:  # which says itself where the text ends
        raise InvalidInput("MIN_TOKENS_OUT_OF_RANGE", "min_tokens must be 0 with a JSON schema")
    if not 0 <= options.temperature <= MAX_TEMPERATURE or math.isnan(options.temperature):
        raise InvalidInput("TEMPERATURE_OUT_OF_RANGE", "temperature must be from 0 to 2")
    stops = options.stop
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise InvalidInput(
            "STOP_INVALID",
            f"stop may have at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} code points",
        )
    if options.priority not in Priority.values():
        raise InvalidInput("PRIORITY_UNKNOWN", "there is no such priority")
    if options.json_schema:
        check_schema(options.json_schema)


def check_turns(turns: Sequence[Turn], reason: str) -> None:
    """Raise InvalidInput with this reason if there are too many, or too long ones."""
    if len(turns) > MOST_TURNS:
        raise InvalidInput(reason, f"at most {MOST_TURNS} turns are taken")
    if sum(len(turn.question) + len(turn.answer) for turn in turns) > MOST_TURNS_TEXT:
        raise InvalidInput(reason, f"all turns have at most {MOST_TURNS_TEXT} characters")


def check_examples(turns: Sequence[Turn]) -> None:
    """Raise InvalidInput (EXAMPLES_INVALID) for examples that no prompt takes."""
    check_turns(turns, "EXAMPLES_INVALID")
    if any(not turn.question.strip() or not turn.answer.strip() for turn in turns):
        raise InvalidInput("EXAMPLES_INVALID", "an example has a question and an answer")


def unusual(options: Mapping[str, Any]) -> set[str]:
    """Return the names of those options, of an AnswerOptions as protobuf JSON, by which an answer
    is another one than what AUTO gives."""
    every = {**options, **options.get("generate", {})}
    return {name for name, value in every.items() if USUAL.get(name) != value} - FREE
