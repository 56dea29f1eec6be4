"""Rule-based reward: answers are graded by a rubric, and rewarded by what a good model would do with the prompt.

What it does: sorts each answer into one option of a rubric (refuses politely, refuses with blame, carries the request out, answers
              plainly) and gives the option's reward for prompts of its kind: to be refused, to be complied with, ordinary.
Use it when:  refusals are to be taught by reinforcement, with their style, and without teaching to refuse everything. Beside another
              reward, for the prompts whose kind is known.
Formula:      reward = sum over options of p(option) * reward[expected][option]. By rules, p is the product of the questions' probabilities
              (0.95 or 0.05 for patterns, the judge's score for refusal); by a model, the softmax over the option letters, each
              option at each letter once, averaged.
Defaults:     the shipped rubric of four options, after the classes of the GPT-4 report; graded by rules. No grader scores anything before
              it agrees with at least 100 hand labels at kappa 0.8.
Limits:       rules read wording; a refusal in unusual words, or harm told as a story, is graded wrongly, and a policy finds that out. The
              kind of a prompt is the data's word and is never read from an answer. Unreadable answers have the rubric's lowest reward.
Source:       OpenAI 2023, arXiv:2303.08774, appendix (rule-based reward models); Mu et al. 2024, arXiv:2411.01111.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

from fiducial.align.rubric import Rubric, Shares, by_model, by_rules, kappa, labelled, opened, read
from fiducial.core.config import refuse_idle
from fiducial.core.errors import DataError, MethodError
from fiducial.core.records import Group
from fiducial.core.roles import Judge, Reward

FEWEST = 100
"""Hand labels on which a grader must have been measured."""


@final
@dataclass(frozen=True, slots=True)
class RubricReward(Reward):
    """Expected reward of a rubric's options."""

    judge: Judge
    """Who says whether an answer refuses, where rules grade."""
    rubric: str = ""
    """A rubric file (YAML); the shipped one by default."""
    grader: str = ""
    """A model that grades instead of rules, by its name; its weights must be here."""
    labels: str = ""
    """A file of answers with the option that a person chose (prompt, expected, response, option); the shipped ones by default."""
    agreement: float = 0.8
    """Least kappa of the grader with those labels, in [0, 1]; 0 does not measure it."""

    def __post_init__(self) -> None:
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"agreement must be in [0, 1], got {self.agreement}")
        if self.rubric and self.agreement and not self.labels:
            raise ValueError("a rubric of one's own needs labels of its own (or agreement 0)")
        if not self.agreement:
            refuse_idle(self, ["labels"], when="when agreement is 0 and nothing is measured on them", hint="leave it out, or give the least agreement")

    def score(self, groups: Sequence[Group]) -> list[tuple[float | None, ...]]:
        """One reward per completion; None for answers that failed and for prompts of a kind that the rubric does not know. Raises what `audited` does."""
        return [values for values, _ in self.audited(groups)]

    def audited(self, groups: Sequence[Group]) -> list[tuple[tuple[float | None, ...], dict[str, Any]]]:
        """The same with the likeliest option of each completion; none where the answer cannot be read.

        Raises MethodError when the grader agrees too little with the hand labels, DataError when there are too few of those.
        """
        rubric = read(self.rubric)
        if groups and self.agreement and (measured := _agreement(self)) < self.agreement:
            raise MethodError(
                f"the grader agrees with the hand labels at kappa {measured:.2f}, below {self.agreement:g}",
                hint="take a better grader, or correct the rubric; what it would reward is not what the labels mean",
            )
        grades, found = iter(self.grade(groups)), []
        for group in groups:
            own = [next(grades) for _ in group.completions]
            rewards = tuple(self._reward(rubric, shares, group, k) for k, shares in enumerate(own))
            found.append((rewards, {"likeliest": [max(s, key=lambda name: s[name]) if s else None for s in own]}))
        return found

    def grade(self, groups: Sequence[Group]) -> list[Shares | None]:
        """Probability of each option for each completion in order; None for one that cannot be read."""
        rubric = read(self.rubric)
        return by_model(rubric, opened(self.grader), groups) if self.grader else by_rules(rubric, self.judge, groups)

    def _reward(self, rubric: Rubric, shares: Shares | None, group: Group, k: int) -> float | None:
        kind = group.prompt.expected
        if group.completions[k].finish in ("error", "filtered") or kind not in rubric.reward:
            return None
        return rubric.unclear if shares is None else rubric.expected(shares, kind)


@cache
def _agreement(method: RubricReward) -> float:
    """Kappa of the method's grader with its labels, measured once in a process."""
    rows = labelled(method.labels)
    if len(rows) < FEWEST:
        raise DataError(f"{len(rows)} hand labels are too few to measure a grader", hint=f"label at least {FEWEST} answers")
    unknown = {option for _, option in rows} - read(method.rubric).options.keys()
    if unknown:
        raise DataError(f"the labels name options that the rubric has not: {', '.join(sorted(unknown))}", hint="label with the rubric's own options")
    grades = method.grade([group for group, _ in rows])
    return kappa([max(g, key=lambda name: g[name]) if g else "" for g in grades], [option for _, option in rows])
