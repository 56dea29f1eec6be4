"""Asks in another language.

What it does: sends a stored translation of the request. Safety training is mostly English, so refusals may not carry over.
Use it when:  the model knows the language at least a little; in one it does not know, answers are noise rather than danger.
Defaults:     French, of which translations of the shipped goals and twins come along. The paper's strongest languages have few
              resources (Zulu, Scots Gaelic, Hmong); give such translations in a file of your own.
Limits:       a prompt without a stored translation is not sent and not scored. The answer is left in its language: the judge must read it.
Source:       Yong, Menghini and Bach 2023, arXiv:2310.02446.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, final

from fiducial.attack.base import TemplateAttack, asking
from fiducial.core.errors import DataError
from fiducial.core.records import Conversation, Prompt
from fiducial.data.load import SHIPPED
from fiducial.data.rows import read_rows


@final
@dataclass(frozen=True, slots=True)
class Translation(TemplateAttack):
    """The request in another language."""

    family: ClassVar[str] = "translation"
    tags: ClassVar[tuple[str, ...]] = ("owasp:llm01", "mitre:AML.T0054")

    language: str = "fr"
    """Language of the translation, as in the file's rows."""
    translations: str = ""
    """JSON Lines file with rows {"text", "language", "translation"}; empty = the shipped one."""

    def rewrite(self, prompt: Prompt, rng: random.Random) -> Conversation | None:
        """The translation as the last user turn; None without one."""
        path = Path(self.translations) if self.translations else SHIPPED / "translations.jsonl"
        changed = path.stat().st_mtime_ns if path.exists() else 0  # a missing file is reported by the reader
        found = _table(path, changed).get((self.language, prompt.text.strip()))
        return asking(prompt, found) if found else None

    def reason(self, prompt: Prompt) -> str:
        """No translation was stored."""
        return f"no translation of this prompt into '{self.language}' is stored"


@cache
def _table(path: Path, _changed: int) -> dict[tuple[str, str], str]:
    """(language, text) -> translation, of every row in the file."""
    table = {}
    for where, row in read_rows(path):
        values = [row.get(key) for key in ("language", "text", "translation")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise DataError(f"{where}: a row needs text, language and translation", hint='write {"text": "...", "language": "fr", "translation": "..."}')
        language, text, translation = (str(value).strip() for value in values)
        table[language, text] = translation
    return table
