"""Files and folders as documents to ingest."""

import json
from pathlib import Path

import pytest

from clients.documents import Ingested, NewDocument
from clients.files import FileError, count, documents, find


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def lines(folder: Path, *objects: object) -> list[tuple[Path, str]]:
    """A file of JSON Lines; what is bytes stands in it as it is."""
    path = folder / "faq.jsonl"
    written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in objects]
    path.write_bytes(b"\n".join(written))
    return find([path])


def test_a_folder_gives_the_files_of_known_formats_with_their_paths_as_ids(tmp_path):
    write(tmp_path, b_dot_txt="b", sub__a_dot_MD="a", image_dot_png="x", _dot_git__c_dot_txt="c")
    write(tmp_path, _dot_hidden_dot_txt="h", sub__noformat="n", sub__deep__d_dot_html="d")
    found = find([tmp_path])
    assert sorted(id for _, id in found) == ["b.txt", "sub/a.MD", "sub/deep/d.html"]
    assert all(path == tmp_path / id for path, id in found)


def test_a_file_is_named_by_its_name_and_keeps_where_it_came_from(tmp_path):
    write(tmp_path, sub__a_dot_md="# A")
    (document,) = documents(find([tmp_path / "sub" / "a.md"]))
    uri = (tmp_path / "sub" / "a.md").as_uri()
    assert document == NewDocument("a.md", b"# A", "text/markdown", uri=uri)


def test_a_file_that_is_named_twice_is_taken_once(tmp_path):
    write(tmp_path, a_dot_txt="a")
    assert len(find([tmp_path, tmp_path / "a.txt", tmp_path])) == 1


def test_two_files_of_one_id_are_refused_because_one_would_replace_the_other(tmp_path):
    write(tmp_path, one__a_dot_txt="1", two__a_dot_txt="2")
    with pytest.raises(FileError, match=r"one/a\.txt and .*two/a\.txt would both be .* a\.txt"):
        find([tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize(
    ("name", "says"),
    [("absent.txt", r"cannot read .*absent\.txt: No such file"), ("image.png", "no format")],
)
def test_a_path_that_cannot_be_ingested_is_named(tmp_path, name, says):
    write(tmp_path, image_dot_png="x")
    with pytest.raises(FileError, match=says):
        find([tmp_path / name])


def test_json_lines_with_id_and_text_are_one_document_a_line(tmp_path):
    first = {"id": "q1", "text": "Über 27 days.", "title": "Leave", "uri": "x:1"}
    found = lines(tmp_path, first, b"", {"id": 2, "text": "b", "metadata": {"year": 2026}})
    one, two = documents(found)
    assert one == NewDocument("q1", "Über 27 days.".encode(), title="Leave", uri="x:1")
    assert (two.id, two.metadata, two.uri) == ("2", {"year": 2026}, found[0][0].as_uri())
    assert count(found) == 2


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (document,) = documents(lines(tmp_path, b'\xef\xbb\xbf{"id": "a", "text": "b"}'))
    assert (document.id, document.content) == ("a", b"b")


def test_other_json_lines_are_one_document(tmp_path):
    found = lines(tmp_path, {"question": "q", "answer": "a"}, {"question": "r"})
    (document,) = documents(found)
    assert (document.id, document.media_type) == ("faq.jsonl", "application/jsonl")
    assert count(found) == 1


@pytest.mark.parametrize(
    "broken",
    [
        b'{"id": "x", "text": "cut sho',
        b"[]",
        b'{"id": "x"}',
        b'{"id": null, "text": "a"}',
        b'{"id": true, "text": "a"}',
        b'{"id": "x", "text": 5}',
        b'{"id": "x", "text": "\\ud800"}',
        b'{"id": "x", "text": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_a_broken_line_fails_by_its_number_and_the_lines_around_it_stand(tmp_path, broken):
    found = lines(tmp_path, {"id": "a", "text": "a"}, broken, {"id": "c", "text": "c"})
    first, failed, last = documents(found)
    assert (first.id, last.id) == ("a", "c")
    message = 'not a JSON object with "id" and "text"'
    assert failed == Ingested("faq.jsonl, line 2", "failed", "MALFORMED", message)
    assert count(found) == 3


def test_a_file_that_went_away_fails_and_the_others_follow(tmp_path):
    write(tmp_path, a_dot_txt="a", b_dot_txt="b", c_dot_jsonl="{}")
    found = find([tmp_path])
    (tmp_path / "a.txt").unlink()
    (tmp_path / "c.jsonl").unlink()
    assert count(found) == 3
    gone, there, also_gone = documents(found)
    assert (gone.id, gone.reason) == ("a.txt", "FILE_UNREADABLE")
    assert "No such file" in gone.message
    assert there.content == b"b"
    assert (also_gone.id, also_gone.reason) == ("c.jsonl", "FILE_UNREADABLE")
