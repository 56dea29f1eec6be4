"""Reward against distance from the base model: EXO and DPO, on preferences and on rewards.

The paper's claim (Ji et al. 2024, arXiv:2402.00856, figure on the oracle reward and the KL): at the same distance from the base model EXO
has the higher true reward. Here the true reward is `gold.plain`. Per seed, K answers to each prompt are drawn from the base model and
scored; all four learn from these same answers: DPO and EXO-pref from pairs of them, DPO-rw and EXO-rw from all K with their rewards. They
differ in the direction of the divergence alone, within each two. The policy is looked at several times along the way on prompts it was not
trained on, with samples of its own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isnan, sqrt
from pathlib import Path
from typing import Any

from common import Trend, answers, arguments, direction, open_model, over, per_seed, record, short_prompts, summary  # imports fiducial, then torch  # isort: skip
import torch
from gold import PLAIN

from fiducial.align.dpo import DPO
from fiducial.align.exo import EXO
from fiducial.core.records import Group, Prompt
from fiducial.training import lora, samples
from fiducial.training.kl import k3
from fiducial.training.loop import train
from fiducial.training.objective import keep
from fiducial.training.options import TrainOptions
from fiducial.training.rewards import FunctionReward, mean

NAME = "exo_against_dpo"
SOURCE = "Ji et al. 2024, arXiv:2402.00856"
METHODS = {
    "DPO": (DPO, {}),
    "EXO-pref": (EXO, {}),
    "DPO-rw": (EXO, {"labels": "rewards", "divergence": "forward"}),
    "EXO-rw": (EXO, {"labels": "rewards"}),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Every number of the experiment."""

    prompts: int = 24
    """To learn from; each with `k` answers."""
    k: int = 4
    held_out: int = 12
    """Prompts that the policy is looked at on; each with `looked_at` answers."""
    looked_at: int = 4
    tokens: int = 16
    beta: float = 0.5
    epochs: float = 2.0
    steps: int = 6
    """Optimizer steps per pass over the data, one less where pairs of equal reward fell away."""
    looks: int = 4
    learning_rate: float = 3e-3
    rank: int = 8
    depth: float = 0.25


SMALL = Sizes(prompts=3, held_out=2, tokens=24, steps=2, looks=2, depth=1.0)


def drawn(model: Any, prompts: Sequence[Prompt], k: int, tokens: int, seed: int) -> list[Group]:
    """Answers of the model with their true rewards."""
    groups = answers(model, prompts, k=k, tokens=tokens, seed=seed)
    return [g.model_copy(update={"rewards": r}) for g, r in zip(groups, FunctionReward(PLAIN).score(groups), strict=True)]


def look(model: Any, prompts: Sequence[Prompt], sizes: Sizes, seed: int) -> dict[str, float]:
    """True reward of fresh samples, and their distance from the base model in nats per answer (k3 summed over tokens)."""
    groups = drawn(model, prompts, sizes.looked_at, sizes.tokens, seed)
    data = samples.data(model, groups, max_length=1024)
    every = range(len(data.groups))
    now = torch.cat(samples.per_group(model, data, every, temperature=1.0), dim=1)[0]
    with lora.adapter_off(model.module):
        before = torch.cat(samples.per_group(model, data, every, temperature=1.0), dim=1)[0]
    count = sum(len(g.completions) for g in data.groups)
    return {"reward": mean([g.rewards or () for g in groups]), "kl": float(k3(now - before).sum()) / count}


def pairs(groups: Sequence[Group]) -> list[Group]:
    """The K answers of each prompt two by two, the one with the higher reward as the target; equal ones are left out."""
    found = []
    for group in groups:
        assert group.rewards is not None
        for a, b in zip(range(0, len(group.completions), 2), range(1, len(group.completions), 2), strict=False):
            if (difference := (group.rewards[a] or 0) - (group.rewards[b] or 0)) != 0:
                found.append(keep(group, [a, b]).model_copy(update={"targets": (1.0, 0.0) if difference > 0 else (0.0, 1.0)}))
    return found


def trained(base: Any, method: str, groups: Sequence[Group], held_out: Sequence[Prompt], sizes: Sizes, seed: int) -> list[dict[str, float]]:
    """Reward and distance along the training of one method."""
    objective, options = METHODS[method]
    data = list(groups) if method.endswith("-rw") else pairs(groups)
    steps = max(1, round(sizes.steps * sizes.epochs))
    chosen = TrainOptions(
        epochs=sizes.epochs,
        batch=max(1, -(-len(data) // sizes.steps)),
        learning_rate=sizes.learning_rate,
        lora_rank=sizes.rank,
        lora_depth=sizes.depth,
        seed=seed,
        watch_every=max(1, steps // sizes.looks),
        save_every=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            over(base), data, objective(beta=sizes.beta, **options), chosen, folder=Path(folder), watch=lambda _, m: (look(m, held_out, sizes, seed), "")
        )
    return result.watched


def at_equal_distance(points: Sequence[Mapping[str, float]], start: float, farthest: float) -> float:
    """Mean reward over distances from 0 to `farthest`, straight lines between the points; `start` is the reward at distance 0.

    A distance is the square root of the KL: reward rises about as that root (Gao et al. 2023), so that straight lines over it favour neither
    the method that was looked at near the base nor the one that was looked at far from it.
    """
    line = [(0.0, start), *sorted((sqrt(max(0.0, p["kl"])), p["reward"]) for p in points)]
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(line):
        end = min(x1, farthest)
        if end > x0:
            y = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y) / 2
    return area / farthest


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(__doc__, argv)
    sizes = SMALL if chosen.small else Sizes()
    base = open_model(chosen)
    prompts = short_prompts(base, sizes.prompts)
    held_out = short_prompts(base, sizes.held_out, skip=sizes.prompts)

    def run(seed: int) -> dict[str, Any]:
        groups = drawn(base, prompts, sizes.k, sizes.tokens, seed)
        start = look(base, held_out, sizes, seed)["reward"]
        found = {method: trained(base, method, groups, held_out, sizes, seed) for method in METHODS}
        return {"start": start, "points": found}

    seeds = per_seed(NAME, chosen, [asdict(sizes), [p.id for p in prompts + held_out]], run)
    for seed in seeds:
        seed["common_kl"] = min(max(p["kl"] for p in points) for points in seed["points"].values())
        seed["mean_reward"] = {m: at_equal_distance(p, seed["start"], sqrt(seed["common_kl"])) for m, p in seed["points"].items()}
    record(trend(seeds, sizes), chosen.out, small=chosen.small)
    return 0


def trend(seeds: Sequence[Mapping[str, Any]], sizes: Sizes) -> Trend:
    """The record."""

    def above(better: str, worse: str) -> list[float]:
        found = [s["mean_reward"][better] - s["mean_reward"][worse] for s in seeds]
        assert not any(map(isnan, found))
        return found

    claims = [("EXO-pref", "DPO", SOURCE, "on the same pairs"), ("EXO-rw", "DPO-rw", SOURCE, "on the same rewards")]
    claims.append(("EXO-rw", "EXO-pref", "ours", "rewards say more than preferences"))
    rows = []
    for method in METHODS:
        gains = [max(p["reward"] for p in s["points"][method]) - s["start"] for s in seeds]
        last = [s["points"][method][-1] for s in seeds]
        rows.append(
            {
                "method": method,
                "mean reward up to the common distance": summary([s["mean_reward"][method] for s in seeds]),
                "reward at the last look": summary([p["reward"] for p in last]),
                "KL at the last look, nats per answer": summary([p["kl"] for p in last]),
                "best rise over the base": summary(gains),
            }
        )
    rows.append(
        {
            "method": "base",
            "mean reward up to the common distance": "-",
            "reward at the last look": summary([s["start"] for s in seeds]),
            "KL at the last look, nats per answer": "0",
            "best rise over the base": "-",
        }
    )
    return Trend(
        name=NAME,
        question="Is the true reward at the same distance from the base model higher with EXO than with DPO?",
        setting=f"SmolLM2-135M-Instruct. Reward: minus the mean letters per word. {sizes.prompts} prompts of at most 20 tokens with {sizes.k} answers of "
        f"at most {sizes.tokens} tokens from the base model, drawn anew for each seed; {sizes.epochs:g} passes of {sizes.steps} steps, LoRA of rank "
        f"{sizes.rank} on the top {sizes.depth:.0%} of the layers, learning rate {sizes.learning_rate:g} and beta {sizes.beta:g} for all. Looked at "
        f"{sizes.looks} times on {sizes.held_out} other prompts with {sizes.looked_at} fresh samples each; "
        f"means are over the distance, the square root of the KL.",
        directions=[
            direction(f"{a} above {b}, {why}", source, above(a, b), f"{a} less {b}, mean reward over the distance that all four reach")
            for a, b, source, why in claims
        ],
        rows=rows,
        seeds=seeds,
        notes=[
            "The paper draws its frontier with larger models; here there is one beta, and the points are looks along one training.",
            "One learning rate for all: Adam takes the size of the gradient, in which EXO and DPO differ, out of the step.",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
