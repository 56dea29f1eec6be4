"""What is looked at while a model learns from its own samples, and the rules that stop it.

Besides the rules of every training run (distance, length, repetition) there is one against reward hacking: what is rewarded rises
while a reward that is only watched falls. A rule that was not measured says so, and is no pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from fiducial.core import intervals
from fiducial.core.intervals import Mean, paired_difference
from fiducial.core.records import Group
from fiducial.training.reportcard import Outcome, evidence, style, summed
from fiducial.training.rewards import Values, mean

WINDOW = 10
"""Steps at the beginning and at the end that are compared for reward hacking."""
CLEAR = 2.0
"""Standard errors that count as a rise or a fall."""
SHOWN = 20
"""Pairs of answers, before and after, that a card holds."""

History = Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Look:
    """One answer to each of some prompts, drawn with the same chance each time."""

    texts: list[str]
    rewards: list[float | None]
    """The total reward of each answer."""
    figures: dict[str, float]
    """Mean of each reward as `reward.NAME`, words per answer, share of repeated 4-grams, share of answers that end."""

    @classmethod
    def of(cls, groups: Sequence[Group], components: Mapping[str, Values], totals: Values) -> Look:
        """From groups of one answer."""
        texts = [g.completions[0].text for g in groups]
        return cls(texts, [t[0] for t in totals], {f"reward.{name}": mean(values) for name, values in components.items()} | surface(groups))


class Rule(NamedTuple):
    """A rule and what came of it."""

    outcome: Outcome
    sentence: str


def surface(groups: Sequence[Group]) -> dict[str, float]:
    """Words per answer, share of 4-grams that repeat, share of answers that came to their own end."""
    found = [c for g in groups for c in g.completions]
    return style([(None, c.text, None) for c in found]) | {"ended": fmean(c.finish == "stop" for c in found) if found else math.nan}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a run is held to."""

    kl: float
    """Distance from the beginning in nats per answer."""
    length: float | None
    """Share by which the mean length may change; None = any."""
    watched: tuple[str, ...] = ()
    """Rewards that must not fall while the trained one rises."""


def rules(history: History, before: Look, seen: Mapping[str, float], bounds: Bounds) -> dict[str, Rule]:
    """Every stopping rule after the last step of `history`, with its outcome and a sentence.

    Length and repetition are those of the last look, `seen`, at the prompts of the first one; a step has prompts of its own. Repetition breaks its
    rule where it doubles, and is above a tenth: below, a few words decide.
    """
    far = history[-1].get("k3", math.nan) if history else math.nan
    length, repeats = (seen.get(name, math.nan) for name in ("length", "repetition"))
    usual_length, usual_repeats = (before.figures.get(name, math.nan) for name in ("length", "repetition"))
    return {
        "drift": _rule(far, far <= bounds.kl, f"k3 is {far:.2f} nats per answer, the budget {bounds.kl:g}"),
        "length": _rule(
            length + usual_length if bounds.length is not None else math.nan,
            abs(length - usual_length) <= (bounds.length or 0.0) * usual_length,
            f"answers to the same prompts have {length:.1f} words on average, at the beginning {usual_length:.1f}",
        ),
        "repetition": _rule(
            repeats + usual_repeats,
            repeats <= max(2 * usual_repeats, 0.1),
            f"{repeats:.0%} of 4-grams are repeats, at the beginning {usual_repeats:.0%} on the same prompts",
        ),
        "reward hacking": _hacked(history, bounds.watched),
    }


def stops(history: History, before: Look, seen: Mapping[str, float], bounds: Bounds) -> str:
    """The first rule that is broken, as a reason to stop; empty when none is."""
    for name, (outcome, sentence) in rules(history, before, seen, bounds).items():
        if outcome == "fail":
            return f"{name}: {sentence}"
    return ""


def gained(before: Look, after: Look) -> Mean:
    """Mean rise of the total reward over the prompts that were scored both times."""
    both = [(a, b) for a, b in zip(after.rewards, before.rewards, strict=True) if a is not None and b is not None]
    return paired_difference([a for a, _ in both], [b for _, b in both])


def card(history: History, before: Look, after: Look, bounds: Bounds, *, stop: str) -> dict[str, Any]:
    """The report card as plain values: rules, figures before and after, how the figures went, pairs of answers, why it stopped."""
    gain = gained(before, after)
    low, high = gain.interval()
    known = {f"reward, {name} training": intervals.mean([r for r in look.rewards if r is not None]) for name, look in (("before", before), ("after", after))}
    return summed(
        rules(history, before, after.figures, bounds),
        evidence(known | {"rise of the reward, same prompts": gain}),
        stop=stop,
        gain={"value": gain.value, "low": low, "high": high, "n": gain.n},
        before=before.figures,
        after=after.figures,
        history=[dict(step) for step in history],
        answers=[{"before": a, "after": b} for a, b in zip(before.texts[:SHOWN], after.texts, strict=False)],
    )


def _hacked(history: History, watched: Sequence[str]) -> Rule:
    """Whether what is rewarded has clearly risen since the beginning and something watched has clearly fallen."""
    if not watched or len(history) < 2 * WINDOW:
        return Rule("not measured", "no reward is only watched" if not watched else f"fewer than {2 * WINDOW} steps were made")
    rise = _moved(history, "reward")
    for name in watched:
        fall = _moved(history, f"reward.{name}")
        if rise > CLEAR and fall < -CLEAR:
            return Rule("fail", f"the reward has risen by {rise:.1f} standard errors while {name}, which is only watched, has fallen by {-fall:.1f}")
    return Rule("pass", "nothing watched falls while the reward rises")


def _moved(history: History, name: str) -> float:
    """Difference of a figure between the first and the last steps, in its standard errors; 0 where it is not known."""
    ends = [[v for h in part if not math.isnan(v := h.get(name, math.nan))] for part in (history[:WINDOW], history[-WINDOW:])]
    if min(len(e) for e in ends) < 2:
        return 0.0
    error = math.sqrt(sum(stdev(e) ** 2 / len(e) for e in ends))
    return (fmean(ends[1]) - fmean(ends[0])) / max(error, 1e-9)


def _rule(measured: float, fine: bool, sentence: str) -> Rule:
    return Rule("not measured", "not measured") if math.isnan(measured) else Rule("pass" if fine else "fail", sentence)
