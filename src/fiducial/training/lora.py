"""LoRA through peft: adapters on all linear layers, off for the reference, merged on request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fiducial.core.config import refuse_idle
from fiducial.core.errors import ConfigError
from fiducial.models import adapters
from fiducial.models.activations import decoder_layers
from fiducial.training.options import TrainOptions

STACKED = ".experts."
"""In the name of a parameter that holds the matrices of all experts of a block."""
TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Layers whose names peft 0.21 takes for experts of all blocks, in a model with stacked ones."""


def attach(module: nn.Module, *, rank: int, alpha: int | None = None, depth: float = 1.0, seed: int = 0, tokens: Sequence[int] = ()) -> nn.Module:
    """A peft model with a fresh adapter on all linear layers of the top share `depth` of the blocks; base weights frozen.

    Alpha defaults to twice the rank. No gradient flows below the lowest block with an adapter. The embeddings of `tokens` train too, and are part
    of the adapter. In a model with stacked experts these get one, and routers, dense feed-forward layers and shared experts none.
    """
    from peft import LoraConfig

    if adapters.is_adapted(module):
        raise ConfigError("the model already carries an adapter", hint="merge it first, or train from its base model")
    if rank < 1:
        raise ConfigError(f"a LoRA rank of {rank} trains nothing", hint="use 1 or more, or lora_rank=0 for full fine-tuning")
    # gpt2 and its kin keep their matrices transposed, in a class of that name
    transposed = any(type(layer).__name__ == "Conv1D" for layer in module.modules())
    with torch.random.fork_rng(devices=[]):  # the adapter's start depends on the seed alone
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"r": rank, "lora_alpha": alpha or 2 * rank, "fan_in_fan_out": transposed, **_targets(module, depth)}
        if tokens:
            shape["trainable_token_indices"] = {name: list(tokens) for name in _embeddings(module)}
        adapted = adapters.add(module, LoraConfig(**shape, exclude_modules=_bypassed(module), task_type="CAUSAL_LM"))
    below = {id(p) for block in _blocks(adapted, depth)[0] for p in block.parameters() if p.requires_grad}
    assert not below, "peft put adapters below the blocks that were to get them"
    return adapted


def _blocks(module: nn.Module, depth: float) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks below the top share, and those in it."""
    blocks = list(decoder_layers(module))
    cut = len(blocks) - max(1, round(depth * len(blocks)))
    return blocks[:cut], blocks[cut:]


def _targets(module: nn.Module, depth: float) -> dict[str, Any]:
    """What gets an adapter, as peft wants to be told."""
    inside = {id(p) for block in _blocks(module, depth)[1] for p in block.parameters()}
    experts = [name for name, p in module.named_parameters() if id(p) in inside and STACKED in name and p.ndim == 3]
    if not experts:
        return {"target_modules": "all-linear" if depth == 1 else _linear_in_top(module, depth)}
    return {"target_modules": [n for n in _linear_in_top(module, depth) if n.rpartition(".")[2] not in TAKEN_FOR_EXPERTS], "target_parameters": experts}


def _linear_in_top(module: nn.Module, depth: float) -> list[str]:
    """Names of the linear layers in the top blocks."""
    inside = {id(layer) for block in _blocks(module, depth)[1] for layer in block.modules()}
    # by its very class: routers derive from the linear layer and give more than a product
    return [name for name, layer in module.named_modules() if id(layer) in inside and (type(layer) is nn.Linear or type(layer).__name__ == "Conv1D")]


def _embeddings(module: Any) -> list[str]:
    """Names of the input embedding and of an output embedding with weights of its own; peft finds one that is tied."""
    first, last = module.get_input_embeddings(), module.get_output_embeddings()
    wanted = [first] if first.weight is last.weight else [first, last]
    return [name for name, layer in module.named_modules() if any(layer is each for each in wanted)]


def _bypassed(module: nn.Module) -> list[str] | None:
    """Layers that get no adapter: Mamba's kernels read the weights of `out_proj` past its forward pass, and peft refuses it there."""
    kind = getattr(getattr(module, "config", None), "model_type", "")
    return ["out_proj"] if kind in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h") else None


def make_trainable(module: nn.Module) -> None:
    """Gradients for the adapter alone, or for all weights of a model without one. Raises ConfigError for an adapter of which only part would train."""
    adapted = adapters.is_adapted(module)
    if adapted:
        _refuse_foreign(module)
    for name, p in module.named_parameters():
        p.requires_grad_(not adapted or _of_adapter(name))


def _refuse_foreign(module: nn.Module) -> None:
    wrapped: Any = module
    said = wrapped.active_peft_config.to_dict()
    whole = [*(said.get("modules_to_save") or ()), *(["biases"] if said.get("bias", "none") != "none" else ())]
    if whole or not any(_of_adapter(name) for name, _ in module.named_parameters()):
        what = f"whole layers ({', '.join(whole)})" if whole else f"weights of the kind {wrapped.active_peft_config.peft_type.value}"
        raise ConfigError(f"the model's adapter holds {what}, which are not trained here", hint="merge the adapter into its base model, and train that")


def refuse_ignored(module: nn.Module, options: TrainOptions) -> None:
    """Raises ConfigError for a depth without an adapter, and where a rank was set and the model carries an adapter of another: that one trains anyway."""
    if not options.lora_rank:
        refuse_idle(options, ["lora_depth"], when="when lora_rank is 0 and all weights train", hint="leave it out, or give a rank")
    if not adapters.is_adapted(module) or "lora_rank" not in options.model_fields_set:
        return
    wrapped: Any = module
    rank = wrapped.active_peft_config.to_dict().get("r")
    if options.lora_rank != rank:
        what = f"the model carries an adapter of rank {rank}, which is trained on, so that lora_rank {options.lora_rank} would be ignored"
        raise ConfigError(what, hint="leave out lora_rank, or begin with a model without an adapter")


def _of_adapter(name: str) -> bool:
    return "lora_" in name or "trainable_tokens_" in name


WRAPPED = re.compile(r"(?<=\.)(token_adapter|base_layer)\.")
"""In the name of a weight below an adapter."""


def base_fingerprint(module: nn.Module) -> str:
    """Which weights lie below the adapter, 16 hexadecimal digits; the same with and without one. Looks at 1024 values of every tensor."""
    looked = hashlib.sha256()
    for name, p in module.named_parameters():
        if not _of_adapter(name):
            values = p.detach().reshape(-1)
            looked.update(WRAPPED.sub("", name.removeprefix("base_model.model.")).encode())
            looked.update(values[:: max(1, len(values) // 1024)].float().cpu().numpy().tobytes())
    return looked.hexdigest()[:16]


@contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """The base model, while inside; does nothing to a model without adapter."""
    if not adapters.is_adapted(module):
        yield
        return
    wrapped: Any = module
    with wrapped.disable_adapter():
        yield


def merge(module: nn.Module) -> nn.Module:
    """The base model with the adapter added into its weights; the module it came from is no longer to be used."""
    if not adapters.is_adapted(module):
        return module
    wrapped: Any = module
    merged: nn.Module = wrapped.merge_and_unload()
    return merged.eval()
