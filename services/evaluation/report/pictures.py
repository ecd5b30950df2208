"""Pictures as inline SVG; colours come from the style sheet, shapes tell things apart too."""

from math import log10

from markupsafe import Markup

from services.evaluation.comparison import Comparison
from services.evaluation.outcome import Estimate, FailureKind, Outcome

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 50, 620, 20, 290
BARS = 150  # where bars begin, right of the names
MOST_LABEL = 21  # characters
LETTER, LINE = 7, 14  # size of a character, about
KINDS: dict[FailureKind, str] = {
    "knowledge_gap": "knowledge gap",
    "retrieval_miss": "retrieval miss",
    "reading_failure": "reading failure",
    "behaviour_gap": "behaviour gap",
    "unspecified": "cannot be told",
}


def quality(comparison: Comparison, outcome: Outcome) -> Markup:
    """Return both scores over the cost of 1,000 answers; empty without scores."""
    results = [one for one in outcome.results if not one.failed and one.scores.answers]
    if not results:
        return Markup()
    costs = [max(one.cost_per_thousand, 1e-9) for one in results]
    wide = max(costs) / min(costs) > 10
    places = [log10(cost) if wide else cost for cost in costs]
    low, high = (min(places), max(places)) if wide else (0.0, max(places))
    span = (high - low) or 1.0
    parts = [
        Markup('<line class="grid" x1="50" x2="620" y1="{y}" y2="{y}"/>'
               '<text x="42" y="{t}" text-anchor="end">{s}</text>').format(
            y=_y(s), t=_y(s) + 4, s=s)
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]  # fmt: skip
    strict_decides = comparison.plan.scoring.strict_decides
    last = -100.0
    labels: list[tuple[float, float, float]] = []
    for result, place in sorted(zip(results, places, strict=True), key=lambda pair: pair[1]):
        x = max(LEFT + 40 + (place - low) / span * (RIGHT - LEFT - 110), last + 26)
        last = x
        pair = (result.scores.strict, result.scores.format_blind)
        main, other = pair if strict_decides else pair[::-1]
        chosen = result.candidate == outcome.verdict.candidate
        parts.append(_interval(x, main, "main"))
        parts.append(_interval(x + 10, other, "other"))
        if main:
            ring = '<circle class="ring" cx="{x}" cy="{y}" r="11"/>' if chosen else ""
            shape = ring + '<circle class="main" cx="{x}" cy="{y}" r="6"/>'
            label = '<text class="label" x="{x}" y="{t}" text-anchor="middle">{name}</text>'
            name = result.candidate + (" ★" if chosen else "")
            labels.append(_free(labels, x, LETTER * len(name), _y(main.high), _y(main.low)))
            parts.append(
                Markup(shape + label).format(
                    x=f"{x:.1f}", y=_y(main.value), t=labels[-1][1], name=name
                )
            )
        if other:
            parts.append(
                Markup('<rect class="other" x="{}" y="{}" width="8" height="8"/>').format(
                    f"{x + 6:.1f}", _y(other.value) - 4
                )
            )
    axis = f"cost of 1,000 answers in {comparison.prices.currency}, " + (
        f"{min(costs):.3g} to {max(costs):.3g}, logarithmic" if wide else f"0 to {max(costs):.3g}"
    )
    parts.append(Markup('<text x="335" y="315" text-anchor="middle">{}</text>').format(axis))
    words = ("strict", "format-blind") if strict_decides else ("format-blind", "strict")
    parts.append(
        Markup('<text x="335" y="333" text-anchor="middle">● {} (decides)   ■ {}</text>').format(
            *words
        )
    )
    return _svg("Quality and cost", "Each candidate's scores with 95 % intervals.", parts, HEIGHT)


def latency(outcome: Outcome) -> Markup:
    """Return bars from p50 to p95 of the first text and of the whole answer; empty if unknown."""
    rows = [(one.candidate, one.warm) for one in outcome.results if one.warm]
    if not rows:
        return Markup()
    longest = max(warm.total_p95_ms for _, warm in rows) or 1.0
    parts: list[Markup] = []
    for number, (name, warm) in enumerate(rows):
        y = 20 + 46 * number
        parts.append(_label(y + 18, name))
        for shift, kind, p50, p95 in (
            (0, "other", warm.first_text_p50_ms, warm.first_text_p95_ms),
            (16, "main", warm.total_p50_ms, warm.total_p95_ms),
        ):
            x, end = (BARS + 350 * min(ms / longest, 1.0) for ms in (p50, p95))
            parts.append(
                Markup(
                    '<rect class="{}" x="{}" y="{}" width="{}" height="12"/>'
                    '<text x="{}" y="{}">{}–{} ms</text>'
                ).format(
                    kind,
                    f"{x:.1f}",
                    y + shift,
                    f"{max(end - x, 2):.1f}",
                    f"{end + 6:.1f}",
                    y + shift + 10,
                    f"{p50:,.0f}",
                    f"{p95:,.0f}",
                )  # fmt: skip
            )
    return _svg(
        "Latency",
        "From p50 to p95: upper bar the first text, lower bar the whole answer.",
        parts,
        30 + 46 * len(rows),
    )


def failures(outcome: Outcome) -> Markup:
    """Return a bar of each candidate's wrong answers, stacked by kind; empty without any."""
    rows = [(one.candidate, one.failures) for one in outcome.results if one.failures]
    if not rows:
        return Markup()
    most = max(sum(share.answers for share in shares) for _, shares in rows) or 1
    parts: list[Markup] = []
    for number, (name, shares) in enumerate(rows):
        y, x = 10 + 30 * number, float(BARS)
        parts.append(_label(y + 13, name))
        for kind in KINDS:
            count = sum(share.answers for share in shares if share.kind == kind)
            width = (RIGHT - BARS) * count / most
            parts.append(
                Markup('<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="18"/>').format(
                    kind, x, y, max(width - 1, 0)
                )
            )
            if width > 9 * len(f"{count:,}"):
                middle = f"{x + width / 2:.1f}"
                parts.append(
                    Markup('<text class="in" x="{}" y="{}" text-anchor="middle">{:,}</text>')
                    .format(middle, y + 13, count)
                )  # fmt: skip
            x += width
    y = 24 + 30 * len(rows)
    present = [kind for kind in KINDS if any(s.kind == kind for _, of in rows for s in of)]
    for number, kind in enumerate(present):
        parts.append(
            Markup(
                '<rect class="{}" x="{x}" y="{}" width="12" height="12"/>'
                '<text x="{t}" y="{}">{}</text>'
            ).format(kind, y, y + 10, KINDS[kind], x=8 + 126 * number, t=26 + 126 * number)
        )
    return _svg("Wrong answers", "How many answers are wrong, by kind.", parts, y + 22)


def _label(y: int, name: str) -> Markup:
    """Return a name left of the bars, cut where it is too long for its place."""
    short = name if len(name) <= MOST_LABEL else name[: MOST_LABEL - 1] + "…"
    return Markup('<text class="label" x="0" y="{}">{}<title>{}</title></text>').format(
        y, short, name
    )


def _y(score: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * min(max(score, 0.0), 1.0), 1)


def _free(
    taken: list[tuple[float, float, float]], x: float, width: float, top: float, bottom: float
) -> tuple[float, float, float]:
    """Return where a label has room above or below an interval, as (x, y of its base, width)."""
    lines = range((BOTTOM - TOP) // LINE)
    above = [max(12, top - 6 - LINE * line) for line in lines]
    below = [min(BOTTOM - 4, bottom + LINE + LINE * line) for line in lines]
    for y in (y for pair in zip(above, below, strict=True) for y in pair):
        if not any(
            abs(x - other) < (width + its_width) / 2 and abs(y - its_y) < LINE
            for other, its_y, its_width in taken
        ):
            return x, y, width
    return x, above[0], width


def _interval(x: float, number: Estimate | None, kind: str) -> Markup:
    if number is None:
        return Markup()
    return Markup('<line class="bar {}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(
        kind, _y(number.low), _y(number.high), x=f"{x:.1f}"
    )


def _svg(title: str, words: str, parts: list[Markup], height: int) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(WIDTH, height, title, words, Markup().join(parts))
