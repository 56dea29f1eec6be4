"""What a training run is looked at for besides its loss: drift from the base model, length, repetition.

Fresh samples are drawn from the trained model on a few harmless prompts and scored under it and under the base model. KL(policy, base)
is estimated per sequence by k1 = mean of l and k3 = mean of (exp(-l) - 1 + l), with l = log pi(y) - log base(y) summed over the tokens
of a sample; both in nats, k3 is never negative. A stop writes its reason; a rule that was not measured says so, and is no pass.
Source of the estimators: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from fiducial.core.records import Conversation
from fiducial.models import adapters
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.training import lora

Outcome = Literal["pass", "fail", "not measured"]


class FreshSamples:
    """Watches a model that trains. Made before training, with the model as it is then.

    The base model is the one below the adapter; where all weights train, give it as `base`, or drift is not measured.
    """

    def __init__(
        self,
        model: LocalModel,
        prompts: Sequence[Conversation],
        *,
        base: LocalModel | None = None,
        max_tokens: int = 24,
        kl_budget: float = 10.0,
        seed: int = 0,
    ) -> None:
        self.reference = base
        self.prompts, self.max_tokens, self.kl_budget, self.seed = list(prompts), max_tokens, kl_budget, seed
        with lora.adapter_off(model.module):  # also when a resumed model already carries its adapter
            self.base = self._texts(base or model)

    def __call__(self, step: int, model: LocalModel) -> tuple[dict[str, float], str]:
        """Figures of the model as it is now, and a reason to stop or an empty string."""
        texts = self._texts(model)
        figures = style(texts) | {f"base_{k}": v for k, v in style(self.base).items()} | self._drift(model, texts)
        for rule, (outcome, sentence) in self.rules(figures).items():
            if outcome == "fail":
                return figures, f"{rule}: {sentence}"
        return figures, ""

    def rules(self, figures: dict[str, float]) -> dict[str, tuple[Outcome, str]]:
        """Every stopping rule with its outcome and a sentence."""
        found: dict[str, tuple[Outcome, str]] = {}
        kl = figures.get("k3", math.nan)
        found["drift"] = _rule(kl, kl <= self.kl_budget, f"k3 is {kl:.2f} nats per sample, the budget {self.kl_budget:g}")
        length, base = figures.get("length", math.nan), figures.get("base_length", math.nan)
        found["length"] = _rule(length + base, 0.5 * base <= length <= 1.5 * base, f"answers have {length:.1f} words on average, the base model's {base:.1f}")
        repeats, usual = figures.get("repetition", math.nan), figures.get("base_repetition", math.nan)
        found["repetition"] = _rule(repeats + usual, repeats <= max(2 * usual, 0.1), f"{repeats:.0%} of 4-grams are repeats, of the base model's {usual:.0%}")
        return found

    def _texts(self, model: LocalModel) -> list[tuple[Conversation, str, tuple[int, ...]]]:
        drawn = model.sample(self.prompts, max_tokens=self.max_tokens, temperature=1.0, seed=self.seed)
        # the end is part of what was said: a model that has learnt to stop at once has moved, too
        end = (model.tokenizer.convert_tokens_to_ids(model.chat.end),) if model.chat.end else ()
        answers = [(p, c[0], end if c[0].finish == "stop" else ()) for p, c in zip(self.prompts, drawn, strict=True)]
        return [(p, c.text, (*c.tokens, *last)) for p, c, last in answers if c.finish != "error" and (c.tokens or last)]

    def _drift(self, model: LocalModel, texts: list[tuple[Conversation, str, tuple[int, ...]]]) -> dict[str, float]:
        if not texts or (self.reference is None and not adapters.is_adapted(model.module)):
            return {}
        pairs = []
        for conversation, _, tokens in texts:
            ids, start = model.encode(conversation)
            pairs.append(([*ids, *tokens], start))
        paths = Paths.of(pairs)
        policy = model.score(paths).path_logp
        with lora.adapter_off(model.module):
            ratio = policy - (self.reference or model).score(paths).path_logp
        k1 = ratio.mean()
        k3 = ((-ratio).clamp(max=20).exp() - 1 + ratio).mean()
        return {"k1": float(k1), "k3": float(k3), "samples": float(len(texts))}


def style(texts: Sequence[tuple[Any, str, Any]]) -> dict[str, float]:
    """Mean words per text and share of 4-grams that repeat one of the same text; no figures for no texts."""
    words = [text.split() for _, text, _ in texts]
    if not words:
        return {}
    grams = [Counter(zip(*(w[i:] for i in range(4)), strict=False)) for w in words]
    total = sum(g.total() for g in grams)
    return {"length": sum(map(len, words)) / len(words), "repetition": sum(g.total() - len(g) for g in grams) / total if total else 0.0}


def _rule(measured: float, fine: bool, sentence: str) -> tuple[Outcome, str]:
    if math.isnan(measured):
        return "not measured", "not measured"
    return "pass" if fine else "fail", sentence
