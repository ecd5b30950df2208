"""Finds what looks like a password or a key in a text that somebody is about to train on."""

import math
import re
from collections import Counter

# Every pattern begins where no word goes on, and none is open at both ends: linear in the text.
PATTERNS = {
    "a private key": r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY",
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22})",
    "a GitLab token": r"\bglpat-[\w-]{20}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10}|\bhooks\.slack\.com/services/T\w{6}",
    "a Google API key": r"\bAIza[\w-]{35}",
    "a Stripe key": r"\b[rs]k_live_\w{16}",
    "an API key": r"\bsk-[\w-]{20}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30}",
    "a JSON web token": r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8}",
    "a password in an address": r"\b[a-z]{2,10}://[^\s:/@]{1,64}:[^\s:/@]{6,64}@",
}
ANY = re.compile("|".join(f"({pattern})" for pattern in PATTERNS.values()))
ASSIGNED = re.compile(
    r"(?:password|passwd|passphrase|pwd|secret|token|api[ _-]?key)"
    r"[\"']?\s{0,3}(?:[:=]|is\b)\s{0,3}[\"']?([^\s\"',;<>{}()\[\]]{8,128})",
    re.IGNORECASE,
)
LEAST_ENTROPY = 2.5  # bits per character; "password123" has 3.3, "required" 2.5


def looks_like(text: str) -> str:
    """Return what kind of secret seems to be in `text`, for people; empty if none does."""
    if match := ANY.search(text):
        return list(PATTERNS)[(match.lastindex or 1) - 1]
    if any(_is_random(match[1]) for match in ASSIGNED.finditer(text)):
        return "a password"
    return ""


def _is_random(word: str) -> bool:
    """Tell a made-up word from one of a language: it has digits and letters, and many of them."""
    if not any(map(str.isdigit, word)) or not any(map(str.isalpha, word)):
        return False
    shares = [count / len(word) for count in Counter(word).values()]
    return -sum(share * math.log2(share) for share in shares) > LEAST_ENTROPY
