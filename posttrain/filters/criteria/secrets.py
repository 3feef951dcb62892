"""Keys and tokens, by the formats that their issuers document. Placeholders, which repeat signs or say so, pass."""

from __future__ import annotations

import re

__all__ = ["has_secret"]

# A string that occurs in every secret of the kind -> regular expression of its format.
FORMATS = {
    "AKIA": r"\bAKIA[0-9A-Z]{16}\b",
    "ASIA": r"\bASIA[0-9A-Z]{16}\b",
    "gh": r"\bgh[pousr]_[A-Za-z0-9]{36}\b",
    "github_pat_": r"\bgithub_pat_\w{82}\b",
    "glpat-": r"\bglpat-[\w-]{20}\b",
    "hf_": r"\bhf_[A-Za-z]{34}\b",
    "sk-": r"\bsk-(?:proj-|ant-[a-z]+\d+-|or-v1-)?[\w-]{32,}",
    "xox": r"\bxox[baprs]-\d{6,}-[\w-]{16,}",
    "AIza": r"\bAIza[\w-]{35}\b",
    "_live_": r"\b[sr]k_live_[A-Za-z0-9]{24,}\b",
    "SG.": r"\bSG\.[\w-]{22}\.[\w-]{43}\b",
    "npm_": r"\bnpm_[A-Za-z0-9]{36}\b",
    "pypi-": r"\bpypi-AgE[\w-]{50,}",
    "eyJ": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "PRIVATE KEY-----": r"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{64,}",
}
SECRETS = [(mark, re.compile(pattern)) for mark, pattern in FORMATS.items()]
PLACEHOLDER = re.compile(r"example|sample|dummy|placeholder|your|xxxx|1234567890|abcdefgh", re.IGNORECASE)
SHORTEST = 20  # characters without a space; every format has a longer run
FEWEST_SIGNS = 10  # different characters


def has_secret(text: str) -> bool:
    """Whether a text contains a key, a token or a private key."""
    if max(map(len, text.split()), default=0) < SHORTEST:
        return False
    return any(mark in text and any(map(_is_secret, pattern.finditer(text))) for mark, pattern in SECRETS)


def _is_secret(found: re.Match[str]) -> bool:
    text = found.group()
    random = any(sign.isdigit() for sign in text) or (text != text.lower() and text != text.upper())
    return random and len(set(text)) >= FEWEST_SIGNS and not PLACEHOLDER.search(text)
