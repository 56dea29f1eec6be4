"""How a row goes through a network: the anatomy of a causal language model, and its forward pass in every mask form.

Everything here returns states per node of the row, whatever the shape the network saw. Which form is right for a model is not
decided here but measured by `fiducial.models.selfcheck`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fiducial.core.errors import ModelError
from fiducial.models.attention import by_products, products
from fiducial.models.blocks import cut
from fiducial.models.forest import Row, additive, visible
from fiducial.models.limits import Limits, limits, setting

Mask = Literal["additive", "bool", "dict", "windowed", "flex"]
"""How a tree mask is handed over: one float mask, one bool mask, one per layer type, one cut to the window, a block mask."""


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """The parts of a causal language model that scoring needs."""

    causal: Any
    """The model with its head, without a peft wrapper; adapters inside it stay active."""
    backbone: nn.Module
    """What turns token ids into final hidden states."""
    layers: nn.ModuleList
    """The blocks, first to last."""
    scale: float
    """Raw logits are multiplied by this."""
    softcap: float | None
    """Then capped smoothly at this."""
    limits: Limits
    """Windows and turning points by its configuration."""
    context: int | None
    """Longest sequence by its configuration; None where there is no longest."""
    attention: str
    """Name of the attention implementation."""
    crossover: float
    """Row length at which attention costs as much as the linear layers."""

    @property
    def window(self) -> int | None:
        """Sliding window in positions, where some layer has one."""
        return self.limits.window

    @property
    def block(self) -> int | None:
        """Attention block length in positions, where some layer has one."""
        return self.limits.block

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.embedding.weight.device

    @property
    def cuts(self) -> bool:
        """Whether attention leaves out what a row's mask leaves empty."""
        return by_products(self.causal.config.get_text_config(), self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.embedding.weight.dtype

    @property
    def head(self) -> nn.Module:
        """The output embedding: hidden states to raw logits. Looked up each time, since peft replaces it."""
        found: nn.Module = self.causal.get_output_embeddings()
        return found

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding."""
        found: Any = self.causal.get_input_embeddings()
        # peft's wrapper of an embedding with new tokens puts the matrix together anew each time it is asked for it; that of LoRA has no size
        embedding: nn.Embedding = getattr(found, "original_module", getattr(found, "base_layer", found))
        return embedding


def anatomy(module: nn.Module) -> Anatomy:
    """The parts of `module`, a transformers causal language model, plain or wrapped by peft. Raises ModelError for anything else."""
    from transformers import PreTrainedModel

    causal: Any = module
    if not isinstance(module, PreTrainedModel):
        from peft import PeftModel

        if not isinstance(module, PeftModel):
            raise ModelError(f"{type(module).__name__} is not a transformers model", hint="open it with AutoModelForCausalLM")
        if module.active_peft_config.is_prompt_learning:
            raise ModelError("prompt-learning adapters add tokens of their own, which rows of tries cannot hold", hint="use LoRA, or merge the adapter")
        causal = module.get_base_model()
    # Llama 4 and Mllama name a backbone that they do not have, and are then their own; it is called "model"
    backbone = causal.model if causal.base_model is causal and "model" in causal._modules else causal.base_model
    if causal.get_output_embeddings() is None or backbone is causal:
        raise ModelError(f"{type(causal).__name__} has no language-model head", hint="open it with AutoModelForCausalLM")
    config = causal.config.get_text_config()
    settings: dict[str, Any] = config.to_dict()
    layers = _blocks(backbone, int(getattr(config, "num_hidden_layers", None) or 0))
    return Anatomy(
        causal=causal,
        backbone=backbone,
        layers=layers,
        scale=_scale(settings),
        softcap=settings.get("final_logit_softcapping"),
        limits=limits(config),
        context=setting(config, "max_position_embeddings"),
        attention=causal.config._attn_implementation or "eager",
        crossover=_crossover(layers, config),
    )


def _blocks(backbone: nn.Module, count: int) -> nn.ModuleList:
    lists = [child for child in backbone.modules() if isinstance(child, nn.ModuleList) and len(child)]
    exact = [child for child in lists if len(child) == count]
    if not lists:
        raise ModelError(f"{type(backbone).__name__} has no list of layers", hint="only models built from a stack of blocks can be scored")
    return (exact or [max(lists, key=len)])[0]


def _scale(settings: dict[str, Any]) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if settings.get(name) is not None:
            return float(settings[name])
    divisor = settings.get("logits_scaling")
    if divisor is None:
        return 1.0
    return float(divisor) if settings.get("model_type") == "hyperclovax" else 1.0 / float(divisor)


def _crossover(layers: nn.ModuleList, config: Any) -> float:
    weights = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim > 1)
    # Attributes, not entries: an attribute answers to the common name where the entry is called n_embd or d_model.
    head, heads, hidden = (setting(config, name) or 0 for name in ("head_dim", "num_attention_heads", "hidden_size"))
    width = head * heads or hidden or 1
    # Operations: 2 per weight and token against 4 per head dimension and pair; attention runs at about half the speed of a product.
    return max(0.5 * weights / (2.0 * len(layers) * width), 1.0)


def tree_mask(row: Row, form: Mask, part: Anatomy) -> Any:
    """The attention mask of a packed row in one of the forms, [1, 1, N, N] where it is a tensor."""
    if form == "flex":
        return _block_mask(row)
    if form == "bool":
        return visible(row)[None, None]
    whole = visible(row)
    if form == "additive":
        return _added(whole, row, part)
    if form == "windowed":
        return _added(visible(row, window=part.window, block=part.block), row, part)
    masks = {"full_attention": _added(whole, row, part)}
    if part.window is not None:
        masks["sliding_attention"] = _added(visible(row, window=part.window), row, part)
    if part.block is not None:
        masks["chunked_attention"] = _added(visible(row, block=part.block), row, part)
    return masks


def _added(seen: Tensor, row: Row, part: Anatomy) -> Tensor:
    mask = additive(seen, part.dtype)[None, None]
    return cut(mask, row) if part.cuts else mask


def _block_mask(row: Row) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    end, n = row.end, len(row.ids)

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    return create_block_mask(sees, None, None, n, n, device=str(row.ids.device))


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of the network: its arguments, and where the nodes `first` to `last` of the row are in what it returns."""

    inputs: dict[str, Any]
    batch: Tensor
    time: Tensor
    first: int
    last: int

    def take(self, raw: Tensor, nodes: Tensor) -> Tensor:
        """States [n, D] of those `nodes` that this call computes, out of [B, T, D]."""
        here = nodes[(nodes >= self.first) & (nodes < self.last)] - self.first
        return raw[self.batch[here].to(raw.device), self.time[here].to(raw.device)]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Which states a pass must hand back; nodes ascending."""

    final: Tensor
    """Nodes whose final states are wanted, [n]."""
    layers: Sequence[int] = ()
    """Blocks whose outputs are wanted."""
    nodes: Tensor | None = None
    """Nodes whose block outputs are wanted, [m]."""
    logits: bool = False
    """Hand back the model's own logits instead of final states."""


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """What a pass handed back."""

    final: Tensor
    """[n, D], or [n, V] when logits were wanted."""
    layers: dict[int, Tensor]
    """Block -> [m, D]."""


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What the first blocks make of a row, known before the pass."""

    blocks: int
    """How many of them, at least one."""
    states: Tensor
    """Output of the last of them, [N, D], for all nodes of the row, on any device."""
    bare: bool
    """Whether blocks hand over the tensor itself, not a tuple that begins with it."""


def run(
    part: Anatomy, row: Row, wanted: Wanted, *, mask: Mask | None = None, masked: bool = False, given: Given | None = None, noise: Tensor | None = None
) -> States:
    """Sends one row, already on the model's device, through the network.

    A "tree" row needs its `mask` form. A "padded" row is right-padded; `masked` hands over a 2D mask for models that look at padding
    on the right. A "kv" row is run in two calls and cannot be differentiated through the second. What is `given` of a row that is not
    "kv" is not computed again. `noise` [N, D] is added to the input embeddings of the nodes.
    """
    final: list[Tensor] = []
    config = part.causal.config.get_text_config()
    caught: dict[int, list[Tensor]] = {layer: [] for layer in wanted.layers}
    for call in _calls(part, row, mask, masked):
        with _noised(part, call, noise), _begun(part, call, given), _capture(part, call, wanted, caught), products(config, part.device):
            if wanted.logits:
                final.append(call.take(part.causal(**call.inputs).logits, wanted.final))
            else:
                final.append(call.take(part.backbone(**call.inputs)[0], wanted.final))
    return States(torch.cat(final), {layer: torch.cat(pieces) for layer, pieces in caught.items()})


class _Reached(Exception):  # noqa: N818  # no error
    """Ends a pass in the middle of the network."""


@torch.no_grad()
def begin(part: Anatomy, row: Row, blocks: int, *, mask: Mask | None = None, masked: bool = False) -> Given:
    """What the first `blocks` blocks make of a row, "tree" or "padded", already on the model's device; the others are not run."""
    found: list[Given] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        bare = isinstance(output, Tensor)
        states = output if bare else output[0]
        found.append(Given(blocks, states[call.batch.to(states.device), call.time.to(states.device)], bare))
        raise _Reached

    (call,) = _calls(part, row, mask, masked)
    handle = part.layers[blocks - 1].register_forward_hook(stop)
    try:
        with products(part.causal.config.get_text_config(), part.device), suppress(_Reached):
            part.backbone(**call.inputs)
    finally:
        handle.remove()
    return found[0]


@contextmanager
def _begun(part: Anatomy, call: _Call, given: Given | None) -> Iterator[None]:
    """The first blocks hand on what they are given, and the last of them what is known to come out of it."""
    if given is None:
        yield
        return
    ids = call.inputs["input_ids"]
    states = given.states.new_zeros(*ids.shape, given.states.shape[-1], device=ids.device)
    states[call.batch, call.time] = given.states.to(ids.device)

    def passed(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if given.bare else (hidden_states,)

    def known(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return states if given.bare else (states,)

    first = list(part.layers)[: given.blocks]
    before = [block.__dict__.get("forward") for block in first]  # what accelerate puts on an instance
    try:
        for block in first:
            block.forward = known if block is first[-1] else passed
        yield
    finally:
        for block, own in zip(first, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


@contextmanager
def _noised(part: Anatomy, call: _Call, noise: Tensor | None) -> Iterator[None]:
    """Adds noise to what the input embedding gives. Raises ModelError for a network that does not ask it for the tokens of the call."""
    if noise is None:
        yield
        return
    shape, added = call.inputs["input_ids"].shape, []

    def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if output.shape[:2] != shape:
            return output
        added.append(True)
        whole = output.new_zeros(*shape, noise.shape[-1])
        whole[call.batch, call.time] = noise[call.first : call.last].to(output)
        return output + whole

    handle = part.causal.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if not added:
        raise ModelError(f"{type(part.causal).__name__} takes no noise on its embeddings, since it does not call them", hint="train without it")


@contextmanager
def _capture(part: Anatomy, call: _Call, wanted: Wanted, caught: dict[int, list[Tensor]]) -> Iterator[None]:
    handles = []
    for layer in wanted.layers:

        def keep(_module: nn.Module, _args: Any, output: Any, *, layer: int = layer) -> None:
            assert wanted.nodes is not None
            caught[layer].append(call.take(output if isinstance(output, Tensor) else output[0], wanted.nodes))

        handles.append(part.layers[layer].register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _calls(part: Anatomy, row: Row, mask: Mask | None, masked: bool) -> Iterator[_Call]:
    if row.form == "padded":
        yield _padded_call(row, masked)
    elif row.form == "kv":
        yield from _kv_calls(part, row)
    else:
        yield _tree_call(part, row, mask)


def _tree_call(part: Anatomy, row: Row, mask: Mask | None) -> _Call:
    inputs: dict[str, Any] = {"input_ids": row.ids[None], "use_cache": False}
    if not row.chain:
        if mask is None:
            raise ModelError("a packed row needs a mask form", hint="let the engine choose the back end")
        inputs |= {"position_ids": row.pos[None], "attention_mask": tree_mask(row, mask, part)}
    time = torch.arange(len(row.ids), device=row.ids.device)
    return _Call(inputs, torch.zeros_like(time), time, 0, len(time))


def _padded_call(row: Row, masked: bool) -> _Call:
    if len(row.paths) == 1:
        return _Call({"input_ids": row.ids[None], "use_cache": False}, row.branch, row.pos, 0, len(row.ids))
    shape = (len(row.paths), int(row.pos.max()) + 1)
    # Filled with a token that does occur: transformers warns about rows that end in the padding token and come without a mask.
    ids = row.ids[:1].expand(shape).clone()
    ids[row.branch, row.pos] = row.ids
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if masked:
        real = row.ids.new_zeros(shape)
        real[row.branch, row.pos] = 1
        inputs["attention_mask"] = real
    return _Call(inputs, row.branch, row.pos, 0, len(row.ids))


def _kv_calls(part: Anatomy, row: Row) -> Iterator[_Call]:
    """The prefix once, then every continuation over a repeated cache. The cache grows in place, so it serves this row only."""
    from transformers import DynamicCache

    cache = DynamicCache(config=part.causal.config)
    time = torch.arange(row.prefix, device=row.ids.device)
    yield _Call({"input_ids": row.ids[None, : row.prefix], "past_key_values": cache, "use_cache": True}, torch.zeros_like(time), time, 0, row.prefix)
    batch, time = row.branch[row.prefix :], row.pos[row.prefix :] - row.prefix
    if not len(batch):
        return
    cache.batch_repeat_interleave(len(row.paths))
    ids = row.ids[:1].expand(len(row.paths), int(time.max()) + 1).clone()
    ids[batch, time] = row.ids[row.prefix :]
    yield _Call({"input_ids": ids, "past_key_values": cache, "use_cache": True}, batch, time, row.prefix, len(row.ids))
