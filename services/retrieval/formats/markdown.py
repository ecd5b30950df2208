"""Markdown (CommonMark with tables) by markdown-it: text without its markup."""

import re
from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token

from services.retrieval.formats import html
from services.retrieval.formats.decoding import decode
from services.retrieval.formats.writer import Writer

_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.M | re.S)
_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.M | re.I)

_MARKDOWN = MarkdownIt("commonmark", {"maxNesting": 100}).enable(["table", "strikethrough"])


def read(data: bytes, charset: str | None, writer: Writer) -> None:
    text = decode(data, charset, writer.limits).replace("\r\n", "\n")
    if front := _FRONT_MATTER.match(text):
        text = text[front.end() :]
        if title := _TITLE.search(front[1]):
            writer.title = title[1].strip("\"'")
    write(_MARKDOWN.parse(text), writer)


def write(tokens: Sequence[Token], writer: Writer) -> None:
    """Headings as such; list items with `- ` or their number; rows as `a | b`; code as it is."""
    depth = 0  # of lists
    marker = ""  # of an item of which nothing has been written
    heading = 0
    cells: list[str] | None = None
    newlines = 2
    for token in tokens:
        match token.type:
            case "bullet_list_open" | "ordered_list_open":
                newlines = 1 if depth else 2
                depth += 1
            case "bullet_list_close" | "ordered_list_close":
                depth -= 1
            case "list_item_open":
                marker = f"{token.info}{token.markup} " if token.info else "- "
                marker = "  " * (depth - 1) + marker
            case "paragraph_open":
                newlines = newlines if token.hidden else 2
            case "heading_open":
                heading = int(token.tag[1])
            case "heading_close":
                heading = 0
            case "tr_open":
                cells = []
            case "tr_close":
                writer.add(" | ".join(cells or ()), newlines)
                cells, newlines = None, 1
            case "table_open" | "table_close":
                newlines = 2
            case "inline" if cells is not None:
                cells.append(" ".join(_inline(token).split()))
            case "inline" if heading:
                writer.heading(heading, _inline(token))
            case "inline":
                writer.add(marker + _inline(token), newlines)
                marker, newlines = "", 1
            case "fence" | "code_block":
                writer.add(token.content)
            case "html_block":
                html.write(token.content, writer)


def _inline(token: Token) -> str:
    return "".join(_text(child) for child in token.children or ())


def _text(token: Token) -> str:
    match token.type:
        case "softbreak":
            return " "
        case "hardbreak":
            return "\n"
        case "html_inline":
            return "\n" if token.content.lower().startswith("<br") else ""
        case _:
            return token.content  # of text, code and image (its description); others have none
