"""The words of every path: frozen files, one per version, and the conversation built from them."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

VERSIONS = ("v1",)
DEFAULT_VERSION = VERSIONS[0]


@dataclass(frozen=True)
class Part:
    """A piece of a message. Droppable ones are left out, the last first, if the context is full."""

    text: str
    id: str = ""
    droppable: bool = False


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: the joined texts of its parts."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Shown:
    """A passage that the model is shown."""

    id: str
    title: str
    text: str


def conversation(
    question: str,
    passages: Sequence[Shown] | None = None,
    history: Sequence[tuple[str, str]] = (),
    examples: Sequence[tuple[str, str]] = (),
    version: str = DEFAULT_VERSION,
) -> list[Message]:
    """Return the messages that ask `question`; with `passages` (RAG, HYBRID) or without (None).

    `history` and `examples` are pairs of question and answer. What is stable comes first and the
    question last, so that the next prompt finds its beginning in the prefix cache.
    """
    words = _words(version)
    system = words["system"] if passages is None else words["passages"]["system"]
    messages = [_message("system", system)]
    for asked, answered in (*examples, *history):
        messages += [
            _message("user", words["question"]["before"] + asked),
            _message("assistant", answered),
        ]
    parts: list[Part] = []
    if passages is not None:
        fence = words["passages"]
        parts.append(Part(fence["before"]))
        parts += [
            Part(fence["open"] + _inside(fence, passage) + fence["close"], passage.id, True)
            for passage in passages
        ]
        parts.append(Part(fence["after"]))
    parts.append(Part(words["question"]["before"] + question.strip()))
    return [*messages, Message("user", tuple(parts))]


def rewriting(
    question: str, history: Sequence[tuple[str, str]], version: str = DEFAULT_VERSION
) -> list[Message]:
    """Return the messages that ask the model for `question` in a form that needs no history."""
    words = _words(version)
    turns = [f"Q: {asked}\nA: {answered}\n" for asked, answered in history]
    text = "".join(turns) + f"Q: {question.strip()}"
    return [_message("system", words["rewrite"]["system"]), _message("user", text)]


def stops(version: str = DEFAULT_VERSION) -> list[str]:
    """Return the texts before which an answer ends."""
    return list(_words(version)["stop"])


def abstention(version: str = DEFAULT_VERSION) -> str:
    """Return the sentence with which the model is told to say that the passages do not answer."""
    return str(_words(version)["passages"]["abstain"])


def _message(role: Role, text: str) -> Message:
    return Message(role, (Part(text.strip()),))


def _inside(fence: dict[str, str], passage: Shown) -> str:
    """Return what stands between the delimiters, which must not end them."""
    text = f"{passage.title}\n{passage.text}" if passage.title else passage.text
    tags = "|".join(re.escape(fence[tag].strip().strip("</>")) for tag in ("open", "close"))
    # A model reads "< /Passage>" as the end too.
    return re.sub(rf"<(?=\s*/?\s*(?:{tags})\b)", "&lt;", text, flags=re.IGNORECASE)


@cache
def _words(version: str) -> dict[str, Any]:
    if version not in VERSIONS:
        raise ValueError(f"no prompt version {version!r}; there are {', '.join(VERSIONS)}")
    text = resources.files("services.prompts").joinpath(f"{version}.toml").read_text("utf-8")
    return tomllib.loads(text)
