"""Choosing among N samples: by a reward model, by vote, by both.

What it does: samples N solutions to each problem with a known answer and says how often the chosen one is right: any sample, the commonest
              answer, the solution that a trained reward or process model scores highest, and the answer with the highest sum of scores.
Use it when:  a reward model is to choose among samples; against the vote it shows what the model adds, and `any_right` what a perfect one could.
Formula:      single: share of right samples; majority: the commonest final answer is right; best: the solution of the highest score is right;
              weighted: the final answer with the highest sum of scores is right, where no score is below 0 (process models); any_right: some
              sample is. Ties share their places. Means over problems. best@N, majority@N and weighted@N are the same for N = 2, 4, ... of the
              samples: best over all subsets of that size, votes over all or else 400 of them. A sample that failed counts as empty and wrong, with
              the lowest score; failed: the share of such samples. false_positives: the share of right solutions in which a process model calls
              some step wrong (below 0.5).
Defaults:     8 samples of at most 256 tokens at temperature 0.7; scores of a process model by the product over steps, by lines.
Limits:       an answer is a solution's last number, or its last line where the known one is no number. A right answer after wrong steps counts. A problem
              without any sample that came is not scored.
Source:       Cobbe et al. 2021, arXiv:2110.14168 (best of N); Wang et al. 2022, arXiv:2203.11171 (majority); Li et al. 2022, arXiv:2206.02336
              (weighted vote).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb, inf
from statistics import fmean
from typing import Any, Literal, cast, final

from fiducial.core import registry
from fiducial.core.intervals import Rate, best_of_n, design_effect
from fiducial.core.records import Completion, Group, Prompt, Score, user
from fiducial.core.roles import Reward, Sink, Suite, SuiteResult, ignore
from fiducial.data import answers
from fiducial.evaluate.base import chunks, fingerprint, mean_score, rate_score
from fiducial.models.base import Model

SCORER = "answers-2"
DRAWS = 400
"""Subsets of the samples at most, over which a vote is averaged (as in Lightman et al. 2023)."""


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
            # one that failed counts towards n: empty, hence wrong, and without a vote
            there = [[c if c.finish not in ("error", "filtered") else Completion(text="", finish="error") for c in row] for row in rows]
            for item in self._judged(chunk, there):
                items.append(item)
                sink(item)
        return SuiteResult(self._scores(model, items), items)

    def _judged(self, problems: Sequence[tuple[str, str]], rows: Sequence[Sequence[Completion]]) -> Iterator[dict[str, Any]]:
        """What is kept of each problem: its solutions, which of them are right, what the reward model says of them, and who chooses rightly."""
        groups = [Group(prompt=Prompt(messages=user(text)), completions=tuple(row)) for (text, _), row in zip(problems, rows, strict=True)]
        right = [[answers.reaches(c.text, gold) for c in row] for (_, gold), row in zip(problems, rows, strict=True)]
        scores: list[list[float | None]] = [[] for _ in rows]
        doubted: list[list[bool | None]] = [[] for _ in rows]
        if self.reward:
            judge = cast(Reward, registry.create("align/learned_reward", {"models": (self.reward,), "steps": self.steps}))
            scores = [list(values) for values in judge.score(groups)]
            doubted = [list(values) for values in judge.doubts([_only(g, r) for g, r in zip(groups, right, strict=True)])]
        for (text, gold), row, reached, said, doubts in zip(problems, rows, right, scores, doubted, strict=True):
            failed = [c.finish == "error" for c in row]
            lowest = [-inf if f else s for f, s in zip(failed, said, strict=True)] if said else []
            solved = None if all(failed) else choices([c.text for c in row], lowest, gold)
            facts = {"problem": text, "answer": gold, "solutions": [c.text for c in row], "right": reached, "failed": sum(failed)}
            yield facts | {"scores": said, "right_with_wrong_step": [d for d in doubts if d is not None], "solved": solved}

    def _scores(self, model: Model, items: Sequence[dict[str, Any]]) -> list[Score]:
        known = [i for i in items if i["solved"] is not None]
        form = ["chat", self.n, self.max_tokens, self.temperature, self.reward, self.steps]
        mark = fingerprint(model, data=[[i["problem"], i["answer"]] for i in items], form=form, scorer=SCORER, scored=[i["problem"] for i in known])
        fields: dict[str, Any] = {"suite": self.name, "model": model.fingerprint, "fingerprint": mark, "not_scored": len(items) - len(known)}
        found = []
        for name in [n for n in (known[0]["solved"] if known else ()) if all(n in i["solved"] for i in known)]:
            values = [i["solved"][name] for i in known]
            whole = all(v in (0.0, 1.0) for v in values)  # Wilson's interval, which is not of width 0 where all agree
            score = rate_score([v == 1.0 for v in values], metric=name, **fields) if whole else mean_score(values, bounds=(0.0, 1.0), metric=name, **fields)
            found.append(score)
        return [*found, *_shares(items, fields | {"not_scored": 0})]


def _only(group: Group, right: Sequence[bool]) -> Group:
    """The group of the right solutions."""
    return group.model_copy(update={"completions": tuple(c for c, r in zip(group.completions, right, strict=True) if r)})


def _shares(items: Sequence[dict[str, Any]], fields: dict[str, Any]) -> list[Score]:
    """Shares of samples, which are alike within a problem: those that failed, and those that are right by a step that is called wrong."""
    every = {"failed": [(k < i["failed"], i["problem"]) for i in items for k in range(len(i["solutions"]))]}
    every["false_positives"] = [(doubted, i["problem"]) for i in items for doubted in i["right_with_wrong_step"]]
    found = []
    for name, trials in every.items():
        if trials:
            hits, problems = [hit for hit, _ in trials], [problem for _, problem in trials]
            found.append(Score.of_rate(Rate(sum(hits), len(hits), design_effect(hits, problems)), metric=name, better="lower", **fields))
    return found


def choices(solutions: Sequence[str], scores: Sequence[float | None], gold: str) -> dict[str, float]:
    """Whether each way of choosing finds a right solution, ties in shares; best and weighted as far as there are scores.

    Of all samples, and of 2, 4, ... of them. A score of -inf is that of a sample which failed.

    >>> choices(["4", "5", "5"], [0.9, 0.3, 0.2], "4")["weighted"], choices(["4", "5", "5"], [], "4")["majority@2"]
    (1.0, 0.3333333333333333)
    """
    right = [answers.reaches(text, gold) for text in solutions]
    said = [answers.final(text, gold) for text in solutions]
    weights = [s for s in scores if s is not None]
    scored = bool(weights) and len(weights) == len(right)
    found = {"single": fmean(right), "any_right": float(any(right))}
    for size in [len(right), *(2**i for i in range(1, len(right)) if 2**i < len(right))]:
        of = "" if size == len(right) else f"@{size}"
        found[f"majority{of}"] = _over(size, said, [1.0] * len(said), right)
        if scored:
            found[f"best{of}"] = best_of_n(weights, right, size)
            if all(w >= 0 or w == -inf for w in weights):
                found[f"weighted{of}"] = _over(size, said, weights, right)
    return found


def _over(size: int, said: Sequence[str], weights: Sequence[float], right: Sequence[bool]) -> float:
    """The vote among `size` of the samples, on average."""
    return fmean(_voted([said[i] for i in some], [weights[i] for i in some], [right[i] for i in some]) for some in _draws(len(said), size))


@cache
def _draws(n: int, size: int) -> list[tuple[int, ...]]:
    """All ways to take `size` of `n`, or DRAWS of them; the same ones whenever it is called."""
    if comb(n, size) <= DRAWS:
        return list(combinations(range(n), size))
    rng = random.Random(f"{n}:{size}")
    return [tuple(rng.sample(range(n), size)) for _ in range(DRAWS)]


def _voted(said: Sequence[str], weights: Sequence[float], right: Sequence[bool]) -> float:
    """Share of right ones among the answers of the largest total weight; an empty answer has no vote."""
    total: dict[str, float] = defaultdict(float)
    truth = dict(zip(said, right, strict=True))
    for answer, weight in zip(said, weights, strict=True):
        total[answer] += weight if answer else 0.0
    top = [answer for answer, weight in total.items() if weight == max(total.values())]
    return fmean(truth[answer] for answer in top)
