"""Small PDF and DOCX files, made by hand."""

import io
import zipfile
from collections.abc import Sequence

_WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
_RELATIONS = 'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"'
_KIND = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"

STYLES = f"""<w:styles {_WORD}>
<w:style w:styleId="Titel"><w:name w:val="Title"/></w:style>
<w:style w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style>
<w:style w:styleId="berschrift2"><w:name w:val="heading 2"/></w:style>
<w:style w:styleId="Own"><w:name w:val="Own"/><w:basedOn w:val="berschrift2"/></w:style>
<w:style w:styleId="Bullet"><w:name w:val="List Bullet"/><w:pPr><w:numPr/></w:pPr></w:style>
</w:styles>"""


def pdf(pages: Sequence[Sequence[str]], title: str = "", encrypted: bool = False) -> bytes:
    """A PDF with these lines on each page; `encrypted` needs a password that nobody knows."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Title (%s) >>" % title.encode(),
    ]
    kids = []
    for lines in pages:
        shown = b" ".join(b"(%s) Tj T*" % line.encode("cp1252") for line in lines)
        content = b"BT /F1 12 Tf 14 TL 72 720 Td %s ET" % shown
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(kids))
    trailer = b"/Root 1 0 R /Info 4 0 R"
    if encrypted:
        trailer += b" /ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -1"
        trailer += b" /O <%s> /U <%s> >>" % (b"11" * 32, b"22" * 32)
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(b"%010d 00000 n \n" % len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, b"".join(offsets))
    end = b"trailer\n<< /Size %d %s >>\nstartxref\n%d\n%%%%EOF\n"
    return out + table + end % (len(objects) + 1, trailer, len(out))


def paragraph(text: str, style: str = "") -> str:
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{properties}<w:r><w:t>{text}</w:t></w:r></w:p>"


def table(*rows: Sequence[str]) -> str:
    cells = ("".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row) for row in rows)
    return f"<w:tbl>{''.join(f'<w:tr>{row}</w:tr>' for row in cells)}</w:tbl>"


def docx(body: str, prolog: str = "", others: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """A DOCX with this body (WordprocessingML with the prefix w) and other members."""
    relation = f'<Relationship Id="r" Type="{_KIND}/%s" Target="%s"/>'
    relations = f"<Relationships {_RELATIONS}>{relation}</Relationships>"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("_rels/.rels", relations % ("officeDocument", "word/document.xml"))
        package.writestr("word/_rels/document.xml.rels", relations % ("styles", "styles.xml"))
        package.writestr("word/styles.xml", STYLES)
        package.writestr(
            "word/document.xml",
            f"{prolog}<w:document {_WORD}><w:body>{body}</w:body></w:document>",
        )
        for name, data in others:
            package.writestr(name, data)
    return buffer.getvalue()


def zip_bomb() -> bytes:
    """A DOCX of 250 KB that unpacks to 250 MB."""
    return docx(paragraph("x"), others=[("word/media/image1.bmp", bytes(250_000_000))])
