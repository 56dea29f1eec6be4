"""Choosing among N samples: by a reward model, by vote, by both.

What it does: samples N solutions to each problem with a known answer and says how often the chosen one is right: any sample, the commonest
              answer, the solution that a trained reward or process model scores highest, and the answer with the highest sum of scores.
Use it when:  a reward model is to choose among samples; against the vote it shows what the model adds, and `any_right` what a perfect one could.
Formula:      single: share of right samples; majority: the commonest final answer is right; best: the solution of the highest score is right;
              weighted: the final answer with the highest sum of scores is right, where no score is below 0 (process models); any_right: some
              sample is. Ties share their places. Means over problems.
Defaults:     8 samples of at most 256 tokens at temperature 0.7; scores of a process model by the product over steps, by lines.
Limits:       an answer is a solution's last number, or its last line where the known one is no number. A right answer after wrong steps counts.
Source:       Cobbe et al. 2021, arXiv:2110.14168 (best of N); Wang et al. 2022, arXiv:2203.11171 (majority); Li et al. 2022, arXiv:2206.02336
              (weighted vote).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, cast, final

from fiducial.core import registry
from fiducial.core.records import Completion, Group, Prompt, Score, user
from fiducial.core.roles import Reward, Sink, Suite, SuiteResult, ignore
from fiducial.data import answers
from fiducial.evaluate.base import chunks, fingerprint, mean_score, rate_score
from fiducial.models.base import Model

SCORER = "answers-1"


@final
@dataclass(frozen=True, slots=True)
class BestOfN(Suite):
    """Shares of problems that are solved by each way of choosing."""

    data: str = ""
    """File with the problems (column prompt, problem or question) and their final answers (answer, reference or target)."""
    reward: str = ""
    """Name of a trained reward, cost or process reward model, such as run:ID; without one there are the votes alone."""
    steps: Literal["as_trained", "product", "min", "last"] = "as_trained"
    """How the steps of a solution become one score, for process reward models; see align/learned_reward."""
    n: int = 8
    """Samples per problem."""
    max_tokens: int = 256
    """Longest solution, in tokens."""
    temperature: float = 0.7
    """Of the samples."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1 or self.temperature <= 0 or self.steps not in ("as_trained", "product", "min", "last"):
            raise ValueError("n and max_tokens must be at least 1, temperature above 0, and steps as_trained, product, min or last")

    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Scores as named above. Raises ConfigError without a file."""
        known = list(answers.known_answers(self.data).items())[:limit]
        items: list[dict[str, Any]] = []
        for chunk in chunks(known):
            rows = model.sample([user(text) for text, _ in chunk], k=self.n, max_tokens=self.max_tokens, temperature=self.temperature, seed=seed + len(items))
            there = [[c for c in row if c.finish not in ("error", "filtered")] for row in rows]
            for (text, gold), row, scores in zip(chunk, there, self._scored([text for text, _ in chunk], there), strict=True):
                solved = choices([c.text for c in row], scores, gold) if row else None
                items.append({"problem": text, "answer": gold, "solutions": [c.text for c in row], "scores": scores, "solved": solved})
                sink(items[-1])
        return SuiteResult(self._scores(model, items), items)

    def _scored(self, problems: Sequence[str], rows: Sequence[Sequence[Completion]]) -> list[list[float | None]]:
        """What the reward model says of each solution; nothing without one."""
        if not self.reward:
            return [[] for _ in rows]
        judge = cast(Reward, registry.create("align/learned_reward", {"models": (self.reward,), "steps": self.steps}))
        groups = [Group(prompt=Prompt(messages=user(text)), completions=tuple(row)) for text, row in zip(problems, rows, strict=True)]
        return [list(values) for values in judge.score(groups)]

    def _scores(self, model: Model, items: Sequence[dict[str, Any]]) -> list[Score]:
        known = [i for i in items if i["solved"] is not None]
        form = ["chat", self.n, self.max_tokens, self.temperature, self.reward, self.steps]
        mark = fingerprint(model, data=[[i["problem"], i["answer"]] for i in items], form=form, scorer=SCORER, scored=[i["problem"] for i in known])
        fields: dict[str, Any] = {"suite": self.name, "model": model.fingerprint, "fingerprint": mark, "not_scored": len(items) - len(known)}
        names = [n for n in ("single", "majority", "best", "weighted", "any_right") if all(n in i["solved"] for i in known)]
        found = []
        for name in names:
            values = [i["solved"][name] for i in known]
            whole = all(v in (0.0, 1.0) for v in values)  # Wilson's interval, which is not of width 0 where all agree
            score = rate_score([v == 1.0 for v in values], metric=name, **fields) if whole else mean_score(values, bounds=(0.0, 1.0), metric=name, **fields)
            found.append(score)
        return found


def choices(solutions: Sequence[str], scores: Sequence[float | None], gold: str) -> dict[str, float]:
    """Whether each way of choosing finds a right solution, ties in shares; best and weighted as far as there are scores.

    >>> choices(["4", "5", "5"], [0.9, 0.3, 0.2], "4") == {"single": 1 / 3, "majority": 0.0, "any_right": 1.0, "best": 1.0, "weighted": 1.0}
    True
    """
    right = [answers.reaches(text, gold) for text in solutions]
    said = [answers.final(text, gold) for text in solutions]
    found = {"single": fmean(right), "majority": _voted(said, [1.0] * len(said), right), "any_right": float(any(right))}
    weights = [s for s in scores if s is not None]
    if weights and len(weights) == len(right):
        found["best"] = fmean(r for r, w in zip(right, weights, strict=True) if w == max(weights))
        if min(weights) >= 0:
            found["weighted"] = _voted(said, weights, right)
    return found


def _voted(said: Sequence[str], weights: Sequence[float], right: Sequence[bool]) -> float:
    """Share of right ones among the answers of the largest total weight; an empty answer has no vote."""
    total: dict[str, float] = defaultdict(float)
    truth = dict(zip(said, right, strict=True))
    for answer, weight in zip(said, weights, strict=True):
        total[answer] += weight if answer else 0.0
    top = [answer for answer, weight in total.items() if weight == max(total.values())]
    return fmean(truth[answer] for answer in top)
