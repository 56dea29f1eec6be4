"""Over-optimisation of learned rewards, and what an ensemble does about it.

A true reward (`gold.plain`) labels pairs of answers of the base model, and some of the labels are flipped. Several reward models learn
from these; they differ in the seed alone. Then the best of n answers is chosen by one member, by the members' mean, by their minimum, or
by their mean less their variance, and the true reward of the choice is followed as n grows.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import getsource
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from common import FIRST, Trend, answers, arguments, direction, open_model, over, per_seed, record, short_prompts, summary  # imports fiducial, then torch  # isort: skip
import torch
from gold import PLAIN, plain

from fiducial.align import learned_reward
from fiducial.align.learned_reward import LearnedReward
from fiducial.align.reward_model import RewardModel
from fiducial.core.intervals import best_of_n, best_of_n_kl
from fiducial.core.records import Group, Prompt
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions
from fiducial.training.rewards import FunctionReward, Values

NAME = "overoptimisation"
GAO, COSTE = "Gao et al. 2023, arXiv:2210.10760", "Coste et al. 2024, arXiv:2310.02743"
ONE = "one reward model"
"""The mean over a seed's members, each of which chooses alone."""
ENSEMBLES = {"mean": "mean", "minimum": "min", "mean less variance": "penalised"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Every number of the experiment."""

    pairs: int = 192
    flipped: float = 0.1
    members: int = 4
    epochs: float = 3.0
    batch: int = 8
    asked: int = 12
    """Prompts of the pool that the best is chosen from."""
    pool: int = 48
    """Answers to each of them."""
    tokens: int = 16
    ns: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    half_way: int = 8
    """The n from which a fall to the largest is looked for; fixed beforehand."""
    learning_rate: float = 1e-3
    rank: int = 8
    depth: float = 0.2


SMALL = Sizes(pairs=4, members=2, epochs=1.0, batch=2, asked=2, pool=4, tokens=24, ns=(1, 2, 4), half_way=2, depth=1.0)


def labelled(base: Any, sizes: Sizes, seed: int) -> list[Group]:
    """Pairs of fresh answers with the truer one as the target, but for the flipped share."""
    prompts = short_prompts(base, sizes.pairs)
    groups = answers(base, prompts, k=2, tokens=sizes.tokens, seed=seed)
    chance, found = random.Random(seed), []
    for group, (a, b) in zip(groups, FunctionReward(PLAIN).score(groups), strict=True):
        if a == b:
            continue
        flip = chance.random() < sizes.flipped
        found.append(group.model_copy(update={"targets": (1.0, 0.0) if (a > b) != flip else (0.0, 1.0)}))
    return found


def member(base: Any, data: Sequence[Group], pool: Sequence[Group], sizes: Sizes, seed: int) -> Values:
    """What one newly trained reward model says of the pool."""
    options = TrainOptions(
        epochs=sizes.epochs,
        batch=sizes.batch,
        learning_rate=sizes.learning_rate,
        lora_rank=sizes.rank,
        lora_depth=sizes.depth,
        seed=seed,
        save_every=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = over(base)
        train(model, data, RewardModel(), options, folder=Path(folder) / "checkpoints")
        name = str(model.save(Path(folder) / "model"))
        scores = LearnedReward(models=(name,)).score(pool)
        learned_reward.opened.cache_clear()
    return scores


def together(members: Sequence[Values]) -> dict[str, Values]:
    """The members' scores combined by the product's own rules."""
    flat = [torch.tensor([v for row in values for v in row]) for values in members]
    found = {}
    for name, combine in ENSEMBLES.items():
        rest = iter(LearnedReward(models=tuple("m" * len(members)), combine=combine).combined(flat).tolist())
        found[name] = [tuple(next(rest) for _ in row) for row in members[0]]
    return found


def curve(proxy: Values, gold: Values, ns: Sequence[int]) -> dict[str, list[float]]:
    """What the best of n by the proxy has, mean over prompts, for each n: `gold`, its true reward, and `proxy`, its proxy reward, both in standard
    deviations of the answers to one prompt, from their mean. `right` is the share of pairs of one prompt's answers that the proxy orders as the truth does.
    """
    said, true = _standard(proxy), _standard(gold)
    pairs = [(p[i] - p[j]) * (g[i] - g[j]) > 0 for p, g in zip(said, true, strict=True) for i in range(len(p)) for j in range(i) if g[i] != g[j]]
    return {
        "gold": [fmean(best_of_n(p, g, n) for p, g in zip(said, true, strict=True)) for n in ns],
        "proxy": [fmean(best_of_n(p, p, n) for p in said) for n in ns],
        "right": [fmean(pairs)],
    }


def bent(true: Sequence[float], ns: Sequence[int]) -> tuple[float, float]:
    """Gao et al.'s curve for the best of n, R = d (a - b d) with d the root of the divergence in nats: (a, b) by least squares."""
    at = [best_of_n_kl(n) ** 0.5 for n in ns]
    two, three, four = (sum(d**power for d in at) for power in (2, 3, 4))
    first, second = sum(d * r for d, r in zip(at, true, strict=True)), sum(d * d * r for d, r in zip(at, true, strict=True))
    whole = two * four - three * three
    return (first * four - second * three) / whole, (first * three - second * two) / whole


def _standard(values: Values) -> list[list[float]]:
    centred = [[v - fmean(row) for v in row] for row in values]
    spread = pstdev([v for row in centred for v in row]) or 1.0
    return [[v / spread for v in row] for row in centred]


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(__doc__, argv)
    sizes = SMALL if chosen.small else Sizes()
    base = open_model(chosen)

    def asked(seed: int) -> list[Prompt]:
        return short_prompts(base, sizes.asked, skip=sizes.pairs + seed * sizes.asked)

    def run(seed: int) -> dict[str, Any]:
        groups = answers(base, asked(seed), k=sizes.pool, tokens=sizes.tokens, seed=10**6 + seed)
        gold, data = FunctionReward(PLAIN).score(groups), labelled(base, sizes, seed)
        scores = [member(base, data, groups, sizes, 100 * seed + m) for m in range(sizes.members)]
        members = [curve(values, gold, sizes.ns) for values in scores]
        alone = {what: [fmean(values) for values in zip(*(m[what] for m in members), strict=True)] for what in members[0]}
        chosen_by = {ONE: alone} | {f"ensemble, {name}": curve(values, gold, sizes.ns) for name, values in together(scores).items()}
        return {"chosen_by": chosen_by | {"the true reward itself": curve(gold, gold, sizes.ns)}, "members": members}

    seeds = per_seed(NAME, chosen, [asdict(sizes), [p.id for p in short_prompts(base, sizes.pairs) + asked(FIRST)], getsource(plain)], run)
    record(trend(seeds, sizes), chosen.out, small=chosen.small)
    return 0


def trend(seeds: Sequence[Mapping[str, Any]], sizes: Sizes) -> Trend:
    """The record."""
    half, most = sizes.ns.index(sizes.half_way), sizes.ns[-1]

    def curves(name: str, what: str) -> list[list[float]]:
        return [s["chosen_by"][name][what] for s in seeds]

    true = curves(ONE, "gold")
    gaps = [[p - g for p, g in zip(*both, strict=True)] for both in zip(curves(ONE, "proxy"), true, strict=True)]
    right = [r[0] - 0.5 for r in curves(ONE, "right")]
    learnt = direction("The reward models have learnt something", "ours, a condition of the rest", right, "share of pairs ordered rightly, less a half")
    parting = direction(
        "What the proxy promises and what is gained part as n grows",
        "ours, true of any imperfect proxy: read its size",
        [g[-1] - g[1] for g in gaps],
        f"proxy less true reward, n = {most} less n = {sizes.ns[1]}",
    )
    falling = direction(
        "With one reward model the true reward falls in the end", GAO, [t[half] - t[-1] for t in true], f"true reward, n = {sizes.half_way} less n = {most}"
    )
    fits = {name: [bent(c, sizes.ns) for c in curves(name, "gold")] for name in seeds[0]["chosen_by"]}
    bending = direction(
        "The true reward bends down: b > 0 in R = d (a - b d), d the root of the KL",
        GAO,
        [b for _, b in fits[ONE]],
        "b of one reward model, in standard deviations",
    )
    helping = [
        direction(
            f"The ensemble ({name}) beats one reward model",
            COSTE,
            [e[-1] - t[-1] for e, t in zip(found, true, strict=True)],
            f"true reward at n = {most}, ensemble less one",
        )
        for name in ENSEMBLES
        for found in [curves(f"ensemble, {name}", "gold")]
    ]
    rows = []
    for name in seeds[0]["chosen_by"]:
        fit = {"a of the fit": summary([a for a, _ in fits[name]]), "b of the fit": summary([b for _, b in fits[name]])}
        cells = {f"n = {n}, KL <= {best_of_n_kl(n):.2f}": summary([c[i] for c in curves(name, "gold")]) for i, n in enumerate(sizes.ns) if n > 1}
        rows.append({"chosen by": name, "orders pairs rightly": summary([c[0] for c in curves(name, "right")]), **cells, **fit})
    return Trend(
        name=NAME,
        question="Does the true reward of the best of n by a learned reward fall behind as n grows, and does an ensemble help?",
        setting=f"SmolLM2-135M-Instruct as policy and as the reward models' backbone. True reward: minus the mean letters per word. Per seed {sizes.pairs} "
        f"pairs of answers of at most {sizes.tokens} tokens, labelled by the true reward, {sizes.flipped:.0%} of the labels flipped by chance; {sizes.members} "
        f"reward models on the same pairs, each with its own head, adapter and order: LoRA of rank {sizes.rank} on the top {sizes.depth:.0%} of the layers, "
        f"{sizes.epochs:g} passes, learning rate {sizes.learning_rate:g}. Best of n from {sizes.pool} answers to each of {sizes.asked} more, others for "
        f"every seed, by the unbiased estimator.",
        directions=[learnt, parting, falling, bending, *helping],
        rows=rows,
        seeds=seeds,
        notes=[
            "Rewards are in standard deviations of the answers to one prompt, from their mean; one reward model is the mean over a seed's members.",
            "Every seed has its own prompts and answers to choose from; the prompts of the labelled pairs are the same, their answers are not.",
            "With 96 pairs, a quarter of them flipped, one pass and heads of ten times the spread, the first sizes, the reward models ordered pairs by "
            "chance (0.503); sizes and spread were changed after that, on seed 0.",
            "The papers go to n of ten thousand and more, a KL above 8 nats; a fall that sets in later is not seen here.",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
