"""How much longer a model answers than another one.

What it does: asks both models the same ordinary requests, and compares the words of their answers prompt by prompt.
Use it when:  a training could reward length, as grades and preferences of judges do: after every round of iterated learning.
Formula:      growth = mean words / mean words of the base - 1, with the delta method's interval over prompts (a ratio of paired means);
              longer = share of prompts whose answer has more than 1 + `margin` times the base's words.
Defaults:     the embedded model as the base, a margin of 0.2, held-out shipped requests, 160 tokens per answer at temperature 0.
Limits:       answers that reach the limit of tokens are cut in both models, which hides growth: read `finished`, the share of answers that came
              to their end, beside it. A Chinese character counts as a word. Longer may be better; whether it is, is not said here.
Source:       Singhal et al. 2023, arXiv:2310.03716, for length as what is learnt; the figures are plain counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Any, final, get_args

from fiducial.core.errors import ConfigError, nearest
from fiducial.core.records import Attempt, Prompt, Score
from fiducial.core.roles import Sink, Suite, SuiteResult, ignore
from fiducial.data import load
from fiducial.data.overlap import words
from fiducial.data.split import Split, split
from fiducial.evaluate.base import ask, chunks, fingerprint, mean_score, rate_score
from fiducial.models.base import Model

SCORER = "words-1"


@final
@dataclass(frozen=True, slots=True)
class AnswerLength(Suite):
    """Words per answer against those of a base model."""

    base: str = "smollm2"
    """Model to compare with, by name."""
    margin: float = 0.2
    """By how much longer an answer must be to count in `longer`, as a share; >= 0."""
    data: str = ""
    """File of prompts; empty = the shipped ordinary requests."""
    split: str = "held-out"
    """Takes only prompts of this split: repair, validation or held-out; empty = all."""
    max_tokens: int = 160
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        if self.split and self.split not in get_args(Split):
            raise ConfigError(f"there is no split '{self.split}'", hint=nearest(self.split, get_args(Split)))
        if self.margin < 0:
            raise ConfigError(f"margin is {self.margin}", hint="a share of at least 0")

    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Scores growth (from two items on), longer, and finished."""
        prompts = load.prompts(self.data or "shipped", expected="answer")
        prompts = (split(prompts)[self.split] if self.split else prompts)[:limit]  # type: ignore[index]  # checked when made
        items: list[dict[str, Any]] = []
        with closing(model.beside(self.base)) as base:
            for chunk in chunks(prompts):
                mine, others = (ask(m, chunk, suite=self.name, max_tokens=self.max_tokens, seed=seed) for m in (model, base))
                for one, other in zip(mine, others, strict=True):
                    items.append(_item(one, other))
                    sink(items[-1])
            return SuiteResult(self._scores(model, base.fingerprint, prompts, items), items)

    def _scores(self, model: Model, base: str, prompts: Sequence[Prompt], items: Sequence[dict[str, Any]]) -> list[Score]:
        known = [i for i in items if i["words"] is not None and i["base_words"] is not None]
        mark = fingerprint(model, data=[p.id for p in prompts], form=["chat", self.max_tokens, base], scorer=SCORER, scored=[i["id"] for i in known])
        common: dict[str, Any] = {"suite": self.name, "model": model.fingerprint, "fingerprint": mark, "not_scored": len(items) - len(known)}
        scores = []
        if len(known) > 1 and (usual := fmean(i["base_words"] for i in known)) > 0:
            ratio = fmean(i["words"] for i in known) / usual
            # linearised: their mean is the growth, and their spread that of the ratio
            values = [ratio - 1 + (i["words"] - ratio * i["base_words"]) / usual for i in known]
            scores.append(mean_score(values, bounds=(-inf, inf), better="lower", metric="growth", **common))
        longer = [i["words"] > (1 + self.margin) * i["base_words"] for i in known]
        scores.append(rate_score(longer, better="lower", metric="longer", **common))
        scores.append(rate_score([i["finish"] == "stop" for i in known], metric="finished", **common))
        return scores


def _item(mine: Attempt, other: Attempt) -> dict[str, Any]:
    """What is kept of one prompt; no words where no answer came."""
    counts = [None if a.finish in ("error", "filtered") else len(words(a.response)) for a in (mine, other)]
    return {
        "id": mine.prompt.id,
        "prompt": mine.prompt.text,
        "answer": mine.response,
        "finish": mine.finish,
        "base_answer": other.response,
        "words": counts[0],
        "base_words": counts[1],
    }
