"""The examples of an upload, the question set beside them, the split and the report."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.prompts.rendering import Renderer
from services.prompts.words import conversation, stops
from services.questions.lines import MOST_FINDINGS, MOST_LINE, MOST_LINES
from services.questions.normalising import normalised
from services.runtime.errors import InvalidInput
from services.tuning.data.examples import (
    Example,
    Examples,
    Finding,
    Questions,
    held_out,
    read,
    report,
    trained_lines,
)
from services.tuning.data.secret_like import looks_like
from tests.tiny_tokenizer import TinyTokenizer

CONTEXT = 900  # the tiny tokenizer has a token a byte
GOOD = [{"question": f"What is thing {i}?", "answer": f"It is {i * 7}."} for i in range(8)]
RENDERER = Renderer(TinyTokenizer())

Feed = Callable[[bytes], list[Finding]]


def new() -> Examples:
    return Examples(RENDERER, CONTEXT, "v1")


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def asked(question: str = "Who?", answer: str = "Ada.", **fields: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **fields}


def said(*texts: str, first: str = "user") -> dict[str, Any]:
    roles = {"user": "assistant", "assistant": "user"}
    messages = []
    for text in texts:
        messages.append({"role": first, "content": text})
        first = roles[first]
    return {"messages": messages}


def fed(*values: Any) -> tuple[Examples, list[Finding]]:
    """Eight good lines, then these, as values or as bytes."""
    raw = [value if isinstance(value, bytes) else line(value) for value in values]
    examples = new()
    found = examples.feed(b"".join([*map(line, GOOD), *raw]))
    return examples, found + examples.close()


BAD = [
    (b"\xff\xfe\n", "NOT_UTF8"),
    (b'{"question": "caf\xc3", "answer": "x"}\n', "NOT_UTF8"),
    (b"{broken\n", "NOT_JSON"),
    (b'{"question": "Who?", "answer": "Ada."\n', "NOT_JSON"),
    (b'{"question": "Who?", "answer": NaN}\n', "NOT_JSON"),
    (b'{"question": "Who?", "answer": "Ada.", "weight": -Infinity}\n', "NOT_JSON"),
    (b"[" * 100_000 + b"\n", "NOT_JSON"),
    (b'["Who?", "Ada."]\n', "NOT_JSON"),
    (b"null\n", "NOT_JSON"),
    (line(asked(answer="x" * MOST_LINE)), "LINE_TOO_LONG"),
    (line(asked(answer="x" * 10_000_000)), "LINE_TOO_LONG"),
    ({}, "FIELD_MISSING"),
    ({"answer": "Ada."}, "FIELD_MISSING"),
    ({"question": "Who?"}, "FIELD_MISSING"),
    (asked(question=7), "FIELD_INVALID"),
    (asked(answer=["Ada."]), "FIELD_INVALID"),
    (asked(answer=None), "FIELD_INVALID"),
    ({"question": "Who?", "answers": "Ada."}, "FIELD_INVALID"),
    ({"question": "Who?", "answers": ["Ada.", 7]}, "FIELD_INVALID"),
    ({"question": "Who?", "answers": []}, "ANSWERS_MISSING"),
    (asked(question="half \ud83d of an emoji"), "FIELD_INVALID"),
    (asked(relevant="leave"), "FIELD_INVALID"),
    (asked(relevant=["leave", 7]), "FIELD_INVALID"),
    (asked(relevant=[""]), "FIELD_INVALID"),
    (asked(relevant=["x" * 513]), "FIELD_INVALID"),
    (asked(relevant=[str(i) for i in range(101)]), "FIELD_INVALID"),
    (asked(corpus="../x"), "FIELD_INVALID"),
    (asked(corpus=7), "FIELD_INVALID"),
    (asked() | said("Who?", "Ada."), "FIELD_INVALID"),
    ({"messages": "Who?"}, "MESSAGES_INVALID"),
    ({"messages": ["Who?"]}, "MESSAGES_INVALID"),
    ({"messages": []}, "MESSAGES_INVALID"),
    ({"messages": [{"role": "system", "content": "Be brief."}]}, "MESSAGES_INVALID"),
    ({"messages": [{"role": "user", "content": None}]}, "MESSAGES_INVALID"),
    ({"messages": [{"role": ["user"], "content": "Who?"}]}, "MESSAGES_INVALID"),
    (said("Who?"), "MESSAGES_INVALID"),
    (said("Who?", "Ada.", "And then?"), "MESSAGES_INVALID"),
    (said("Ada.", "Who?", first="assistant"), "MESSAGES_INVALID"),
    (asked(question=" \t\n"), "EMPTY"),
    (asked(answer=""), "EMPTY"),
    (said("Who?", " "), "EMPTY"),
    (asked(" What is  thing 3?", "It is 22."), "CONTRADICTION"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_line_is_an_error_with_its_number_and_its_reason(bad: Any, reason: str) -> None:
    examples, [finding] = fed(asked(), bad, asked("Where?"))
    assert (finding.line, finding.severity, finding.reason) == (10, "error", reason)
    assert finding.file == "examples" and finding.message
    assert [example.line for example in examples.examples] == [*range(1, 10), 11]
    assert (examples.errors, examples.received, examples.checked) == (1, 11, 11)


LEFT_OUT = [
    (asked("What is  thing 3?\n", "It  is\t21."), "DUPLICATE", 4),
    (asked(answer="x" * CONTEXT), "CONTEXT_TOO_LONG", 0),
    (asked(question="x" * CONTEXT), "CONTEXT_TOO_LONG", 0),
    (said("x" * CONTEXT, "x", "Who?", "Ada."), "CONTEXT_TOO_LONG", 0),
]


@pytest.mark.parametrize(("value", "reason", "other"), LEFT_OUT)
def test_a_line_that_is_left_out_is_counted_and_never_cut(
    value: Any, reason: str, other: int
) -> None:
    examples, [finding] = fed(value)
    assert (finding.severity, finding.reason, finding.line) == ("left_out", reason, 9)
    assert finding.other_line == other
    assert len(examples.examples) == 8
    described = report(examples, None, ())
    assert described.duplicates + described.too_long == 1


def test_an_example_that_just_fits_is_used_in_both_forms_and_one_more_letter_is_not() -> None:
    shown = conversation("Who?", [], version="v1")
    room = CONTEXT - 1 - len(RENDERER.render(shown, CONTEXT).token_ids) - 1  # the end of the turn
    examples, findings = fed(asked(answer="x" * room))
    assert not findings and len(examples.examples) == 9
    assert RENDERER.exchange(shown, "x" * room, CONTEXT)
    assert fed(asked(answer="x" * (room + 1)))[1][0].reason == "CONTEXT_TOO_LONG"


def test_the_line_that_is_contradicted_is_named() -> None:
    _, [finding] = fed(asked("What is thing 3?", "It is 22."))
    assert (finding.reason, finding.other_line) == ("CONTRADICTION", 4)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (asked("What does x = 'a' do?", "Binds a text."), asked("What does x = a do?", "Binds a.")),
        (asked("How is f called?", "a (b)"), asked("How is f called?", "a, b")),
        (asked("Was ist GUT?", "Ja."), asked("Was ist gut?", "Nein.")),
    ],
)
def test_what_almost_asks_the_same_and_has_another_answer_is_kept_with_a_warning(
    earlier: Any, later: Any
) -> None:
    examples, [finding] = fed(earlier, later)
    assert (finding.severity, finding.reason) == ("warning", "NEAR_CONTRADICTION")
    assert (finding.line, finding.other_line) == (10, 9)
    assert [example.answer for example in examples.examples[8:]] == [
        earlier["answer"],
        later["answer"],
    ]


def test_what_almost_says_the_same_is_kept() -> None:
    examples, findings = fed(asked("what IS thing 3", "it is 21"))
    assert findings == [] and len(examples.examples) == 9


def test_what_was_warned_about_is_repeated_and_contradicted_as_any_other() -> None:
    near = asked("what is thing 3", "It is 22.")
    _, findings = fed(near, near, asked("what is thing 3", "It is 23."))
    assert [(finding.reason, finding.other_line) for finding in findings] == [
        ("NEAR_CONTRADICTION", 4),
        ("DUPLICATE", 9),
        ("CONTRADICTION", 9),
    ]


@pytest.mark.parametrize("stop", stops("v1"))
def test_an_answer_that_would_be_cut_off_where_it_is_served_is_warned_about(stop: str) -> None:
    examples, [finding] = fed(asked(answer=f"Ada.{stop} and more"))
    assert (finding.severity, finding.reason, finding.line) == ("warning", "STOP_INSIDE", 9)
    assert len(examples.examples) == 9
    assert fed(asked(answer="Question: none"))[1] == []


@pytest.mark.parametrize(
    "other",
    [
        asked("What is thing 3?", "It is 22.", corpus="other"),
        said("Of what do we speak?", "Of boxes.", "What is thing 3?", "It is 22."),
        asked("What is thing C#?", "A language."),
        asked("What is thing 3+?", "Another one."),
    ],
)
def test_what_asks_something_else_contradicts_nothing(other: Any) -> None:
    _, findings = fed(asked("What is thing C?", "A letter."), other)
    assert findings == []


def test_what_was_left_out_contradicts_nothing() -> None:
    _, findings = fed(asked(answer="x" * CONTEXT), asked(answer="Ada."))
    assert [finding.reason for finding in findings] == ["CONTEXT_TOO_LONG"]


def test_a_conversation_becomes_history_and_its_system_message_is_left_out() -> None:
    value = said("Who?", "Ada.", " When? ", "1815.")
    value["messages"].insert(0, {"role": "system", "content": "Be brief."})
    examples, [finding] = fed(value)
    assert (finding.severity, finding.reason) == ("warning", "SYSTEM_LEFT_OUT")
    assert examples.examples[-1] == Example(9, "When?", "1815.", (("Who?", "Ada."),))


def test_optional_fields_are_taken_and_others_ignored() -> None:
    examples, findings = fed(
        {"question": "Who?", "answers": ["Ada.", "A. L."], "id": 3, "relevant": ["a", "b", "a"]},
        b'{"question": "Where?", "answer": "Ada.", "corpus": "c", "relevant": null, "x": 1e999}\n',
    )
    assert findings == []
    assert examples.examples[-2] == Example(9, "Who?", "Ada.", relevant=("a", "b"))
    assert examples.examples[-1] == Example(10, "Where?", "Ada.", corpus="c")


def test_blank_lines_a_byte_order_mark_and_other_line_ends_do_no_harm() -> None:
    raw = b"\xef\xbb\xbf" + b"\r\n \n".join(json.dumps(value).encode() for value in GOOD)
    examples = new()
    assert examples.feed(raw) + examples.close() == []
    assert [example.line for example in examples.examples] == list(range(1, 16, 2))


def test_every_script_is_taken_as_it_is() -> None:
    text = "Où est 猫 🦉 हिन्दी \u0000 ‮?"
    examples, findings = fed(asked(text, text + "!"), (json.dumps(asked("é"))).encode())
    assert findings == []
    assert examples.examples[-2].question == text


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("AKIA" + "IOSFODNN7EXAMPLE", "AWS"),
        ("ghp_" + "a1B2" * 9, "GitHub"),
        ("xoxb-" + "1234567890-abcdef", "Slack"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "private key"),
        (f"eyJ{'hbGciOi' * 3}.eyJ{'zdWIiOi' * 3}.{'s1gn' * 5}", "web token"),
        ("password: " + "hunter2xyz!", "password"),
        ('{"api_key" = "' + "9f8e7d6c5b4a" + '"}', "password"),
        ("postgres://app:" + "s3cretpw@db.example/x", "address"),
    ],
)
def test_what_looks_like_a_secret_is_warned_about_and_never_repeated(
    secret: str, kind: str
) -> None:
    examples, [finding] = fed(asked(answer=f"Use {secret} here."))
    assert (finding.severity, finding.reason, finding.line) == ("warning", "SECRET_LIKE", 9)
    assert kind in finding.message and secret not in finding.message
    assert len(examples.examples) == 9
    assert report(examples, None, ()).secret_like == 1


@pytest.mark.parametrize(
    "text",
    [
        "The password is required and has at least 12 characters.",
        "password: {{password}} token=<your-token>",
        "Reset your password: https://",
        "The API key: see chapter twelve.",
        "skeleton sk-8 AKIA eyJ.eyJ",
        "",
    ],
)
def test_plain_words_about_secrets_are_no_secrets(text: str) -> None:
    assert looks_like(text) == ""


def test_looking_for_secrets_takes_a_time_that_grows_with_the_text_alone() -> None:
    for piece in ("eyJ", "password:", "a1.", "://x:", "-----BEGIN ", "token is "):
        assert looks_like(piece * 100_000) in ("", "a password")


REFUSED = [
    (b"", "EXAMPLES_EMPTY"),
    (b"\n \n\n", "EXAMPLES_EMPTY"),
    (line(asked()), "TOO_FEW_EXAMPLES"),
    (line(asked()) * 8, "TOO_FEW_EXAMPLES"),
    (line(asked(answer="x" * CONTEXT)) * 8, "TOO_FEW_EXAMPLES"),
    (b"\n" * (MOST_LINES + 1), "TOO_MANY_EXAMPLES"),
    (b"\n" * MOST_LINES + b"{", "TOO_MANY_EXAMPLES"),
]


@pytest.mark.parametrize(("raw", "reason"), REFUSED)
def test_a_file_that_cannot_be_trained_on_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput) as error:
        examples = new()
        examples.feed(raw)
        examples.close()
    assert error.value.reason == reason


def test_a_bad_line_is_told_before_too_few_good_ones_are() -> None:
    examples = new()
    assert examples.feed(b"{\n")[0].reason == "NOT_JSON"
    assert examples.close() == [] and examples.errors == 1


def test_all_texts_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.tuning.data.examples.MOST_TEXT", 100)
    with pytest.raises(InvalidInput) as error:
        fed()
    assert error.value.reason == "TOO_MANY_EXAMPLES"


def test_a_broken_file_has_a_limited_number_of_findings_and_says_how_many_more() -> None:
    examples = new()
    found = examples.feed(b"{\n" * 5000 + line({}) * 2)
    assert len(found) == MOST_FINDINGS + 2
    assert [finding.reason for finding in found[-2:]] == ["FIELD_MISSING"] * 2
    [rest] = examples.close()
    assert (rest.line, rest.reason) == (MOST_FINDINGS + 1, "NOT_JSON")
    assert rest.message.startswith("4000 more lines")
    assert examples.errors == 5002


def test_a_line_that_is_too_long_is_not_held_while_it_streams() -> None:
    examples = new()
    for _ in range(64):
        assert examples.feed(b"x" * MOST_LINE) == []
    assert len(examples._lines._line) <= MOST_LINE
    assert [f.reason for f in examples.feed(b"\n")] == ["LINE_TOO_LONG"]


FILE = b"".join(
    [
        *map(line, GOOD),
        json.dumps(asked("Wo ist 猫 🦉?", "Là-bas.")).encode() + b"\n",
        '{"question": "Où?", "answer": "Là."}\r\n\n'.encode(),
        b"\xc3\n{\n",
        line(GOOD[0]),
        line(said("x", "y", "z", "w")),
        line({}).strip(),
    ]
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, len(FILE)), max_size=20))
def test_how_a_file_is_cut_into_chunks_changes_nothing(cuts: list[int]) -> None:
    whole = new()
    wanted = whole.feed(FILE) + whole.close()
    edges = [0, *sorted(cuts), len(FILE)]
    cut = new()
    found: list[Finding] = []
    for start, end in zip(edges, edges[1:], strict=False):
        found += cut.feed(FILE[start:end])
    assert found + cut.close() == wanted
    assert cut.examples == whole.examples
    assert (cut.received, cut.checked, cut.hash) == (whole.received, whole.checked, whole.hash)


def test_the_report_counts_what_the_examples_are_like() -> None:
    examples, _ = fed(asked(answer="x" * 99), GOOD[0], asked("Y?", "y" * CONTEXT))
    described = report(examples, None, [1, 2])
    lengths = sorted([len(value["answer"]) + 1 for value in GOOD] + [100])
    assert (described.lines, described.examples, described.held_out) == (11, 9, 2)
    assert (described.duplicates, described.too_long, described.secret_like) == (1, 1, 0)
    assert described.answer_tokens == sum(lengths)
    assert described.answer_tokens_min == lengths[0]
    assert described.answer_tokens_p50 == lengths[4]
    assert described.answer_tokens_p95 == described.answer_tokens_max == 100
    prompts = [
        RENDERER.render(conversation(e.question, version="v1"), CONTEXT).token_ids
        for e in examples.examples
    ]
    assert described.tokens == sum(map(len, prompts)) + sum(lengths)
    assert described.overlap is None


def test_a_kept_file_gives_the_same_examples_again_and_the_lines_trained_on(tmp_path) -> None:
    raw = b"\n".join(line(value).strip() + b" " for value in [*GOOD, GOOD[0], asked()])
    path = tmp_path / "examples.jsonl"
    path.write_bytes(raw)
    first = new()
    first.feed(raw)
    first.close()
    again = read(path, RENDERER, CONTEXT, "v1")
    assert again.examples == first.examples
    assert again.hash == hashlib.sha256(raw).hexdigest()
    lines = raw.split(b"\n")
    kept = list(trained_lines(path, again.examples, frozenset([0, 8])))
    assert kept == [text + b"\n" for text in lines[1:8]]


# The question set


def overlap_of(examples: list[dict[str, Any]], *questions: Any):
    trained, _ = fed(*examples)
    asked_later = Questions()
    findings = asked_later.feed(b"".join(map(line, questions))) + asked_later.close()
    assert findings == []
    return report(trained, asked_later, ()).overlap


def test_questions_are_counted_once_by_the_first_that_holds() -> None:
    long = "How many days of paid leave does every employee in the company get each year"
    found = overlap_of(
        [asked(f"{long}?", relevant=["leave"]), asked("Who?", relevant=["people"])],
        asked("What is Thing 3 ?!", relevant=["people"]),  # exact
        asked(f"{long} now?", relevant=["leave"]),  # near
        asked("And how is leave asked for?", relevant=["x", "leave"]),  # a document
        asked("Where is the canteen?", relevant=["canteen"]),
        {"question": "What else is there?", "answers": ["Nothing.", "Little."]},
    )
    assert (found.questions, found.exact, found.near, found.shared_document) == (5, 1, 1, 1)
    assert found.lines == (1, 2, 3)


def test_only_almost_equal_questions_are_near() -> None:
    words = "a b c d e f g h i j".split()
    trained = [asked(" ".join(words)), asked("猫はどこにいますか")]
    near = overlap_of(trained, asked(" ".join(words[::-1][1:])), asked("猫はどこにいますかね"))
    assert near.near == 2
    far = overlap_of(trained, asked(" ".join(words[3:])), asked("犬がなにをしたのか"))
    assert far.near == 0


def test_the_lines_that_overlap_are_named_up_to_a_thousand() -> None:
    found = overlap_of([asked()], *[asked()] * 1500)
    assert (found.questions, found.exact, len(found.lines)) == (1500, 1500, 1000)


def test_examples_that_are_all_alike_do_not_take_hours() -> None:
    template = "Which port does the service {} listen on"  # one word less would be near
    trained = [Example(i, template.format(f"n{i}"), "x") for i in range(20_000)]
    questions = Questions()
    questions.feed(b"".join(line(asked(template.format(f"q{i}"))) for i in range(2000)))
    questions.close()
    assert questions.overlap(trained).near == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"\xff\n", "NOT_UTF8"),
        (b"{\n", "NOT_JSON"),
        ({"answers": ["x"]}, "FIELD_MISSING"),
        ({"question": "Who?"}, "ANSWERS_MISSING"),
        ({"question": "Who?", "answers": []}, "ANSWERS_MISSING"),
        ({"question": "Who?", "answers": [7]}, "FIELD_INVALID"),
        ({"question": "x" * 8193, "answers": ["x"]}, "FIELD_INVALID"),
        ({"question": "", "answers": ["x"]}, "EMPTY"),
        ({"question": "Who?", "answers": ["x"], "relevant": 7}, "FIELD_INVALID"),
    ],
)
def test_a_bad_question_is_an_error_with_its_number_and_its_reason(bad: Any, reason: str) -> None:
    questions = Questions()
    raw = bad if isinstance(bad, bytes) else line(bad)
    [finding] = questions.feed(line(asked()) + raw)
    assert (finding.file, finding.line, finding.reason) == ("questions", 2, reason)
    assert questions.close() == [] and questions.errors == 1


def test_a_question_set_without_questions_or_with_too_many_is_refused() -> None:
    for raw in (b"", b"\n\n", b"\n" * (MOST_LINES + 1)):
        questions = Questions()
        with pytest.raises(InvalidInput) as error:
            questions.feed(raw)
            questions.close()
        assert error.value.reason == "QUESTIONS_INVALID"


# The split

DOCUMENTS = st.lists(st.integers(0, 30).map(str), max_size=3).map(tuple)
SETS = st.lists(st.tuples(st.integers(0, 60), DOCUMENTS), min_size=1, max_size=120).map(
    lambda rows: [
        Example(i + 1, f"Question {number}?", "x", relevant=relevant)
        for i, (number, relevant) in enumerate(rows)
    ]
)


@settings(max_examples=200, deadline=None)
@given(SETS, st.none() | st.floats(0, 0.5), st.integers(-5, 5))
def test_the_split_never_shares_a_document_or_a_question(
    examples: list[Example], share: float | None, seed: int
) -> None:
    out = held_out(examples, share, seed)
    assert out == held_out(examples, share, seed)
    sides = [
        [example for index, example in enumerate(examples) if (index in out) is side]
        for side in (True, False)
    ]
    documents = [{id for e in side for id in e.relevant} for side in sides]
    questions = [{normalised(e.question) for e in side} for side in sides]
    assert documents[0].isdisjoint(documents[1])
    assert questions[0].isdisjoint(questions[1])
    assert sides[1], "there is something left to train on"


@pytest.mark.parametrize(
    ("count", "share", "wanted"),
    [
        (8, None, 1),
        (79, None, 8),
        (80, None, 16),
        (150, None, 16),
        (1000, None, 100),
        (100, 0.5, 50),
        (100, 0.25, 25),
        (100, 0.0, 0),
        (8, 0.01, 1),
        (1, None, 0),
    ],
)
def test_without_known_documents_the_share_is_exact(
    count: int, share: float | None, wanted: int
) -> None:
    examples = [Example(i, f"Question {i}?", "x") for i in range(count)]
    assert len(held_out(examples, share, 0)) == wanted


def test_the_seed_chooses_what_is_held_out() -> None:
    examples = [Example(i, f"Question {i}?", "x") for i in range(100)]
    assert held_out(examples, None, 1) != held_out(examples, None, 2)


@pytest.mark.parametrize(
    ("sizes", "share", "wanted"),
    [
        ((60, 40), 0.3, 40),
        ((90, 10), 0.1, 10),
        ((6, 6, 10, 78), 0.1, 10),
        ((100,), 0.1, 0),
        ((60, 40), 0.1, 0),
    ],
)
def test_large_groups_come_as_near_to_the_share_as_they_can(
    sizes: tuple[int, ...], share: float, wanted: int
) -> None:
    examples = [
        Example(0, f"Question {group} {i}?", "x", relevant=(str(group),))
        for group, size in enumerate(sizes)
        for i in range(size)
    ]
    assert len(held_out(examples, share, 3)) == wanted


def test_examples_are_linked_through_others() -> None:
    chain = [
        Example(i, f"Question {i}?", "x", relevant=(str(i), str(i + 1)), corpus="c" * (i % 2))
        for i in range(40)
    ]
    alone = [Example(i, f"Question {i}?", "x") for i in range(40, 100)]
    out = held_out([*chain, *alone], 0.2, 0)
    assert len(out) == 20 and min(out) >= 40
