"""The tables of a report; one without rows is left out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.evaluation.comparison import Answer, Comparison
from services.evaluation.outcome import CandidateResult, Outcome
from services.evaluation.report.text import estimate, number, small


@dataclass(frozen=True)
class Table:
    """A table with its first column naming a candidate, or a pair or type."""

    title: str
    words: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(comparison: Comparison, outcome: Outcome, answers: Sequence[Answer]) -> list[Table]:
    """Return what was measured, table by table."""
    currency, margin = comparison.prices.currency, comparison.plan.margin
    texts = {answer.sequence: answer.text for answer in answers}
    results = outcome.results
    found = [
        Table(
            "Candidates",
            "Scores from 0 to 1 with 95 % intervals. The ceiling is with the relevant documents"
            " given.",
            ("Candidate", "Strict", "Format-blind", "Judge", "Ceiling", "Supported", "Failed",
             "Degraded", "No evidence"),
            tuple(_scores(comparison, one) for one in results),
        ),
        Table(
            "Time and cost",
            f"Costs are in {currency}, training included. Latency is p50 / p95 to the end.",
            ("Candidate", "Latency", "Latency, cold", "Tokens in / out", "Per 1,000",
             "Per correct", "Training s", "Indexing s"),
            tuple(_costs(one) for one in results),
        ),
        Table(
            "Differences",
            f"The first less the second, by the paired tests. The margin is {margin:.2f}.",
            ("Pair", "Strict", "Format-blind", "Only one right", "p", "Holm p", "In words",
             "Detectable", "Questions"),
            tuple(
                (f"{d.first} − {d.second}", estimate(d.strict),
                 estimate(d.format_blind), f"{d.only_first} / {d.only_second}",
                 small(d.p_value), small(d.adjusted_p_value),
                 _words(d.adjusted_p_value, d.only_first - d.only_second, d.first, d.second,
                        d.first_not_inferior, d.second_not_inferior), f"{d.detectable:.2f}",
                 number(d.questions))
                for d in outcome.differences
            ),
        ),
        Table(
            "Why wrong answers are wrong",
            "Knowledge gap: right once the document is given. Retrieval miss: the search did not"
            " find it. Reading failure: it was shown. Behaviour gap: wrong in form.",
            ("Candidate", "Kind", "Answers", "For example"),
            tuple(
                (one.candidate, share.kind.replace("unspecified", "cannot be told")
                 .replace("_", " "), number(share.answers),
                 " · ".join(texts.get(example, "")[:60] for example in share.examples[:2]))
                for one in results for share in one.failures
            ),
        ),
        Table(
            "Retrieval",
            "",
            ("Candidate", "Questions", "nDCG@10", "Recall"),
            tuple(
                (one.candidate, number(one.retrieval.questions), estimate(one.retrieval.ndcg_10),
                 "; ".join(f"@{at.k} {estimate(at.recall)}" for at in one.retrieval.recall))
                for one in results if one.retrieval
            ),
        ),
        Table(
            "After the documents changed",
            "",
            ("Candidate", "Questions", "New", "Old", "Neither", "Follows after s",
             "Retraining s", f"Retraining {currency}"),
            tuple(
                (one.candidate, number(s.questions), estimate(s.new_share), estimate(s.old_share),
                 estimate(s.neither_share), number(s.seconds_to_follow),
                 number(s.retraining_seconds), number(s.retraining_cost))
                for one in results if (s := one.staleness)
            ),
        ),
        Table(
            "By type of question",
            "",
            ("Type", "Candidate", "Answers", "Strict", "Format-blind"),
            tuple(
                (t.type, one.candidate, number(t.scores.answers), estimate(t.scores.strict),
                 estimate(t.scores.format_blind))
                for one in results for t in one.types
            ),
        ),
        Table(
            "The verdict by type",
            "",
            ("Type", "Candidate", "Why"),
            tuple(
                (t.type, t.candidate, " ".join(r.message for r in t.reasons))
                for t in outcome.verdict.types
            ),
        ),
        Table(
            "Overlap with training examples",
            "Scores with and without the questions that the adapter saw in training.",
            ("Candidate", "Exact", "Near", "Format-blind, all", "without them", "Strict, all",
             "without them"),
            tuple(
                (one.candidate, number(one.overlap.exact), number(one.overlap.near),
                 estimate(one.scores.format_blind), estimate(rest.format_blind if rest else None),
                 estimate(one.scores.strict), estimate(rest.strict if rest else None))
                for one in results if one.overlap for rest in (one.without_overlap,)
            ),
        ),
    ]  # fmt: skip
    return [_filled(table) for table in found if table.rows]


def _filled(table: Table) -> Table:
    """Leave out the columns in which nothing is known."""
    kept = [
        at for at in range(len(table.header)) if any(row[at] not in ("–", "") for row in table.rows)
    ]
    header = tuple(table.header[at] for at in kept)
    return replace(
        table, header=header, rows=tuple(tuple(r[at] for at in kept) for r in table.rows)
    )


def _scores(comparison: Comparison, one: CandidateResult) -> tuple[str, ...]:
    failed = ", ".join(f"{count} {why}" for why, count in one.errors.items()) or "0"
    decides = comparison.plan.scoring.strict_decides
    ceiling = None
    if one.oracle:
        ceiling = one.oracle.strict if decides else one.oracle.format_blind
    return (
        one.candidate, estimate(one.scores.strict), estimate(one.scores.format_blind),
        estimate(one.scores.judge), estimate(ceiling), estimate(one.supported),
        f"not compared: {failed}" if one.failed else failed,
        number(one.degraded), number(one.no_evidence),
    )  # fmt: skip


def _costs(one: CandidateResult) -> tuple[str, ...]:
    warm, cold = (
        f"{at.total_p50_ms:,.0f} / {at.total_p95_ms:,.0f} ms" if at else "–"
        for at in (one.warm, one.cold)
    )
    return (
        one.candidate, warm, cold, f"{one.input_tokens:,.0f} / {one.output_tokens:,.0f}",
        number(one.cost_per_thousand), number(one.cost_per_correct),
        number(one.training_seconds), number(one.indexing_seconds),
    )  # fmt: skip


def _words(p: float, wins: int, first: str, second: str, first_ok: bool, second_ok: bool) -> str:
    if p < 0.05:
        return f"{first if wins > 0 else second} is right more often"
    if first_ok and second_ok:
        return "no difference beyond the margin"
    if first_ok or second_ok:
        return f"{first if first_ok else second} is not worse"
    return "undecided"
