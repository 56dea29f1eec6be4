"""What a training on data takes of memory, by its parts, from the shapes of a model in outline: no weight is loaded.

Weights, gradients and moments are counted. What one row of the engine leaves for its backward pass, and what that needs besides, is run through the model's
own code on the meta device, where tensors have shapes and no memory, so that architecture, adapter, frozen layers and attention have their say. The
row is the largest of the heaviest step, that of the `batch` groups with the most tokens, laid out as the engine does. There is no gradient
checkpointing in this loop: rows are bounded instead. Left out: Python and its libraries (some hundreds of MiB), what an allocator holds in reserve,
and further processes of a training, each of which takes as much.

Measured: two steps of align/sft on SmolLM2-135M in float32, one thread of a CPU, a row of 550 tokens, tensors counted by `LiveBytes`: 1,326 MiB with an
adapter of rank 16 (reckoned 1,332), 2,485 MiB with all weights (reckoned 2,473). On a GPU, where attention is reckoned as torch's
memory-efficient kernel keeps it, nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fiducial.core.roles import Objective
from fiducial.models import abreast, adapters
from fiducial.models.attention import by_products, products
from fiducial.models.blocks import Block, blocks_of, cut
from fiducial.models.forest import Row, additive, visible
from fiducial.models.head import CPU_CELLS, GPU_CELLS, Tiles
from fiducial.models.local import LocalModel
from fiducial.models.passes import Anatomy, anatomy
from fiducial.models.planning import STEP, plan
from fiducial.models.scoring import CPU_BUDGET, GPU_BUDGET
from fiducial.training import frozen, lora
from fiducial.training.data import Data
from fiducial.training.livebytes import LiveBytes
from fiducial.training.options import TrainOptions
from fiducial.training.row_passes import MOST_EACH

FUSED = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations of attention that write out no scores."""
_NAME = "fiducial_outline"


@dataclass(frozen=True, slots=True)
class Part:
    """One part of what is in memory at the peak of a step."""

    name: str
    size: int
    """Bytes."""
    why: str
    """What it is made of, in a few words."""


def parts(model: LocalModel, data: Data, objective: Objective, options: TrainOptions, *, device: str) -> list[Part]:
    """The parts, of a `model` in outline without a new adapter, which it has afterwards; `device` is where it would be trained."""
    began_adapted = adapters.is_adapted(model.module)
    if options.lora_rank and not began_adapted:
        model.module = lora.attach(model.module, rank=options.lora_rank, depth=options.lora_depth, seed=options.seed)
    lora.make_trainable(model.module)
    weights, adapted = list(model.module.parameters()), adapters.is_adapted(model.module)
    trained = [p for p in weights if p.requires_grad]
    base = [p for p in weights if not p.requires_grad] if adapted else weights
    moving, count = sum(p.nbytes for p in trained), sum(p.numel() for p in trained)
    narrow = [p for p in trained if p.dtype != torch.float32]
    layouts = _layouts(model, data, objective, options, count, torch.device(device))
    rows = [_row(model.module, row, torch.device(device)) for row in layouts]
    each = f"{len(rows)} rows at once, in threads, the largest" if len(rows) > 1 else "one row at a time, the largest"
    of_threads = len(rows) * moving if len(rows) > 1 else sum(p.nbytes for p in narrow)
    held = "scores" not in objective.reads and began_adapted
    found = [
        Part("weights", sum(p.nbytes for p in base), _kinds(base)),
        Part("adapter", moving if adapted else 0, f"{count / 1e6:.3g} million weights that train, {_kinds(trained)}"),
        Part("float32 copies", 4 * sum(p.numel() for p in narrow), "of weights that train in a smaller type: small updates round away there"),
        Part("gradients", 4 * count + of_threads, "float32, and those of the pass that runs"),
        Part("optimizer", 8 * count, "two float32 moments of each weight that trains"),
        Part("activations", sum(rows), f"{each} of {max(len(row.ids) for row in layouts)} tokens; no checkpointing"),
        Part("logits", sum(_head(model.module, row, torch.device(device)) for row in layouts), "tiles of the head, never all logits"),
        Part("frozen layers", _kept(model, data, options), "what the layers below the adapter make of the data, computed once"),
        Part("reference", _reference(model, data, objective, held=held), "the model as it is now" if held else "a table of numbers, no second model"),
    ]
    return [part for part in found if part.size]


def _kinds(weights: Sequence[Tensor]) -> str:
    """Number types, by the bytes that they take, most first."""
    sizes: dict[str, int] = {}
    for p in weights:
        name = str(p.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + p.nbytes
    return " and ".join(sorted(sizes, key=lambda name: -sizes[name]))


def _layouts(model: LocalModel, data: Data, objective: Objective, options: TrainOptions, trained: int, device: torch.device) -> list[Row]:
    """The largest row of each thread, in the heaviest step."""
    tokens = [sum(len(data.paths.ids[p]) for p in data.paths_of([g])) for g in range(len(data.groups))]
    chosen = sorted(range(len(tokens)), key=lambda g: -tokens[g])[: options.batch]
    size = [tokens[g] for g in chosen]
    divisible = 4 * trained <= MOST_EACH
    count = abreast.threads(device, min(len(chosen), sum(size) // abreast.TOKENS_EACH)) if divisible else 1
    part = anatomy(model.module)
    budget = CPU_BUDGET if device.type == "cpu" else GPU_BUDGET
    shape: dict[str, Any] = {"crossover": part.crossover, "call": STEP, "dense": not by_products(part.causal.config.get_text_config(), device)}
    found = []
    for places in abreast.divided(size, count):
        paths = data.paths.select(data.paths_of([chosen[i] for i in sorted(places)]))
        rows = plan(
            paths, budget=budget, backend="padded" if options.from_scratch or options.neftune else "auto", keep_last="scores" in objective.reads, **shape
        )
        found.append(max(rows, key=_area))
    return found


def _area(row: Row) -> int:
    """Tokens that the network is fed, with those that fill up."""
    return len(row.paths) * (int(row.pos.max()) + 1) if row.form == "padded" else len(row.ids)


def _row(module: nn.Module, row: Row, device: torch.device) -> int:
    """Bytes that a pass through a row and back takes at its peak, besides the gradients of what trains."""
    part = anatomy(module)
    config = part.causal.config.get_text_config()
    with LiveBytes() as live, products(config, device), _fused(config):
        states = part.backbone(**_inputs(row, part, cuts=by_products(config, device)))[0]
        states.backward(torch.empty_like(states))
    grads = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    for p in module.parameters():
        p.grad = None
    return max(0, live.peak - grads)


@contextmanager
def _fused(config: Any) -> Iterator[None]:
    """Attention inside is what torch's fused kernel keeps, also on the meta device, where torch would write out all scores."""
    before = config._attn_implementation
    if before in FUSED:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(_module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **_: Any) -> tuple[Tensor, None]:
    heads = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(heads, 1) if heads > 1 else x for x in (key, value))
    out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)


def _inputs(row: Row, part: Anatomy, *, cuts: bool) -> dict[str, Any]:
    """What the network is given of a row, in shape; the mask as the engine cuts it."""
    shape = (len(row.paths), int(row.pos.max()) + 1) if row.form == "padded" else (1, len(row.ids))
    inputs: dict[str, Any] = {"input_ids": row.ids.new_zeros(shape, device="meta"), "use_cache": False}
    if row.form == "padded" or row.chain:
        # without a mask transformers would look at the numbers of positions, of which there are none here; a causal one is made anyway, layer by layer
        return inputs | {"attention_mask": torch.zeros(1, 1, shape[1], shape[1], dtype=part.dtype, device="meta")}
    mask = additive(visible(row), part.dtype)[None, None]
    blocks = blocks_of(cut(mask, row)) if cuts else None
    shapes = mask.to("meta")
    if blocks is not None:
        shapes.blocks = [Block(*block[:3], block.mask.to("meta")) for block in blocks]  # type: ignore[attr-defined]
    return inputs | {"position_ids": row.pos[None].to("meta"), "attention_mask": shapes}


def _head(module: nn.Module, row: Row, device: torch.device) -> int:
    """Bytes of a tile of logits in both its types, and of what is kept per position; nothing where a row is only read at its end."""
    positions, head = len(row.unique_parents), anatomy(module).head
    weight: Tensor | None = getattr(head, "weight", None)
    if not positions or weight is None:
        return 0
    tiles = Tiles.of(positions, len(weight), CPU_CELLS if device.type == "cpu" else GPU_CELLS)
    cells = (tiles.rows[0].stop) * tiles.tokens[0].stop
    wide = 4 if weight.dtype.itemsize < 4 else 0
    states = positions * weight.shape[1] * (weight.itemsize + 4)
    return cells * (weight.itemsize + wide) + states + (weight.nbytes if weight.requires_grad else 0)


def _kept(model: LocalModel, data: Data, options: TrainOptions) -> int:
    if options.epochs < frozen.PASSES or options.neftune or not frozen.frozen_blocks(model.module):
        return 0
    size = sum(map(len, data.paths.ids)) * model.width * anatomy(model.module).dtype.itemsize
    return size if size <= frozen.MOST else 0


def _reference(model: LocalModel, data: Data, objective: Objective, *, held: bool) -> int:
    """A table of what the reference says; and, where an adapter trains on, the model as it is now, by which fresh answers are measured."""
    scored: Sequence[int] = [len(ids) - start for ids, start in zip(data.paths.ids, data.paths.start, strict=True)]
    table = 4 * (sum(scored) if "tokens" in objective.reads else len(scored)) if objective.needs_reference else 0
    return table + (sum(p.nbytes for p in model.module.parameters()) if held else 0)
