"""What a line of examples or of questions holds."""

import re
from dataclasses import dataclass
from typing import Any

from services.questions.lines import BadLine

CORPUS = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MOST_QUESTION = 8192  # code points: a longer one cannot be asked
MOST_RELEVANT = 100
MOST_ID = 512  # code points
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half of a character


@dataclass(frozen=True, slots=True)
class Example:
    """One line to train on. `history` is pairs of question and answer, `relevant` the ids of the
    documents that answer; `corpus` is empty where the line names none."""

    line: int
    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    relevant: tuple[str, ...] = ()
    corpus: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a question set, without its answers."""

    line: int
    question: str
    relevant: tuple[str, ...] = ()


def example(line: int, value: dict[str, Any]) -> tuple[Example, bool]:
    """Return the example, and whether a system message was left out. Raises BadLine (FIELD_MISSING,
    FIELD_INVALID, ANSWERS_MISSING, MESSAGES_INVALID, EMPTY)."""
    if "messages" not in value and "question" not in value:
        raise BadLine("FIELD_MISSING", 'there is neither "question" nor "messages"')
    if "messages" in value and "question" in value:
        raise BadLine("FIELD_INVALID", 'there are both "question" and "messages"')
    if "messages" in value:
        turns, system = _turns(value["messages"])
    else:
        turns, system = [(text(value["question"], "question"), _answer(value))], False
    corpus = value.get("corpus") or ""
    if corpus and not (isinstance(corpus, str) and CORPUS.fullmatch(corpus)):
        raise BadLine("FIELD_INVALID", '"corpus" is not the name of a corpus')
    asked, answered = turns.pop()
    return Example(line, asked, answered, tuple(turns), _relevant(value), corpus), system


def question(line: int, value: dict[str, Any]) -> Question:
    """Return the question. Raises BadLine (FIELD_MISSING, FIELD_INVALID, ANSWERS_MISSING,
    EMPTY)."""
    if "question" not in value:
        raise BadLine("FIELD_MISSING", 'there is no "question"')
    asked = text(value["question"], "question")
    if len(asked) > MOST_QUESTION:
        raise BadLine("FIELD_INVALID", f"the question has more than {MOST_QUESTION} characters")
    if "answer" not in value and "answers" not in value:
        raise BadLine("ANSWERS_MISSING", 'there is no "answers"')
    _answer(value)
    return Question(line, asked, _relevant(value))


def _answer(value: dict[str, Any]) -> str:
    """Return the answer; of several, the first."""
    if "answer" in value:
        return text(value["answer"], "answer")
    if "answers" not in value:
        raise BadLine("FIELD_MISSING", 'there is no "answer"')
    if not isinstance(value["answers"], list):
        raise BadLine("FIELD_INVALID", '"answers" is not a list')
    answers = [text(answer, "answers") for answer in value["answers"]]
    if not answers:
        raise BadLine("ANSWERS_MISSING", '"answers" is empty')
    return answers[0]


def _turns(messages: Any) -> tuple[list[tuple[str, str]], bool]:
    """Return pairs of question and answer, and whether a system message was left out."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadLine("MESSAGES_INVALID", '"messages" is not a list of objects')
    system = bool(messages) and messages[0].get("role") == "system"
    said = messages[system:]
    for index, message in enumerate(said):
        wanted = "assistant" if index % 2 else "user"
        place = f"messages[{index + system}]"
        if message.get("role") != wanted:
            raise BadLine("MESSAGES_INVALID", f"{place} is not the {wanted}'s")
        if not isinstance(message.get("content"), str):
            raise BadLine("MESSAGES_INVALID", f'the "content" of {place} is not a text')
    if not said or len(said) % 2:
        raise BadLine("MESSAGES_INVALID", "the last message is not the assistant's")
    texts = [text(message["content"], "content") for message in said]
    return list(zip(texts[::2], texts[1::2], strict=True)), system


def _relevant(value: dict[str, Any]) -> tuple[str, ...]:
    ids = value.get("relevant") or []
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise BadLine("FIELD_INVALID", '"relevant" is not a list of document ids')
    if len(ids) > MOST_RELEVANT:
        raise BadLine("FIELD_INVALID", f'"relevant" has more than {MOST_RELEVANT} document ids')
    if not all(0 < len(id) <= MOST_ID and not SURROGATE.search(id) for id in ids):
        raise BadLine("FIELD_INVALID", f"a document id has 1 to {MOST_ID} characters")
    return tuple(dict.fromkeys(ids))


def text(value: Any, name: str) -> str:
    """Return a text as it is trained on, without its outer white space. Raises BadLine
    (FIELD_INVALID, EMPTY)."""
    if not isinstance(value, str):
        raise BadLine("FIELD_INVALID", f'"{name}" is not a text')
    if SURROGATE.search(value):
        raise BadLine("FIELD_INVALID", f'"{name}" has half a character (a lone surrogate)')
    if not (said := value.strip()):
        raise BadLine("EMPTY", f'"{name}" is empty')
    return said
