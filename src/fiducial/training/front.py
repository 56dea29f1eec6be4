"""Of a run under a cost limit, the checkpoints that no other beats in both reward and cost: which they are, and their weights on the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from fiducial.core.store import write_atomic
from fiducial.training.weights import Trainables


class Point(NamedTuple):
    """What a checkpoint was worth."""

    step: int
    reward: float
    cost: float


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in both reward (higher is better) and cost (lower is better), by step. Of equals the first stays."""
    return [p for i, p in enumerate(points) if not any(_beats(q, p) or (i > j and q[1:] == p[1:]) for j, q in enumerate(points) if j != i)]


def best(points: Sequence[Point], limit: float) -> Point:
    """The point of the front with the highest reward among those within the limit; the cheapest where none is."""
    kept = front(points)
    within = [p for p in kept if p.cost <= limit]
    return max(within, key=lambda p: p.reward) if within else min(kept, key=lambda p: p.cost)


class Front:
    """Weights of those checkpoints, a file each. Every process has the points, which follow from the history; the one that `writes` has the files."""

    def __init__(self, folder: Path, trainables: Trainables, *, writes: bool) -> None:
        self.folder, self.trainables, self.writes = folder, trainables, writes
        self.points: list[Point] = []
        self.last = 0
        """The step of the last checkpoint, kept or not."""

    def add(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """Keeps the weights after this step unless a kept checkpoint had both a higher reward and a lower cost.

        Means are over the steps since the last checkpoint, kept or not.
        """
        from safetensors.torch import save

        since, self.last = self.last, step
        recent = [h for h in history if h["step"] > since and not math.isnan(h["cost"] + h["reward"])]
        if not recent:
            return
        points = front([*self.points, Point(step, fmean(h["reward"] for h in recent), fmean(h["cost"] for h in recent))])
        if points[-1].step == step and self.writes:
            write_atomic(self._file(points[-1]), save({n: w.detach().contiguous() for n, w in self.trainables.masters.items()}))
        self.points = points

    def clear(self) -> None:
        """Removes files that are no longer needed; not before a checkpoint stands that names the others."""
        kept = {self._file(point) for point in self.points}
        for file in self.folder.glob("front-*.safetensors") if self.writes else ():
            if file not in kept:
                file.unlink(missing_ok=True)

    def take_best(self, limit: float) -> Point | None:
        """The best checkpoint of all, whose weights the model is given; None where none was kept."""
        from safetensors.torch import load_file

        if not self.points:
            return None
        chosen = best(self.points, limit)
        stored = load_file(self._file(chosen))
        with torch.no_grad():
            for name, value in stored.items():
                self.trainables.masters[name].copy_(value)
        self.trainables.publish()
        return chosen

    def _file(self, point: Point) -> Path:
        return self.folder / f"front-{point.step}.safetensors"


def _beats(one: Point, other: Point) -> bool:
    return one.reward >= other.reward and one.cost <= other.cost and one[1:] != other[1:]
