"""Sentence boundaries in a text that is still arriving."""

import re

Span = tuple[int, int, str]  # start, end, text

_CLOSERS = "\"'”’»›)\\]}*_`"
# A stop with what closes after it, a stop of Chinese or Japanese, or a line break.
_CANDIDATE = re.compile(
    rf"(?<![.!?…])[.!?…]++[{_CLOSERS}]*+(?=[\s\[])|[。！？｡]+[{_CLOSERS}」』）】]*|\n"
)
_REFERENCE = re.compile(r"[ \t]?\[[^\]\n]{1,30}\]")  # "grew.[3] Then", "grew. [3] Then"
_OPEN_REFERENCE = re.compile(r"[ \t]?(?:\[[^\]\n]{0,30})?\Z")
_MARKER = re.compile(r"(?:(?:[-*+•·>#|]+|\(?(?:\d{1,2}|[A-Za-z])[.)])[ \t]+)+")
_NUMBERED_LINE = re.compile(r"\(?\d{1,2}[.)]\s")
_WORD = re.compile(r"[^\s(\[\"'“‘]*$")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_LETTERS = re.compile(r"[^\W\d_]+")

# Never the end of a sentence.
_TITLES = frozenset(
    "dr mr mrs ms prof rev gen col lt sgt capt gov sen rep hon st mt ft vs e.g i.e cf fig figs eq "
    "sec ch vol pp approx ca al viz incl resp bzw z.b".split()
)
# Abbreviations before a digit, else words ("No. 5", "She said no.").
_BEFORE_DIGIT = frozenset("no nos p art nr".split())
# These may end a sentence, and do if the next word is one of `_OPENERS`; so do initials.
_EITHER = frozenset(
    "jr sr inc ltd co corp dept univ etc ph.d est jan feb mar apr jun jul aug sep sept oct nov "
    "dec".split()
)
_OPENERS = frozenset(
    "the a an it he she they we you i this that these those there in on at by for from with as if "
    "when while after before since during although though because however and but or so its his "
    "her their our your what who where how both each all some many most no not then also".split()
)
# A line at least this long was probably wrapped: its break ends no sentence.
_WRAPPED = 60
# What never ends (a table, a model that repeats itself) is cut at a space before this length.
_LONGEST = 1000


class SentenceSplitter:
    """Splits text into sentences as it arrives.

    The spans (code points of the whole text; white space and list markers trimmed) are the same
    however the text was cut. A boundary is reported when the next sentence has begun, for "3." may
    become "3.5"; after an abbreviation that may end a sentence, one word later.
    """

    def __init__(self) -> None:
        self._buffer = ""  # from the end of the last sentence on
        self._offset = 0  # where the buffer begins in the text
        self._column = 0  # and in its line
        self._searched = 0  # no boundary in the buffer before this

    def feed(self, delta: str) -> list[Span]:
        """The sentences that are complete with this delta."""
        self._buffer += delta
        found: list[Span] = []
        while True:
            match = _CANDIDATE.search(self._buffer, self._searched, _LONGEST)
            if match is None and len(self._buffer) < _LONGEST:
                # No candidate spans a space, so one that comes is in the last word.
                self._searched = max(self._searched, self._buffer.rfind(" ") + 1)
                return found
            if match is None:
                found += self._cut(self._buffer.rfind(" ", 0, _LONGEST) + 1 or _LONGEST)
                continue
            end = _skip_references(self._buffer, match)
            ends = None if end is None else _ends(self._buffer, match, end, self._column)
            if end is None or ends is None:
                return found
            self._searched = end
            if ends:
                found += self._cut(end)

    def finish(self) -> list[Span]:
        """The sentences that are left."""
        # An empty line settles every candidate that was waiting for more text.
        return self.feed("\n\n") + self._cut(len(self._buffer))

    def _cut(self, end: int) -> list[Span]:
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        start = self._offset + len(text) - len(text.lstrip())
        newline = text.rfind("\n")
        self._column = self._column + end if newline < 0 else end - newline - 1
        self._offset, self._searched = self._offset + end, 0
        text = text.strip()
        if marker := _MARKER.match(text):
            start, text = start + marker.end(), text[marker.end() :]
        return [(start, start + len(text), text)] if text else []


def split(text: str) -> list[Span]:
    """The sentences of a whole text."""
    splitter = SentenceSplitter()
    return splitter.feed(text) + splitter.finish()


def _skip_references(text: str, match: re.Match[str]) -> int | None:
    """Where a sentence that ends with this candidate ends; None: more text is needed."""
    end = match.end()
    if match[0] == "\n":
        return end
    while reference := _REFERENCE.match(text, end):
        end = reference.end()
    return None if _OPEN_REFERENCE.match(text, end) else end


def _ends(text: str, match: re.Match[str], end: int, column: int) -> bool | None:
    """Whether a candidate ends a sentence; None: more text is needed."""
    rest = text[end:].lstrip()
    if not rest:
        return None
    if match[0] == "\n":
        return _line_ends(text, match.start(), rest, column)
    if match[0][0] in "。！？｡":
        return True
    if rest[0].islower() or not (text[end].isspace() or end > match.end()):
        return False
    if match[0].rstrip(_CLOSERS) != ".":
        return True
    found = _WORD.search(text, 0, match.start())
    word = found[0].lower() if found else ""
    if word in _TITLES or (word in _BEFORE_DIGIT and rest[0].isdigit()):
        return False
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.end() + 1]
    if _MARKER.fullmatch(line.lstrip()):
        return False
    if word in _EITHER or _INITIALS.fullmatch(word):
        following = _LETTERS.match(rest)
        if following and following.end() == len(rest):
            return None
        return not following or following[0].lower() in _OPENERS
    return True


def _line_ends(text: str, newline: int, rest: str, column: int) -> bool | None:
    gap = text[newline + 1 : len(text) - len(rest)]
    if "\n" in gap or rest[0] in "-*+•·>#|":
        return True
    if rest[0].isdigit() or rest[0] == "(":
        if len(rest) < 5 and not re.search(r"\s", rest):
            return None
        if _NUMBERED_LINE.match(rest):
            return True
    before = text.rfind("\n", 0, newline)
    length = newline - before - 1 if before >= 0 else newline + column
    return length < _WRAPPED and not rest[0].islower()
