"""The questions of an upload, with their answers: checked line by line while they arrive."""

from pathlib import Path
from typing import Any

from services.evaluation.comparison import Question
from services.questions import fields
from services.questions.lines import BadLine, CheckedFile, Finding
from services.questions.normalising import digest, spaced
from services.runtime.errors import InvalidInput

MOST_QUESTIONS = 20_000  # lines
MOST_TEXT = 64 * 1024 * 1024  # code points of all lines
MOST_ANSWERS = 100  # of one question
MOST_ANSWER = 65_536  # code points
MOST_TYPE = 64  # code points
READ = 1024 * 1024  # bytes


class QuestionFile(CheckedFile):
    """The questions of a comparison. `questions` are those that are asked, in the order of their
    lines."""

    def __init__(self) -> None:
        super().__init__("questions", "TOO_MANY_QUESTIONS", MOST_TEXT)
        self.questions: list[Question] = []
        # By question, white space aside: its answers and its line.
        self._asked: dict[bytes, tuple[bytes, int]] = {}

    def close(self) -> list[Finding]:
        """Check the last line, and return what was found last. Raises InvalidInput
        (QUESTIONS_EMPTY) if no line is in order and none is an error, which is worse."""
        findings = super().close()
        if not self.questions and not self.errors:
            raise InvalidInput("QUESTIONS_EMPTY", "there is no question")
        return findings

    def use(self, line: int, value: dict[str, Any]) -> int:
        asked = fields.question(line, value)
        question = Question(
            line=line,
            question=asked.question,
            answers=_answers(value),
            relevant=asked.relevant,
            type=_type(value),
            stale_answers=_stale_answers(value),
        )
        key = digest(question.question, form=spaced)
        # The order of the answers does not matter: any of them is right.
        stale = sorted(question.stale_answers)
        said = digest(*sorted(question.answers), f"{len(stale)}", *stale, form=spaced)
        earlier, other = self._asked.setdefault(key, (said, line))
        if earlier != said:
            message = f"line {other} asks the same and has other answers"
            raise BadLine("CONTRADICTION", message, other)
        if other != line:
            message = f"line {other} asks the same and has the same answers"
            self.findings.add(line, "left_out", "DUPLICATE", message, other)
            return 0
        self.questions.append(question)
        texts = (question.question, *question.answers, *stale, *question.relevant, question.type)
        return sum(map(len, texts))

    def _check(self, line: bytes | None) -> None:
        if self._lines.count > MOST_QUESTIONS:
            raise InvalidInput("TOO_MANY_QUESTIONS", f"at most {MOST_QUESTIONS} lines are taken")
        super()._check(line)


def load(path: Path) -> list[Question]:
    """Return the questions of a file that was checked before. Raises OSError. Blocks."""
    file = QuestionFile()
    with path.open("rb") as content:
        while chunk := content.read(READ):
            file.feed(chunk)
    file.close()
    return file.questions


def _answers(value: dict[str, Any]) -> tuple[str, ...]:
    """Return all answers that are right; a line may have "answer", "answers" or both."""
    one = [value["answer"]] if "answer" in value else []
    return _texts([*one, *_list(value, "answers")], "answers")


def _stale_answers(value: dict[str, Any]) -> tuple[str, ...]:
    return _texts(_list(value, "stale_answers"), "stale_answers")


def _list(value: dict[str, Any], name: str) -> list[Any]:
    texts = value.get(name)
    if texts is None:
        return []
    if not isinstance(texts, list):
        raise BadLine("FIELD_INVALID", f'"{name}" is not a list')
    return texts


def _texts(values: list[Any], name: str) -> tuple[str, ...]:
    if len(values) > MOST_ANSWERS:
        raise BadLine("FIELD_INVALID", f'"{name}" has more than {MOST_ANSWERS} texts')
    texts = [fields.text(value, name) for value in values]
    if any(len(text) > MOST_ANSWER for text in texts):
        raise BadLine("FIELD_INVALID", f'"{name}" has one of more than {MOST_ANSWER} characters')
    return tuple(dict.fromkeys(texts))


def _type(value: dict[str, Any]) -> str:
    said = value.get("type")
    if said is None or said == "":
        return ""
    type = fields.text(said, "type")
    if len(type) > MOST_TYPE:
        raise BadLine("FIELD_INVALID", f'"type" has more than {MOST_TYPE} characters')
    return type
