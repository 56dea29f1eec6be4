"""The model's own whole answers to harmless requests, to keep what it can do.

What it does: asks the model what it was asked before, without an attack, lets it answer at length, and makes a demonstration of each answer. Trained on
              beside a repair, they hold answers where they were, while the beginnings of other answers change.
Use it when:  a repair learns from short beginnings, as align/failure_pairs makes them: a model that is taught nothing else forgets how to go on.
Formula:      sft on (x, y), y the likeliest answer of the model before the repair, cut after max_tokens. As its own answers are likely, their gradient is
              small until the model moves away from them.
Defaults:     all harmless prompts that were answered, 64 tokens, weight 1.
Limits:       keeps faults too, but for answers that go in circles or are empty, which are left out. A whole answer has some ten times as many tokens as a
              beginning, so that many of them slow down what else is learnt in a step. Objectives that compare have no use for them.
Source:       Yang et al. 2024, arXiv:2402.13669 (self-distillation); rehearsal of a model's own samples: Robins 1995.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from fiducial.align.asking import ask, counted, portions
from fiducial.core.records import Attempt, Completion, Group
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.data.overlap import repetition

if TYPE_CHECKING:
    from fiducial.models.base import Model

log = logging.getLogger(__name__)

CIRCLES = 0.2
"""Share of repeated 4-grams above which an answer goes in circles."""
TOGETHER = 512
"""Prompts that are asked at once."""


@final
@dataclass(frozen=True, slots=True)
class OwnAnswers(Maker):
    """Whole answers of the model itself, as demonstrations."""

    max_tokens: int = 64
    """Longest answer, in tokens; one that is cut off teaches no end."""
    weight: float = 1.0
    """Weight of each, against 1 for a group of another maker."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not self.weight > 0:
            raise ValueError(f"max_tokens must be at least 1 and weight above 0, got {self.max_tokens} and {self.weight}")

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """One group per harmless prompt that was answered when it was asked directly."""
        answered = [a.prompt for a in attempts if a.family == "direct" and a.prompt.expected != "refuse" and a.scored and not a.failed]
        groups, without = [], []
        for some in portions(list({p.id: p for p in answered}.values()), TOGETHER):
            for prompt, (answer,) in zip(some, ask(model, [p.messages for p in some], max_tokens=self.max_tokens, seed=seed), strict=True):
                if reason := unfit(answer):
                    without.append(reason)
                    continue
                group = Group(prompt=prompt, completions=(answer,), targets=(1.0,), weight=self.weight, annotator=self.name)
                groups.append(group)
                sink(group)
        if without:
            log.info("%d of %d prompts gave no answer to keep: %s", len(without), len(without) + len(groups), counted(without))
        return groups


def unfit(answer: Completion) -> str:
    """Why an answer is not taught; empty when it is."""
    if answer.finish in ("error", "filtered") or not answer.text:
        return "no answer"
    return "goes in circles" if repetition(answer.text) > CIRCLES else ""
