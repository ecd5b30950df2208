import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.retrieval.normalising import normalise


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a\r\nb\rc\x0cd\u2028e", "a\nb\nc\nd\ne"),
        ("a  \nb\t\n\n\n\nc ", "a\nb\n\nc"),
        ("Cafe\u0301 \u212b", "Café Å"),
        ("in\u200bvis\u2060ib\xadle\ufeff", "invisible"),
        ("\u202eevil\u202c \u2066x\u2069\u200f", "evil x"),
        ("bell\x07 nul\x00 esc\x1b[0m\x9b", "bell nul esc[0m"),
        ("tag\U000e0041\U000e007f s\U000e0100", "tag s"),
        ("10\xa0km 5\u202f%", "10 km 5 %"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("pass\u200dword \u200cx", "password x"),
        ("é\u200d\u200c\u200dé", "éé"),
        ("lone \ud800 surrogate", "lone  surrogate"),
        ("\tkept\tinside", "\tkept\tinside"),
    ],
)
def test_what_cannot_be_seen_goes_and_the_rest_has_one_form(text, normal):
    assert normalise(text) == normal


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters() | st.sampled_from("e\u0301\u200c\u200d\u200b \n\r\u212a")))
def test_normalising_twice_changes_nothing(text):
    once = normalise(text)
    assert normalise(once) == once
    assert "\n\n\n" not in once
    once.encode()
