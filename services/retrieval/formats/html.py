"""HTML by Lexbor (the parsing algorithm of the HTML standard): the text that a reader would see."""

import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

from services.retrieval.formats.decoding import decode
from services.retrieval.formats.writer import Writer

_DROPPED = frozenset(
    "audio button canvas datalist dialog embed head iframe map math nav noscript object rp rt "
    "script select style svg template textarea title video".split()
)
_PARAGRAPHS = frozenset(
    "article aside blockquote dl fieldset figure footer form header hr main p pre section table "
    "h1 h2 h3 h4 h5 h6".split()
)
_LINES = frozenset(
    "address body caption center dd details div dt figcaption legend li menu ol summary tbody "
    "tfoot thead tr ul".split()
)
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_IN_LAYOUT = "table, h1, h2, h3, h4, h5, h6, pre"  # a table with one of these holds no data
_UNSEEN = re.compile(r"display:none|visibility:hidden|opacity:0(?![.\d])|font-size:0(?![.\d])")
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?([\w.:-]{1,40})", re.I)
_SPACE = re.compile("[ \t\r\n\f\xa0]+")
_SPACED_NEWLINE = re.compile(" ?\n ?")


def read(data: bytes, charset: str | None, writer: Writer) -> None:
    declared = _META_CHARSET.search(data[:1024])
    charset = charset or (declared[1].decode("ascii") if declared else None)
    if charset and charset.lower().startswith("utf-16") and b"\0" not in data[:1024]:
        charset = None  # a declaration that could be read as ASCII is wrong about this
    write(decode(data, charset, writer.limits), writer)


def write(markup: str, writer: Writer) -> None:
    """h1 to h6 as headings, rows of data tables as `a | b`, list items as `- item`."""
    tree = LexborHTMLParser(markup)
    title = tree.css_first("head > title")
    if title is not None:
        writer.title = writer.title or title.text()
    if tree.body is not None:
        _Walk(writer).walk(tree.body)


class _Walk:
    """One pass without recursion: the depth of a document is not limited."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._inline: list[str] = []
        self._newlines = 2
        self._marker = ""
        self._items = 0  # open list items
        self._pre = 0
        self._captured = ""  # the open heading or cell: blocks inside do not end it
        self._cells: list[str] = []
        self._tables: list[bool] = []  # of the open tables: holds data, not layout

    def walk(self, node: LexborNode | None) -> None:
        open_tags: list[tuple[LexborNode, str]] = []
        while node is not None:
            tag = node.tag or ""
            if node.is_text_node:
                self._text(node.text_content or "")
            elif node.is_element_node and not _hidden(node, tag):
                self._open(node, tag)
                if node.child is not None:
                    open_tags.append((node, tag))
                    node = node.child
                    continue
                self._close(tag)
            while node.next is None and open_tags:
                node, tag = open_tags.pop()
                self._close(tag)
            node = node.next if open_tags else None
        self._flush()

    def _text(self, text: str) -> None:
        self._inline.append(text if self._pre else _SPACE.sub(" ", text))

    def _open(self, node: LexborNode, tag: str) -> None:
        if tag == "br":
            self._inline.append("\n")
        elif tag == "img":
            self._text(node.attributes.get("alt") or "")
        self._boundary(tag)
        if self._captured:
            return
        if tag in _HEADINGS:
            self._captured = tag
        elif tag == "table":
            # A selector may match the node itself: its children are asked.
            self._tables.append(not any(child.css_first(_IN_LAYOUT) for child in node.iter()))
        elif tag in ("td", "th") and self._tables and self._tables[-1]:
            self._captured = tag
        elif tag == "li":
            self._marker = "- "
            self._items += 1
        elif tag == "pre":
            self._pre += 1

    def _close(self, tag: str) -> None:
        if tag == self._captured:
            text = _SPACE.sub(" ", "".join(self._inline)).strip()
            self._inline.clear()
            self._captured = ""
            if tag in _HEADINGS:
                self._writer.heading(int(tag[1]), text)
            else:
                self._cells.append(text)
        elif not self._captured and tag == "tr" and self._cells:
            self._add(" | ".join(self._cells))
            self._cells.clear()
        self._boundary(tag)
        if self._captured:
            return
        if tag == "table" and self._tables:
            self._tables.pop()
        elif tag == "li":
            self._marker = ""
            self._items -= 1
        elif tag == "pre":
            self._pre -= 1

    def _boundary(self, tag: str) -> None:
        block = tag in _PARAGRAPHS or tag in _LINES or tag in ("td", "th")
        if block and self._captured:
            self._inline.append(" ")
        elif block:
            self._flush()
            paragraph = tag in _PARAGRAPHS and not self._items
            self._newlines = max(self._newlines, 2 if paragraph else 1)

    def _flush(self) -> None:
        text = "".join(self._inline)
        self._inline.clear()
        if not self._pre:
            text = _SPACED_NEWLINE.sub("\n", re.sub(" {2,}", " ", text)).strip(" \n")
        if text.strip():
            self._add(self._marker + text)
            self._marker = ""

    def _add(self, text: str) -> None:
        self._writer.add(text, self._newlines)
        self._newlines = 1


def _hidden(node: LexborNode, tag: str) -> bool:
    if tag in _DROPPED:
        return True
    attributes = node.attributes
    if not attributes:
        return False
    style = "".join((attributes.get("style") or "").lower().split())
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or attributes.get("role") == "navigation"
        or _UNSEEN.search(style) is not None
    )
