"""Token sequences that share beginnings, packed into rows of tries. No model is needed here.

A row is a forest in pre-order: `ids[i]` is a token, `pos[i]` its depth, `end[i]` one past its last descendant. The whole attention
mask follows from that: `visible(q, k) = k <= q < end[k]`. Trees of one row cannot see each other. Nodes are the tokens fed to the
network; edges are what is scored, so a sequence's last token is an edge but a node only when `keep_last` asks for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from math import ceil, inf, sqrt
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fiducial.core.errors import DataError

Form = Literal["tree", "kv", "padded"]
"""How a row is laid out: everything shared, one common prefix shared, nothing shared."""

CROSSOVER = 1500.0
"""Row length at which attention costs as much as the linear layers; measured for SmolLM2-135M on a CPU, larger models have a larger one."""
Tokens = tuple[int, ...]
WIDEST = 2
"""In a padded row the longest group is at most this many times as long as the shortest."""
CALL = 24.0
"""Fixed cost of one forward pass, in tokens; measured for SmolLM2-135M on a CPU."""
STEP = 120.0
"""The same for a forward and backward pass with an adapter."""
BLOCK = 16384
"""Fixed cost of a block of attention, in pairs of query and key; measured for SmolLM2-135M on a CPU, forward and backward."""
WORTH = 1.15
"""Sharing has to be cheaper by this factor: measured at two short prompts with long completions, where the bare count was misleading."""
MAX_ROW = 8192
"""Longest row with a dense mask: 64 MiB of booleans."""


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


@dataclass(frozen=True, slots=True)
class PlanStats:
    """What sharing saves, in tokens fed to the network."""

    naive: int
    """Every path on its own."""
    padded: int
    """Every group right-padded to its longest path."""
    unique: int
    """As planned."""
    scored: int
    """Tokens whose log-probability is asked for."""
    predicted_speedup: float
    """Cost of `naive` over cost of the plan, attention included, head and fixed costs left out."""


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning.

    >>> common([5, 6, 7], [5, 6, 8, 9])
    2
    """
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else bisect_left(range(n), True, key=lambda i: a[: i + 1] != b[: i + 1])


def plan(
    paths: Paths,
    *,
    budget: int = 800,
    backend: str = "tree",
    keep_last: bool = False,
    crossover: float = CROSSOVER,
    call: float = CALL,
    dense: bool = True,
) -> list[Row]:
    """Rows of at most about `budget` tokens that together hold every path once, longest row first.

    `backend`: "tree" shares every common beginning, also between groups; "split" does so but cuts every group into at least two
    rows; "kv" shares each group's common prefix; "padded" shares nothing; "auto" is "tree" where that is cheaper and "padded"
    elsewhere. A group is divided over rows only when its tree exceeds the budget. `keep_last` makes last tokens nodes. `crossover` is the
    row length at which attention costs as much as the linear layers, `call` the fixed cost of a pass; both in tokens. `dense` attention
    costs every pair of nodes of a row, other only those that see each other.
    """
    if budget < 1:
        raise DataError(f"a row budget of {budget} tokens holds nothing", hint="use 400 to 1600 on a CPU")
    fed = [tuple(ids if keep_last else ids[: max(len(ids) - 1, start)]) for ids, start in zip(paths.ids, paths.start, strict=True)]
    members: dict[int, list[int]] = {}
    for index in sorted(range(len(fed)), key=lambda index: fed[index]):
        members.setdefault(paths.group[index], []).append(index)
    groups = list(members.values())
    cost = _Cost(crossover, call, dense)
    layouts: list[tuple[Form, list[int]]] = []
    if backend in ("tree", "split", "auto"):
        clusters = _clusters(groups, fed, budget, cost, split=backend == "split")
        shared = [backend != "auto" or _shares(cluster, paths.group, fed, budget, cost) for cluster in clusters]
        layouts += [("tree", row) for row in _first_fit([cluster for cluster, yes in zip(clusters, shared, strict=True) if yes], fed, budget, cost)]
        groups = _regroup([cluster for cluster, yes in zip(clusters, shared, strict=True) if not yes], paths.group)
    if backend == "kv":
        together = [group for group in groups if len(group) > 1 and common(fed[group[0]], fed[group[-1]])]
        layouts += [("kv", row) for group in together for row in _cached(group, fed, budget)]
        groups = [group for group in groups if group not in together]
    if backend in ("kv", "padded", "auto"):
        layouts += [("padded", row) for row in _batches(groups, fed, budget)]
    elif backend not in ("tree", "split"):
        raise DataError(f"there is no plan '{backend}'", hint="known: tree, split, kv, padded, auto")
    rows = [_build(paths, fed, sorted(row), form) for form, row in layouts]
    return sorted(rows, key=lambda row: -len(row.ids))


def stats(paths: Paths, rows: Sequence[Row], *, crossover: float = CROSSOVER, dense: bool = True) -> PlanStats:
    """Token counts of a plan and the speed-up they predict over scoring every path on its own; `dense` as in `plan`."""
    lengths = [max(len(ids) - 1, start) for ids, start in zip(paths.ids, paths.start, strict=True)]
    longest: dict[int, int] = {}
    for group, length in zip(paths.group, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    naive = sum(_cost(length, crossover) for length in lengths)
    planned = sum(_row_cost(row, crossover, dense) for row in rows)
    return PlanStats(
        naive=sum(lengths),
        padded=sum(longest[group] for group in paths.group),
        unique=sum(len(row.ids) for row in rows),
        scored=sum(len(row.edge_target) for row in rows),
        predicted_speedup=naive / planned if planned else 1.0,
    )


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


def _cost(length: float, crossover: float) -> float:
    return length + length * length / crossover


def _row_cost(row: Row, crossover: float, dense: bool) -> float:
    if row.form == "padded":
        return CALL + len(row.paths) * _cost(int(row.pos.max()) + 1, crossover)
    size = len(row.ids)
    seen = size**2 if dense else min(int((row.pos + 1).sum()) + BLOCK * len(row.paths), size**2)
    return CALL + size + seen / crossover


def _size(cluster: Sequence[int], fed: list[Tokens]) -> int:
    """Nodes of the trie of lexicographically sorted sequences."""
    return len(fed[cluster[0]]) + sum(len(fed[b]) - common(fed[a], fed[b]) for a, b in pairwise(cluster)) if cluster else 0


@dataclass(frozen=True, slots=True)
class _Cost:
    """What rows cost, in tokens."""

    crossover: float
    call: float
    dense: bool

    def of(self, cluster: Sequence[int], fed: list[Tokens]) -> float:
        """Of the trie of lexicographically sorted sequences."""
        size = _size(cluster, fed)
        if self.dense:
            return _cost(size, self.crossover)
        first = cluster[0]
        seen = len(fed[first]) ** 2 + sum((len(fed[b]) - common(fed[a], fed[b])) * len(fed[b]) for a, b in pairwise(cluster))
        return size + min(seen + BLOCK * len(cluster), size * size) / self.crossover

    def join_pays(self, a: int, b: int, shared: int) -> bool:
        """Whether one row for trees of `a` and `b` nodes is cheaper than two: it saves a call and what they share, but dense attention is across."""
        return not self.dense or self.call + shared > 2.0 * a * (b - shared) / self.crossover

    def pieces(self, prefix: int, rest: int) -> float:
        """Into how many rows a tree of a prefix and the rest is best divided, where repeating the prefix saves attention."""
        return rest / sqrt(prefix * (self.crossover + prefix)) if self.dense else inf


def _clusters(groups: list[list[int]], fed: list[Tokens], budget: int, cost: _Cost, *, split: bool) -> list[list[int]]:
    """Groups that share a beginning drawn together up to the budget; larger groups cut. Groups come in lexicographic order."""
    clusters: list[list[int]] = []
    held, previous = 0, None
    for group in groups:
        size = _size(group, fed)
        if size > budget or (split and len(group) > 1):
            clusters += _cut(group, fed, size, budget, cost, least=2 if split else 1)
            previous = None
            continue
        shared = common(fed[previous], fed[group[0]]) if previous is not None else 0
        if shared and held + size - shared <= budget and cost.join_pays(held, size, shared):
            clusters[-1] += group
            held += size - shared
        else:
            clusters.append(list(group))
            held = size
        previous = group[0]
    return clusters


def _cut(group: list[int], fed: list[Tokens], size: int, budget: int, cost: _Cost, *, least: int) -> list[list[int]]:
    """A tree divided where repeating its prefix costs as much as the dense attention saved: r = S / sqrt(P (c + P)), c the crossover."""
    prefix = common(fed[group[0]], fed[group[-1]])
    rest = size - prefix
    best = cost.pieces(prefix, rest) if prefix else float(len(group))
    filled = ceil(rest / max(budget - prefix, budget // 4, 1))
    pieces = min(max(round(min(best, filled)), least, ceil(size / MAX_ROW)), len(group))
    target = prefix + rest / pieces
    cuts: list[list[int]] = []
    current, nodes = [group[0]], len(fed[group[0]])
    for before, index in pairwise(group):
        grown = len(fed[index]) - common(fed[before], fed[index])
        if (len(cuts) < pieces - 1 and nodes + grown / 2 > target) or nodes + grown > MAX_ROW:
            cuts.append(current)
            current, nodes = [], common(fed[before], fed[index])
        current.append(index)
        nodes += grown
    return [*cuts, current]


def _shares(cluster: list[int], group: Sequence[int], fed: list[Tokens], budget: int, cost: _Cost) -> bool:
    """Whether the packed form of a cluster costs less than its paths side by side, the places that padding fills included."""
    batches = _batches(_regroup([cluster], group), fed, budget)
    apart = sum(len(batch) * _cost(max(len(fed[index]) for index in batch), cost.crossover) for batch in batches)
    return len(cluster) > 1 and WORTH * cost.of(sorted(cluster, key=lambda index: fed[index]), fed) < apart


def _first_fit(clusters: list[list[int]], fed: list[Tokens], budget: int, cost: _Cost) -> list[list[int]]:
    """Bins packed into rows, largest first, each into the first row with room where joining pays."""
    rows: list[list[int]] = []
    held: list[int] = []
    for size, cluster in sorted(((_size(sorted(cluster, key=lambda index: fed[index]), fed), cluster) for cluster in clusters), key=lambda item: -item[0]):
        fits = (number for number, nodes in enumerate(held) if nodes + size <= budget and cost.join_pays(nodes, size, 0))
        number = next(fits, None)
        if number is None:
            rows.append(list(cluster))
            held.append(size)
        else:
            rows[number] += cluster
            held[number] += size
    return rows


def _regroup(clusters: list[list[int]], group: Sequence[int]) -> list[list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for number, cluster in enumerate(clusters):
        for index in cluster:
            found.setdefault((number, group[index]), []).append(index)
    return list(found.values())


def _batches(groups: list[list[int]], fed: list[Tokens], budget: int) -> list[list[int]]:
    """Groups of like length put together while paths times longest path stays within the budget."""
    batches: list[list[int]] = []
    current: list[int] = []
    width = 0
    longest = {number: max(len(fed[index]) for index in group) for number, group in enumerate(groups)}
    for number, group in sorted(enumerate(groups), key=lambda item: -longest[item[0]]):
        if current and ((len(current) + len(group)) * width > budget or longest[number] * WIDEST < width):
            batches.append(current)
            current = []
        if not current:
            width = longest[number]
            height = max(budget // width, 1)
            pieces = [group[at : at + height] for at in range(0, len(group), height)]
            batches += pieces[:-1]
            current = list(pieces[-1])
        else:
            current += group
    return [*batches, current] if current else batches


def _cached(group: list[int], fed: list[Tokens], budget: int) -> list[list[int]]:
    """A group over its cached prefix, in pieces whose continuations fit the budget."""
    prefix = common(fed[group[0]], fed[group[-1]])
    longest = max(len(fed[index]) for index in group) - prefix
    height = max(max(budget - prefix, budget // 2) // max(longest, 1), 1)
    return [group[at : at + height] for at in range(0, len(group), height)]


def _build(paths: Paths, fed: list[Tokens], chosen: list[int], form: Form) -> Row:
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
