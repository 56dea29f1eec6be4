"""What a training on data would do, before it does it: which tokens are learnt from, how many steps, what a step takes.

    fiducial align dpo smollm2 --data pairs.jsonl --preview

Time and memory are those of two steps that are really made, on a model that is thrown away afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    from fiducial.core.run import follows
    from fiducial.training.loop import planned_steps, read

    if job.resumed or follows():
        raise ConfigError("--preview looks at a training before it begins, in one process", hint="leave it out")
    with closing(job.local()) as model:
        data, held = read(model, groups, objective, options)
        shown = [_shown(model, data, i) for i in range(min(SHOWN, len(data.groups)))]
        longest = max(range(len(data.paths)), key=lambda i: len(data.paths.ids[i]))
        steps = planned_steps(len(data.groups), options)
        with job.progress.task("two steps, to measure", 2) as task:
            cost = _cost(model, _tried(data, options, longest), objective, options, task.advance)
    counts = {"groups": len(data.groups), "left_out": data.left_out, "held_out": len(held.groups) if held else 0, "completions": len(data.paths)}
    counts |= {"tokens": sum(map(len, data.paths.ids)), "longest": len(data.paths.ids[longest]), "steps": steps}
    whole = steps * cost["seconds_per_step"]
    less = ["--lora-depth 0.5", "a smaller --max-length", *(["an adapter (--lora-rank 16)"] if not options.lora_rank else [])]
    lines = [
        f"learnt from: {counts['groups']} groups; left out (too long, or too few completions): {counts['left_out']}; held out: {counts['held_out']}",
        f"what is learnt stands between {OPEN} and {CLOSE}" + (": the state at the end" if "scores" in objective.reads else ""),
        *(line for number, group in enumerate(shown, 1) for line in _lines(number, group)),
        f"completions: {counts['completions']}, with their prompts {counts['tokens']} tokens, the longest {counts['longest']}",
        f"weights that train: {cost['trained'] / 1e6:.3g} of {cost['weights'] / 1e6:.3g} million",
        f"steps: {steps}, of {options.batch} groups each; one took {cost['seconds_per_step']:.2g} s here, all would take about {duration(whole)}",
        f"tokens that were saved by sharing what prompts have in common: {1 - cost['fed'] / cost['naive']:.0%}",
        f"memory: up to {cost['memory_mib']} MiB; for less: {', '.join(less)}",
        "nothing was kept; to train, leave out --preview",
    ]
    job.output.result(counts | {"shown": shown, "seconds": whole, **cost}, *lines)
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


def _tried(data: Data, options: TrainOptions, longest: int) -> list[Group]:
    """The groups of the first two steps, the one with the longest path among them."""
    from fiducial.training.loop import batch

    chosen = [g for step in range(2) for g in batch(step, len(data.groups), options)]
    owner = next(g for g in range(len(data.groups)) if longest in data.paths_of([g]))
    chosen = chosen if owner in chosen else [*chosen[:-1], owner]
    return [data.groups[g] for g in dict.fromkeys(chosen)]


def _cost(model: LocalModel, groups: Sequence[Group], objective: Objective, options: TrainOptions, done: Any) -> dict[str, Any]:
    """Seconds, tokens and memory of two steps, and how many weights they move. The model is not what it was afterwards."""
    import torch

    from fiducial.training.loop import train

    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    at: list[float] = []

    def report(*_: Any) -> None:
        at.append(time.monotonic())
        done(1)

    size = min(options.batch, len(groups))
    changed = {"epochs": 2 * size / len(groups), "batch": size, "held_out": 0.0, "save_every": 10**9, "watch_every": 0, "minutes": None}
    with TemporaryDirectory() as folder:
        result = train(model, groups, objective, options.model_copy(update=changed), folder=Path(folder), report=report)
    on_gpu = torch.cuda.max_memory_allocated() >> 20 if model.device.type == "cuda" else 0
    weights = list(model.module.parameters())
    return {
        "seconds_per_step": at[-1] - at[-2] if len(at) > 1 else result.seconds,  # the first one warms up
        "fed": result.tokens,
        "naive": result.naive_tokens,
        "memory_mib": on_gpu or peak_memory(),
        "trained": sum(p.numel() for p in weights if p.requires_grad),
        "weights": sum(p.numel() for p in weights),
    }
