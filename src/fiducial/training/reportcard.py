"""What a training run is looked at for besides its loss: drift from the base model, length, repetition.

Fresh samples are drawn from the trained model on a few harmless prompts and scored under it and under the base model. KL(policy, base)
is estimated per sequence by k1 = mean of l and k3 = mean of (exp(-l) - 1 + l), with l = log pi(y) - log base(y) summed over the tokens
of a sample; both in nats, k3 is never negative. A stop writes its reason; a rule that was not measured says so, and is no pass.
Nothing here reads the loss in training: a run of which that alone is known is `not measured`.
Source of the estimators: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fiducial.core.intervals import Mean, Rate, mean
from fiducial.core.records import Conversation, Evidence
from fiducial.data.overlap import units
from fiducial.models import adapters
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.training import heldout, lora

if TYPE_CHECKING:
    from fiducial.training.loop import TrainResult

Outcome = Literal["pass", "fail", "not measured"]
RULES = ("drift", "length", "repetition")
"""The rules of every run."""
DISPLACED = 0.7
"""Share of preferred answers that lost probability, above which the report card says what that means."""
KEPT = {"name", "value", "low", "high", "n", "baseline", "baseline_low", "baseline_high"}
"""What a card keeps of a figure."""
SAYS: dict[Outcome, str] = {
    "pass": "whether the model does better what it is for is not measured here",
    "fail": "do not use this model before you have looked at its answers",
    "not measured": "a falling loss alone shows nothing",
}
"""What each verdict means, and what it does not."""


class FreshSamples:
    """Watches a model that trains. Made before training, with the model as it is then.

    The base model is the one below the adapter. Give it as `base` where all weights train, or drift is not measured, and where the model begins
    with an adapter, or drift is measured from the model below that.
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
        self.now: list[tuple[Conversation, str, tuple[int, ...]]] = []
        self.ratio: Tensor | None = None
        with lora.adapter_off(model.module):  # also when a resumed model already carries its adapter
            self.base = self._texts(base or model)

    def __call__(self, step: int, model: LocalModel) -> tuple[dict[str, float], str]:
        """Figures of the model as it is now, and a reason to stop or an empty string."""
        self.now = texts = self._texts(model)
        figures = style(texts) | {f"base_{k}": v for k, v in style(self.base).items()} | self._drift(model, texts)
        for rule, (outcome, sentence) in self.rules(figures).items():
            if outcome == "fail":
                return figures, f"{rule}: {sentence}"
        return figures, ""

    def rules(self, figures: dict[str, float]) -> dict[str, tuple[Outcome, str]]:
        """Every stopping rule with its outcome and a sentence. Repetition breaks its rule where it doubles, and is above a tenth."""
        found: dict[str, tuple[Outcome, str]] = {}
        kl = figures.get("k3", math.nan)
        found["drift"] = _rule(kl, kl <= self.kl_budget, f"k3 is {kl:.2f} nats per sample, the budget {self.kl_budget:g}")
        length, base = figures.get("length", math.nan), figures.get("base_length", math.nan)
        found["length"] = _rule(length + base, 0.5 * base <= length <= 1.5 * base, f"answers have {length:.1f} words on average, the base model's {base:.1f}")
        repeats, usual = figures.get("repetition", math.nan), figures.get("base_repetition", math.nan)
        found["repetition"] = _rule(repeats + usual, repeats <= max(2 * usual, 0.1), f"{repeats:.0%} of 4-grams are repeats, of the base model's {usual:.0%}")
        return found

    def evidence(self) -> list[Evidence]:
        """The figures of the last look with their intervals; nothing where there was none."""
        found: dict[str, Mean | Rate] = {}
        if self.ratio is not None:
            found = {"drift k1, nats per answer": mean(self.ratio.tolist()), "drift k3, nats per answer": mean(_k3(self.ratio).tolist())}
        for name, texts in (("base model", self.base), ("trained model", self.now if self.base else [])):
            words = [units(text) for _, text, _ in texts]
            found[f"words per answer, {name}"] = mean([float(len(w)) for w in words])
            repeats = [_repeats(w) for w in words]
            if any(repeats):  # else nothing is long enough to repeat
                found[f"answers with a repeated 4-gram, {name}"] = Rate(sum(map(any, repeats)), len(repeats))
        return evidence(found)

    def answers(self) -> list[dict[str, str]]:
        """What the base model and the model at the last look said to each prompt, drawn with the same chance."""
        now = {conversation: text for conversation, text, _ in self.now}
        return [{"before": text, "after": now[conversation]} for conversation, text, _ in self.base if conversation in now]

    def _texts(self, model: LocalModel) -> list[tuple[Conversation, str, tuple[int, ...]]]:
        drawn = model.sample(self.prompts, max_tokens=self.max_tokens, temperature=1.0, seed=self.seed)
        # the end is part of what was said: a model that has learnt to stop at once has moved, too
        end = (model.tokenizer.convert_tokens_to_ids(model.chat.end),) if model.chat.end else ()
        answers = [(p, c[0], end if c[0].finish == "stop" else ()) for p, c in zip(self.prompts, drawn, strict=True)]
        return [(p, c.text, (*c.tokens, *last)) for p, c, last in answers if c.finish != "error" and (c.tokens or last)]

    def _drift(self, model: LocalModel, texts: list[tuple[Conversation, str, tuple[int, ...]]]) -> dict[str, float]:
        self.ratio = None
        if not texts or (self.reference is None and not adapters.is_adapted(model.module)):
            return {}
        if model.chat.control_ids:  # the engine scores as if control tokens could be drawn, and the base model may not know them
            return {}
        pairs = []
        for conversation, _, tokens in texts:
            ids, start = model.encode(conversation)
            pairs.append(([*ids, *tokens], start))
        paths = Paths.of(pairs)
        policy = model.score(paths).path_logp
        with lora.adapter_off(model.module):
            self.ratio = ratio = policy - (self.reference or model).score(paths).path_logp
        return {"k1": float(ratio.mean()), "k3": float(_k3(ratio).mean()), "samples": float(len(texts))}


def verdict(rules: Mapping[str, tuple[Outcome, str]]) -> Outcome:
    """`fail` when a rule is broken, `pass` when every rule was measured and none is, else `not measured`."""
    outcomes = {outcome for outcome, _ in rules.values()}
    return "fail" if "fail" in outcomes else "pass" if outcomes == {"pass"} else "not measured"


def says(rules: Mapping[str, tuple[Outcome, str]], besides: Sequence[str] = ()) -> str:
    """The verdict in a sentence, with how many rules it rests on and all that was not measured; `besides` names what no rule here is about."""
    said, outcomes = verdict(rules), [outcome for outcome, _ in rules.values()]
    counted = {
        "pass": f"pass of {len(outcomes)} rules",
        "fail": f"fail of {outcomes.count('fail')} in {len(outcomes)} rules",
        "not measured": f"no verdict, {outcomes.count('pass')} of {len(outcomes)} rules pass",
    }
    unknown = dict.fromkeys([*(name for name, (outcome, _) in rules.items() if outcome == "not measured"), *besides])
    return "; ".join([counted[said], *([f"not measured: {', '.join(unknown)}"] if unknown else []), SAYS[said]])


def summed(rules: Mapping[str, tuple[Outcome, str]], figures: Sequence[Evidence], *, stop: str, **rest: Any) -> dict[str, Any]:
    """A report card as plain values, the same for every kind of training; `rest` is what a kind adds."""
    said = verdict(rules)
    return {
        "verdict": said,
        "says": says(rules),
        "stop": stop,
        "rules": {name: {"outcome": outcome, "sentence": sentence} for name, (outcome, sentence) in rules.items()},
        "figures": [e.model_dump(mode="json", include=KEPT, exclude_none=True) for e in figures],
        **rest,
    }


def added(known: Mapping[str, Any], rules: Mapping[str, tuple[Outcome, str]], figures: Sequence[Evidence]) -> dict[str, Any]:
    """A report card with more rules and figures, and the verdict on all of them."""
    before = _rules(known)
    rest = {name: value for name, value in known.items() if name not in ("verdict", "says", "stop", "rules", "figures")}
    return summed({**before, **rules}, [*(Evidence(**figure) for figure in known["figures"]), *figures], stop=known["stop"], **rest)


def unmeasured(known: Mapping[str, Any], how: Mapping[str, str]) -> dict[str, Any]:
    """A report card that names besides what no rule of it is about, and how each is measured."""
    missing = {name: {"outcome": "not measured", "sentence": sentence} for name, sentence in how.items()}
    return {**known, "says": says(_rules(known), list(how)), "unmeasured": missing}


def card(watch: FreshSamples | None, figures: Mapping[str, float], result: TrainResult, *, why: str = "") -> dict[str, Any]:
    """The report card of a run on data, after its last look; without one (`why` says why) no rule on fresh samples is measured."""
    found: dict[str, tuple[Outcome, str]] = dict.fromkeys(RULES, ("not measured", why or "no fresh samples were drawn"))
    if watch is not None:
        found = watch.rules(dict(figures))
    seen, pairs = (watch.evidence(), watch.answers()) if watch is not None else ([], [])
    if result.looks:
        better, sentence = heldout.rule(result.looks, result.held_before, result.held_out)
        found["held_out"] = ("pass" if better else "fail", sentence)
        seen = [*seen, *evidence(heldout.intervals(result.held_out)), *heldout.evidence(result.held_together, len(result.held_out))]
    # of the held-out pairs where there are such, else of the last tenth of the steps
    displaced = mean([s["displaced"] for s in result.looks[-1:] or result.history[-max(1, len(result.history) // 10) :] if "displaced" in s]).value
    remarks = [displacement(displaced, answers=[found[name][0] for name in ("length", "repetition")])] if displaced > DISPLACED else []
    ends = {"learnt_from": result.completions, "without_end": result.endless}
    kept = {"completions": ends, "looks": [dict(look) for look in result.looks], "history": [dict(step) for step in result.history]}
    return summed(found, seen, stop=result.stop, remarks=remarks, answers=pairs, **kept)


def displacement(share: float, *, answers: Sequence[Outcome]) -> str:
    """What it means that so many preferred answers have lost probability against the reference, by the outcomes of the rules on fresh answers."""
    said = f"{share:.0%} of the preferred answers have lost probability against the reference"
    if "fail" in answers:
        return f"{said}, and fresh answers are worse: dangerous; an anchor (anchor=1 of align/dpo), pairs drawn from the model itself, or a larger beta stop it"
    known = "which by length and repetition are within their limits" if set(answers) == {"pass"} else "which were not measured"
    return f"{said}: usual where only differences are trained; look at fresh answers, {known}"


def evidence(figures: Mapping[str, Mean | Rate]) -> list[Evidence]:
    """Figures as evidence; those that have no interval, such as a mean of one item, are left out."""
    known = [(name, f, *f.interval()) for name, f in figures.items() if f.n]
    return [Evidence(name=name, value=f.value, n=f.n, low=low, high=high) for name, f, low, high in known if math.isfinite(f.value + high - low)]


def _rules(known: Mapping[str, Any]) -> dict[str, tuple[Outcome, str]]:
    """The rules of a report card."""
    return {name: (rule["outcome"], rule["sentence"]) for name, rule in known["rules"].items()}


def _k3(ratio: Tensor) -> Tensor:
    """The estimate of each sample, never negative."""
    return (-ratio).clamp(max=20).exp() - 1 + ratio


def _repeats(words: Sequence[str]) -> list[bool]:
    """Whether each 4-gram stands earlier in the same text."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for gram in zip(*(words[i:] for i in range(4)), strict=False):
        found.append(gram in seen)
        seen.add(gram)
    return found


def style(texts: Sequence[tuple[Any, str, Any]]) -> dict[str, float]:
    """Mean words per text, share of 4-grams that repeat one of the same text, and distinct-2, the share of different pairs of words among all of them
    (Li et al. 2016, arXiv:1510.03055). Words are those of `data.overlap.units`; no share where no text is long enough, no figures for no texts."""
    words = [units(text) for _, text, _ in texts]
    if not words:
        return {}
    repeats = [r for w in words for r in _repeats(w)]
    pairs = [pair for w in words for pair in pairwise(w)]
    found = {"length": sum(map(len, words)) / len(words)} | ({"repetition": sum(repeats) / len(repeats)} if repeats else {})
    return found | ({"distinct_2": len(set(pairs)) / len(pairs)} if pairs else {})


def _rule(measured: float, fine: bool, sentence: str) -> tuple[Outcome, str]:
    if math.isnan(measured):
        return "not measured", "not measured"
    return "pass" if fine else "fail", sentence
