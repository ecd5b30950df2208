"""How well a search found the relevant documents, by question."""

from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np
from ir_measures import R, nDCG

from services.evaluation.comparison import Question
from services.evaluation.measures import NAN, Floats

DEPTHS = (1, 3, 5, 10)
MEASURES = (nDCG @ 10, *(R @ depth for depth in DEPTHS))


def search_quality(
    questions: Sequence[Question], found: Mapping[int, Sequence[str]]
) -> Floats | None:
    """Return nDCG@10 and recall of the first 1, 3, 5 and 10 documents as an array of shape
    (questions, 5): NaN for a question without relevant documents or that was not searched. None if
    that is so of all. `found` has the documents by line, the best first."""
    rows = {
        str(row): row
        for row, question in enumerate(questions)
        if question.relevant and question.line in found
    }
    if not rows:
        return None
    relevant = {id: dict.fromkeys(questions[row].relevant, 1) for id, row in rows.items()}
    run = {
        id: {
            document: -float(rank)
            for rank, document in enumerate(dict.fromkeys(found[questions[row].line]))
        }
        for id, row in rows.items()
    }
    values = np.full((len(questions), len(MEASURES)), NAN)
    values[list(rows.values())] = 0.0  # a search that finds nothing has no entry below
    column = {measure: index for index, measure in enumerate(MEASURES)}
    for metric in ir_measures.iter_calc(MEASURES, relevant, run):
        values[rows[metric.query_id], column[metric.measure]] = metric.value
    return values
