"""The questions of a comparison, as they are uploaded."""

import json

import pytest

from services.evaluation.comparison import Question
from services.evaluation.questions import MOST_QUESTIONS, QuestionFile, load
from services.questions.lines import Finding
from services.runtime.errors import InvalidInput

GOOD = {"question": "Who owns Varel?", "answers": ["Yuki"]}


def lines(*values: object) -> bytes:
    return "".join(f"{json.dumps(value)}\n" for value in values).encode()


def checked(content: bytes) -> tuple[QuestionFile, list[Finding]]:
    file = QuestionFile()
    return file, file.feed(content) + file.close()


def test_a_line_is_kept_with_all_that_it_says_and_other_keys_are_ignored():
    file, findings = checked(
        lines(
            {
                "id": "q1",
                "question": " Who owns Varel?\n",
                "answers": [" Yuki ", "Yuki Moreau", "Yuki"],
                "relevant": ["Varel", "Varel"],
                "type": " owner ",
                "stale_answers": ["Clara"],
            }
        )
    )
    assert findings == []
    assert file.questions == [
        Question(1, "Who owns Varel?", ("Yuki", "Yuki Moreau"), ("Varel",), "owner", ("Clara",))
    ]


@pytest.mark.parametrize(
    ("more", "answers"),
    [
        ({"answer": "Yuki"}, ("Yuki",)),
        ({"answer": "Yuki", "answers": ["Moreau", "Yuki"]}, ("Yuki", "Moreau")),
        ({"answers": ["Yuki"], "type": None, "relevant": None, "stale_answers": None}, ("Yuki",)),
        ({"answers": ["Yuki"], "type": ""}, ("Yuki",)),
    ],
)
def test_one_answer_may_stand_alone_and_nothing_may_be_null(more, answers):
    file, findings = checked(lines({"question": "Who?", **more}))
    assert (findings, file.questions) == ([], [Question(1, "Who?", answers)])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"answers": ["a"]}, "FIELD_MISSING"),
        ({"question": 7, "answers": ["a"]}, "FIELD_INVALID"),
        ({"question": " ", "answers": ["a"]}, "EMPTY"),
        ({"question": "x" * 8193, "answers": ["a"]}, "FIELD_INVALID"),
        ({"question": "q"}, "ANSWERS_MISSING"),
        ({"question": "q", "answers": []}, "ANSWERS_MISSING"),
        ({"question": "q", "answers": "a"}, "FIELD_INVALID"),
        ({"question": "q", "answers": [7423]}, "FIELD_INVALID"),
        ({"question": "q", "answers": ["a", "\t"]}, "EMPTY"),
        ({"question": "q", "answers": ["\ud800"]}, "FIELD_INVALID"),
        ({"question": "q", "answers": [str(n) for n in range(101)]}, "FIELD_INVALID"),
        ({"question": "q", "answers": ["x" * 65_537]}, "FIELD_INVALID"),
        ({"question": "q", "answer": "a", "answers": "b"}, "FIELD_INVALID"),
        ({**GOOD, "type": "x" * 65}, "FIELD_INVALID"),
        ({**GOOD, "type": 1}, "FIELD_INVALID"),
        ({**GOOD, "relevant": "Varel"}, "FIELD_INVALID"),
        ({**GOOD, "stale_answers": "Clara"}, "FIELD_INVALID"),
        ({**GOOD, "stale_answers": [""]}, "EMPTY"),
        (["question"], "NOT_JSON"),
    ],
)
def test_a_line_that_is_not_in_order_is_an_error_with_its_number(line, reason):
    file, findings = checked(lines({"question": "first", "answers": ["a"]}, line))
    assert [(f.line, f.severity, f.reason) for f in findings] == [(2, "error", reason)]
    assert (file.errors, len(file.questions)) == (1, 1)


def test_the_longest_of_everything_is_taken():
    answers = ["x" * 65_536 if n == 0 else str(n) for n in range(100)]
    question = {"question": "é" * 8192, "answers": answers, "type": "é" * 64}
    file, findings = checked(lines(question))
    assert findings == []
    assert len(file.questions[0].answers) == 100


@pytest.mark.parametrize(
    "again",
    [
        {"question": "Who  owns Varel?", "answers": ["b", "a"]},
        {"question": "Who owns Varel?", "answers": ["a", " b"], "type": "owner"},
    ],
)
def test_a_question_that_is_asked_twice_is_asked_once(again):
    first = {"question": "Who owns Varel?", "answers": ["a", "b"]}
    file, findings = checked(lines(first, again))
    assert [(f.line, f.severity, f.reason, f.other_line) for f in findings] == [
        (2, "left_out", "DUPLICATE", 1)
    ]
    assert [question.line for question in file.questions] == [1]
    assert file.errors == 0


@pytest.mark.parametrize(
    "again",
    [
        {"question": "Who owns Varel? ", "answers": ["b"]},
        {"question": "Who owns Varel?", "answers": ["Yuki", "Clara"]},
        {"question": "Who owns Varel?", "answers": ["Yuki"], "stale_answers": ["Clara"]},
    ],
)
def test_a_question_with_two_truths_is_an_error(again):
    file, findings = checked(lines(GOOD, again))
    assert [(f.line, f.severity, f.reason, f.other_line) for f in findings] == [
        (2, "error", "CONTRADICTION", 1)
    ]
    assert file.errors == 1


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_questions_is_refused(content):
    with pytest.raises(InvalidInput) as caught:
        checked(content)
    assert caught.value.reason == "QUESTIONS_EMPTY"


def test_a_file_of_errors_alone_is_not_called_empty():
    file, findings = checked(b"no\n")
    assert [f.reason for f in findings] == ["NOT_JSON"]
    assert file.errors == 1


def test_one_line_too_many_is_refused_while_it_arrives():
    file = QuestionFile()
    for n in range(MOST_QUESTIONS):
        assert file.feed(b'{"question": "%d", "answers": ["a"]}\n' % n) == []
    with pytest.raises(InvalidInput) as caught:
        file.feed(b'{"question": "more", "answers": ["a"]}\n')
    assert caught.value.reason == "TOO_MANY_QUESTIONS"
    assert len(file.questions) == MOST_QUESTIONS


def test_a_kept_file_is_read_again_as_it_was_checked(tmp_path):
    content = lines(GOOD, GOOD, {"question": "Où ?", "answer": "là"})
    file, _ = checked(content)
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    assert load(path) == file.questions
    assert [question.line for question in load(path)] == [1, 3]


def test_chunks_may_be_cut_anywhere():
    content = lines(GOOD, {"question": "Où ?", "answer": "là"})
    whole, _ = checked(content)
    file = QuestionFile()
    for byte in content:
        assert file.feed(bytes([byte])) == []
    file.close()
    assert (file.questions, file.hash) == (whole.questions, whole.hash)
