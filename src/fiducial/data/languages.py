"""Languages: which one a text is in, and which of some to use."""

from __future__ import annotations

from collections.abc import Iterable

LANGUAGES = {"english": "en", "chinese": "zh", "zh-cn": "zh", "中文": "zh"}
"""Codes of languages that data files name otherwise, in small letters."""


def nearest(languages: Iterable[str], language: str) -> str:
    """Of some languages the one to use for `language`: itself, else the one that it is a kind of, English, the first.

    >>> nearest(["fr", "zh", "en"], "zh-TW"), nearest(["fr", "en"], "de"), nearest(["fr", "zh"], "en")
    ('zh', 'en', 'fr')
    """
    given = {name.lower(): name for name in languages}
    wanted = language.lower().replace("_", "-")
    return next((given[kind] for kind in (wanted, wanted.partition("-")[0], "en") if kind in given), next(iter(given.values())))


def language_of(text: str) -> str:
    """`zh` when at least a fifth of the letters are Chinese characters, else `en`. Only for rows that do not say."""
    letters = [c for c in text if c.isalpha()]
    chinese = sum("一" <= c <= "鿿" for c in letters)
    return "zh" if letters and chinese >= len(letters) / 5 else "en"


def tongue(language: str) -> str:
    """`zh` for any kind of Chinese, else `en`: the languages in which the shipped texts are written."""
    return "zh" if language.startswith("zh") else "en"
