"""Files as documents to ingest."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from services.retrieval.media_types import JSON_LINES, TEXT, media_type_of

MetadataValue = str | float | bool | datetime


@dataclass(frozen=True)
class NewDocument:
    """A document to ingest. `id` names it in its corpus; `title` may be left to the content."""

    id: str
    content: bytes
    media_type: str = TEXT
    title: str = ""
    uri: str = ""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


class FileError(ValueError):
    """A file that cannot be ingested, in one sentence."""


def find(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """Return every file to ingest with the id that it gets: a file's name, or its path within the
    folder that was given. In folders, hidden files and unknown formats are passed over.

    Raises FileError for a path that does not exist or a file whose format is unknown.
    """
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            found += [
                (file, file.relative_to(path).as_posix())
                for file in sorted(path.rglob("*"))
                if file.is_file()
                and media_type_of(file.name)
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
        elif not path.exists():
            raise FileError(f"there is no file {path}")
        elif media_type_of(path.name) is None:
            raise FileError(
                f"{path} has no format that can be ingested: take .txt, .md, .html, .pdf, .docx,"
                " .csv or .jsonl"
            )
        else:
            found.append((path, path.name))
    return found


def documents(files: Iterable[tuple[Path, str]]) -> Iterator[NewDocument]:
    """Yield the documents of files that `find` returned, reading one file at a time.

    A file of JSON Lines whose objects have "id" and "text" holds one document a line (also "title",
    "uri" and "metadata"); every other file is one document.
    """
    for path, id in files:
        media_type = media_type_of(path.name) or TEXT
        uri = path.absolute().as_uri()
        if media_type == JSON_LINES and _holds_documents(path):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _of_line(line, f"{path}, line {number}", uri)
        else:
            yield NewDocument(id, path.read_bytes(), media_type, uri=uri)


def count(files: Iterable[tuple[Path, str]]) -> int:
    """Return how many documents these files hold."""
    total = 0
    for path, _ in files:
        if media_type_of(path.name) == JSON_LINES and _holds_documents(path):
            with path.open("rb") as lines:
                total += sum(1 for line in lines if line.strip())
        else:
            total += 1
    return total


def _holds_documents(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
        fields = json.loads(first)
    except ValueError:
        return False
    return isinstance(fields, dict) and {"id", "text"} <= fields.keys()


def _of_line(line: str, where: str, uri: str) -> NewDocument:
    try:
        fields = json.loads(line)
        return NewDocument(
            id=str(fields["id"]),
            content=fields["text"].encode(),
            title=fields.get("title", ""),
            uri=fields.get("uri", uri),
            metadata=fields.get("metadata", {}),
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FileError(f'{where}: not an object with "id" and "text"') from None
