"""The media types that can be ingested, and the file names that mean them."""

TEXT = "text/plain"
MARKDOWN = "text/markdown"
HTML = "text/html"
PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
CSV = "text/csv"
JSON_LINES = "application/jsonl"
JSON_LINES_ALIAS = "application/x-ndjson"

_BY_SUFFIX = {
    "txt": TEXT,
    "text": TEXT,
    "md": MARKDOWN,
    "markdown": MARKDOWN,
    "html": HTML,
    "htm": HTML,
    "xhtml": HTML,
    "pdf": PDF,
    "docx": DOCX,
    "csv": CSV,
    "jsonl": JSON_LINES,
    "ndjson": JSON_LINES,
}


def media_type_of(filename: str) -> str | None:
    """The media type that the suffix of a file name or path stands for, None for any other file."""
    _, dot, suffix = filename.rpartition(".")
    return _BY_SUFFIX.get(suffix.lower()) if dot else None
