"""A row of numbers as one line of bars."""

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return at most `width` bars from the lowest to the highest value; each stands for the mean of
    as many values. Values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    edges = [len(finite) * index // count for index in range(count + 1)] if count else []
    means = [sum(finite[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    top = len(BARS) - 1
    return "".join(BARS[round((mean - low) / ((high - low) or 1) * top)] for mean in means)
