"""How the attention of a packed row is cut: what no node of a span sees is not computed for it.

The mask of a row is mostly empty: trees do not see each other, nor do branches of a tree. Each block is a span of queries with the
spans of keys that they see some of. A block costs its area and a fixed amount for the calls that it takes, so small branches stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fiducial.models.forest import Row
from fiducial.models.planning import BLOCK

Span = tuple[int, int]

MOST_RUNS = 200
"""Unbranched stretches beyond which trees are left whole."""
LONGEST = 1024
"""Queries at once up to which all scores are written out."""


class Block(NamedTuple):
    """Queries `first` to `last`, and what they look at."""

    first: int
    last: int
    keys: tuple[Span, ...]
    """Spans of keys, ascending, none touching the next."""
    mask: Tensor
    """What is added to the scores, [1 or B, 1, queries, keys]."""


@dataclass(frozen=True, slots=True)
class _Run:
    """An unbranched stretch of nodes, with all that descends from it up to `end`."""

    first: int
    last: int
    end: int
    children: list[_Run]


_Plan = tuple[float, list[tuple[Span, tuple[Span, ...]]]]
"""Cost, and for every block its queries and its keys."""


def cut(mask: Tensor, row: Row) -> Tensor:
    """`mask` [1, 1, N, N], which carries the blocks of `row` as its attribute `blocks` from now on; `blocks_of` reads them."""
    _, plan = _forest(_runs(row), ())
    area = sum((last - first) * sum(b - a for a, b in keys) for (first, last), keys in plan)
    if len(plan) > 1 and area <= LONGEST**2:
        whole = [Block(first, last, keys, torch.cat([mask[..., first:last, a:b] for a, b in keys], -1)) for (first, last), keys in plan]
        mask.blocks = whole  # type: ignore[attr-defined]
    return mask


def blocks_of(mask: object) -> list[Block] | None:
    """The blocks that a mask carries; none where it carries none, as the result of an operation on one."""
    return cast("list[Block] | None", getattr(mask, "blocks", None))


def _runs(row: Row) -> list[_Run]:
    """The trees of a row as runs, long ones in pieces; where they are too many, a run for each tree."""
    parent, end, size = row.parent.tolist(), row.end.tolist(), len(row.ids)
    children = [0] * size
    for above in parent:
        if above >= 0:
            children[above] += 1
    starts = [i for i, above in enumerate(parent) if above < 0 or above != i - 1 or children[above] > 1]
    starts = [at for first, last in zip(starts, [*starts[1:], size], strict=True) for at in range(first, last, LONGEST // 2)]
    if len(starts) > MOST_RUNS:
        return [_Run(i, end[i], end[i], []) for i, above in enumerate(parent) if above < 0]
    roots: list[_Run] = []
    open_runs: list[_Run] = []
    for first, last in zip(starts, [*starts[1:], size], strict=True):
        run = _Run(first, last, end[first], [])
        while open_runs and open_runs[-1].end <= first:
            open_runs.pop()
        (open_runs[-1].children if open_runs else roots).append(run)
        open_runs.append(run)
    return roots


def _forest(runs: Sequence[_Run], above: tuple[Span, ...]) -> _Plan:
    """The cheapest blocks for neighbours below the keys `above`: together, or each by itself."""
    together = _one((runs[0].first, runs[-1].end), above)
    apart = [_tree(run, above) for run in runs]
    return min(together, (sum(cost for cost, _ in apart), [block for _, blocks in apart for block in blocks]), key=lambda plan: plan[0])


def _tree(run: _Run, above: tuple[Span, ...]) -> _Plan:
    """The cheapest blocks for a run and its descendants: together, or the run by itself."""
    together = _one((run.first, run.end), above)
    if not run.children:
        return together
    (own, first), (rest, others) = _one((run.first, run.last), above), _forest(run.children, _joined(above, (run.first, run.last)))
    return min(together, (own + rest, first + others), key=lambda plan: plan[0])


def _one(queries: Span, above: tuple[Span, ...]) -> _Plan:
    keys, count = _joined(above, queries), queries[1] - queries[0]
    return count * sum(b - a for a, b in keys) + BLOCK if count <= LONGEST else inf, [(queries, keys)]


def _joined(spans: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    """One more span after the others, as part of the last where it touches it."""
    return (*spans[:-1], (spans[-1][0], span[1])) if spans and spans[-1][1] == span[0] else (*spans, span)
