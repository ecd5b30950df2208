import codecs
import json
import random

import pytest

from services.retrieval import media_types
from services.retrieval.parsing import Limits, parse
from services.runtime.errors import InvalidInput
from tests.documents import docx, paragraph, pdf, table, zip_bomb

WORD = media_types.DOCX


def sections_of(parsed):
    """(text, heading path, page) of each section, after checking that they tile the text."""
    assert "".join(parsed.text[s.start : s.end] for s in parsed.sections) == parsed.text
    return [(parsed.text[s.start : s.end].strip(), s.heading_path, s.page) for s in parsed.sections]


def test_plain_text_is_one_section():
    parsed = parse("\ufeffOne  \r\n\r\n\r\n\r\ntwo\u200b\n".encode(), "text/plain")
    assert parsed.text == "One\n\ntwo"
    assert sections_of(parsed) == [("One\n\ntwo", (), 0)]


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        ("Grüße".encode("cp1252"), "text/plain; charset=windows-1252"),
        ("Grüße".encode("latin-1"), 'Text/Plain; format=flowed; CHARSET="ISO-8859-1"'),
        ("Grüße".encode("utf-16"), "text/plain"),
        (codecs.BOM_UTF8 + "Grüße".encode(), "text/plain; charset=latin-1"),
        ("<meta charset=windows-1252><p>Grüße".encode("cp1252"), "text/html"),
        ('<meta charset="utf-16"><p>Grüße'.encode(), "text/html"),
    ],
)
def test_the_charset_is_honoured_and_a_byte_order_mark_above_it(data, media_type):
    assert parse(data, media_type).text == "Grüße"


MARKDOWN = """---
title: "A *handbook*"
---
Before all.

# Intro *bold*

Text with `code`, a [link](http://x.example)
and ![a picture](y.png).<br>New <b>line</b>.

- one
- two
  1. deep

```python
if x:

    y = "# no heading"
```

## Two

| a | b |
|---|---|
| 1 | *2* |

<div>html <em>block</em></div><script>evil()</script>

Three
=====
End.
"""


def test_markdown_loses_its_markup_and_keeps_code_tables_and_headings():
    parsed = parse(MARKDOWN.encode(), "text/markdown")
    assert parsed.title == "A *handbook*"
    code = 'if x:\n\n    y = "# no heading"'
    intro = (
        "Intro bold\n\nText with code, a link and a picture.\nNew line.\n\n- one\n- two\n  1. deep"
    )
    assert sections_of(parsed) == [
        ("Before all.", (), 0),
        (f"{intro}\n\n{code}", ("Intro bold",), 0),
        ("Two\n\na | b\n1 | 2\n\nhtml block", ("Intro bold", "Two"), 0),
        ("Three\n\nEnd.", ("Three",), 0),
    ]


HTML = """<!doctype html><html><head><title>Hand &amp; book</title><style>p{}</style></head><body>
<nav><a href="/">Home</a></nav><script>evil()</script>
<h1>Head <i>one</i></h1>Loose   text
<p>A para<b>graph</b>,<br>two lines.</p><p hidden>hidden</p><p style="Display : none">hidden</p>
<span aria-hidden="true">hidden</span>
<ul><li>a<li><p>b</p><ul><li>c</ul></ul>
<h3>Deep</h3>
<table><tr><th>x<th>y<tr><td><p>1</p><p>2</p><td>3</table>
<table><tr><td><h2>In a layout table</h2></td><td><table><tr><td>5<td>6</table></td></tr></table>
<pre>  code
    &lt;indented&gt;</pre><img alt="A picture"></body></html>"""


def test_html_gives_what_a_reader_sees():
    parsed = parse(HTML.encode(), "text/html; charset=utf-8")
    assert parsed.title == "Hand & book"
    assert sections_of(parsed) == [
        (
            "Head one\n\nLoose text\n\nA paragraph,\ntwo lines.\n\n- a\n- b\n- c",
            ("Head one",),
            0,
        ),
        ("Deep\n\nx | y\n1 2 | 3", ("Head one", "Deep"), 0),
        (
            "In a layout table\n\n5 | 6\n\n  code\n    <indented>\n\nA picture",
            ("Head one", "In a layout table"),
            0,
        ),
    ]


def test_a_pdf_has_pages_and_its_lines_flow():
    pages = [["A sentence that is", "set on two lines, hyphen-", "ated. End."], [], ["Café two"]]
    parsed = parse(pdf(pages, title="Report"), "application/pdf")
    assert parsed.title == "Report"
    assert sections_of(parsed) == [
        ("A sentence that is set on two lines, hyphenated. End.", (), 1),
        ("Café two", (), 3),
    ]


def test_docx_headings_come_from_styles_and_tables_are_lines():
    body = (
        paragraph("The title", "Titel")
        + paragraph("Chapter", "berschrift1")
        + paragraph("Text.")
        + paragraph("one", "Bullet")
        + paragraph("two", "Bullet")
        + paragraph("Own style", "Own")
        + table(["a", "b"], ["1", "2"])
        + table(["framed"])
        + paragraph("Last", "berschrift1")
        + paragraph("End.")
    )
    parsed = parse(docx(body), WORD)
    assert parsed.title == "The title"
    assert sections_of(parsed) == [
        ("The title", ("The title",), 0),
        ("Chapter\n\nText.\n\n- one\n- two", ("The title", "Chapter"), 0),
        ("Own style\n\na | b\n1 | 2\n\nframed", ("The title", "Chapter", "Own style"), 0),
        ("Last\n\nEnd.", ("The title", "Last"), 0),
    ]


def test_docx_text_is_what_a_reader_sees():
    run = "<w:r><w:t>{}</w:t></w:r>"
    body = (
        "<w:p>"
        + run.format("kept ")
        + f"<w:ins>{run.format('inserted ')}</w:ins>"
        + "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del>"
        + f"<w:hyperlink>{run.format('link')}</w:hyperlink>"
        + "<w:r><w:rPr><w:vanish/></w:rPr><w:t>hidden</w:t></w:r>"
        + "<w:r><w:br/><w:t>next</w:t><w:tab/><w:t>tab</w:t></w:r>"
        + "</w:p>"
        + f"<w:sdt><w:sdtContent>{paragraph('in a control')}</w:sdtContent></w:sdt>"
    )
    assert parse(docx(body), WORD).text == "kept inserted link\nnext\ttab\n\nin a control"


def test_csv_has_a_section_per_row():
    data = b'name;place\nAnn;Paris\n"B;x";"Ber\nlin";more\n;\n'
    assert sections_of(parse(data, "text/csv")) == [
        ("name: Ann\nplace: Paris", (), 0),
        ("name: B;x\nplace: Ber\nlin\ncolumn 3: more", (), 0),
    ]
    assert parse(b"only,a,header\n", "text/csv").text == "only | a | header"


@pytest.mark.parametrize("media_type", ["application/jsonl", "application/x-ndjson"])
def test_json_lines_have_a_section_per_object(media_type):
    first = {"n": 1, "deep": {"list": [1, True, None, "x"]}, "rows": [{"a": "b"}], "none": None}
    data = json.dumps(first) + '\n\n{"price": 1.50, "text": "two\\nlines\\ud800"}\n'
    assert sections_of(parse(data.encode(), media_type)) == [
        ("n: 1\ndeep.list: 1, true, x\nrows.0.a: b", (), 0),
        ("price: 1.50\ntext: two\nlines", (), 0),
    ]


def test_heading_paths_follow_the_levels():
    data = b"## B\n\n# A\n\n### C\n\n## D\n\n# E\n"
    paths = [path for _, path, _ in sections_of(parse(data, "text/markdown"))]
    assert paths == [("B",), ("A",), ("A", "C"), ("A", "D"), ("E",)]


def test_a_long_heading_is_short_in_paths_and_whole_in_the_text():
    parsed = parse(b"# " + b"x" * 5000, "text/markdown")
    assert len(parsed.text) == 5000
    assert len(parsed.sections[0].heading_path[0]) == 200


NOISE = random.Random(0).randbytes(1000)
SMALL = Limits(input_bytes=100_000, characters=100, pages=2, unpacked_bytes=1_000_000)
PNG = b"\x89PNG\r\n\x1a\n" + NOISE
OLE2 = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100)
DTD = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("data", "media_type", "reason"),
    [
        (b"", "text/plain", "EMPTY_DOCUMENT"),
        (b" \n\t", "application/pdf", "EMPTY_DOCUMENT"),
        ("\ufeff\u200b".encode(), "text/plain", "EMPTY_DOCUMENT"),
        (b"<script>x</script>", "text/html", "EMPTY_DOCUMENT"),
        (b"{}\n{}", "application/jsonl", "EMPTY_DOCUMENT"),
        (pdf([[]]), "application/pdf", "EMPTY_DOCUMENT"),
        (docx(""), WORD, "EMPTY_DOCUMENT"),
        (b"x", "image/png", "MEDIA_TYPE_UNKNOWN"),
        (b"x", "", "MEDIA_TYPE_UNKNOWN"),
        (b"a\0b", "text/plain", "NOT_TEXT"),
        (b"a,b\n\0,c", "text/csv", "NOT_TEXT"),
        ("Grüße".encode("latin-1"), "text/markdown", "NOT_TEXT"),
        (b"x", "text/plain; charset=klingon", "NOT_TEXT"),
        (b"x", "text/plain; charset=rot13", "NOT_TEXT"),
        (b"+ADw-", "text/plain; charset=utf-7", "NOT_TEXT"),
        (NOISE[:300], "text/plain", "NOT_TEXT"),
        (PNG, "application/pdf", "MEDIA_TYPE_MISMATCH"),
        (PNG, "text/html", "MEDIA_TYPE_MISMATCH"),
        (b"text", "application/pdf", "MEDIA_TYPE_MISMATCH"),
        (b"text", WORD, "MEDIA_TYPE_MISMATCH"),
        (OLE2, WORD, "MEDIA_TYPE_MISMATCH"),
        (pdf([["x"]]), WORD, "MEDIA_TYPE_MISMATCH"),
        (pdf([["x"]]), "text/plain", "MEDIA_TYPE_MISMATCH"),
        (docx(paragraph("x")), "application/pdf", "MEDIA_TYPE_MISMATCH"),
        (docx(paragraph("x")), "text/csv", "MEDIA_TYPE_MISMATCH"),
        (docx("").replace(b"word/", b"xlsx/"), WORD, "MEDIA_TYPE_MISMATCH"),
        (pdf([["x"]], encrypted=True), "application/pdf", "ENCRYPTED"),
        (OLE2 + "EncryptedPackage".encode("utf-16-le"), WORD, "ENCRYPTED"),
        (pdf([["x"]])[:300], "application/pdf", "MALFORMED"),
        (b"%PDF-1.4\n" + NOISE, "application/pdf", "MALFORMED"),
        (docx(paragraph("x"))[:-200], WORD, "MALFORMED"),
        (docx("<w:p>"), WORD, "MALFORMED"),
        (docx(paragraph("&e;"), prolog=DTD), WORD, "MALFORMED"),
        (b'{"a": 1}\n{"a": ', "application/jsonl", "MALFORMED"),
        (b'{"a": 1}\n[1]', "application/jsonl", "MALFORMED"),
        (b"[" * 100_000, "application/jsonl", "TOO_LARGE"),
        (b'{"a":' + b"[" * 350, "application/jsonl", "MALFORMED"),
        (b"x" * 101, "text/plain", "TOO_LARGE"),
        (b"x" * 401, "text/html", "TOO_LARGE"),
        (b"x" * 100_001, "application/pdf", "TOO_LARGE"),
        (b"a\n" + b"1\n" * 100, "text/csv", "TOO_LARGE"),
        (docx(paragraph("x" * 101)), WORD, "TOO_LARGE"),
        (docx("", others=[("x", bytes(1_000_000))]), WORD, "TOO_LARGE"),
        (pdf([["x"]] * 3), "application/pdf", "TOO_MANY_PAGES"),
    ],
)
def test_bad_documents_have_a_reason(data, media_type, reason):
    with pytest.raises(InvalidInput) as caught:
        parse(data, media_type, SMALL)
    assert caught.value.reason == reason


def test_a_zip_bomb_is_refused_before_it_is_unpacked():
    with pytest.raises(InvalidInput) as caught:
        parse(zip_bomb(), WORD)
    assert caught.value.reason == "TOO_LARGE"


def test_a_message_says_which_line_is_broken_and_nothing_of_the_library():
    with pytest.raises(InvalidInput) as caught:
        parse(b'{"a": 1}\n{"a": nope}', "application/jsonl")
    assert str(caught.value) == "line 2 is not a JSON object"


@pytest.mark.parametrize(
    ("filename", "media_type"),
    [
        ("a.txt", "text/plain"),
        ("dir.d/README.MD", "text/markdown"),
        ("a.htm", "text/html"),
        ("a.b.pdf", "application/pdf"),
        ("a.docx", WORD),
        ("a.csv", "text/csv"),
        ("a.jsonl", "application/jsonl"),
        ("a.ndjson", "application/jsonl"),
        ("a.png", None),
        ("pdf", None),
    ],
)
def test_file_names_tell_the_media_type(filename, media_type):
    assert media_types.media_type_of(filename) == media_type
