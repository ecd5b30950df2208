import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.citations.checker import Citation, CitationChecker, Source, Unsupported

LEAVE = (
    "🌴 Leave policy of Hollin & Vane. Every employee has 28 days of paid leave a year. "
    "Up to five days may be carried over until 31 March 2027, but they are not paid out. "
    "Requests go to Ingrid Sørensen in Bergen, who answers within two working days. "
    "The cafe\u0301 on floor 3 is closed in August. "
    "Parental leave lasts 16 weeks, and Tomas Okafor approves it. "
    "It increased from 12 weeks in 2021."
)
EXPENSES = (
    "Travel is booked with form TR-204 and reimbursed within 14 days. "
    "Hotels cost at most 140 euros a night (180 euros in Zurich). "
    "Receipts above 1,000 euros need the signature of Marta Lindqvist. "
    "Alcohol is never reimbursed. The wiki page explains how max_amount is set."
)
SUPPORT = (
    "The Orla service listens on port 7423. It is owned by Priya Nair and runs in Porto. "
    "Logs are kept for 30 days."
)
BILLING = "The Tern service listens on port 2948. It is owned by Jonas Weiss and runs in Oslo."
# The passages begin somewhere in their documents.
LEAD = {"leave": "é🙂\n\n", "expenses": "", "orla": "Intro. ", "tern": "x" * 100}
TEXTS = {"leave": LEAVE, "expenses": EXPENSES, "orla": SUPPORT, "tern": BILLING}
DOCUMENTS = {name: LEAD[name] + text for name, text in TEXTS.items()}
SOURCES = [Source(f"{n}#0", n, len(LEAD[n]), text) for n, text in TEXTS.items()]


def check(answer: str, *deltas: str) -> list[Citation | Unsupported]:
    checker = CitationChecker(SOURCES)
    return [v for d in deltas or (answer,) for v in checker.feed(d)] + checker.finish()


def quotes(answer: str) -> list[str] | None:
    """The quotes of an answer; None if some of it is unsupported."""
    verdicts = check(answer)
    cited = [v.quote for v in verdicts if isinstance(v, Citation)]
    return cited if len(cited) == len(verdicts) else None


def holds(citation: Citation) -> bool:
    text = DOCUMENTS[citation.document_id]
    return text[citation.source_start : citation.source_end] == citation.quote != ""


@pytest.mark.parametrize(
    ("answer", "evidence"),
    [
        ("Every employee has 28 days of paid leave a year.", "Every employee has 28 days"),
        ("Every employee has twenty-eight days of paid leave.", "Every employee has 28 days"),
        ("Up to 5 days may be carried over until 31 March 2027.", "Up to five days"),
        ("Until 2027-03-31, up to five days may be carried over.", "Up to five days"),
        ("They aren't paid out.", "Up to five days"),
        ("Parental leave takes 16 weeks.", "Parental leave lasts 16 weeks"),
        ("Tomas Okafor approves parental leave.", "Parental leave lasts 16 weeks"),
        ("Requests go to Sørensen in Bergen.", "Requests go to Ingrid Sørensen"),
        ("The cafe\u0301 on floor 3 is closed in August.", "The cafe\u0301 on floor 3"),
        ("Hotels cost at most €140 a night.", "Hotels cost at most 140 euros"),
        ("Hotels cost at most 140 euros (180 euros in Zurich).", "Hotels cost at most 140"),
        ("Receipts above 1000 euros need a signature.", "Receipts above 1,000 euros"),
        ("You book travel with form TR-204.", "Travel is booked with form TR-204"),
        ("Alcohol is not reimbursed.", "Alcohol is never reimbursed"),
        ("Parental leave increased from 12 weeks in 2021.", "It increased from 12 weeks"),
        ("The Orla service listens on port 7423.", "The Orla service listens on port 7423."),
        ("28", "Every employee has 28 days"),
        ("Five.", "Up to five days"),
        ("Marta Lindqvist", "Receipts above 1,000 euros"),
        ("According to the passage, logs are kept for 30 days.", "Logs are kept for 30 days."),
        ("1. Alcohol is never reimbursed.", "Alcohol is never reimbursed."),
    ],
)
def test_what_a_source_says_is_cited(answer: str, evidence: str) -> None:
    found = quotes(answer)
    assert found and any(evidence in quote for quote in found)


@pytest.mark.parametrize(
    "answer",
    [
        "Every employee has 29 days of paid leave a year.",  # a random number
        "Every employee has 16 days of paid leave a year.",  # another of the passage
        "Parental leave lasts 28 weeks, and Tomas Okafor approves it.",
        "Hotels cost at most 180 euros a night (140 euros in Zurich).",  # exchanged
        "Hotels cost at most 140 dollars a night.",
        "Up to five days may be carried over until 31 March 2026.",
        "Up to five days may be carried over until 31 March 2021.",
        "Up to five days may be carried over until 31 May 2027.",
        "Up to five days may be carried over until 31 August 2027.",
        "Parental leave lasts 16 weeks, and Ingrid Sørensen approves it.",
        "Parental leave lasts 16 weeks, and Boris Yilmaz approves it.",
        "Requests go to Ingrid Sørensen in Zurich.",
        "Travel is booked with form TR-240.",
        "The wiki page explains how min_amount is set.",
        "Alcohol is reimbursed.",
        "Receipts above 1,000 euros do not need the signature of Marta Lindqvist.",
        "Every employee never has 28 days of paid leave a year.",
        "It decreased from 12 weeks in 2021.",
        "The Orla service listens on port 2948.",  # of the same kind, from another passage
        "Jonas Weiss owns the Orla service.",
        "The moon is made of green cheese.",
        "29",
        "Boris Yilmaz",
    ],
)
def test_what_no_source_says_is_unsupported(answer: str) -> None:
    assert check(answer) == [Unsupported(0, len(answer))]


@pytest.mark.parametrize(
    "answer", ["", "  \n ", "Yes.", "Sure!", "No.", "Certainly, here it is:", "…", "- ", "**"]
)
def test_a_sentence_without_content_has_no_verdict(answer: str) -> None:
    assert check(answer) == []


def test_every_source_sentence_is_cited_by_an_exact_quote() -> None:
    for source in SOURCES:
        verdicts = check(source.text)
        assert len(verdicts) >= 2
        for verdict in verdicts:
            assert isinstance(verdict, Citation) and holds(verdict) and verdict.support == 1.0
            answer = source.text[verdict.answer_start : verdict.answer_end]
            assert answer in verdict.quote


def test_joined_facts_are_cited_from_both_passages() -> None:
    answer = "Orla listens on port 7423 and Tern listens on port 2948."
    verdicts = check(answer)
    assert [v.document_id for v in verdicts if isinstance(v, Citation)] == ["orla", "tern"]
    assert {(v.answer_start, v.answer_end) for v in verdicts} == {(0, len(answer))}


def test_a_name_for_a_pronoun_is_supported_by_both_sentences() -> None:
    assert quotes("The Orla service is owned by Priya Nair.") == [
        "The Orla service listens on port 7423. It is owned by Priya Nair and runs in Porto."
    ]


def test_each_sentence_has_its_own_verdict() -> None:
    answer = "Alcohol is never reimbursed. Employees have 99 days of leave. Yes! Five days."
    verdicts = check(answer)
    assert [answer[v.answer_start : v.answer_end] for v in verdicts] == [
        "Alcohol is never reimbursed.",
        "Employees have 99 days of leave.",
        "Five days.",
    ]
    assert [type(v) for v in verdicts] == [Citation, Unsupported, Citation]


def test_a_verdict_comes_as_soon_as_the_next_sentence_begins() -> None:
    checker = CitationChecker(SOURCES)
    assert checker.feed("Alcohol is never reimbursed. ") == []
    assert len(checker.feed("L")) == 1


def test_without_sources_everything_is_unsupported() -> None:
    assert CitationChecker([]).feed("Alcohol is free. And") == [Unsupported(0, 16)]


PIECES = st.sampled_from(
    [*LEAVE.split(), *EXPENSES.split(), "Dr.", "U.S.", "e.g.", "3.5", "\n", "\n\n", "- ", "1. ",
     "...", "?!", "。", "はい。", '"', ")", "[1]", "[", "🙂", "No.", "J.", "The", "a" * 400]
)  # fmt: skip


@settings(deadline=None)  # the machine may be busy
@given(st.lists(PIECES, max_size=40), st.sampled_from(["", " "]), st.data())
def test_the_cut_into_deltas_changes_nothing(
    words: list[str], glue: str, data: st.DataObject
) -> None:
    text = glue.join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    deltas = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = check(text)
    assert check("", *deltas) == whole == check("", *(text or [""]))
    assert all(holds(v) for v in whole if isinstance(v, Citation))
    assert all(0 <= v.answer_start < v.answer_end <= len(text) for v in whole)


@pytest.mark.parametrize("text", ["." * 5000, "7 " * 3000, "a" * 5000, "[" * 3000, "- " * 3000])
def test_text_that_never_ends_is_checked_in_pieces(text: str) -> None:
    assert check(text) == check("", *text)
