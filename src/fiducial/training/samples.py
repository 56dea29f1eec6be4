"""Answers that a model drew, made into training data token by token, and their log-probabilities under the model and its beginning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fiducial.core.records import Group, Prompt
from fiducial.core.roles import Objective
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.training import lora
from fiducial.training.advantages import EQUAL
from fiducial.training.data import Data
from fiducial.training.heads import Heads
from fiducial.training.objective import GroupLogProbs, examples, keep, layout, preferred
from fiducial.training.online_options import OnlineOptions
from fiducial.training.rewards import Values
from fiducial.training.weights import Trainables


class Pick(NamedTuple):
    """Which completions of a drawn group are trained on, and as what."""

    group: int
    completions: tuple[int, ...]
    record: Group
    """The group of those completions, with rewards and targets."""


def draw(model: LocalModel, prompts: Sequence[tuple[int, Prompt]], options: OnlineOptions, *, k: int, seed: int) -> list[Group]:
    """`k` answers to each prompt, drawn from the model's own distribution: no tail is cut off, no length is forced.

    What is drawn depends on the number that stands before a prompt, and not on what other prompts are given.
    """
    how = {"k": k, "max_tokens": options.max_tokens, "temperature": options.temperature, "seed": seed}
    drawn = model.sample([p.messages for _, p in prompts], numbers=[n for n, _ in prompts], top_p=1.0, **how)
    return [Group(prompt=p, completions=c) for (_, p), c in zip(prompts, drawn, strict=True)]


def data(model: LocalModel, groups: Sequence[Group], *, max_length: int) -> Data:
    """Drawn answers as training data: the prompt's tokens, the drawn ones, and the template's end-of-turn token where the answer ended.

    A completion does not say which token ended it: where a model has several (Llama 3, Qwen) and another was drawn, the end of turn is
    trained in its place. Groups are left out whose prompt did not fit into the context, or has an answer that is empty (where the model has no end token) or
    longer than `max_length` with its prompt.
    """
    kept: list[Group] = []
    ids, starts, owner, lengths, left_out = [], [], [], [], 0
    end = (model.tokenizer.convert_tokens_to_ids(model.chat.end),) if model.chat.end else tuple(sorted(model.eos_ids)[:1])
    for group in groups:
        asked, start = model.encode(group.prompt.messages)
        rows = [(*asked, *c.tokens, *(end if c.finish == "stop" else ())) for c in group.completions]
        if any(c.finish == "error" for c in group.completions) or not all(start < len(row) <= max_length for row in rows):
            left_out += 1
            continue
        ids += rows
        starts += [start] * len(rows)
        owner += [len(kept)] * len(rows)
        lengths.append([len(row) - start for row in rows])
        kept.append(group)
    return _data(kept, Paths(ids, starts, owner), lengths, left_out)


def _data(groups: list[Group], paths: Paths, lengths: Sequence[Sequence[int]], left_out: int, given: Mapping[str, Tensor] | None = None) -> Data:
    counts = torch.tensor([len(g.completions) for g in groups], dtype=torch.long)
    return Data(groups, [g.id for g in groups], paths, (counts.cumsum(0) - counts).tolist(), layout(groups, lengths, given or {}), left_out)


def picked(drawn: Data, picks: Sequence[Pick]) -> tuple[Data, Tensor]:
    """The picked completions as data of their own, and where its tokens stood in that of all, [E]."""
    spans = drawn.paths.spans()
    chosen = [drawn.first[p.group] + k for p in picks for k in p.completions]
    owner = [i for i, p in enumerate(picks) for _ in p.completions]
    paths = Paths([drawn.paths.ids[i] for i in chosen], [drawn.paths.start[i] for i in chosen], owner)
    lengths = [[len(spans[drawn.first[p.group] + k]) for k in p.completions] for p in picks]
    return _data([p.record for p in picks], paths, lengths, 0), torch.tensor([e for i in chosen for e in spans[i]], dtype=torch.long)


def mixed(model: LocalModel, drawn: Data, given: Mapping[str, Tensor], before: Tensor, demonstrations: Sequence[Group], weight: float) -> tuple[Data, Tensor]:
    """`drawn` with the preferred completions of demonstrations added to it, and the reference's log-probabilities, [E], of both.

    `given` is 0 for demonstrations, but for `imitate`, which shares `weight` out among their tokens. These are `imitable`.
    """
    shown = [keep(preferred(g), [0]) for g in demonstrations]
    rows = [_encoded(model, g) for g in shown]
    sizes = [len(ids) - start for ids, start in rows]
    total, count = sum(sizes), len(drawn.groups)
    lengths = [drawn.parts.length[g, : len(group.completions)].tolist() for g, group in enumerate(drawn.groups)] + [[n] for n in sizes]
    paths = Paths(
        [*drawn.paths.ids, *(ids for ids, _ in rows)],
        [*drawn.paths.start, *(start for _, start in rows)],
        [*drawn.paths.group, *range(count, count + len(rows))],
    )
    nothing = torch.zeros(total)
    longer = {name: torch.cat([values, nothing]) for name, values in given.items()}
    longer["imitate"] = torch.cat([torch.zeros(len(before)), torch.full((total,), weight / total)])
    return _data([*drawn.groups, *shown], paths, lengths, drawn.left_out, longer), torch.cat([before, nothing])


def imitable(model: LocalModel, demonstrations: Sequence[Group], *, max_length: int) -> list[Group]:
    """Those whose first preferred completion has tokens to learn and fits into `max_length` with its prompt."""

    def fits(group: Group) -> bool:
        shown = examples(group)
        if not shown.completions:
            return False
        ids, start = _encoded(model, keep(shown, [0]))
        return start < len(ids) <= max_length

    return [g for g in demonstrations if fits(g)]


def _encoded(model: LocalModel, group: Group) -> tuple[list[int], int]:
    """Token ids of a demonstration, and the first that is learnt."""
    completion = group.completions[0]
    return model.encode(group.prompt.messages, completion.text, end=completion.finish != "length")


def with_given(drawn: Data, given: Mapping[str, Tensor]) -> Data:
    """The same data with further constants of each token."""
    assert drawn.parts.tokens is not None
    tokens = drawn.parts.tokens
    return replace(drawn, parts=replace(drawn.parts, tokens=replace(tokens, given={**tokens.given, **given})))


def with_costs(drawn: Data, costs: Values, picks: Sequence[Pick], *, weight: float) -> Data:
    """The same data with what each of the picked completions costs, and how much that counts."""
    found = torch.full(drawn.parts.mask.shape, torch.nan)
    found[drawn.parts.mask] = torch.tensor([torch.nan if (cost := costs[p.group][k]) is None else cost for p in picks for k in p.completions])
    return replace(drawn, parts=replace(drawn.parts, costs=found, cost_weight=weight))


def choose(objective: Objective, index: int, group: Group, *, contrast: bool) -> Pick | None:
    """What an objective is to learn from a group with rewards; None where it can learn nothing.

    With `contrast` the answers are labelled: the best one is the target, and an objective that takes two is given the best and the worst;
    groups of equal rewards have no better one. Without, all that were scored are taken.
    """
    assert group.rewards is not None
    known = [(r, k) for k, r in enumerate(group.rewards) if r is not None]
    if len(known) < max(1, objective.least):
        return None
    record = keep(group, [k for _, k in known])
    if contrast:
        (high, top), (low, bottom) = max(known, key=lambda rk: rk[0]), min(known, key=lambda rk: rk[0])
        if high - low <= EQUAL:
            return None
        kept = [top, bottom] if objective.most == 2 else [k for _, k in known]
        targets = tuple(1.0 if k == top else 0.0 for k in kept)
        record = objective.prepare(keep(group, kept).model_copy(update={"targets": targets}))
    # by identity: two answers may have the same words
    chosen = tuple(k for k, c in enumerate(group.completions) if any(c is other for other in record.completions))
    order = {id(group.completions[k]): k for k in chosen}
    return Pick(index, tuple(order[id(c)] for c in record.completions), record) if len(record.completions) >= objective.least else None


def per_group(model: LocalModel, drawn: Data, chosen: Sequence[int], *, temperature: float, heads: Heads | None = None) -> list[Tensor]:
    """Log-probability of each token of each chosen group under the model as it is, and in further rows what each head says before it: [R, E].

    Computed in rows as training packs them; which groups share a row may differ, so log-probabilities may too, by rounding.
    """
    paths = drawn.paths.select(drawn.paths_of(chosen))
    spans = paths.spans()
    found = torch.zeros(1 + len(heads.named) if heads else 1, spans[-1].stop if spans else 0)
    with torch.no_grad():
        for indices, scores in model.engine.stream(paths, grad=True, temperature=temperature, hidden=heads.asked if heads else None):
            at = torch.tensor([e for i in indices for e in spans[i]], dtype=torch.long)
            found[0, at] = scores.edge_logp.float().cpu()
            for row, values in enumerate(heads.read(scores) if heads else (), start=1):
                found[row, at] = values.cpu()
    return list(torch.split(found, drawn.parts.length[list(chosen)].sum(1).tolist(), dim=1))


def sampler_gap(groups: Sequence[Group], old: GroupLogProbs) -> float:
    """Mean log-probability per token that the sampler gave less that which scoring gives, in nats; NaN where no token was drawn.

    Both are of the same tokens under the same model, so that anything but rounding says that they are of different distributions.
    """
    assert old.tokens is not None
    said = torch.tensor([p for g in groups for c in g.completions for p in c.logprobs])
    inside = old.tokens.position < old.spread(torch.tensor([_padded([len(c.logprobs) for c in g.completions], old.mask.shape[1]) for g in groups]))
    return float((said - old.tokens.logp[inside]).mean()) if len(said) else float("nan")


def _padded(values: list[int], width: int) -> list[int]:
    return values + [0] * (width - len(values))


class Start:
    """The weights with which a run began, to be looked at again while others train. Made before the first update."""

    def __init__(self, model: LocalModel, trainables: Trainables, *, fresh: bool) -> None:
        """`fresh`: the adapter was just attached, so that to turn it off is to be back at the beginning."""
        self.model, self.trainables = model, trainables
        self.kept = None if fresh else {name: p.detach().clone() for name, p in trainables.named.items()}

    @contextmanager
    def again(self) -> Iterator[LocalModel]:
        """The model as it was at the beginning, while inside."""
        if self.kept is None:
            with lora.adapter_off(self.model.module):
                yield self.model
            return
        now = {name: p.detach().clone() for name, p in self.trainables.named.items()}
        self._put(self.kept)
        try:
            yield self.model
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            self.trainables.named[name].copy_(value)
