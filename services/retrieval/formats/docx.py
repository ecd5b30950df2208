"""DOCX (ECMA-376 part 1, WordprocessingML), read from its XML.

python-docx leaves out inserted text of tracked changes and content controls, and loads pictures;
the walk here keeps all text that a reader sees in the body, and reads nothing else. Names are
compared without their namespace: the strict and the transitional variant differ in nothing else.
"""

import io
import posixpath
import re
import zipfile
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from services.retrieval.formats.writer import Writer
from services.runtime.errors import InvalidInput

_OLE2 = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_SKIPPED = frozenset(
    "del moveFrom pPr rPr instrText delText footnoteReference endnoteReference "
    "commentReference".split()
)
_HEADING = re.compile(r"heading ([1-9])", re.I)
_MEMBERS = 20_000
_BODY, _LIST = 10, -1  # beside the levels of headings


def read(data: bytes, charset: str | None, writer: Writer) -> None:
    if data.startswith(_OLE2) and "EncryptedPackage".encode("utf-16-le") in data:
        raise InvalidInput("ENCRYPTED", "the document needs a password")
    if not data.startswith(b"PK"):
        raise InvalidInput("MEDIA_TYPE_MISMATCH", "the document is not a DOCX file")
    with zipfile.ZipFile(io.BytesIO(data)) as package:
        members = package.infolist()
        # A member that unpacks to more than it declares is cut there by zipfile.
        size = sum(member.file_size for member in members)
        if size > writer.limits.unpacked_bytes or len(members) > _MEMBERS:
            raise InvalidInput("TOO_LARGE", "the document unpacks to too much")
        if any(member.flag_bits & 1 for member in members):
            raise InvalidInput("ENCRYPTED", "the document needs a password")
        main = _part(package, "officeDocument", "_rels/.rels")
        document = _xml(package, main)
        if document is None or _name(document) != "document":
            raise InvalidInput("MEDIA_TYPE_MISMATCH", "the document is not a DOCX file")
        core = _xml(package, _part(package, "core-properties", "_rels/.rels"))
        folder, name = posixpath.split(main)
        styles = _xml(package, _part(package, "styles", f"{folder}/_rels/{name}.rels", folder))
    if core is not None:
        writer.title = core.findtext("{*}title") or ""
    _Body(writer, _levels(styles)).walk(document)


class _NoDoctype(ElementTree.TreeBuilder):
    """The standard allows no DTD in a package: no entity is ever defined, be it a bomb or a URL."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise InvalidInput("MALFORMED", "the document has a document type declaration")


def _xml(package: zipfile.ZipFile, name: str) -> Element | None:
    if name not in package.namelist():
        return None
    parser = ElementTree.XMLParser(target=_NoDoctype())
    parser.feed(package.read(name))
    root: Element = parser.close()
    return root


def _part(package: zipfile.ZipFile, kind: str, relations: str, folder: str = "") -> str:
    """The name of the part to which a relation of this kind points, or ""."""
    root = _xml(package, relations)
    for relation in root if root is not None else ():
        if relation.get("Type", "").rpartition("/")[2] == kind:
            return posixpath.normpath(posixpath.join("/", folder, relation.get("Target", "")))[1:]
    return ""


def _levels(styles: Element | None) -> dict[str, int]:
    """Style id -> level of the headings in that style; 0 for the title's, _LIST for list items."""
    found: dict[str, int] = {}
    based_on: dict[str, str] = {}
    for style in styles.iterfind("{*}style") if styles is not None else ():
        identifier = _value(style, "styleId")
        name = _value(style.find("{*}name"), "val")
        outline = _value(style.find("{*}pPr/{*}outlineLvl"), "val")
        based_on[identifier] = _value(style.find("{*}basedOn"), "val")
        if heading := _HEADING.fullmatch(name):
            found[identifier] = int(heading[1])
        elif name.lower() == "title":
            found[identifier] = 0
        elif outline.isdecimal() and int(outline) < 9:  # 9 is body text
            found[identifier] = int(outline) + 1
        elif style.find("{*}pPr/{*}numPr") is not None:
            found[identifier] = _LIST
    for identifier in based_on:
        ancestor, steps = identifier, 0
        while ancestor and ancestor not in found and steps < 20:
            ancestor, steps = based_on.get(ancestor, ""), steps + 1
        if ancestor in found:
            found[identifier] = found[ancestor]
    return found


class _Body:
    def __init__(self, writer: Writer, levels: dict[str, int]) -> None:
        self._writer = writer
        self._levels = levels
        self._in_list = False

    def walk(self, parent: Element) -> None:
        for child in parent:
            match _name(child):
                case "p":
                    self._paragraph(child)
                case "tbl":
                    self._table(child)
                case "body" | "sdt" | "sdtContent" | "customXml" | "ins" | "moveTo":
                    self.walk(child)

    def _paragraph(self, paragraph: Element) -> None:
        text = "".join(_texts(paragraph))
        if not text.strip():
            return
        properties = paragraph.find("{*}pPr")
        style = outline = ""
        in_list = False
        if properties is not None:
            style = _value(properties.find("{*}pStyle"), "val")
            outline = _value(properties.find("{*}outlineLvl"), "val")
            in_list = properties.find("{*}numPr") is not None
        level = int(outline) + 1 if outline.isdecimal() else self._levels.get(style, _BODY)
        if 0 <= level < _BODY:
            if level == 0 and not self._writer.title:
                self._writer.title = text
            self._writer.heading(level, text)
            in_list = False
        else:
            in_list = in_list or level == _LIST
            newlines = 1 if in_list and self._in_list else 2
            self._writer.add(f"- {text.strip()}" if in_list else text, newlines)
        self._in_list = in_list

    def _table(self, table: Element) -> None:
        rows = [list(_inside(row, "tc")) for row in _inside(table, "tr")]
        if len(rows) == 1 and len(rows[0]) == 1:  # a frame around text
            self.walk(rows[0][0])
            return
        newlines = 2
        for row in rows:
            cells = [" ".join(" ".join(_cell(cell)).split()) for cell in row]
            if any(cells):
                self._writer.add(" | ".join(cells), newlines)
                newlines = 1
        self._in_list = False


def _inside(parent: Element, name: str) -> Iterator[Element]:
    """Rows of a table or cells of a row, also those in content controls."""
    for child in parent:
        if _name(child) == name:
            yield child
        elif _name(child) in ("sdt", "sdtContent", "customXml", "ins"):
            yield from _inside(child, name)


def _cell(parent: Element) -> Iterator[str]:
    for child in parent:
        if _name(child) == "p":
            yield "".join(_texts(child))
        elif _name(child) not in _SKIPPED:
            yield from _cell(child)


def _texts(parent: Element) -> Iterator[str]:
    for child in parent:
        name = _name(child)
        if name == "t":
            yield child.text or ""
        elif name in ("tab", "ptab"):
            yield "\t"
        elif name in ("br", "cr"):
            yield "\n"
        elif name == "noBreakHyphen":
            yield "-"
        elif name == "AlternateContent":  # the same content for newer and older programs
            yield from _texts(child[0]) if len(child) else ()
        elif name == "txbxContent":
            yield "\n" + "\n".join("".join(_texts(p)) for p in child) + "\n"
        elif name not in _SKIPPED and not (name == "r" and _vanishes(child)):
            yield from _texts(child)


def _vanishes(run: Element) -> bool:
    mark = run.find("{*}rPr/{*}vanish")
    return mark is not None and _value(mark, "val") not in ("0", "false", "off")


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _value(element: Element | None, name: str) -> str:
    """An attribute, which has a namespace of its own in WordprocessingML."""
    if element is None:
        return ""
    return next((v for k, v in element.items() if k.rpartition("}")[2] == name), "")
