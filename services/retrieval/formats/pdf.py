"""PDF by PDFium: the text of each page, as its lines are set."""

import re

import pypdfium2
import pypdfium2.raw as pdfium

from services.retrieval.formats.writer import Writer
from services.runtime.errors import InvalidInput

_LOCKED = {pdfium.FPDF_ERR_PASSWORD, pdfium.FPDF_ERR_SECURITY}
_HYPHENATED = re.compile("[\x02\ufffe]\r?\n?")  # what PDFium makes of a hyphen at a line's end
# A line break that is only layout: the sentence goes on in lower case.
_WRAPPED = re.compile(r"(?<=[^\W_]|[,;)])\r?\n(?=[a-zß-öø-ÿα-ωа-я])")


def read(data: bytes, charset: str | None, writer: Writer) -> None:
    if b"%PDF-" not in data[:1024]:
        raise InvalidInput("MEDIA_TYPE_MISMATCH", "the document is not a PDF file")
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if error.err_code in _LOCKED:
            raise InvalidInput("ENCRYPTED", "the document needs a password") from error
        raise
    if len(document) > writer.limits.pages:
        raise InvalidInput("TOO_MANY_PAGES", f"the document has over {writer.limits.pages} pages")
    writer.title = document.get_metadata_dict().get("Title", "").strip("\0 ")
    for number, page in enumerate(document, start=1):
        textpage = page.get_textpage()
        text = _HYPHENATED.sub("", textpage.get_text_bounded())
        writer.page(number)
        writer.add(_WRAPPED.sub(" ", text))
        textpage.close()
        page.close()
