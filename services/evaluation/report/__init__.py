"""The report of a comparison: one HTML file without any reference outside, Markdown and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from services.evaluation.comparison import REPORT, Answer, Comparison, Question
from services.evaluation.outcome import Outcome, Verdict
from services.evaluation.report import pictures
from services.evaluation.report.examples import telling
from services.evaluation.report.tables import tables
from services.evaluation.report.text import clean, markdown, number
from services.prompts.options import unusual
from services.runtime import disk


def write(
    folder: Path,
    comparison: Comparison,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    outcome: Outcome,
) -> None:
    """Write report.html, .md and .json, each whole or not at all. Raises OSError."""
    view = _view(comparison, questions, answers, outcome)
    everything = {"comparison": asdict(comparison), "outcome": asdict(outcome)}
    texts = {
        "html": _environment(html=True).get_template("page.html.j2").render(view),
        "md": _environment(html=False).get_template("page.md.j2").render(view),
        "json": json.dumps(everything, indent=1) + "\n",
    }
    for ending, text in texts.items():
        disk.put(folder / f"{REPORT}.{ending}", text.encode(errors="replace"))


def _view(
    comparison: Comparison,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    outcome: Outcome,
) -> dict[str, Any]:
    verdict = outcome.verdict
    style = Path(__file__).with_name("style.css").read_text("utf-8")
    lists = [
        {"title": "What would change it", "items": verdict.would_change},
        {"title": "What it does not know", "items": verdict.unknown},
        {"title": "Method and limits", "items": _method(comparison)},
    ]
    return {
        "c": comparison,
        "v": verdict,
        "style": Markup(style),
        "quality": pictures.quality(comparison, outcome),
        "latency": pictures.latency(outcome),
        "failures": pictures.failures(outcome),
        "auto": _auto(comparison, verdict),
        "tables": tables(comparison, outcome, answers),
        "examples": telling(comparison.plan, questions, answers, verdict.candidate),
        "lists": [one for one in lists if one["items"]],
    }


def _auto(comparison: Comparison, verdict: Verdict) -> bool:
    """Say whether a policy can name what the verdict does."""
    plan = comparison.plan
    types = verdict.types if verdict.router else ()
    wanted = {verdict.candidate, *(one.candidate for one in types)}
    return bool(plan.corpus and verdict.candidate) and not any(
        one.corpus not in ("", plan.corpus) or unusual(json.loads(one.options))
        for one in plan.candidates
        if one.id in wanted
    )


def _method(comparison: Comparison) -> list[str]:
    plan, prices, scoring = comparison.plan, comparison.prices, comparison.plan.scoring
    decides = scoring.strict if scoring.strict_decides else scoring.format_blind
    lines = [
        f"{comparison.questions:,} questions in {comparison.clusters:,} clusters that share no"
        f" document. Model: {comparison.model or 'unknown'}.",
        f"Strict score: {scoring.strict}. Format-blind score: {scoring.format_blind}. {decides}"
        " decides; 0.5 and more is right.",
        "Intervals of 95 % by a paired bootstrap over clusters; exact McNemar tests of right and"
        f" wrong, corrected by Holm over all pairs; margin {plan.margin:.2f}; seed {plan.seed}.",
        f"Latency at {plan.concurrency} questions at a time, one candidate after the other.",
        f"Prices: {prices.answering_second:g} {prices.currency} a second of answering,"
        f" {prices.training_second:g} {prices.currency} a second of training, spread over"
        f" {prices.answers_per_training:,} answers.",
    ]
    if comparison.judge:
        lines.append(f"Judge: the language model {comparison.judge}. It decides nothing.")
    if comparison.clusters < 40:
        lines.append("With fewer than 40 clusters the intervals are unreliable: too narrow.")
    return lines


def _environment(html: bool) -> Environment:
    safe = clean if html else markdown

    def finalize(value: Any) -> Any:
        return safe(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("services.evaluation.report", "."),
        autoescape=html,
        finalize=finalize,
    )
    environment.filters["number"] = number
    environment.filters["rights"] = lambda question: " / ".join(question.answers)
    return environment
