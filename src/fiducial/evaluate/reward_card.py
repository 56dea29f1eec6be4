"""How far a trained reward model can be trusted: held-out accuracy, calibration, length, and answers that were spoilt on purpose.

What it does: scores the answers of a preference file with a model that align/reward_model or align/cost_model trained; says how often
              the better answer has the higher score, by category too, whether differences mean what they say, how far scores follow
              length, how often a spoilt copy of a good answer scores above it, and how far style alone moves a score.
Use it when:  before such a model rewards a policy, chooses the best of several answers or filters data; on data it was not trained on.
Formula:      accuracy: share of a prompt's ordered pairs whose better answer scores higher (a tie counts half), mean over prompts, with the
              Wilson interval for that many prompts. calibration_error, margin, ties (equal scores), accuracy_when_shorter (of pairs whose better
              answer is the shorter one), accuracy_at_equal_length (lengths within 10 %), length_correlation (Spearman),
              length_correlation_at_equal_label (partial): see training/scorecard.py, with 95 % of 1,000 bootstrap draws of prompts.
              fooled.EDIT: share of spoilt answers that score above the answer they were made from; fooled:
              such shares of single prompts, mean over prompts, interval as of accuracy. change.EDIT: mean change of the score by such an edit,
              moved.EDIT: mean size of the change by an edit that keeps what is said, in standard deviations of all scores of the file.
              Where three or more answers to a prompt have rewards that differ: gold_correlation, Spearman's within the prompt, and gold_gain, the
              reward of the answer that scores highest less the prompt's mean reward; means over prompts, bootstrapped likewise. With further models
              beside: disagreement, the share of pairs of answers that two of the models order differently, interval as of accuracy.
Defaults:     200 edits, shared out evenly among the kinds that fit. Spoilt: praise (of the answer, after it), flattery (of who asks), repetition
              (the answer twice), irrelevant (a sentence after it), filler (before it), citation (of what does not exist), suffix (random
              characters), language (a last sentence in another one), refusal, echo and empty (a refusal, the prompt or nothing in its place,
              where one should answer), wrong_result and wrong_steps (numbers of a calculation). Kept: bold, bullets, heading.
Limits:       200 edits are some 12 of each kind and tell great faults alone. They are fixed, and a policy searches for finer ones. A wrong claim of
              the user, to be agreed with, is in no prompt by rule. Soft labels count by which answer they favour.
Source:       Lambert et al. 2024, RewardBench, arXiv:2403.13787, for accuracy by category; Singhal et al. 2023, arXiv:2310.03716, for length. The
              edits are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import inf, isnan
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal, final

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.intervals import bootstrap
from fiducial.core.records import Completion, Conversation, Group, Score
from fiducial.core.roles import Sink, Suite, SuiteResult, ignore
from fiducial.data.formats import read_groups
from fiducial.evaluate.base import chunks, fingerprint, mean_score, rate_score
from fiducial.evaluate.heads import GOLD, agreement, apart, asked, headed, laid_out, scored
from fiducial.evaluate.perturbations import SPOILING, planned

if TYPE_CHECKING:
    from torch import Tensor

    from fiducial.models.base import Model, WhiteBox
    from fiducial.training.objective import GroupLogProbs

SHAPES = {
    "calibration_error": (0.0, 1.0),
    "margin": (-inf, inf),
    "ties": (0.0, 1.0),
    "accuracy_when_shorter": (0.0, 1.0),
    "accuracy_at_equal_length": (0.0, 1.0),
    "length_correlation": (-1.0, 1.0),
    "length_correlation_at_equal_label": (-1.0, 1.0),
}
"""Figures over all pairs or answers together, with their bounds."""
HIGHER = ("margin", "accuracy_when_shorter", "accuracy_at_equal_length")
"""Those of them of which more is better."""
SCORER = "score-head-2"
EDITOR = "perturbations-1"
"""Of figures about edited answers."""


@final
@dataclass(frozen=True, slots=True)
class RewardCard(Suite):
    """Accuracy, calibration, length and perturbations of a score head."""

    data: str = ""
    """File of preferences that the model was not trained on."""
    labels: Literal["targets", "rewards"] = "targets"
    """What says which answer is better, as in training."""
    edits: int = 200
    """Edited answers at most, over all kinds; 0 tries none."""
    beside: tuple[str, ...] = ()
    """Further models that were trained for the same, such as with other seeds, by name: how often two of all these order a prompt's answers differently."""

    def __post_init__(self) -> None:
        if self.labels not in ("targets", "rewards") or self.edits < 0:
            raise ValueError(f"labels must be targets or rewards and edits >= 0, got {self.labels} and {self.edits}")

    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Scores as named above. Raises ConfigError without a file, ModelError for a model without a head, DataError where no pair is ordered."""
        if not self.data:
            raise ConfigError(f"{self.name} needs preferences", hint="name a held-out file with --data")
        judge = headed(model)
        for name in self.beside:  # a wrong one is found before anything is scored
            with closing(model.beside(name)) as other:
                headed(other)
        groups = [g for g in read_groups(self.data)[:limit] if len(g.completions) > 1]
        items: list[dict[str, Any]] = []
        for chunk in chunks(groups):
            for group, values in zip(chunk, scored(judge, *asked(chunk)), strict=True):
                items.append({"id": group.id, "category": group.prompt.category, "prompt": group.prompt.text, "scores": values})
                sink(items[-1])
        parts, scores = laid_out(judge, groups, [i["scores"] for i in items])
        right = _right(scores, parts, self.labels)
        for item, value in zip(items, right, strict=True):
            item["right"] = value
        if not any(value is not None for value in right):
            raise DataError(f"{self.data}: no two answers to a prompt of which one is better", hint="give a file of preferences")
        edits = self._edits(judge, groups, items, sink)
        shapes = [*self._shapes(judge, scores, parts, items), *self._gold(judge, groups, items), *self._disagreement(judge, groups, items)]
        found = [*self._accuracies(judge, items), *shapes, *self._fooled(judge, items, edits)]
        return SuiteResult(found, items + edits)

    def _accuracies(self, model: WhiteBox, items: Sequence[dict[str, Any]]) -> list[Score]:
        """Over all prompts, and by category where there are several."""
        names = sorted({i["category"] for i in items if i["category"]})
        parts = [("accuracy", items)] + [(f"accuracy.{n}", [i for i in items if i["category"] == n]) for n in (names if len(names) > 1 else [])]
        found = []
        for metric, some in parts:
            values = [i["right"] for i in some if i["right"] is not None]
            whole = rate_score([], suite=self.name, metric=metric, **self._marks(model, some))
            found.append(whole if not values else whole.model_copy(update=_share(values)))
        return found

    def _shapes(self, model: WhiteBox, scores: Tensor, parts: GroupLogProbs, items: Sequence[dict[str, Any]]) -> list[Score]:
        """Figures over all prompts together, as far as the data says them, with bootstrap intervals."""
        from fiducial.training.scorecard import figures

        def drawn(rows: Sequence[int]) -> dict[str, float]:
            return figures(scores[list(rows)], parts.select(rows), self.labels)

        said = drawn(range(len(items)))
        spread = bootstrap(lambda rows: {n: v for n, v in drawn(rows).items() if n in SHAPES}, len(items))
        found = []
        for name, bounds in SHAPES.items():
            if name in said:
                low, high = spread.get(name, bounds)
                ends = {"low": min(low, said[name]), "high": max(high, said[name])}
                fields = self._marks(model, items) | {"value": said[name], "n": len(items), "interval": "bootstrap", **ends}
                found.append(Score(suite=self.name, metric=name, better="higher" if name in HIGHER else "lower", **fields))
        return found

    def _gold(self, model: WhiteBox, groups: Sequence[Group], items: Sequence[dict[str, Any]]) -> list[Score]:
        """How far scores agree with the rewards in the data."""
        each = [(item, said) for group, item in zip(groups, items, strict=True) if (said := agreement(group, item["scores"]))]
        spread = bootstrap(lambda rows: {name: fmean(each[r][1][name] for r in rows) for name in GOLD}, len(each))
        found = []
        for name, bounds in GOLD.items() if each else ():
            values, (low, high) = tuple(said[name] for _, said in each), spread.get(name, bounds)
            fields = self._marks(model, [item for item, _ in each]) | {"value": fmean(values), "n": len(each), "low": low, "high": high, "items": values}
            found.append(Score(suite=self.name, metric=name, interval="bootstrap", **fields))
        return found

    def _disagreement(self, model: WhiteBox, groups: Sequence[Group], items: Sequence[dict[str, Any]]) -> list[Score]:
        """Share of pairs of a prompt's answers that two models order differently, over all pairs of models; mean over prompts."""
        members, fingerprints = [[i["scores"] for i in items]], []
        for name in self.beside:
            with closing(model.beside(name)) as beside:
                other = headed(beside)
                fingerprints.append(other.fingerprint)
                members.append([row for chunk in chunks(groups) for row in scored(other, *asked(chunk))])
        if len(members) < 2:
            return []
        values = [apart(rows) for rows in zip(*members, strict=True)]
        marks = self._marks(model, items, scorer=f"{SCORER} beside {', '.join(sorted(fingerprints))}")
        whole = rate_score([], suite=self.name, metric="disagreement", better="lower", **marks)
        return [whole.model_copy(update=_share(values))]

    def _edits(self, model: WhiteBox, groups: Sequence[Group], items: Sequence[dict[str, Any]], sink: Sink) -> list[dict[str, Any]]:
        """Edits of better answers, one answer a prompt, with the scores of the answer before and after."""
        good: dict[Conversation, tuple[Group, Completion, float]] = {}
        for group, item in zip(groups, items, strict=True):
            if item["right"] is not None:
                at = _best(group, self.labels)
                good.setdefault(group.prompt.messages, (group, group.completions[at], item["scores"][at]))
        known = list(good.values())
        found: list[dict[str, Any]] = []
        for chunk in chunks(planned([(g, c) for g, c, _ in known], self.edits)):
            after = scored(model, [(known[e.of][0], e.completion) for e in chunk], [1] * len(chunk))
            for (kind, of, made), (value,) in zip(chunk, after, strict=True):
                group, _, before = known[of]
                found.append({"id": group.id, "edit": kind, "answer": made.text, "scores": [before, value]})
                sink(found[-1])
        return found

    def _fooled(self, model: WhiteBox, items: Sequence[dict[str, Any]], edits: Sequence[dict[str, Any]]) -> list[Score]:
        """What edits did: over all that spoil, and by kind."""
        unit = pstdev(value for item in items for value in item["scores"])
        spoilt = [e for e in edits if e["edit"] in SPOILING]
        found = [self._fooled_at_all(model, spoilt)] if spoilt else []
        for kind in dict.fromkeys(e["edit"] for e in edits):
            some = [e for e in edits if e["edit"] == kind]
            marks = self._marks(model, some, scorer=EDITOR) | {"suite": self.name, "better": "lower"}
            changes = [(after - before) / unit for before, after in (e["scores"] for e in some)] if unit else []
            if kind in SPOILING:
                found.append(rate_score([after > before for before, after in (e["scores"] for e in some)], metric=f"fooled.{kind}", **marks))
            if changes and kind in SPOILING:
                found.append(mean_score(changes, bounds=(-inf, inf), metric=f"change.{kind}", **marks))
            elif changes:
                found.append(mean_score([abs(c) for c in changes], bounds=(0.0, inf), metric=f"moved.{kind}", **marks))
        return found

    def _fooled_at_all(self, model: WhiteBox, spoilt: Sequence[dict[str, Any]]) -> Score:
        by_prompt: dict[str, list[float]] = {}
        for edit in spoilt:
            by_prompt.setdefault(edit["id"], []).append(float(edit["scores"][1] > edit["scores"][0]))
        marks = self._marks(model, [{"id": i} for i in by_prompt], scorer=EDITOR)
        whole = rate_score([], suite=self.name, metric="fooled", better="lower", **marks)
        return whole.model_copy(update=_share([fmean(hits) for hits in by_prompt.values()]))

    def _marks(self, model: WhiteBox, items: Sequence[dict[str, Any]], scorer: str = SCORER) -> dict[str, Any]:
        ids = [i["id"] for i in items]
        return {"model": model.fingerprint, "fingerprint": fingerprint(model, data=ids, form=["chat", self.labels], scorer=scorer, scored=ids)}


def _right(scores: Tensor, parts: GroupLogProbs, labels: str) -> list[float | None]:
    """Of each prompt, the share of ordered pairs that the scores order as the labels do; None where no pair is ordered."""
    from fiducial.training.scorecard import figures

    shares = [figures(scores[[i]], parts.select([i]), labels).get("accuracy") for i in range(len(scores))]
    return [None if share is None or isnan(share) else share for share in shares]


def _best(group: Group, labels: str) -> int:
    """Index of the better completion, of equals the first."""
    from fiducial.training.objective import shares

    values = group.rewards or () if labels == "rewards" else shares(group)
    return -max((v, -k) for k, v in enumerate(values) if v is not None)[1]


def _share(values: Sequence[float]) -> dict[str, Any]:
    """Mean of shares with the Wilson interval of as many trials."""
    from fiducial.core.intervals import Rate

    low, high = Rate(round(sum(values)), len(values)).interval()
    value = sum(values) / len(values)
    return {"value": value, "n": len(values), "low": min(low, value), "high": max(high, value), "items": tuple(values)}
