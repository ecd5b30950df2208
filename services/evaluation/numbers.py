"""Numbers in texts, however they are written."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from services.runtime.unicode import normalize

# Digits with what may stand between them, then cut into readings in Python: no backtracking.
WRITTEN = re.compile(
    r"(?P<sign>(?<![\w.,)\]])[-+\u2212])?(?<![\w.,])"
    r"(?P<digits>[.,]?\d(?:[\d.,'\u2019_]*\d)?(?:[eE][-+]?\d{1,3}(?!\w))?)(?P<percent> ?%)?"
)
SPACES = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # between thousands
CLOSE = 1e-9  # two numbers that differ by less are the same, but for rounding


@dataclass(frozen=True)
class Number:
    """What a written number may mean, the likeliest first: 1,234 may be 1234 or 1.234."""

    readings: tuple[float, ...]
    percent: bool


def numbers(text: str) -> Iterator[Number]:
    """Yield the numbers of a text; what has several dots, such as a version, is none."""
    # Thousands are joined before NFKC, which makes plain spaces of all.
    text = normalize("NFKC", SPACES.sub("", text))
    text = text.replace("\u066b", ".").replace("\u066c", ",")  # Arabic signs
    for match in WRITTEN.finditer(text):
        sign = -1.0 if match["sign"] in ("-", "\u2212") else 1.0
        if readings := tuple(sign * value for value in _readings(match["digits"])):
            yield Number(readings, bool(match["percent"]))


def bare(text: str) -> bool:
    """Return whether the text is one number and nothing else, but for a percent sign."""
    match = WRITTEN.fullmatch(normalize("NFKC", SPACES.sub("", text)).strip())
    return bool(match and _readings(match["digits"]))


def within(number: Number, right: Number, tolerance: float) -> bool:
    """Return whether any reading of `number` is within `tolerance`, relative to the likeliest
    reading of `right`. 50 % is 50 or 0.5, unless the other is in percent too."""
    said, wanted = number.readings, right.readings[:1]
    if number.percent and not right.percent:
        said = (*said, *(value / 100 for value in said))
    if right.percent and not number.percent:
        wanted = (*wanted, *(value / 100 for value in wanted))
    allowed = max(tolerance, CLOSE)
    return any(
        math.isfinite(value) and abs(value - target) <= allowed * abs(target)
        for value in said
        for target in wanted
    )


def _readings(digits: str) -> tuple[float, ...]:
    """Return the values that `digits` may mean, the likeliest first."""
    mantissa, _, exponent = digits.lower().partition("e")
    power = f"e{exponent}" if exponent else ""
    mantissa = re.sub("['\u2019_]", "", mantissa)
    dots, commas = mantissa.count("."), mantissa.count(",")
    if dots and commas:
        # The last sign is the decimal one, the other one groups thousands.
        decimal = max(".,", key=mantissa.rfind)
        grouping = "," if decimal == "." else "."
        whole, _, fraction = mantissa.rpartition(decimal)
        if decimal in whole or grouping in fraction or not _groups(whole, grouping):
            return ()
        return (float(f"{whole.replace(grouping, '')}.{fraction}{power}"),)
    if not (dots or commas):
        return (float(mantissa + power),)
    sign = "." if dots else ","
    grouped = _groups(mantissa, sign)
    if dots + commas > 1:
        return (float(mantissa.replace(sign, "") + power),) if grouped else ()
    decimal_value = float(mantissa.replace(",", ".") + power)
    if not grouped or mantissa.startswith("0"):
        return (decimal_value,)
    whole_value = float(mantissa.replace(sign, "") + power)
    # A comma before three digits rather groups, a dot rather not.
    return (whole_value, decimal_value) if commas else (decimal_value, whole_value)


def _groups(digits: str, sign: str) -> bool:
    """Return whether `sign` stands between groups of three digits."""
    first, *others = digits.split(sign)
    return 1 <= len(first) <= 3 and all(len(group) == 3 for group in others)
