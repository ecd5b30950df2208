"""Normal forms whose time does not grow with the square of what is sent."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.questions.normalising import normalised
from services.retrieval.normalising import normalise
from services.runtime.unicode import MOST_MARKS, normalize

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
MARKS = "\u0316\u0301" * 100_000  # out of order, which takes a normal form 100,000² steps
HALFWIDTH = ("\u0316" * 25 + "\uff9e") * 8000  # a letter that becomes a mark


@pytest.mark.parametrize("form", FORMS)
@given(text=st.text(max_size=MOST_MARKS))
def test_a_text_with_few_marks_has_the_form_that_unicode_says(form, text):
    assert normalize(form, text) == unicodedata.normalize(form, text)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("marks", [MARKS, HALFWIDTH], ids=["marks", "halfwidth"])
def test_a_character_keeps_its_first_marks(form, marks):
    text = normalize(form, f"a{marks}b{marks}c")
    assert len(text) < 2 * (MOST_MARKS + 1) + 3
    assert text[-1] == "c"


def test_what_is_sent_to_be_compared_or_kept_goes_this_way():
    assert len(normalised(f"a{MARKS}")) <= MOST_MARKS + 1
    assert len(normalise(f"a{MARKS}")) <= MOST_MARKS + 1
