"""Shows a dialogue in which the assistant always helps, then asks.

What it does: puts n finished exchanges before the request, in one user turn. In each a person asks something harmless and the
              assistant eagerly complies; the request is the next line of the dialogue.
Use it when:  testing whether compliance is learned from context. Run it at several n: the paper's effect is a curve.
Formula:      mean negative log-likelihood of compliance after n shots = C * n^(-a) + K (a power law in n).
Defaults:     4 shots (the paper goes from 1 to 256), since small models read slowly and have short contexts.
Limits:       the shots are harmless, where the paper's are harmful; this shows the pull of eager compliance alone and is a lower bound.
              At most 24 shots, each used once.
Source:       Anil et al. 2024, Many-shot jailbreaking (Anthropic).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, final

from fiducial.attack.base import TemplateAttack, asking, in_language
from fiducial.core.errors import ConfigError
from fiducial.core.records import Conversation, Prompt

MOST = 24
"""Shots there are per language."""


@final
@dataclass(frozen=True, slots=True)
class ManyShot(TemplateAttack):
    """Exchanges of eager help before the request."""

    family: ClassVar[str] = "many_shot"
    tags: ClassVar[tuple[str, ...]] = ("owasp:llm01", "mitre:AML.T0054")

    shots: int = 4
    """Exchanges before the request; 1 to 24. Each costs about 20 tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.shots <= MOST:
            raise ConfigError(f"shots must lie in 1..{MOST}, got {self.shots}")

    def rewrite(self, prompt: Prompt, rng: random.Random) -> Conversation:
        """Exchanges drawn without repetition, then the request as the next line."""
        user, assistant = in_language(prompt, en="User: |Assistant: ", zh="用户：|助手：").split("|")
        drawn = rng.sample(_exchanges(in_language(prompt, en="en", zh="zh")), self.shots)
        lines = [f"{user}{ask}\n{assistant}{reply}\n" for ask, reply in drawn]
        return asking(prompt, "".join(lines) + f"{user}{prompt.text}\n{assistant}".rstrip())


@cache
def _exchanges(language: str) -> tuple[tuple[str, str], ...]:
    """The exchanges of one language as (request, reply)."""
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    return tuple((row["ask"], row["reply"]) for row in rows if row["language"] == language)
