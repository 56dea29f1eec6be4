"""Process against outcome supervision: choosing among N solutions of multi-step arithmetic.

    python bench/trends/prm_against_orm.py [--seeds N] [--small]

A generator is taught the form of solutions with align/sft. Its samples are labelled by a program, step by step and by their answer, and
the same samples train a process and an outcome reward model (align/process_reward, labels process and outcome). Both choose among
samples for new problems. Every problem asks for the last digit of a result, so that a wrong step can end in a right answer.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from common import Trend, arguments, direction, open_model, per_seed, record, summary  # isort: skip

import fiducial
from fiducial.align import learned_reward
from fiducial.align.learned_reward import LearnedReward
from fiducial.align.process_reward import ProcessReward
from fiducial.align.sft import SFT
from fiducial.core.intervals import Rate, best_of_n
from fiducial.core.records import Completion, Group, Message, Prompt
from fiducial.core.roles import Objective
from fiducial.data.steps import solution
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

NAME = "prm_against_orm"
PAPER = "Lightman et al. 2023, arXiv:2305.20050"
SYSTEM = Message(role="system", content="Calculate step by step.")
DRAWS = 200
"""Random subsets that a vote is averaged over."""
Labels = Literal["process", "outcome"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Every number of the experiment."""

    operations: int = 3
    taught: int = 2000
    """Solutions that the generator is taught, so that most of its own are right."""
    trained: int = 128
    """Problems per seed whose samples train the reward models."""
    k: int = 6
    """Samples of each of these."""
    tested: int = 48
    """Problems per seed to choose solutions for."""
    n: tuple[int, ...] = (1, 2, 4, 8)
    """Samples to choose among; the last is drawn."""
    max_tokens: int = 48
    teaching_rate: float = 1e-3
    learning_rate: float = 5e-4
    """Of the reward models."""
    epochs: float = 2.0
    """Their passes, as in the paper."""


SMALL = Sizes(taught=4, trained=2, k=2, tested=2, n=(1, 2, 4), max_tokens=8)


class Problem(NamedTuple):
    """A number and what is done with it."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, rng: random.Random, operations: int) -> Problem:
        """Numbers up to 15 added to and subtracted from one below 50; no result is negative or above 99."""
        start = value = rng.randint(10, 49)
        found: list[tuple[str, int]] = []
        while len(found) < operations:
            sign, number = rng.choice("+-"), rng.randint(2, 15)
            after = value + number if sign == "+" else value - number
            if 0 <= after <= 99:
                value = after
                found.append((sign, number))
        return cls(start, tuple(found))

    @property
    def prompt(self) -> Prompt:
        """What is asked."""
        text = "".join(f"{sign}{number}" for sign, number in self.operations)
        return Prompt(messages=(SYSTEM, Message(role="user", content=f"What is the last digit of {self.start}{text}?")))

    @property
    def lines(self) -> list[str]:
        """The right solution."""
        value, found = self.start, []
        for sign, number in self.operations:
            after = value + number if sign == "+" else value - number
            found.append(f"{value}{sign}{number}={after}")
            value = after
        return [*found, f"answer {value % 10}"]


class Checked(NamedTuple):
    """A sampled solution, held against the right one."""

    completion: Completion
    """With its steps; 1 = right, 0 = the first wrong one, None after it."""
    answer: str
    right: bool
    """Whether the answer is; not whether the steps are."""
    lucky: bool
    """Right answer, wrong step: a false positive of outcome supervision."""


def checked(problem: Problem, text: str) -> Checked:
    """The gold labels, by program."""
    lines, gold = [line for line in text.split("\n") if line.strip()], problem.lines
    same = [i < len(gold) and line.strip() == gold[i] for i, line in enumerate(lines)]
    wrong = next((i for i, good in enumerate(same) if not good), len(lines))
    values = [1.0 if i < wrong else 0.0 if i == wrong else None for i in range(len(lines))]
    answer = lines[-1].strip() if lines else ""
    right = answer == gold[-1]
    return Checked(solution(lines, values), answer if answer.startswith("answer ") else "", right, right and (wrong < len(lines) or len(lines) < len(gold)))


def problems(count: int, sizes: Sizes, seed: str) -> list[Problem]:
    """Problems of one use. There are so many that two uses practically never share one."""
    rng = random.Random(seed)
    return [Problem.draw(rng, sizes.operations) for _ in range(count)]


def trained(model: Any, groups: Sequence[Group], objective: Objective, options: TrainOptions, folder: Path) -> Path:
    """A folder with the trained model."""
    train(model, groups, objective, options, folder=folder / "checkpoints")
    place = model.save(folder / "model")
    model.close()
    return place


def taught(chosen: Any, sizes: Sizes, folder: Path) -> Path:
    """The generator: the model after supervised fine-tuning on right solutions."""
    groups = [Group(prompt=p.prompt, completions=(Completion(text="\n".join(p.lines)),)) for p in problems(sizes.taught, sizes, "taught")]
    return trained(open_model(chosen), groups, SFT(), TrainOptions(batch=4, learning_rate=sizes.teaching_rate, lora_depth=0.5), folder)


def sampled(generator: Any, asked: Sequence[Problem], k: int, sizes: Sizes, seed: int) -> list[list[Checked]]:
    """`k` checked samples of each problem at temperature 1."""
    rows = generator.sample([p.prompt.messages for p in asked], k=k, max_tokens=sizes.max_tokens, temperature=1.0, seed=seed)
    return [[checked(problem, c.text) for c in row] for problem, row in zip(asked, rows, strict=True)]


def groups_of(asked: Sequence[Problem], rows: Sequence[Sequence[Checked]]) -> list[Group]:
    """The samples with both kinds of label: values of steps, and the answer as reward."""
    return [
        Group(prompt=p.prompt, completions=tuple(c.completion for c in row), rewards=tuple(float(c.right) for c in row))
        for p, row in zip(asked, rows, strict=True)
    ]


def voted(row: Sequence[Checked], weights: Sequence[float], n: int, rng: random.Random) -> float:
    """How often the answer with the largest weight among `n` of the samples is right; answers that tie share their places."""
    total = 0.0
    draws = 1 if n == len(row) else DRAWS
    for _ in range(draws):
        weight: dict[str, float] = defaultdict(float)
        for i in rng.sample(range(len(row)), n):
            weight[row[i].answer] += weights[i] if row[i].answer else 0.0
        top = [answer for answer, w in weight.items() if w == max(weight.values())]
        total += sum(any(c.right and c.answer == answer for c in row) for answer in top) / len(top)
    return total / draws


def choices(rows: Sequence[Sequence[Checked]], scores: Mapping[str, Sequence[Sequence[float]]], sizes: Sizes) -> dict[str, dict[str, float]]:
    """Per way of choosing and N: share of problems solved; besides, the share solved by luck."""
    rng = random.Random(0)

    def mean(one: Callable[[int, Sequence[Checked]], float]) -> float:
        return fmean(one(i, row) for i, row in enumerate(rows))

    found: dict[str, dict[str, float]] = defaultdict(dict)
    for n in sizes.n:
        at = str(n)
        found["majority"][at] = mean(lambda i, row, n=n: voted(row, [1.0] * len(row), n, rng))
        found["any right"][at] = mean(lambda i, row, n=n: best_of_n([c.right for c in row], [c.right for c in row], n))
        for name, of in scores.items():
            found[name][at] = mean(lambda i, row, n=n, of=of: best_of_n(of[i], [c.right for c in row], n))
            found[f"{name}, lucky"][at] = mean(lambda i, row, n=n, of=of: best_of_n(of[i], [c.lucky for c in row], n))
            found[f"{name}-weighted vote"][at] = mean(lambda i, row, n=n, of=of: voted(row, of[i], n, rng))
    return dict(found)


def one_seed(generator: Callable[[], Path], sizes: Sizes, seed: int) -> dict[str, Any]:
    """New problems, new samples, two reward models, and what each way of choosing solves."""
    model: Any = fiducial.open(str(generator()), device="cpu")
    learning, asked = problems(sizes.trained, sizes, f"trained {seed}"), problems(sizes.tested, sizes, f"tested {seed}")
    material = groups_of(learning, sampled(model, learning, sizes.k, sizes, seed))
    rows = sampled(model, asked, sizes.n[-1], sizes, 1000 + seed)
    model.close()
    scores: dict[str, list[list[float]]] = {}
    kinds: tuple[tuple[Labels, Mapping[str, Literal["product", "min", "last"]]], ...] = (
        ("process", {"PRM": "product", "PRM, least step": "min"}),
        ("outcome", {"ORM": "last"}),
    )
    for labels, ways in kinds:
        with TemporaryDirectory() as folder:
            options = TrainOptions(batch=2, epochs=sizes.epochs, learning_rate=sizes.learning_rate, seed=seed)
            place = trained(fiducial.open(str(generator()), device="cpu"), material, ProcessReward(labels=labels), options, Path(folder))
            for name, read in ways.items():
                said = LearnedReward(models=(str(place),), steps=read).score(groups_of(asked, rows))
                scores[name] = [[-1.0 if s is None else s for s in row] for row in said]
            learned_reward.opened.cache_clear()
    flat = [c for row in rows for c in row]
    steps = sizes.operations + 1
    counts = {
        "samples": len(flat),
        "short": sum(len(c.completion.ends) < steps for c in flat),
        "right": sum(c.right for c in flat),
        "lucky": sum(c.lucky for c in flat),
    }
    labelled = {"right": sum(r == 1 for g in material for r in g.rewards or ()), "solutions": sum(len(g.completions) for g in material)}
    return {"solved": choices(rows, scores, sizes), "samples": counts, "training": labelled}


def trend(found: Sequence[Mapping[str, Any]], sizes: Sizes) -> Trend:
    """The directions, and the table over N."""
    most = str(sizes.n[-1])

    def of(name: str, n: str) -> list[float]:
        return [seed["solved"][name][n] for seed in found]

    def gap(first: str, second: str, n: str) -> list[float]:
        return [a - b for a, b in zip(of(first, n), of(second, n), strict=True)]

    figure, among = f"{PAPER}, figure 3", f"share of problems solved, N = {most}"
    directions = [
        direction("a PRM chooses better than an ORM", figure, gap("PRM", "ORM", most), f"PRM less ORM, {among}"),
        direction("a PRM chooses better than majority voting", figure, gap("PRM", "majority", most), f"PRM less majority, {among}"),
        direction(
            "an ORM chooses more solutions that are right by luck",
            "ours, after the paper's argument",
            gap("ORM, lucky", "PRM, lucky", most),
            f"ORM less PRM, share of problems, N = {most}",
        ),
    ]
    counted = {name: sum(seed["samples"][name] for seed in found) for name in ("samples", "right", "lucky", "short")}
    learnt = Rate(sum(s["training"]["right"] for s in found), sum(s["training"]["solutions"] for s in found))
    setting = (
        f"SmolLM2-135M-Instruct, taught {sizes.taught} right solutions (align/sft, LoRA, one pass, the same generator for all seeds). Problems: "
        f"{sizes.operations} additions or subtractions of numbers up to 15, a line each, then the last digit of the result. Per seed: "
        f"{sizes.trained} new problems with {sizes.k} samples each train both reward models from the generator ({sizes.epochs:g} passes); {sizes.tested} "
        f"others with {sizes.n[-1]} samples each are chosen among, temperature 1. PRM: product over steps; ORM: score at the end. Best of N is exact over "
        f"all subsets, votes are means over {DRAWS} subsets."
    )
    return Trend(
        NAME,
        "Does a reward model that was told which step is wrong choose better solutions than one that was told which answer is wrong, or than a vote?",
        setting,
        directions,
        [{"N": n} | {name: summary(of(name, str(n))) for name in found[0]["solved"]} for n in sizes.n],
        found,
        (
            f"Samples to choose among with a right answer: {Rate(counted['right'], counted['samples'])}; right answer after a wrong step: "
            f"{Rate(counted['lucky'], counted['samples'])}. Samples of one problem are not independent, so these intervals are too narrow.",
            f"Training samples with a right answer: {learnt}.",
            f"Samples to choose among that leave steps out: {Rate(counted['short'], counted['samples'])}. A product of fewer probabilities is larger, and one "
            "such sample among many is enough to be chosen; the least step has no such preference.",
            "`lucky`: share of problems whose chosen solution has a right answer and a wrong step; it counts as solved, as in the paper.",
            "Two earlier sizes, in which the generator was taught 400 solutions and a third of its answers were right, decided nothing but that a PRM chose "
            "worse than a vote: 32 problems and three seeds, then 128 and five. They were changed on seed 0, to arithmetic that the model can do.",
            "Unlike the paper, the PRM is trained on uniform samples, those of the ORM, and not on wrong answers that it found convincing.",
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all seeds and writes the record."""
    chosen = arguments(__doc__, argv, seeds=5)
    sizes = SMALL if chosen.small else Sizes()
    with TemporaryDirectory() as folder:
        ready: list[Path] = []

        def generator() -> Path:
            if not ready:
                ready.append(taught(chosen, sizes, Path(folder)))
            return ready[0]

        found = per_seed(NAME, chosen, [asdict(sizes), DRAWS], partial(one_seed, generator, sizes))
    record(trend(found, sizes), chosen.out, small=chosen.small)
    return 0


if __name__ == "__main__":
    sys.exit(main())
