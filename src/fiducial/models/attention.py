"""Attention by plain products, for models on a CPU whose attention is torch's fused kernel.

The fused kernel of torch 2.13 on a CPU takes two to three times as long as two batched products with a softmax between them: for single
tokens over a cache, and for the rows of a few hundred tokens that scoring and training run, above all backwards. Heads that share a key
are computed together, and keys are not repeated. What a packed row's mask leaves empty is left out in blocks. Scores are rounded to the
model's type before the softmax, as in the eager attention of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fiducial.models.blocks import LONGEST, Block, Span, blocks_of

_NAME = "fiducial_products"


def by_products(config: Any, device: torch.device) -> bool:
    """Whether plain products are faster there."""
    return device.type == "cpu" and config._attn_implementation in ("sdpa", _NAME)


@contextmanager
def products(config: Any, device: torch.device) -> Iterator[None]:
    """Forward passes inside attend by plain products where that is faster; elsewhere nothing changes."""
    before = config._attn_implementation
    if by_products(config, device):
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any) -> Any:
    """Attention of [B, H, T, D] queries on [B, G, S, D] keys, H a multiple of G; [B, T, H, D] and no weights, as transformers wants it."""
    t, s = query.shape[2], key.shape[2]
    blocks = blocks_of(attention_mask)
    known = isinstance(attention_mask, Tensor) or (t == s and getattr(module, "is_causal", False))
    longest = t if blocks is None else max(block.last - block.first for block in blocks)
    foreign = kwargs.get("position_bias") is not None or kwargs.get("dropout") or (not query.is_meta and torch.is_autocast_enabled(query.device.type))
    if longest > LONGEST or not known or foreign:  # for long rows the fused kernel needs less memory
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if blocks is None:
        blocks = [Block(0, t, ((0, s),), _additive(attention_mask, query, s))]
    return _Products.apply(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling, blocks), None  # type: ignore[no-untyped-call]


class _Products(torch.autograd.Function):
    """Scores, softmax and values of every block, and their gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, blocks: Sequence[Block]) -> Tensor:
        (b, heads, t, _), groups = query.shape, key.shape[1]
        scaled = _grouped((query * scaling).transpose(1, 2), groups)
        out = query.new_empty(b, t, heads, value.shape[3])
        parts, kept = _grouped(out, groups), []
        for first, last, keys, mask in blocks:
            q, k, v = scaled[:, :, :, first:last].flatten(2, 3), _taken(key, keys), _taken(value, keys)
            scores = (q @ k.transpose(2, 3)).view(b, groups, -1, last - first, k.shape[2])
            if t == 1:  # small enough for wider sums
                scores = scores.float()
            weights = torch.softmax(scores.add_(mask[:, :, None]), -1).to(value.dtype).flatten(2, 3)
            parts[:, :, :, first:last] = (weights @ v).view(b, groups, -1, last - first, v.shape[3])
            kept += [q, weights] if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(key, value, *kept)
        ctx.scaling, ctx.heads, ctx.spans = scaling, heads, [block[:3] for block in blocks]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, value, *kept = ctx.saved_tensors
        (b, groups, _, width), t = key.shape, grad.shape[1]
        pulls = _grouped(grad, groups)
        grad_query = grad.new_empty(b, t, ctx.heads, width)
        parts = _grouped(grad_query, groups)
        grad_key, grad_value = _Sum(key, alone=len(ctx.spans) == 1), _Sum(value, alone=len(ctx.spans) == 1)
        for (first, last, keys), q, weights in zip(ctx.spans, kept[::2], kept[1::2], strict=True):
            pull, k, v = pulls[:, :, :, first:last].flatten(2, 3), _taken(key, keys), _taken(value, keys)
            grad_value.add(keys, weights.transpose(2, 3) @ pull)
            grad_scores = torch._softmax_backward_data(pull @ v.transpose(2, 3), weights, -1, weights.dtype)
            grad_key.add(keys, grad_scores.transpose(2, 3) @ q)
            torch.mul((grad_scores @ k).view(b, groups, -1, last - first, width), ctx.scaling, out=parts[:, :, :, first:last])
        return grad_query.transpose(1, 2), grad_key.result(), grad_value.result(), None, None


class _Sum:
    """Gradients of keys from all blocks, added up in at least float32; of one block alone just its own."""

    def __init__(self, like: Tensor, *, alone: bool) -> None:
        self.dtype = like.dtype
        self.total = None if alone else torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))

    def add(self, spans: tuple[Span, ...], part: Tensor) -> None:
        """Takes the gradients of the keys in `spans`."""
        if self.total is None:
            self.total = part
            return
        at = 0
        for a, b in spans:
            self.total[:, :, a:b] += part[:, :, at : at + b - a]
            at += b - a

    def result(self) -> Tensor:
        """The sum, in the dtype of the keys."""
        assert self.total is not None
        return self.total.to(self.dtype)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, T, H, D] as [B, G, heads of a group, T, D]."""
    b, t, heads, width = x.shape
    return x.view(b, t, groups, heads // groups, width).permute(0, 2, 3, 1, 4)


def _taken(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Some of the keys of [B, G, S, D]."""
    parts = [x[:, :, a:b] for a, b in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _additive(mask: Tensor | None, query: Tensor, keys: int) -> Tensor:
    """The mask as numbers to add, [1 or B, 1, T, S]; the causal one where there is none."""
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        return torch.full((keys, keys), lowest, dtype=query.dtype, device=query.device).triu_(1)[None, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, lowest)
    return mask


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
