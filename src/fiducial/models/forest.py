"""Token sequences that share beginnings, as rows of tries. No model is needed here.

A row is a forest in pre-order: `ids[i]` is a token, `pos[i]` its depth, `end[i]` one past its last descendant. The whole attention
mask follows from that: `visible(q, k) = k <= q < end[k]`. Trees of one row cannot see each other. Nodes are the tokens fed to the
network; edges are what is scored, so a sequence's last token is an edge but a node only when `keep_last` asks for it. Which paths
share a row is decided in `fiducial.models.planning`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fiducial.core.errors import DataError

Form = Literal["tree", "kv", "padded"]
"""How a row is laid out: everything shared, one common prefix shared, nothing shared."""
Tokens = tuple[int, ...]
"""What of a path the network sees."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Token sequences to score: [P] of them, each with the index of its first scored token.

    Token ids are those of the whole sequence as tokenised together. `start` may equal the length: then nothing is scored, but the
    hidden state can still be asked for. Raises DataError for an empty sequence, for a start of 0 (the first token has no context
    to be predicted from) and for a start beyond the end.
    """

    ids: Sequence[Sequence[int]]
    """Token ids, one sequence per path."""
    start: Sequence[int]
    """Index of the first scored token of each path, 1 to its length."""
    group: Sequence[int] = ()
    """Paths with equal numbers stay in one row where possible; by default each path is its own group."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(tuple(ids) for ids in self.ids))
        object.__setattr__(self, "start", tuple(self.start))
        object.__setattr__(self, "group", tuple(self.group) if len(self.group) else tuple(range(len(self.ids))))
        if not len(self.ids) == len(self.start) == len(self.group):
            raise DataError(
                f"{len(self.ids)} sequences, {len(self.start)} starts and {len(self.group)} group numbers do not fit together",
                hint="give one start and one group number per sequence",
            )
        for number, (ids, start) in enumerate(zip(self.ids, self.start, strict=True)):
            if not ids:
                raise DataError(f"path {number} has no tokens", hint="leave empty sequences out")
            if start < 1:
                raise DataError(f"path {number} scores from token {start}, but the first token has no context", hint="begin with a start-of-text token")
            if start > len(ids):
                raise DataError(f"path {number} scores from token {start} of {len(ids)}", hint="the start is an index into the sequence")

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[int], int]], *, group: Sequence[int] = ()) -> Self:
        """Paths from (token ids, start) pairs."""
        pairs = list(pairs)
        return cls([ids for ids, _ in pairs], [start for _, start in pairs], group)

    def __len__(self) -> int:
        return len(self.ids)

    def spans(self) -> list[range]:
        """Where each path's scored tokens stand among those of all paths, ordered by path and position."""
        sizes = [len(ids) - start for ids, start in zip(self.ids, self.start, strict=True)]
        return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def select(self, indices: Sequence[int]) -> Paths:
        """The paths at `indices`, in that order, with their group numbers."""
        return Paths([self.ids[i] for i in indices], [self.start[i] for i in indices], [self.group[i] for i in indices])


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One forward pass: N nodes, E scored edges, and the paths they belong to. All tensors are int64."""

    ids: Tensor
    """Token of each node, [N], in pre-order."""
    pos: Tensor
    """Depth of each node = its position id, [N]; restarts at 0 for every tree."""
    end: Tensor
    """One past the last descendant of each node, [N]."""
    parent: Tensor
    """Node before each node, [N]; -1 at roots."""
    branch: Tensor
    """Which of `paths` brought the node in, [N], as an index into `paths`; -1 for the shared prefix of a "kv" row."""
    edge_parent: Tensor
    """Node that predicts, [E]."""
    edge_target: Tensor
    """Token that is scored, [E]."""
    edge_node: Tensor
    """Node of the scored token itself, [E]; -1 when it is not fed."""
    edge_path: Tensor
    """Index into `paths`, [E]; edges are ordered by path, then step."""
    edge_step: Tensor
    """Position in the scored part of its path, [E], from 0."""
    unique_parents: Tensor
    """Nodes that predict anything, ascending, [U]."""
    edge_u: Tensor
    """Index of each edge's node in `unique_parents`, [E]."""
    leaves: Tensor
    """Node of each path's last token, [P_row]; -1 when it is not fed."""
    prompt_end: Tensor
    """Node of each path's last token before the first scored one, [P_row]."""
    paths: list[int]
    """Indices of the paths in this row, ascending."""
    form: Form
    """Layout."""
    prefix: int
    """Number of nodes that all paths of a "kv" row share; 0 otherwise."""

    @property
    def chain(self) -> bool:
        """Whether there is a single unbranched sequence, for which plain causal attention is right."""
        return bool((self.end == len(self.end)).all())

    def to(self, device: torch.device | str) -> Row:
        """The row with its tensors on `device`."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning.

    >>> common([5, 6, 7], [5, 6, 8, 9])
    2
    """
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else bisect_left(range(n), True, key=lambda i: a[: i + 1] != b[: i + 1])


def visible(row: Row, *, window: int | None = None, block: int | None = None) -> Tensor:
    """Which node sees which, bool [N, N]: query in rows, key in columns; every node sees itself.

    `window`: a key counts only if fewer than that many positions back. `block`: only within the same block of that many positions.
    Both are measured in positions along the path, not in row indices.
    """
    index = torch.arange(len(row.ids), device=row.ids.device)
    mask = (index <= index[:, None]) & (index[:, None] < row.end)
    if window is not None:
        mask &= row.pos[:, None] - row.pos < window
    if block is not None:
        mask &= row.pos[:, None] // block == row.pos // block
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers to add to attention scores: 0 where visible, the lowest finite number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def build(paths: Paths, fed: list[Tokens], chosen: list[int], form: Form) -> Row:
    """The row of the paths `chosen` (indices, ascending) laid out as `form`; `fed` holds what of each path the network sees."""
    order = sorted(range(len(chosen)), key=lambda local: fed[chosen[local]])
    prefix = common(fed[chosen[order[0]]], fed[chosen[order[-1]]]) if form == "kv" else 0
    ids, pos, parent, branch = list(fed[chosen[0]][:prefix]), list(range(prefix)), list(range(-1, prefix - 1)), [-1] * prefix
    stack = list(range(prefix))
    nodes: list[list[int]] = [[] for _ in chosen]
    end = torch.zeros(prefix + sum(len(fed[index]) for index in chosen), dtype=torch.int64)
    last = fed[chosen[0]][:prefix]
    for local in order:
        tokens = fed[chosen[local]]
        shared = common(last, tokens) if form == "tree" else prefix
        count, fresh = len(ids), len(tokens) - shared
        end[stack[shared:]] = count
        if fresh:
            parent.append(stack[shared - 1] if shared else -1)
            parent.extend(range(count, count + fresh - 1))
        ids.extend(tokens[shared:])
        pos.extend(range(shared, len(tokens)))
        branch.extend([local] * fresh)
        stack = stack[:shared] + list(range(count, count + fresh))
        nodes[local], last = stack, tokens
    end[stack] = len(ids)
    return _edges(paths, chosen, nodes, form, prefix, _ints(ids), _ints(pos), end[: len(ids)], _ints(parent), _ints(branch))


def _edges(
    paths: Paths, chosen: list[int], nodes: list[list[int]], form: Form, prefix: int, ids: Tensor, pos: Tensor, end: Tensor, parent: Tensor, branch: Tensor
) -> Row:
    before: list[int] = []
    target: list[int] = []
    itself: list[int] = []
    owner: list[int] = []
    step: list[int] = []
    for local, index in enumerate(chosen):
        start, length, own = paths.start[index], len(paths.ids[index]), nodes[local]
        before.extend(own[start - 1 : length - 1])
        target.extend(paths.ids[index][start:])
        itself.extend(own[start:] + [-1] * (length - max(len(own), start)))
        owner.extend([local] * (length - start))
        step.extend(range(length - start))
    unique, edge_u = torch.unique(_ints(before), return_inverse=True)
    whole = [own[-1] if len(own) == len(paths.ids[index]) else -1 for own, index in zip(nodes, chosen, strict=True)]
    ends = [own[paths.start[index] - 1] for own, index in zip(nodes, chosen, strict=True)]
    return Row(
        ids, pos, end, parent, branch, _ints(before), _ints(target), _ints(itself), _ints(owner), _ints(step), unique, edge_u,
        _ints(whole), _ints(ends), chosen, form, prefix,
    )  # fmt: skip


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
