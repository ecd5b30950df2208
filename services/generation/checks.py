"""Turns requests into plain values, and refuses those that can never succeed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tworoads.v1 import generation_pb2 as pb

from services.prompts.options import check_options
from services.prompts.words import Message, Part, Role
from services.runtime.errors import InvalidInput

ROLES: dict[int, Role] = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
}
ADAPTER_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}@[0-9a-f]{12}")


@dataclass(frozen=True)
class Sampling:
    """How to write. `max_tokens` None means as many as the service gives by default."""

    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: str = ""
    batch: bool = False
    every_token: bool = False
    min_tokens: int = 0


def conversation(messages: Sequence[pb.Message]) -> list[Message]:
    """Return the messages. Raises InvalidInput (MESSAGES_EMPTY, MESSAGE_INVALID)."""
    if not messages:
        raise InvalidInput("MESSAGES_EMPTY", "messages must have at least one entry")
    turns = [_message(message, i) for i, message in enumerate(messages)]
    start = 1 if turns[0].role == "system" else 0
    for i, turn in enumerate(turns[start:]):
        wanted = "assistant" if i % 2 else "user"
        if turn.role != wanted:
            raise _invalid(start + i, f"is the {turn.role}'s where the {wanted}'s belongs")
    if turns[-1].role != "user":
        raise _invalid(len(turns) - 1, "is the last and not the user's")
    return turns


def sampling(request: pb.GenerateRequest, context_length: int) -> Sampling:
    """Return how to write. Raises InvalidInput with the reasons that the proto names."""
    options = request.options
    check_options(options, context_length)
    return Sampling(
        max_tokens=options.max_tokens if options.HasField("max_tokens") else None,
        temperature=options.temperature,
        seed=options.seed if options.HasField("seed") else None,
        stop=tuple(options.stop),
        json_schema=options.json_schema,
        batch=options.priority == pb.PRIORITY_BATCH,
        every_token=request.every_token,
        min_tokens=options.min_tokens,
    )


def adapter_id(text: str) -> None:
    """Raise InvalidInput (ADAPTER_NAME_INVALID) unless it is an adapter's NAME@HASH."""
    if not ADAPTER_ID.fullmatch(text):
        raise InvalidInput(
            "ADAPTER_NAME_INVALID",
            "an adapter is named NAME@HASH: 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with"
            " a letter or a digit, then '@' and 12 digits of 0-9 and a-f",
        )


def _message(message: pb.Message, index: int) -> Message:
    role = ROLES.get(message.role)
    if role is None:
        raise _invalid(index, "has no role")
    if role == "system" and index > 0:
        raise _invalid(index, "is the system's and not the first")
    if not message.parts:
        raise _invalid(index, "has no parts")
    if any(part.droppable and not part.id for part in message.parts):
        raise _invalid(index, "has a droppable part without an id")
    return Message(role, tuple(Part(p.text, p.id, p.droppable) for p in message.parts))


def _invalid(index: int, what: str) -> InvalidInput:
    return InvalidInput("MESSAGE_INVALID", f"messages[{index}] {what}", index=str(index))
