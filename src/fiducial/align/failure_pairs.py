"""Preference pairs from judged attempts, with contrast.

What it does: turns judged attempts into groups. Harmful goal: a brief refusal is preferred to the compliant answer. Benign prompt
              (twin or ordinary): the model's own helpful answer is preferred to a refusal. Attempts that already went well are
              kept too, so that what is right stays right.
Use it when:  a model's failures have been found and are to be repaired with align/dpo or, using the preferred side alone, align/sft.
Defaults:     refusals are drawn from a shipped list by language, the same for the same goal and seed; benign prompts that were refused get
              no pair, since no good answer to them is known.
Limits:       off-policy refusals of few wordings: the model learns their style too. Contrast decides how blunt the learnt rule is; give
              as many benign twins as goals.
Source:       contrast by benign counterparts: Röttger et al. 2023, arXiv:2308.01263 (XSTest); pairs of revision and first answer as in
              the alignment handbook's variant of constitutional AI, arXiv:2212.08073.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, final

from fiducial.core.records import Attempt, Completion, Group, Prompt, digest
from fiducial.core.roles import Maker, Sink, ignore

if TYPE_CHECKING:
    from fiducial.models.base import Model


@final
@dataclass(frozen=True, slots=True)
class FailurePairs(Maker):
    """Refusal over compliance on harmful goals, own answer over refusal on benign prompts."""

    failure_weight: float = 1.0
    """Weight of attempts that went wrong, against 1 for those that went well."""
    other_languages: float = 1.0
    """Factor on that weight for prompts that are not English. Where a model reads badly it learns to refuse by the form of a request."""
    keep: int = 20
    """Bytes (UTF-8) of the model's own answer that are kept, up to a word's end; 0 keeps all. Whether it refuses is decided in its first words.
    In bytes, since a Chinese character says as much as several letters and costs as many tokens."""

    def __post_init__(self) -> None:
        if min(self.failure_weight, self.other_languages) <= 0 or self.keep < 0:
            given = f"{self.failure_weight}, {self.other_languages} and {self.keep}"
            raise ValueError(f"failure_weight and other_languages must be > 0 and keep >= 0, got {given}")

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """At most one group of two completions per attempt; the preferred one first. Not-scored attempts give none."""
        groups = []
        for attempt in attempts:
            group = self._pair(attempt, seed)
            if group is not None:
                groups.append(group)
                sink(group)
        return groups

    def _pair(self, attempt: Attempt, seed: int) -> Group | None:
        if not attempt.scored:
            return None
        asked = attempt.prompt.model_copy(update={"messages": attempt.sent})
        no = Completion(text=refusal(attempt.prompt, seed))
        own = _beginning(attempt, self.keep)
        if attempt.prompt.expected == "refuse":
            # what was refused already is paired with nothing worse at hand; its refusal is still taught, alone
            completions, failed = ((no, own), True) if attempt.failed else ((no,), False)
        elif attempt.refused:
            return None
        else:
            completions, failed = (own, no), False
        return Group(
            prompt=asked,
            completions=completions,
            targets=(1.0,) + (0.0,) * (len(completions) - 1),
            weight=self.failure_weight * (1.0 if asked.language == "en" else self.other_languages) if failed else 1.0,
            annotator=f"{self.name} on {attempt.verdict.judge if attempt.verdict else 'no judge'}",
        )


def _beginning(attempt: Attempt, keep: int) -> Completion:
    """The answer's first `keep` bytes, as one that was cut off and therefore teaches no end."""
    text = attempt.response
    cut = text.encode()[:keep].decode(errors="ignore")
    if not keep or cut == text:
        return Completion(text=text, finish=attempt.finish)
    head, space, _ = cut.rpartition(" ")
    return Completion(text=head if space else cut, finish="length")


def refusal(prompt: Prompt, seed: int = 0) -> str:
    """A refusal in the prompt's language; which one depends on seed and prompt alone."""
    texts = _refusals()["zh" if prompt.language.startswith("zh") else "en"]
    return texts[int(digest([seed, prompt.text]), 16) % len(texts)]


@cache
def _refusals() -> dict[str, list[str]]:
    path = Path(__file__).with_name("refusals.json")
    found: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))["refusals"]
    return found
