"""Files as documents to ingest."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from clients.documents import Ingested, NewDocument
from services.retrieval.media_types import JSON_LINES, TEXT, media_type_of


class FileError(ValueError):
    """A file that cannot be used, in one sentence."""


def find(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """Return every file to ingest with the id that it gets: a file's name, or its path within the
    folder that was given. In folders, hidden files and unknown formats are passed over.

    Raises FileError for a path that does not exist or cannot be read, a file whose format is
    unknown, and two files that would get the same id.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for file, id in _in_folder(path) if _is_folder(path) else [(path, path.name)]:
            other = found.setdefault(id, file)
            if other.resolve() != file.resolve():
                raise FileError(
                    f"{other} and {file} would both be the document {id}: name the folder above"
                    " them, or ingest them into two corpora"
                )
    return [(file, id) for id, file in found.items()]


def documents(files: Iterable[tuple[Path, str]]) -> Iterator[NewDocument | Ingested]:
    """Yield the documents of files that `find` returned, reading one file at a time.

    A file of JSON Lines whose first object has "id" and "text" holds one document a line (also
    "title", "uri" and "metadata"); every other file is one document. What cannot be read is yielded
    as failed, and the next one follows.
    """
    for path, id in files:
        try:
            uri = path.absolute().as_uri()
            if _holds_documents(path):
                for number, line in _lines(path):
                    yield _of_line(line, f"{id}, line {number}", uri)
            else:
                yield NewDocument(id, path.read_bytes(), media_type_of(path.name) or TEXT, uri=uri)
        except OSError as error:
            yield Ingested(id, "failed", "FILE_UNREADABLE", error.strerror or str(error))


def count(files: Iterable[tuple[Path, str]]) -> int:
    """Return how many documents these files hold."""
    total = 0
    for path, _ in files:
        try:
            total += sum(1 for _ in _lines(path)) if _holds_documents(path) else 1
        except OSError:
            total += 1
    return total


def _is_folder(path: Path) -> bool:
    try:
        if path.is_dir():
            return True
        path.stat()
    except OSError as error:
        _refuse(error)
    if media_type_of(path.name) is None:
        raise FileError(
            f"{path} has no format that can be ingested: take .txt, .md, .html, .pdf, .docx,"
            " .csv or .jsonl"
        )
    return False


def _in_folder(folder: Path) -> Iterator[tuple[Path, str]]:
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(parent, name)
            if not name.startswith(".") and media_type_of(name) and file.is_file():
                yield file, file.relative_to(folder).as_posix()


def _refuse(error: OSError) -> NoReturn:
    raise FileError(f"cannot read {error.filename}: {error.strerror}") from error


def _holds_documents(path: Path) -> bool:
    if media_type_of(path.name) != JSON_LINES:
        return False
    _, first = next(_lines(path), (0, b""))
    try:
        fields = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and {"id", "text"} <= fields.keys()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, by number from 1."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line := line.strip():
                yield number, line


def _of_line(line: bytes, where: str, uri: str) -> NewDocument | Ingested:
    try:
        match fields := json.loads(line):
            case {"id": str() | int(), "text": str()} if not isinstance(fields["id"], bool):
                return NewDocument(
                    id=str(fields["id"]),
                    content=fields["text"].encode(),
                    title=fields.get("title") or "",
                    uri=fields.get("uri") or uri,
                    metadata=fields.get("metadata") or {},
                )
    except (ValueError, RecursionError):
        pass
    return Ingested(where, "failed", "MALFORMED", 'not a JSON object with "id" and "text"')
