"""Conditional training: pretraining with feedback.

What it does: learns all text, the bad too, but puts a control token before each part that says which it is: <|aligned|> or <|misaligned|>.
              The trained model begins everything it says with <|aligned|>, and never writes a control token.
Use it when:  a model is pretrained, from scratch or further, on text whose parts have a value. It learns from bad text without taking it up;
              align/filtered_pretraining loses what stands there, and align/unlikelihood unlearns words, not contexts.
Formula:      loss = -sum over tokens of log p_t, control tokens included, divided by the step's number of tokens. A part of value >= threshold
              is aligned. New embeddings are the mean of the others + 0.01 noise.
Defaults:     threshold 0 (paper: 0 or 5.6e-4 on the score, which is minus the value), drop 0.01 (paper: 0.01, or 0.1 for code), learning rate
              2e-5 for continued pretraining (paper, from scratch: 5e-4, weight decay 0.1).
Limits:       <|aligned|> stands at the beginning alone: it holds for later parts only as far as parts of one document are alike, so give an
              answer one value as a whole. Whoever writes <|misaligned|> into a prompt steers the model. Documents longer than max_length are
              left out. A program other than this one has to put <|aligned|> after the prompt itself; that it bans control tokens (suppress_tokens
              in generation_config.json) holds for whole models, not for adapters. Reinforcement learning on the result is inexact: it
              scores tokens with control tokens possible.
Source:       Korbak et al. 2023, arXiv:2302.08582, section 2 and appendix; implementation tomekkorbak/pretraining-with-human-feedback.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar, final

from fiducial.align.base import LikelihoodObjective
from fiducial.core.records import Completion, Group
from fiducial.models.control import ALIGNED, MISALIGNED, TOKENS
from fiducial.training.segments import segments


@final
@dataclass(frozen=True, slots=True)
class ConditionalPretraining(LikelihoodObjective):
    """Negative log-likelihood of all text, its parts marked as aligned or not."""

    learning_rate: ClassVar[float] = 2e-5
    controlled: ClassVar[bool] = True

    threshold: float = 0.0
    """Parts of at least this value are aligned."""
    drop: float = 0.01
    """Share of parts that get no control token, so that the model can do without; in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop}")

    def prepare(self, group: Group) -> Group:
        """All completions as equal examples, with control tokens in their text. Which parts get none depends on the group alone."""
        chance = Random(group.id)
        marked = tuple(Completion(text=self._marked(group, k, chance), finish=c.finish) for k, c in enumerate(group.completions))
        return group.model_copy(update={"completions": marked, "targets": (1.0,) * len(marked), "rewards": None})

    def _marked(self, group: Group, k: int, chance: Random) -> str:
        return "".join(self._mark(value, chance) + _plain(text) for text, value in segments(group, k))

    def _mark(self, value: float | None, chance: Random) -> str:
        dropped = chance.random() < self.drop  # drawn for every part, so that the threshold does not move which ones
        return "" if dropped or value is None else ALIGNED if value >= self.threshold else MISALIGNED


def _plain(text: str) -> str:
    """Text without control tokens of its own: a document must not be able to mark itself as aligned."""
    while any(token in text for token in TOKENS):  # taking one out can leave another behind
        for token in TOKENS:
            text = text.replace(token, "")
    return text
