"""Puts the blocks of a document together and keeps track of its sections."""

from services.retrieval.normalising import normalise
from services.retrieval.parsing import Limits, Parsed, Section
from services.runtime.errors import InvalidInput

_HEADING_CHARACTERS = 200  # of a heading in a path: paths are repeated in every section below


class Writer:
    """A reader calls `page`, `section`, `heading` and `add` in the order of the document."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.title = ""
        self._parts: list[str] = []
        self._length = 0
        self._sections: list[tuple[int, tuple[str, ...], int]] = []
        self._headings: list[tuple[int, str]] = []
        self._page = 0
        self._starts_section = True

    def page(self, number: int) -> None:
        """What follows is on this page (from 1)."""
        self._page = number
        self._starts_section = True

    def section(self) -> None:
        """What follows is a section of its own under the same headings."""
        self._starts_section = True

    def heading(self, level: int, text: str) -> None:
        """A heading, the outermost level being 1; the first one is the title if there is none."""
        text = " ".join(normalise(text).split())
        if not text:
            return
        while self._headings and self._headings[-1][0] >= level:
            self._headings.pop()
        self._headings.append((level, text[:_HEADING_CHARACTERS]))
        self.title = self.title or text
        self._starts_section = True
        self.add(text)

    def add(self, text: str, newlines: int = 2) -> None:
        """A block of text, with so many newlines between it and the one before."""
        text = normalise(text).strip("\n").rstrip()
        if not text.strip():
            return
        if self._parts:
            self._parts.append("\n" * newlines)
            self._length += newlines
        if self._starts_section:
            path = tuple(heading for _, heading in self._headings)
            self._sections.append((self._length, path, self._page))
            self._starts_section = False
        self._parts.append(text)
        self._length += len(text)
        if self._length > self.limits.characters:
            raise InvalidInput(
                "TOO_LARGE", f"the text has over {self.limits.characters} characters"
            )

    def finish(self) -> Parsed:
        """The document. Raises InvalidInput EMPTY_DOCUMENT if nothing was added."""
        if not self._parts:
            raise InvalidInput("EMPTY_DOCUMENT", "the document has no text (scans need OCR first)")
        starts = [0, *(start for start, _, _ in self._sections[1:]), self._length]
        sections = tuple(
            Section(start, end, path, page)
            for start, end, (_, path, page) in zip(starts, starts[1:], self._sections, strict=False)
        )
        title = " ".join(normalise(self.title).split())[:_HEADING_CHARACTERS]
        return Parsed("".join(self._parts), title, sections)
