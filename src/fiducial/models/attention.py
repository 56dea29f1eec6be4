"""Attention by plain products, for models on a CPU whose attention is torch's fused kernel.

The fused kernel of torch 2.13 on a CPU takes two to three times as long as two batched products with a softmax between them: for single
tokens over a cache, and for the rows of a few hundred tokens that scoring and training run, above all backwards. Heads that share a key
are computed together, and keys are not repeated. Scores are rounded to the model's type before the softmax, as in the eager attention
of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LONGEST = 1024
"""Queries at once up to which all scores are written out; beyond it the fused kernel needs less memory."""
_NAME = "fiducial_products"


@contextmanager
def products(config: Any, device: torch.device) -> Iterator[None]:
    """Forward passes inside attend by plain products where that is faster; elsewhere nothing changes."""
    before = config._attn_implementation
    if before == "sdpa" and device.type == "cpu":
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any) -> Any:
    """Attention of [B, H, T, D] queries on [B, G, S, D] keys, H a multiple of G; [B, T, H, D] and no weights, as transformers wants it."""
    (b, heads, t, width), s = query.shape, key.shape[2]
    known = isinstance(attention_mask, Tensor) or (t == s and getattr(module, "is_causal", False))
    if t > LONGEST or not known or kwargs.get("position_bias") is not None or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    mask = _additive(attention_mask, query, s)
    grouped = (query * (width**-0.5 if scaling is None else scaling)).reshape(b, key.shape[1], -1, width)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(b, key.shape[1], -1, t, s)
    if t == 1:  # small enough for wider sums
        scores = scores.float()
    weights = torch.softmax(scores + mask[:, :, None], -1).to(value.dtype).view(b, key.shape[1], -1, s)
    out = torch.matmul(weights, value).view(b, heads, t, -1)
    return out.transpose(1, 2).contiguous(), None


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
