"""The engine that scores token sequences with everything they share computed once.

Multiple choice, preference losses, judge comparisons, trigger tests and attack candidates all compare continuations of one prompt.
`Engine.score` takes them as paths and hands back log-probabilities per token, differentiable if asked, computing shared beginnings
once, the head at scored positions only, in rows of bounded size. Which back ends a model may use is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fiducial.core.errors import DataError, ModelError
from fiducial.models import abreast
from fiducial.models.forest import Paths, Row
from fiducial.models.head import HeadScores, module_logprobs, selected_logprobs
from fiducial.models.lower import Lower
from fiducial.models.noise import Noise
from fiducial.models.passes import Given, Wanted, anatomy, begin, run
from fiducial.models.planning import CALL, MAX_ROW, STEP, plan
from fiducial.models.selfcheck import Verdict, check

Backend = Literal["auto", "tree", "kv", "split", "padded", "flex"]
Place = Literal["leaf", "prompt_end", "scored", "before"]
CPU_BUDGET, GPU_BUDGET = 800, 2048
"""Tokens per row. On a CPU 400 to 1600 measured alike; a GPU wants more work per launch, within the dense mask's quadratic cost."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Log-probabilities of E scored tokens of P paths, in nats. Edges are ordered by path, then by position."""

    edge_logp: Tensor
    """Log-probability of each scored token given everything before it, [E], float32."""
    edge_path: Tensor
    """Path of each scored token, [E], int64."""
    path_logp: Tensor
    """Sum over each path's scored tokens, [P]."""
    path_len: Tensor
    """Number of scored tokens of each path, [P], int64."""
    is_greedy: Tensor
    """Whether every scored token of the path is the likeliest at its place, [P], bool; true where nothing is scored."""
    entropy: Tensor | None = None
    """Entropy of the distribution each token was scored under, in nats, [E], when asked for."""
    hidden: dict[int | str, Tensor] | None = None
    """Layer as it was asked for -> states [P, D], or [E, D] at "scored" and "before", when asked for."""

    @property
    def path_mean(self) -> Tensor:
        """Mean log-probability per scored token of each path, [P]; 0 where nothing is scored."""
        return self.path_logp / self.path_len.clamp(min=1)


class Engine:
    """Scores paths under one model, which it puts in evaluation mode and leaves there.

    `backend` "auto" takes the first of tree, kv (without gradients) and padded that the self-check accepted, and shares only what
    is worth sharing. Naming a back end that was not accepted raises ModelError. "kv" shares each group's prefix through the cache,
    "split" cuts every tree into rows that repeat the prefix, "flex" needs CUDA and a model opened with flex attention.
    `budget` is the number of tokens in a row (800 on a CPU, 2048 elsewhere), `cells` the number of logits that exist at
    once where the head is a plain matrix.
    """

    def __init__(self, module: nn.Module, *, backend: Backend = "auto", budget: int | None = None, cells: int | None = None) -> None:
        if backend not in get_args(Backend):
            raise ModelError(f"there is no back end '{backend}'", hint="known: " + ", ".join(get_args(Backend)))
        self.module = module
        self.cells = cells
        self._part = anatomy(module)
        self.budget = budget or (CPU_BUDGET if self._part.device.type == "cpu" else GPU_BUDGET)
        self.asked = backend
        """The back end that was asked for."""
        self.compute = self._computed
        """What computes a row; replaced where weights have to be gathered for it."""
        self.lower: Lower | None = None
        """What the first blocks make of some paths, where it is known; whoever sets it takes it away before those blocks change."""
        self._verdict: Verdict | None = None
        if backend not in ("auto", "padded"):
            self._allow(backend)

    @property
    def verdict(self) -> Verdict:
        """The self-check's findings, measured at first use."""
        if self._verdict is None:
            self._verdict = check(self.module)
        return self._verdict

    def beside(self, module: nn.Module) -> Engine:
        """The same around another module of the same structure, for a thread of its own."""
        other = Engine(module, budget=self.budget, cells=self.cells)
        other.asked, other._verdict, other.lower = self.asked, self.verdict, self.lower
        return other

    def team(self, count: int) -> list[Engine]:
        """This engine and others around the same parameters, one for each of `count` threads; itself alone where the model cannot be copied.

        The others have the model as it is now: hooks put on it and adapters switched off later are not theirs.
        """
        return [self, *(self.beside(module) for module in abreast.twins(self.module, count)[1:])]

    @property
    def backend(self) -> str:
        """The back end that is used without gradients: the one asked for, or the best that the self-check accepted."""
        return self._choose(grad=False)

    def plan(self, paths: Paths, *, grad: bool = False, keep_last: bool = False, shared: bool = True) -> list[Row]:
        """The rows in which `paths` will be run, longest first; not `shared`, each path has nodes of its own. Raises DataError for a path
        longer than the model reads.
        """
        name = self._choose(grad=grad) if shared else "padded"
        limit = self.verdict.longest
        if name not in ("kv", "padded") and limit is not None and any(len(ids) > limit for ids in paths.ids):
            self._unpacked(limit)
            name = "padded"
        turn, drift = self._part.limits.turn, self._part.limits.drift
        fed = [len(ids) if keep_last else max(len(ids) - 1, start) for ids, start in zip(paths.ids, paths.start, strict=True)]
        if drift is not None and max(fed, default=0) > drift:
            raise ModelError(
                f"beyond {drift} tokens this model's numbers depend on what it was run on before", hint='shorten the paths, or set a fixed "rope_type"'
            )
        context = self._part.context
        if context is not None and max(fed, default=0) > context:
            raise DataError(f"a text of {max(fed)} tokens is longer than the {context} that the model reads", hint="shorten it, or leave it out")
        # One row has one set of rotary frequencies, chosen by its longest path; a cached prefix is run apart, so it may have the other.
        sides = [[i for i, n in enumerate(fed) if (turn is not None and n > turn) == long] for long in (False, True)]
        second = "padded" if name == "kv" else name
        rows = [*self._rows(paths, sides[0], name, keep_last, grad), *self._rows(paths, sides[1], second, keep_last, grad)]
        return sorted(rows, key=lambda row: -len(row.ids))

    def _unpacked(self, limit: int) -> None:
        if self.asked != "auto":
            raise ModelError(f"packed rows are only shown right up to the window of {limit} tokens, and a path or row is longer", hint='use backend="auto"')

    def _rows(self, paths: Paths, chosen: list[int], name: str, keep_last: bool, grad: bool) -> list[Row]:
        """Rows of the paths `chosen` [indices, ascending]; none that shares reaches beyond a window of unknown measure."""
        foreign = self._part.limits.foreign
        budget = self.budget if foreign is None or name == "padded" else min(self.budget, foreign)
        form = {"tree": "auto" if self.asked == "auto" else "tree", "flex": "tree"}.get(name, name)
        costs: dict[str, Any] = {"crossover": self._part.crossover, "call": STEP if grad else CALL, "dense": self._dense}
        some = plan(paths.select(chosen), budget=budget, backend=form, keep_last=keep_last, **costs) if chosen else []
        rows = [replace(row, paths=[chosen[local] for local in row.paths]) for row in some]
        wide = [row for row in rows if foreign is not None and len(row.ids) > foreign and row.form != "padded" and not row.chain]
        if not wide:
            return rows
        assert foreign is not None
        self._unpacked(foreign)
        kept = [row for row in rows if not any(row is other for other in wide)]
        return kept + self._rows(paths, sorted(index for row in wide for index in row.paths), "padded", keep_last, grad)

    def score(self, paths: Paths, *, grad: bool = False, temperature: float = 1.0, hidden: Mapping[str, Any] | None = None, entropy: bool = False) -> Scores:
        """Scores of all paths, in their order. With `grad`, the activations of all rows are held; `stream` holds one row's.

        `hidden` asks for states too: {"layers": [0, -1] or "last", "at": "leaf" | "prompt_end" | "scored" | "before"}. A layer's states
        are its block's output; "last" are the final states that the head reads. "leaf" is each path's last token, "prompt_end" the last
        one before the first scored, "scored" every scored token itself, "before" the token before each of them. Log-probabilities are
        of logits divided by `temperature`. Raises DataError for a token outside the vocabulary.
        """
        pieces, order = [], []
        for chosen, scores in self.stream(paths, grad=grad, temperature=temperature, hidden=hidden, entropy=entropy):
            pieces.append(scores)
            order.extend(chosen)
        if not pieces:
            return self._nothing(hidden, entropy=entropy)
        by_edge = hidden is not None and hidden.get("at") in ("scored", "before")
        return _gather(pieces, torch.tensor(order, device=pieces[0].path_len.device), by_edge=by_edge)

    def stream(
        self,
        paths: Paths,
        *,
        grad: bool = False,
        temperature: float = 1.0,
        hidden: Mapping[str, Any] | None = None,
        entropy: bool = False,
        rows: Sequence[Row] | None = None,
        noise: Noise | None = None,
    ) -> Iterator[tuple[list[int], Scores]]:
        """One row at a time: the indices of its paths, and their scores, where `edge_path` counts within that list.

        Groups stay together unless larger than a row, so a loss that couples only paths of one group can go backward per row. `rows` are
        those of `plan`, where they are there already; states at "leaf" and "scored" need its `keep_last`. With `noise` nothing is shared.
        """
        if temperature <= 0:
            raise DataError(f"a temperature of {temperature} gives no distribution", hint="use a positive temperature; `is_greedy` tells about temperature 0")
        asked = _Hidden.read(hidden, len(self._part.layers))
        self.module.eval()
        for row in self.plan(paths, grad=grad, keep_last=asked is not None and asked.keeps_last, shared=noise is None) if rows is None else rows:
            self._admit(row)
            drawn = noise.of(row, paths, self._part.embedding.embedding_dim) if noise is not None else None
            lower = self.lower if noise is None else None
            given = lower.of(row, paths) if lower is not None and (asked is None or asked.from_block(lower.blocks - 1)) else None
            with nullcontext() if grad else torch.no_grad():
                scores = self._row(row.to(self._part.device), asked, temperature, entropy=entropy, given=given, noise=drawn)
            yield row.paths, scores

    def _choose(self, *, grad: bool) -> str:
        if self.asked != "auto":
            if grad and self.asked == "kv":
                raise ModelError("no gradient flows through a cached prefix", hint='use backend="tree" or "padded" for training')
            return self.asked
        if self.verdict.tree_mask is not None:
            return "tree"
        return "kv" if self.verdict.kv and not grad else "padded"

    @property
    def _dense(self) -> bool:
        """Whether attention computes what a tree's mask hides."""
        return not self._part.cuts or self.verdict.tree_mask in (None, "bool", "flex")

    def _allow(self, backend: str) -> None:
        if backend == "flex":
            if self._part.device.type != "cuda":
                raise ModelError(f"flex attention needs CUDA, and the model is on {self._part.device}", hint='use backend="tree"')
            if self.verdict.tree_mask != "flex":
                raise ModelError(f"flex attention was not accepted: {self.verdict.reason}", hint='open the model with attn_implementation="flex_attention"')
        if backend in ("tree", "split") and self.verdict.tree_mask is None:
            raise ModelError(f"{type(self._part.causal).__name__} cannot run packed rows; {self.verdict.reason}", hint='use backend="auto"')
        if backend == "kv" and not self.verdict.kv:
            raise ModelError(
                f"{type(self._part.causal).__name__} cannot continue from a repeated cache: {self.verdict.differences.get('kv')}", hint='use backend="auto"'
            )

    def _admit(self, row: Row) -> None:
        size = self._part.embedding.num_embeddings
        for tokens in (row.ids, row.edge_target):
            if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
                raise DataError(
                    f"token {int(tokens.max())} or {int(tokens.min())} is outside the vocabulary of {size}", hint="tokenise with this model's tokenizer"
                )
        if row.form == "tree" and len(row.ids) > MAX_ROW and not row.chain:
            raise DataError(f"a row of {len(row.ids)} tokens needs a mask of more than {MAX_ROW} squared", hint="shorten the paths, or lower the budget")

    def begin(self, row: Row, blocks: int) -> Given:
        """What the first `blocks` blocks make of a row of `plan` for `grad`, without gradients."""
        self._admit(row)
        self.module.eval()
        return begin(self._part, row.to(self._part.device), blocks, mask=self.verdict.tree_mask, masked=self.verdict.padded == "masked")

    def _row(self, row: Row, asked: _Hidden | None, temperature: float, *, entropy: bool, given: Given | None, noise: Tensor | None) -> Scores:
        return self._assemble(row, *self.compute(row, asked, temperature, entropy=entropy, given=given, noise=noise))

    def _computed(
        self, row: Row, asked: _Hidden | None, temperature: float, *, entropy: bool, given: Given | None, noise: Tensor | None
    ) -> tuple[HeadScores, dict[int | str, Tensor] | None]:
        """What the head says, and hidden states: all that needs the model's weights, in containers whose tensors torch finds."""
        nodes = asked.nodes(row) if asked is not None else row.ids[:0]
        unique, where = torch.unique(nodes, return_inverse=True)
        logits = self.verdict.head == "logits"
        both, head_at = torch.unique(torch.cat([row.unique_parents, unique]), return_inverse=True)
        wants_last = asked is not None and "last" in asked.layers
        blocks = asked.blocks if asked is not None else {}
        wanted = Wanted(both if wants_last else row.unique_parents, sorted(set(blocks.values())), unique, logits)
        states = run(self._part, row, wanted, mask=self.verdict.tree_mask, masked=self.verdict.padded == "masked", given=given, noise=noise)
        count = len(row.unique_parents)
        h_UD = states.final[head_at[:count]] if wants_last else states.final
        found: dict[int | str, Tensor] = {name: states.layers[block][where] for name, block in blocks.items()}
        if wants_last:
            if logits:
                raise ModelError(f"the head of {type(self._part.causal).__name__} cannot be told from its logits", hint="ask for layers by number")
            found["last"] = states.final[head_at[count:]][where]
        return self._head(h_UD, row, temperature, entropy=entropy), found if asked is not None else None

    def _head(self, h_UD: Tensor, row: Row, temperature: float, *, entropy: bool) -> HeadScores:
        part = self._part
        if not len(row.edge_u):
            empty = torch.zeros(0, device=h_UD.device)
            return HeadScores(empty, empty.bool(), empty if entropy else None)
        shape: dict[str, Any] = {"temperature": temperature, "want_entropy": entropy}
        if self.verdict.head == "logits":
            return module_logprobs(h_UD, nn.Identity(), row.edge_u, row.edge_target, **shape)
        shape |= {"scale": part.scale, "softcap": part.softcap}
        # An adapter on the head, or a head of another class, is called as it is.
        if type(part.head) is not nn.Linear:
            return module_logprobs(h_UD, part.head, row.edge_u, row.edge_target, **shape)
        weight, bias = part.head.weight, part.head.bias
        return selected_logprobs(
            h_UD.to(weight.device), weight, bias, row.edge_u.to(weight.device), row.edge_target.to(weight.device), cells=self.cells, **shape
        )

    def _assemble(self, row: Row, head: HeadScores, hidden: dict[int | str, Tensor] | None) -> Scores:
        device = head.logp.device
        path, count = row.edge_path.to(device), len(row.paths)
        missed = torch.zeros(count, dtype=torch.int64, device=device).index_add_(0, path, (~head.greedy).long())
        return Scores(
            edge_logp=head.logp,
            edge_path=path,
            path_logp=torch.zeros(count, dtype=head.logp.dtype, device=device).index_add(0, path, head.logp),
            path_len=torch.bincount(path, minlength=count),
            is_greedy=missed == 0,
            entropy=head.entropy,
            hidden=hidden,
        )

    def _nothing(self, hidden: Mapping[str, Any] | None, *, entropy: bool) -> Scores:
        asked = _Hidden.read(hidden, len(self._part.layers))
        none = torch.zeros(0, device=self._part.device)
        width = self._part.embedding.embedding_dim
        states = {layer: torch.zeros(0, width, dtype=self._part.dtype, device=self._part.device) for layer in asked.layers} if asked else None
        return Scores(none, none.long(), none, none.long(), none.bool(), none if entropy else None, states)


@dataclass(frozen=True, slots=True)
class _Hidden:
    """A checked request for hidden states."""

    layers: tuple[int | str, ...]
    blocks: dict[int | str, int]
    at: Place

    @classmethod
    def read(cls, asked: Mapping[str, Any] | None, count: int) -> _Hidden | None:
        if asked is None:
            return None
        layers, at = asked.get("layers", "last"), asked.get("at", "leaf")
        layers = (layers,) if isinstance(layers, int | str) else tuple(layers)
        if at not in get_args(Place) or set(asked) - {"layers", "at"}:
            hint = '{"layers": [..] or "last", "at": "leaf", "prompt_end", "scored" or "before"}'
            raise DataError(f"hidden states cannot be asked for as {dict(asked)}", hint=hint)
        for layer in layers:
            if layer != "last" and not (isinstance(layer, int) and -count <= layer < count):
                raise DataError(f"there is no layer {layer!r}", hint=f'layers are 0 to {count - 1}, negative from the end, or "last"')
        return cls(layers, {layer: layer % count for layer in layers if isinstance(layer, int)}, at)

    @property
    def keeps_last(self) -> bool:
        """Whether the last token of a path has to be fed to the network."""
        return self.at in ("leaf", "scored")

    def from_block(self, first: int) -> bool:
        """Whether no block before this one is asked for."""
        return all(block >= first for block in self.blocks.values())

    def nodes(self, row: Row) -> Tensor:
        return {"leaf": row.leaves, "prompt_end": row.prompt_end, "scored": row.edge_node, "before": row.edge_parent}[self.at]


def _gather(pieces: Sequence[Scores], order: Tensor, *, by_edge: bool) -> Scores:
    """Scores of rows put into the order of the paths they were made from; `order` [P] is the path of each row's paths in turn.

    `by_edge`: hidden states belong to scored tokens, not to paths.
    """
    offsets = torch.tensor([0, *(len(piece.path_len) for piece in pieces)]).cumsum(0).tolist()
    edge_path = torch.cat([order[piece.edge_path + offset] for piece, offset in zip(pieces, offsets, strict=False)])
    edges, back = torch.argsort(edge_path, stable=True), torch.argsort(order)
    first = pieces[0]
    hidden = None
    if first.hidden is not None:
        whole = {layer: torch.cat([piece.hidden[layer] for piece in pieces if piece.hidden is not None]) for layer in first.hidden}
        hidden = {layer: states[edges if by_edge else back] for layer, states in whole.items()}
    return Scores(
        edge_logp=torch.cat([piece.edge_logp for piece in pieces])[edges],
        edge_path=edge_path[edges],
        path_logp=torch.cat([piece.path_logp for piece in pieces])[back],
        path_len=torch.cat([piece.path_len for piece in pieces])[back],
        is_greedy=torch.cat([piece.is_greedy for piece in pieces])[back],
        entropy=torch.cat([piece.entropy for piece in pieces if piece.entropy is not None])[edges] if first.entropy is not None else None,
        hidden=hidden,
    )
