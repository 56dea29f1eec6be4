"""Reading and editing what flows between the layers of any causal language model of transformers, by forward hooks.

    with capture(module, layers=[3], positions=-1) as store:
        module(input_ids=ids)
    store[3]                                  # [B, D], the residual stream after layer 3, at the last position

Layers count from 0; negative numbers count from the end. Hooks are removed when the block ends, whatever ends it. During cached
generation a forward holds the new tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from fiducial.core.errors import ModelError
from fiducial.models.decoding import base_of

__all__ = ["Positions", "Site", "capture", "decoder_layers", "patch"]

Site = Literal["residual", "mlp", "attention"]
"""`residual`: the stream after the whole layer. `mlp`, `attention`: what that part of the layer adds, before it is added."""
Positions = int | Sequence[int] | Tensor | None
"""None: all. A number: that position of every row. [B]: one position for each row. [B, P]: several for each row."""

_LAYERS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "backbone.layers", "transformer.blocks")
_PARTS = {
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "ffn"),
    "attention": ("self_attn", "attn", "attention", "self_attention"),
}


def decoder_layers(module: torch.nn.Module) -> torch.nn.ModuleList:
    """The list of decoder layers of a causal language model, wrapped by peft or not. Raises ModelError when there is none."""
    base = base_of(module)
    named = {name: part for name, part in base.named_modules() if isinstance(part, torch.nn.ModuleList)}
    for name in _LAYERS:
        if name in named:
            return named[name]
    depth = base.config.get_text_config().num_hidden_layers
    for part in named.values():
        if len(part) == depth:
            return part
    raise ModelError(
        f"{type(base).__name__} has no list of {depth} decoder layers",
        hint=f"looked for {', '.join(_LAYERS)}; it has {', '.join(named) or 'no module lists'}",
    )


@contextmanager
def capture(
    module: torch.nn.Module, layers: Sequence[int] | Literal["all"] = "all", *, at: Site = "residual", positions: Positions = None
) -> Iterator[dict[int, Tensor]]:
    """Yields a store that each forward fills: layer (as given) -> [B, N, D]; [B, D] or [B, P, D] when `positions` are chosen.

    Positions are gathered as the layer runs, so what is not asked for is not kept. A later forward replaces what an earlier one
    left. Gradients flow through what is stored, unless the forward ran without. Raises ModelError for a layer or part that is not there.
    """
    found = decoder_layers(module)
    store: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in range(len(found)) if layers == "all" else layers:
            hooks.callback(_part(found, layer, at).register_forward_hook(_keeper(store, layer, positions)).remove)
        yield store


@contextmanager
def patch(module: torch.nn.Module, layer: int, function: Callable[[Tensor], Tensor], *, at: Site = "residual") -> Iterator[None]:
    """Within the block, what `layer` gives, [B, N, D], is replaced by `function` of it, of the same shape.

    Raises ModelError for a layer that is not there, and, in the forward, for a result of another shape.
    """

    def replace(_: Any, __: Any, output: Any) -> Any:
        before = _hidden(output)
        after = function(before)
        if after.shape != before.shape:
            raise ModelError(
                f"the patch of layer {layer} returned {list(after.shape)} for {list(before.shape)}", hint="return a tensor of the shape it was given"
            )
        return (after, *output[1:]) if isinstance(output, tuple) else after

    hook = _part(decoder_layers(module), layer, at).register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _part(layers: torch.nn.ModuleList, layer: int, at: Site) -> torch.nn.Module:
    if not -len(layers) <= layer < len(layers):
        raise ModelError(f"there is no layer {layer}", hint=f"the model has layers 0 to {len(layers) - 1}")
    whole = layers[layer]
    if at == "residual":
        return whole
    parts = dict(whole.named_children())
    for name in _PARTS[at]:
        if name in parts:
            return parts[name]
    raise ModelError(f"layer {layer} has no part for '{at}'", hint=f"looked for {', '.join(_PARTS[at])}; it has {', '.join(parts)}")


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _keeper(store: dict[int, Tensor], layer: int, positions: Positions) -> Callable[[Any, Any, Any], None]:
    def keep(_: Any, __: Any, output: Any) -> None:
        store[layer] = _gather(_hidden(output), positions)

    return keep


def _gather(hidden_BND: Tensor, positions: Positions) -> Tensor:
    if positions is None:
        return hidden_BND
    if isinstance(positions, int):
        # A copy: a view would keep the whole tensor alive.
        return hidden_BND[:, positions].clone()
    index = torch.as_tensor(positions, device=hidden_BND.device)
    rows = torch.arange(len(hidden_BND), device=hidden_BND.device)
    if len(index) != len(rows):
        raise ModelError(f"positions for {len(index)} rows, but the forward has {len(rows)}", hint="give one entry per row of the batch")
    return hidden_BND[rows if index.ndim == 1 else rows[:, None], index]
