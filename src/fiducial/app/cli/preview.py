"""What a training on data would do, before it does it: which tokens are learnt from, how many steps, what a step takes.

    fiducial align dpo smollm2 --data pairs.jsonl --preview

Time and memory are those of two steps that are really made, on a model that is thrown away afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fiducial.app.cli.job import Job
from fiducial.app.cli.progress import duration
from fiducial.app.measure import peak_memory
from fiducial.core.errors import ConfigError
from fiducial.core.records import Group
from fiducial.core.roles import Objective
from fiducial.core.run import several

if TYPE_CHECKING:
    from fiducial.models.local import LocalModel
    from fiducial.training.data import Data
    from fiducial.training.options import TrainOptions

SHOWN = 5
"""Groups whose tokens are shown."""
WIDTH = 240
"""Characters of the prompt and of the completion that are shown, from the place where learning begins."""
OPEN, CLOSE = "[[", "]]"


def preview(job: Job, groups: Sequence[Group], objective: Objective, options: TrainOptions) -> int:
    """Shows it; makes no run and keeps nothing."""
    from fiducial.training.loop import planned_steps, read
    from fiducial.training.scratch import begin_from_scratch

    if several():
        raise ConfigError("--preview looks at a training in one process, and several were started", hint="call it without torchrun")
    with closing(job.local()) as model:
        if options.from_scratch or options.sizes:
            begin_from_scratch(model, options)
        data, held = read(model, groups, objective, options)
        found: dict[str, Any] = {
            "groups": len(data.groups),
            "left_out": data.left_out + (held.left_out if held else 0),
            "held_out": len(held.groups) if held else 0,
            "completions": len(data.paths),
            "without_end": data.endless,
            "tokens": sum(map(len, data.paths.ids)),
            "longest": max(map(len, data.paths.ids)),
            "steps": planned_steps(len(data.groups), options),
            "shown": [_shown(model, data, i) for i in range(min(SHOWN, len(data.groups)))],
        }
        job.output.shown(
            f"learnt from: {found['groups']} groups; left out (too long, or too few completions): {found['left_out']}; held out: {found['held_out']}",
            f"what is learnt stands between {OPEN} and {CLOSE}" + (": the state at the end" if "scores" in objective.reads else ""),
            *(line for number, group in enumerate(found["shown"], 1) for line in _lines(number, group)),
            f"completions: {found['completions']}, with their prompts {found['tokens']} tokens, the longest {found['longest']}",
            f"completions that no end token closes: {found['without_end']}",
            f"steps: {found['steps']}, of {options.batch} groups each",
        )
        with job.progress.task("two steps, to measure", 2) as task:
            again = _again(model, data, options)
            cost = _cost(model, _tried(data, groups, options, again=again), objective, options, task.advance, again=again)
    job.output.shown(*_costs(cost, found["steps"], options), "nothing was kept; to train, leave out --preview")
    job.output.result(found | cost)
    return 0


def _shown(model: LocalModel, data: Data, index: int) -> list[dict[str, Any]]:
    """The completions of a group: what comes before the first token that is learnt from, and what is learnt."""
    rows = []
    for k, path in enumerate(data.paths_of([index])):
        ids, start = data.paths.ids[path], data.paths.start[path]
        before, learnt = (model.tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:start], ids[start:]))
        reward = float(data.parts.rewards[index, k])
        row = {"before": before, "learnt": learnt, "tokens": len(ids) - start, "target": float(data.parts.targets[index, k])}
        rows.append(row | ({"reward": reward} if reward == reward else {}))  # NaN where it is not known
    return rows


def _lines(number: int, rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        before, learnt = (row[name].replace("\n", "\\n") for name in ("before", "learnt"))
        before = before if len(before) <= WIDTH else "…" + before[-WIDTH:]
        learnt = learnt if len(learnt) <= WIDTH else learnt[:WIDTH] + "…"
        worth = f"target {row['target']:.2g}" + (f", reward {row['reward']:.3g}" if "reward" in row else "")
        found.append(f"  {number}. ({worth}, {row['tokens']} tokens) {before}{OPEN}{learnt}{CLOSE}")
    return found


def _costs(cost: dict[str, Any], steps: int, options: TrainOptions) -> list[str]:
    less = ["a smaller --max-length"]
    if not options.lora_rank and not options.from_scratch:
        less.append("an adapter (--lora-rank 16)")
    elif options.lora_rank and options.lora_depth > 0.5:
        less.append("--lora-depth 0.5")
    if not cost["fits"]:
        return [f"two steps do not fit into memory; try {', or '.join(less)}"]
    each = cost["seconds_per_step"]
    memory = f"memory at its peak: {cost['memory_mib']} MiB" if cost["memory_mib"] else "memory: not known on this system"
    return [
        f"a step took {each:.2g} s here, so the steps alone would take about {duration(each * steps)}" + (" of --minutes" if options.minutes else ""),
        f"weights that train: {cost['trained'] / 1e6:.3g} of {cost['weights'] / 1e6:.3g} million",
        f"tokens that the network was fed: {cost['fed']} of {cost['naive']}; what several begin with once, and no last one",
        f"{memory}; for less: {', or '.join(less)}",
    ]


def _again(model: LocalModel, data: Data, options: TrainOptions) -> bool:
    """Whether the training comes to the same groups again and may keep what frozen blocks make of them: then a step is made twice, else two."""
    from fiducial.training.frozen import MOST, PASSES

    size = sum(map(len, data.paths.ids)) * model.width * next(model.module.parameters()).dtype.itemsize
    return options.epochs >= PASSES and size <= MOST


def _tried(data: Data, groups: Sequence[Group], options: TrainOptions, *, again: bool) -> list[Group]:
    """As they were given, groups for two whole steps, or for one that is made twice: the first ones of the schedule, and last the one with the most tokens."""
    from fiducial.training.loop import batch

    count = min(options.batch if again else 2 * options.batch, len(data.groups))
    order = batch(0, len(data.groups), options.model_copy(update={"batch": len(data.groups), "epochs": 1.0}))
    largest = max(order, key=lambda g: sum(len(data.paths.ids[path]) for path in data.paths_of([g])))
    chosen = [*[g for g in order if g != largest][: count - 1], largest]
    given = {group.id: group for group in groups}
    return [given[data.names[g]] for g in chosen]


def _cost(
    model: LocalModel, groups: Sequence[Group], objective: Objective, options: TrainOptions, done: Callable[[int], None], *, again: bool
) -> dict[str, Any]:
    """Seconds, tokens and memory of two steps, and how many weights they move; where they do not fit, that alone. The model is another one afterwards."""
    import torch

    from fiducial.training.loop import train

    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    at: list[float] = []

    def report(*_: Any) -> None:
        at.append(time.monotonic())
        done(1)

    each = min(options.batch, len(groups))
    if not again:
        groups = [*groups, *groups][-2 * each :]  # two steps, also where there are groups for less
    two = {"epochs": 2.0 if again else 1.0, "batch": each}
    changed = two | {"held_out": 0.0, "save_every": 10**9, "watch_every": 0, "minutes": None}
    try:
        with TemporaryDirectory() as folder:
            result = train(model, groups, objective, options.model_copy(update=changed), folder=Path(folder), report=report)
    except torch.OutOfMemoryError:
        return {"fits": False}
    weights = list(model.module.parameters())
    return {
        "fits": True,
        "seconds_per_step": at[1] - at[0],  # the first one warms up
        "fed": result.tokens,
        "naive": result.naive_tokens,
        "memory_mib": torch.cuda.max_memory_allocated(model.device) >> 20 if on_gpu else peak_memory(),
        "trained": sum(p.numel() for p in weights if p.requires_grad),
        "weights": sum(p.numel() for p in weights),
    }
