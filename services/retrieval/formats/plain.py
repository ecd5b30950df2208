"""Plain text: one section."""

from services.retrieval.formats.decoding import decode
from services.retrieval.formats.writer import Writer


def read(data: bytes, charset: str | None, writer: Writer) -> None:
    writer.add(decode(data, charset, writer.limits))
