import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from services.retrieval.chunking import Chunk, chunk
from services.retrieval.parsing import Parsed, Section, parse


def words(text):
    return len(text.split())


def word_level():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def markdown(text):
    return parse(text.encode(), "text/markdown")


def one_section(text):
    return Parsed(text, "", (Section(0, len(text), (), 0),))


def texts(parsed, chunks):
    return [parsed.text[c.start : c.end] for c in chunks]


def check(parsed, chunks):
    """Trimmed, in order, without overlap, and nothing is lost."""
    rest, end = [], 0
    for c in chunks:
        assert end <= c.start < c.end
        assert parsed.text[c.start : c.end].strip() == parsed.text[c.start : c.end]
        rest.append(parsed.text[end : c.start])
        end = c.end
    assert not "".join([*rest, parsed.text[end:]]).strip()


def test_a_document_that_fits_is_one_chunk_whatever_its_headings():
    parsed = markdown("# A\n\none\n\n## B\n\ntwo\n\n# C\n\nthree\n")
    assert chunk(parsed, words, 6) == [Chunk(0, len(parsed.text), (), 0)]


def test_sections_have_their_own_chunks():
    parsed = markdown("# A\n\n" + "a b c d.\n\n" * 2 + "## B\n\n" + "e f g h.\n\n" * 2)
    chunks = chunk(parsed, words, 12)
    assert texts(parsed, chunks) == ["A\n\na b c d.\n\na b c d.", "B\n\ne f g h.\n\ne f g h."]
    assert [c.heading_path for c in chunks] == [("A",), ("A", "B")]


def test_tiny_sections_join_their_parent_or_siblings():
    long = "word " * 15
    parsed = markdown(
        f"# A\n\n## B\n\n{long}\n\n## C\n\nx\n\n## D\n\ny\n\n# E\n\n{long}\n\n# F\n\nz"
    )
    chunks = chunk(parsed, words, 17)
    assert [text.split("\n")[0] for text in texts(parsed, chunks)] == ["A", "C", "E", "F"]
    assert [c.heading_path for c in chunks] == [("A",), ("A",), ("E",), ("F",)]


def test_tiny_parts_of_the_whole_join_only_each_other():
    parsed = markdown("# A\n\na\n\n# B\n\nb\n\n# C\n\n" + "word " * 15)
    chunks = chunk(parsed, words, 17)
    assert [
        (text[:8], c.heading_path) for text, c in zip(texts(parsed, chunks), chunks, strict=True)
    ] == [
        ("A\n\na\n\nB\n", ()),
        ("C\n\nword ", ("C",)),
    ]


def test_rows_share_chunks_and_none_is_cut():
    rows = "".join(f"{n},Paris {n}\n" for n in range(100))
    parsed = parse(f"id,city\n{rows}".encode(), "text/csv")
    chunks = chunk(parsed, words, 32)
    check(parsed, chunks)
    for text in texts(parsed, chunks):
        assert text.startswith("id: ") and text.count("id: ") == text.count("city: ")
    assert len(chunks) < 20


def test_a_chunk_has_the_page_that_it_begins_on():
    text = "one two three. four five. six"
    sections = (Section(0, 15, (), 1), Section(15, 26, (), 2), Section(26, 29, (), 3))
    chunks = chunk(Parsed(text, "", sections), words, 3)
    assert [(text[c.start : c.end], c.page) for c in chunks] == [
        ("one two three.", 1),
        ("four five.", 2),
        ("six", 3),
    ]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One two three. Four five six. Seven eight.", "One two three. Four five six."),
        ("One two 3.5 four! Five six? Seven eight", "One two 3.5 four! Five six?"),
        ("One two three four.\n\nFive. Six seven eight", "One two three four."),
        ("One two three.\n\nFour five. Six seven eight", "One two three.\n\nFour five."),
        ("one two three\nFour five six seven\nEight", "one two three\nFour five six seven"),
        ("one two three,\nfour five. Six seven\neight", "one two three,\nfour five."),
        ("one two three four five six seven eight", "one two three four five six seven"),
    ],
)
def test_a_chunk_ends_with_a_paragraph_line_sentence_or_word(text, first):
    parsed = one_section(text + " end" * 20)
    chunks = chunk(parsed, words, 7)
    check(parsed, chunks)
    assert texts(parsed, chunks)[0] == first


def test_chinese_sentences_are_ends_too():
    parsed = one_section("東京は日本の首都です。大阪は大きい。" * 5)
    chunks = chunk(parsed, len, 20)
    check(parsed, chunks)
    assert all(text.endswith("。") for text in texts(parsed, chunks))


def test_the_end_of_a_section_is_no_crumb():
    parsed = one_section("Word word. " * 52)
    sizes = [words(text) for text in texts(parsed, chunk(parsed, words, 100))]
    assert sizes == [62, 42]


def test_a_token_without_end_is_cut():
    parsed = one_section("x" * 5000 + " y")
    for count in (words, word_level()):
        chunks = chunk(parsed, count, 10)
        check(parsed, chunks)
        assert max(c.end - c.start for c in chunks) <= 160


def test_an_accent_stays_with_its_letter():
    parsed = one_section("e\u0301x" * 100)
    for text in texts(parsed, chunk(parsed, len, 10)):
        assert text[0] in "ex"


def test_a_character_with_too_many_tokens_is_a_chunk():
    parsed = one_section("ab 😀 c")
    assert texts(parsed, chunk(parsed, lambda text: len(text.encode()), 2)) == ["ab", "😀", "c"]


UNICODE = st.text(
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from(" \n.!?。,abcABC1e\u0301😀\u200d👩💻\u3000\x1c\x85ßж"),
    max_size=300,
)
COUNTERS = {
    "words": words,
    "characters": len,
    "bytes": lambda text: len(text.encode()),
    "tokenizer": word_level(),
}


@settings(max_examples=200, deadline=None)
@given(st.lists(UNICODE, min_size=1, max_size=6), st.sampled_from(list(COUNTERS)), st.data())
def test_chunks_hold_all_of_any_text_within_the_limit(parts, counter, data):
    text = "".join(parts)
    sections, start = [], 0
    for number, part in enumerate(parts):
        path = data.draw(st.lists(st.sampled_from("AB"), max_size=2).map(tuple))
        sections.append(Section(start, start + len(part), path, number))
        start += len(part)
    limit = data.draw(st.integers(1, 40))
    parsed = Parsed(text, "", tuple(sections))
    chunks = chunk(parsed, COUNTERS[counter], limit)
    check(parsed, chunks)
    count = COUNTERS[counter]
    for piece in texts(parsed, chunks):
        tokens = count(piece) if callable(count) else len(count.encode(piece))
        assert tokens <= limit or len(piece) == 1


@pytest.mark.parametrize(
    "unit",
    [
        "x",
        "quick brown fox ",
        "Quick brown fox. ",
        "line\n",
        "東京は首都です。",
        "A b.\n\n",
        "é\u0301",
    ],
)
def test_a_megabyte_takes_no_time_that_grows_with_its_square(unit):
    parsed = one_section((unit * (1_000_000 // len(unit))).strip())
    tokenizer = word_level()
    start = time.process_time()
    chunks = chunk(parsed, tokenizer, 256)
    assert time.process_time() - start < 2
    assert len(chunks) > 200
