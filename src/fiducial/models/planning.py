"""Which paths share a row: what sharing saves against what attention between strangers, passes and padding cost.

Costs are in tokens: those that the linear layers see, and attention as the tokens that would take as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf, sqrt

from fiducial.core.errors import DataError
from fiducial.models.forest import Form, Paths, Row, Tokens, build, common

CROSSOVER = 1500.0
"""Row length at which attention costs as much as the linear layers; measured for SmolLM2-135M on a CPU, larger models have a larger one."""
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
    rows = [build(paths, fed, sorted(row), form) for form, row in layouts]
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
