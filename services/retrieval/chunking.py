"""Cuts a document into the chunks that are embedded: by headings, then by sentences.

The text is tokenised once as a whole and the places to cut are chosen by the tokens' offsets; each
chunk is then counted once more. Splitters that count candidate pieces tokenise it five times.
"""

import os.path
import re
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.retrieval.parsing import Parsed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Some tokenizers count any long word as one unknown token: here it is at least one per so many.
_CHARACTERS_PER_TOKEN = 16
_TINY = 4  # a section below this part of a chunk may share one with its neighbours
_WINDOW = 20_000  # code points that are tokenised at a time
_WORD = re.compile(r"\S+\s*")
# Where a text may be cut, best first. A line break inside a sentence (the next line goes on in
# lower case, as in text with lines of 80 characters) is none of them.
_PARAGRAPH_END = re.compile(r"\n\n")
_LINE_END = re.compile(r"\n(?![a-zß-öø-ÿα-ωа-я])|(?<![\w,;)])\n")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*\s(?![a-z])|[。！？｡][」』）】]*")
_SPACE = re.compile(r"\s")


@dataclass(frozen=True, slots=True)
class Chunk:
    """text[start:end] of a document, in code points, without white space at its ends.

    heading_path: the headings that all of it is under. page: of its first character, 0 for none.
    """

    start: int
    end: int
    heading_path: tuple[str, ...]
    page: int


def chunk(
    parsed: Parsed, count_tokens: "Callable[[str], int] | Tokenizer", max_tokens: int
) -> list[Chunk]:
    """Chunks of at most `max_tokens` tokens (special tokens not counted), in order. A tokenizer
    neither truncates nor pads.

    They do not overlap and together hold all that is not white space. A document that fits is one
    chunk. A section has its own chunks, but for tiny ones, which join their parent or siblings. One
    character that has more tokens than `max_tokens` is a chunk.
    """
    if callable(count_tokens):
        text = _Text(parsed.text, count_tokens, _word_starts(parsed.text, count_tokens))
    else:
        tokenizer = count_tokens
        text = _Text(
            parsed.text,
            lambda piece: len(tokenizer.encode(piece, add_special_tokens=False)),
            _token_starts(parsed.text, tokenizer),
        )
    starts = [section.start for section in parsed.sections]
    chunks = []
    for low, high in _groups(parsed, text, max_tokens):
        for start, end in text.split(low, high, max_tokens):
            first, last = bisect_right(starts, start) - 1, bisect_left(starts, end)
            inside = parsed.sections[first:last]
            path = _common(*(section.heading_path for section in inside))
            chunks.append(Chunk(start, end, path, inside[0].page))
    return chunks


def _groups(parsed: Parsed, text: "_Text", max_tokens: int) -> Iterator[tuple[int, int]]:
    """Sections that share a chunk, or single ones that may need several."""
    whole = len(parsed.text)
    if text.fits(0, whole, max_tokens):
        yield 0, whole
        return
    start, end, path = 0, 0, parsed.sections[0].heading_path
    for section in parsed.sections:
        common = _common(path, section.heading_path)
        related = len(common) >= max(len(path), len(section.heading_path)) - 1
        sizes = text.tokens(start, end), text.tokens(section.start, section.end)
        tiny = max_tokens / _TINY
        # Parts right below the document are joined only if all are tiny, others if one is.
        apart = not common and (path or section.heading_path)
        if end > start and not (
            related
            and text.tokens(start, section.end) <= max_tokens
            and (max(sizes) if apart else min(sizes)) < tiny
        ):
            yield start, end
            start, common = section.start, section.heading_path
        end, path = section.end, common
    yield start, end


class _Text:
    """A text whose tokens begin at `starts`, in order."""

    def __init__(self, text: str, count: Callable[[str], int], starts: "array[int]") -> None:
        self._text = text
        self._count = count
        self._starts = starts

    def tokens(self, start: int, end: int) -> int:
        """Tokens of a part, nearly: a cut may change the tokens beside it."""
        tokens = bisect_left(self._starts, end) - bisect_left(self._starts, start)
        return max(tokens, -(-(end - start) // _CHARACTERS_PER_TOKEN))

    def fits(self, start: int, end: int, max_tokens: int) -> bool:
        """Whether a part has at most so many tokens, exactly."""
        core = self._text[start:end].strip()
        short = len(core) <= max_tokens * _CHARACTERS_PER_TOKEN
        return short and self._count(core) <= max_tokens

    def split(self, start: int, end: int, max_tokens: int) -> Iterator[tuple[int, int]]:
        while start < end:
            cut = self._cut(start, end, max_tokens)
            piece = self._text[start:cut]
            if core := piece.strip():
                first = start + len(piece) - len(piece.lstrip())
                yield first, first + len(core)
            start = cut

    def _cut(self, start: int, end: int, max_tokens: int) -> int:
        tokens = self.tokens(start, end)
        # The last two chunks are alike rather than a full one and a crumb.
        budget = max_tokens
        if max_tokens < tokens <= 2 * max_tokens:
            budget = min(max_tokens, -(-tokens * 3 // 5))
        while budget > 0:
            cut = self._boundary(start, self._reach(start, end, budget), end)
            counted = self._count(self._text[start:cut].strip())
            if counted <= max_tokens:
                return cut
            budget = min(budget - 1, budget * max_tokens // counted)
        return start + 1

    def _reach(self, start: int, end: int, tokens: int) -> int:
        index = bisect_left(self._starts, start) + tokens
        reach = self._starts[index] if index < len(self._starts) else end
        return max(start + 1, min(reach, end, start + tokens * _CHARACTERS_PER_TOKEN))

    def _boundary(self, start: int, reach: int, end: int) -> int:
        """The best place to cut up to `reach`, in the second half if there is one."""
        if reach == end:
            return end
        middle, quarter = (start + reach) // 2, (3 * start + reach) // 4
        for low, high, pattern in (
            (middle, reach, _PARAGRAPH_END),
            (middle, reach, _LINE_END),
            (middle, reach, _SENTENCE_END),
            (quarter, middle, _LINE_END),
            (quarter, middle, _SENTENCE_END),
            (middle, reach, _SPACE),
        ):
            matches = pattern.finditer(self._text, low, high + 2)  # which sees what follows
            # White space just behind the reach costs nothing.
            ends = [match.end() for match in matches if match.end() <= high + 1]
            if ends and ends[-1] > start:
                return ends[-1]
        cut = reach
        while cut > middle + 1 and _continues(self._text[cut - 1], self._text[cut]):
            cut -= 1
        return cut


def _continues(before: str, character: str) -> bool:
    """Whether a character is part of the one before: an accent, a joined emoji."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") or before == "\u200d"


def _token_starts(text: str, tokenizer: "Tokenizer") -> "array[int]":
    starts = array("L")
    low = 0
    while low < len(text):
        high = min(low + _WINDOW, len(text))
        if high < len(text):
            spaces = max(text.rfind(" ", low + 1, high), text.rfind("\n", low + 1, high))
            high = spaces if spaces > 0 else high
        encoding = tokenizer.encode(text[low:high], add_special_tokens=False)
        starts.extend(low + start for start, _ in encoding.offsets)
        low = high
    return starts


def _word_starts(text: str, count: Callable[[str], int]) -> "array[int]":
    """Counts word by word; the tokens of a word are spread evenly over it."""
    starts = array("L")
    for word in _WORD.finditer(text):
        start, end = word.span()
        tokens = count(word[0])
        starts.extend(start + (end - start) * index // tokens for index in range(tokens))
    return starts


def _common(*paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(os.path.commonprefix(paths))
