"""Log-probabilities of chosen tokens at chosen positions, without ever holding all logits.

Logits are made in tiles, some positions by some of the vocabulary, in the model's dtype, and reduced in float32 to a running
log-sum-exp per position and one number per scored token. Where only the states need a gradient, which a frozen head leaves, the mean
of the output embeddings under the model's distribution is gathered on the way, and the backward pass needs no logits; otherwise it
makes the tiles again. Memory is a tile, and for the backward pass a row as wide as the states for each position. Several scored tokens
at one position (the first tokens of all answers to a question) share its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fiducial.core.errors import DataError

ROWS = 512
"""Positions of a tile, at most."""
CPU_CELLS, GPU_CELLS = 1 << 20, 1 << 25
"""Logits of a tile: on a CPU what fits beside the weights in a cache, on a GPU what keeps it busy."""


class HeadScores(NamedTuple):
    """What the head says about E scored tokens."""

    logp: Tensor
    """Natural log-probability of each scored token, [E], float32 (float64 for float64 input)."""
    greedy: Tensor
    """Whether the scored token is the likeliest, the first of equals, [E] bool."""
    entropy: Tensor | None
    """Entropy in nats of the distribution each token was scored under, [E]."""


@dataclass(frozen=True, slots=True)
class LogitForm:
    """How raw logits become the model's: `cap * tanh(scale * raw / cap) / temperature`."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply(self, raw: Tensor) -> Tensor:
        """Logits in at least float32."""
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def pull(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, given that with respect to the formed ones. Overwrites `grad`."""
        if self.softcap is not None:
            capped = logits * (self.temperature / self.softcap)
            grad *= 1.0 - capped * capped
        factor = self.scale / self.temperature
        return grad if factor == 1.0 else grad.mul_(factor)


def selected_logprobs(
    h_UD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    edge_u: Tensor,
    edge_target: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    cells: int | None = None,
    want_entropy: bool = False,
) -> HeadScores:
    """Scores of the tokens `edge_target` [E] at positions `edge_u` [E] (indices into the U rows of `h_UD`).

    Differentiable once with respect to hidden states, weight and bias; what needs no gradient gets no work. A tile has `cells` logits;
    sums over tiles are kept in float32, the products of one tile have the model's dtype. Under autocast they have the autocast dtype.
    Raises DataError for a token that the weight has no row for.
    """
    if len(edge_target) and not 0 <= int(edge_target.min()) <= int(edge_target.max()) < len(weight_VD):
        raise DataError(f"a scored token is outside the head's vocabulary of {len(weight_VD)}", hint="tokenise with this model's tokenizer")
    form = LogitForm(scale, softcap, temperature)
    dtype = torch.get_autocast_dtype(h_UD.device.type) if torch.is_autocast_enabled(h_UD.device.type) else weight_VD.dtype
    tiles = Tiles.of(len(h_UD), len(weight_VD), cells or (CPU_CELLS if h_UD.device.type == "cpu" else GPU_CELLS))
    # what is scored of one position more than once, by several paths, is made once
    pair, of_edge = torch.unique(edge_u * len(weight_VD) + edge_target, return_inverse=True)
    logp, greedy, entropy_U = _Selected.apply(  # type: ignore[no-untyped-call]
        h_UD.to(dtype),
        weight_VD.to(dtype),
        None if bias_V is None else bias_V.to(dtype),
        Pairs(pair // len(weight_VD), pair % len(weight_VD)),
        form,
        tiles,
        torch.is_grad_enabled(),
        want_entropy,
    )
    return HeadScores(logp[of_edge], greedy[of_edge], entropy_U[edge_u] if want_entropy else None)


def module_logprobs(
    h_UD: Tensor,
    head: Callable[[Tensor], Tensor],
    edge_u: Tensor,
    edge_target: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int = 64,
    want_entropy: bool = False,
) -> HeadScores:
    """The same for a head that is only known as a callable [n, D] -> [n, V]: an adapter on it, a custom module.

    Ordinary autograd with each chunk recomputed in the backward pass.
    """
    form = LogitForm(scale, softcap, temperature)

    def part(h: Tensor, u: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = form.apply(head(h))
        lse = logsumexp(logits)
        entropy = lse - (torch.exp(logits - lse[:, None]) * logits).sum(-1) if want_entropy else lse
        found = logits[u, target]
        return found - lse[u], logits.argmax(-1)[u] == target, entropy[u]

    order = torch.argsort(edge_u, stable=True)
    parts = [
        checkpoint(part, h_UD[a:b], edge_u[edges] - a, edge_target[edges], use_reentrant=False)
        if torch.is_grad_enabled()
        else part(h_UD[a:b], edge_u[edges] - a, edge_target[edges])
        for a, b, edges in _chunks(len(h_UD), edge_u, order, chunk)
    ]
    back = torch.argsort(order)
    logp, greedy, entropy = (torch.cat(column)[back] for column in zip(*parts, strict=True))
    return HeadScores(logp, greedy, entropy if want_entropy else None)


def logsumexp(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension. On a CPU an order of magnitude faster than torch's own (measured with torch 2.13)."""
    top = logits.detach().amax(-1, keepdim=True)
    return (top + torch.exp(logits - top).sum(-1, keepdim=True).log())[..., 0]


def _chunks(rows: int, edge_u: Tensor, order: Tensor, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, one past the last, edges at those rows) for every chunk."""
    bounds = [*range(0, rows, chunk), rows]
    at = torch.searchsorted(edge_u[order], torch.tensor(bounds, device=edge_u.device)).tolist()
    for number in range(len(bounds) - 1):
        yield bounds[number], bounds[number + 1], order[at[number] : at[number + 1]]


class Pairs(NamedTuple):
    """Scored tokens: each at a position, no two alike."""

    u: Tensor
    """Position, [P]."""
    target: Tensor
    """Token, [P]."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a matrix of positions by vocabulary is cut."""

    rows: list[slice]
    """Positions."""
    tokens: list[slice]
    """Vocabulary."""

    @classmethod
    def of(cls, rows: int, vocabulary: int, cells: int) -> Tiles:
        """Tiles of at most so many cells, with as many rows as are allowed."""
        height = max(1, min(rows, ROWS, cells))
        width = max(1, min(vocabulary, cells // height))
        return cls(_slices(rows, height), _slices(vocabulary, width))


def _slices(size: int, step: int) -> list[slice]:
    return [slice(a, min(a + step, size)) for a in range(0, size, step)]


class _Buffers:
    """Memory for one tile, taken once: memory that is given back and asked for again comes page by page."""

    def __init__(self, like: Tensor, tiles: Tiles) -> None:
        size = (tiles.rows[0].stop if tiles.rows else 0) * tiles.tokens[0].stop
        self.narrow, wide = like.new_empty(size), torch.promote_types(like.dtype, torch.float32)
        self.wide = self.narrow if wide == like.dtype else like.new_empty(size, dtype=wide)

    def logits(self, h: Tensor, weight: Tensor, bias: Tensor | None, form: LogitForm) -> Tensor:
        """Logits [n, B] in at least float32, in memory that the next tile takes over."""
        shape = (len(h), len(weight))
        raw = self._view(self.narrow, shape)
        if bias is None:
            torch.mm(h, weight.t(), out=raw)
        else:
            torch.addmm(bias, h, weight.t(), out=raw)
        return form.apply(raw if self.wide is self.narrow else self._view(self.wide, shape).copy_(raw))

    def narrowed(self, tile: Tensor) -> Tensor:
        """The tile in the model's dtype."""
        return tile if tile.dtype == self.narrow.dtype else self._view(self.narrow, tile.shape).copy_(tile)

    @staticmethod
    def _view(memory: Tensor, shape: Sequence[int]) -> Tensor:
        return memory[: shape[0] * shape[1]].view(*shape)


class _Selected(torch.autograd.Function):
    """Scores of pairs, and the entropy at each position."""

    @staticmethod
    def forward(
        ctx: Any,
        h_UD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        pairs: Pairs,
        form: LogitForm,
        tiles: Tiles,
        grad: bool,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability [P] and greediness [P] of `pairs`, which are in order of their positions, and the entropy at each position, [U].

        With `grad`, where only the states need one, the mean embedding under the model's distribution is gathered tile by tile.
        """
        wide = torch.promote_types(h_UD.dtype, torch.float32)
        keeps = grad and form.softcap is None and ctx.needs_input_grad[:3] == (True, False, False)
        lowest = torch.finfo(wide).min
        top_U = h_UD.new_full((len(h_UD),), lowest, dtype=wide)
        total_U = torch.zeros_like(top_U)  # sum of exp(logit - top)
        spread_U = torch.zeros_like(top_U) if want_entropy else None  # sum of exp(logit - top) (logit - top)
        mean_UD = torch.zeros_like(h_UD, dtype=wide) if keeps else None  # sum of exp(logit - top) weight, without the scored tokens
        leads = torch.zeros(len(pairs.u), dtype=torch.bool, device=h_UD.device)  # first of the largest in its tile
        first_U, tile_of = torch.zeros_like(top_U, dtype=torch.long), torch.zeros_like(pairs.u)  # tile of the first largest, of the token
        found = top_U.new_empty(len(pairs.u))
        buffers = _Buffers(h_UD, tiles)
        for number, tokens in enumerate(tiles.tokens):
            weight, bias = weight_VD[tokens], None if bias_V is None else bias_V[tokens]
            for rows in tiles.rows:
                inside, u, target = _inside(pairs, rows, tokens)
                logits = buffers.logits(h_UD[rows], weight, bias, form)
                peak, values = logits.amax(-1), logits[u, target]
                found[inside], leads[inside], tile_of[inside] = values, _is_first_top(logits, peak, u, target, values), number
                first_U[rows].masked_fill_(peak > top_U[rows], number)
                top = torch.maximum(top_U[rows], peak)
                shrink = torch.exp(top_U[rows] - top)
                logits -= top[:, None]
                exp = logits.exp_() if spread_U is None else logits.exp()
                total = exp.sum(-1)
                if spread_U is not None:
                    moved = spread_U[rows] + total_U[rows] * (top_U[rows] - top)
                    spread_U[rows] = shrink * moved + logits.clamp_(min=lowest).mul_(exp).sum(-1)
                total_U[rows] = shrink * total_U[rows] + total
                top_U[rows] = top
                if mean_UD is not None:
                    exp[u, target] = 0.0
                    mean_UD[rows] = torch.addcmul(buffers.narrowed(exp) @ weight, mean_UD[rows], shrink[:, None])
        lse_U = top_U + total_U.log()
        entropy_U = lse_U - top_U - spread_U / total_U if spread_U is not None else None
        greedy = leads & (found == top_U[pairs.u]) & (tile_of == first_U[pairs.u])
        logp = found - lse_U[pairs.u]
        if mean_UD is not None:
            mean_UD /= total_U[:, None]
        ctx.save_for_backward(h_UD, weight_VD, bias_V, *pairs, lse_U, entropy_U, mean_UD, logp)
        ctx.form, ctx.tiles = form, tiles
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(greedy)
        return logp, greedy, entropy_U

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, _greedy: Tensor | None, entropy_pull_U: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of states, weight and bias: from the gathered mean where it is there, else from logits made again tile by tile."""
        h_UD, weight_VD, bias_V, u, target, lse_U, entropy_U, mean_UD, logp = ctx.saved_tensors
        pairs = Pairs(u, target)
        grad_logp = torch.zeros_like(logp) if grad_logp is None else grad_logp
        pull_U = torch.zeros_like(lse_U).index_add_(0, u, grad_logp)
        if mean_UD is not None and entropy_pull_U is None:
            # d logp / d state = weight of the token - mean weight, the scored tokens' part in the mean apart: near certainty it nearly cancels
            grad_states, share = torch.empty_like(h_UD), grad_logp - pull_U[u] * logp.exp()
            for rows in ctx.tiles.rows:
                inside, at, token = _inside(pairs, rows, slice(0, len(weight_VD)))
                part = (mean_UD[rows] * -pull_U[rows, None]).index_add_(0, at, share[inside, None] * weight_VD[token])
                grad_states[rows] = ctx.form.pull(part, part)
            return grad_states, *([None] * 7)
        need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_h = torch.zeros_like(h_UD, dtype=lse_U.dtype) if need_h else None
        grad_weight = torch.zeros_like(weight_VD) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=lse_U.dtype) if need_bias else None
        buffers = _Buffers(h_UD, ctx.tiles)
        for tokens in ctx.tiles.tokens:
            weight, bias = weight_VD[tokens], None if bias_V is None else bias_V[tokens]
            products = []
            for rows in ctx.tiles.rows:
                inside, at, token = _inside(pairs, rows, tokens)
                logits = buffers.logits(h_UD[rows], weight, bias, ctx.form)
                if entropy_pull_U is not None:  # d entropy / d logit_j = -p_j (log p_j + entropy)
                    log_p = (logits - lse_U[rows, None]).clamp_(min=torch.finfo(logits.dtype).min)
                    grad = torch.exp(log_p)
                    grad *= -pull_U[rows, None] - entropy_pull_U[rows, None] * (log_p + entropy_U[rows, None])
                else:
                    own = logits if ctx.form.softcap is None else logits.clone()  # a cap's derivative needs the logits
                    grad = own.sub_(lse_U[rows, None]).exp_().mul_(-pull_U[rows, None])
                grad[at, token] += grad_logp[inside]
                grad = ctx.form.pull(grad, logits)
                if grad_bias is not None:
                    grad_bias[tokens] += grad.sum(0)
                narrow = buffers.narrowed(grad)
                if grad_h is not None:
                    grad_h[rows] += narrow @ weight
                if grad_weight is not None:
                    products.append(narrow.t() @ h_UD[rows])
            if grad_weight is not None and products:
                grad_weight[tokens] = products[0] if len(products) == 1 else torch.stack(products).sum(0, dtype=lse_U.dtype)
        return (
            grad_h.to(h_UD.dtype) if grad_h is not None else None,
            grad_weight,
            grad_bias.to(bias_V.dtype) if grad_bias is not None else None,
            *([None] * 5),
        )


def _inside(pairs: Pairs, rows: slice, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs lie in a tile, and where in it: rows and columns."""
    # pairs are in order of their positions
    first, last = torch.searchsorted(pairs.u, torch.tensor([rows.start, rows.stop], device=pairs.u.device)).tolist()
    target = pairs.target[first:last]
    inside = first + ((target >= tokens.start) & (target < tokens.stop)).nonzero()[:, 0]
    return inside, pairs.u[inside] - rows.start, pairs.target[inside] - tokens.start


def _is_first_top(logits: Tensor, top: Tensor, u: Tensor, target: Tensor, found: Tensor) -> Tensor:
    """Whether each target is its row's argmax. Only those equal to the maximum are looked at for ties, which bfloat16 has often."""
    greedy = found == top[u]
    close = greedy.nonzero().flatten()
    greedy[close] = logits[u[close]].argmax(-1) == target[close] if len(close) else greedy[close]
    return greedy
