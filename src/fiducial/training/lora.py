"""LoRA through peft, computed at the speed of the base model.

Adapters are float32, since updates of bfloat16 weights round away at the learning rates in use (measured: lr 2e-5 on pure bfloat16
learned nothing). peft would then compute in float32 too, which costs 2.3 times a forward pass of the base model; here the matrices
are cast to the base model's type instead of the activations to float32, and gradients arrive in float32 through the cast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fiducial.core.errors import ConfigError
from fiducial.models import adapters


def attach(module: nn.Module, *, rank: int, alpha: int | None = None, targets: str | list[str] = "all-linear", seed: int = 0) -> nn.Module:
    """A peft model with a fresh adapter on all linear layers (or those named); base weights frozen. Alpha defaults to twice the rank."""
    from peft import LoraConfig, get_peft_model

    if adapters.is_adapted(module):
        raise ConfigError("the model already carries an adapter", hint="merge it first, or train from its base model")
    if rank < 1:
        raise ConfigError(f"a LoRA rank of {rank} trains nothing", hint="use 1 or more, or lora_rank=0 for full fine-tuning")
    with torch.random.fork_rng():  # the adapter's start depends on the seed alone
        torch.manual_seed(seed)
        wrapped = get_peft_model(module, LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, task_type="CAUSAL_LM"))
    quicken(wrapped)
    return wrapped.eval()


def quicken(module: nn.Module) -> None:
    """Makes plain LoRA layers compute in the base layer's type. Others (DoRA, quantised, several adapters) keep peft's own forward."""
    from peft.tuners.lora import Linear

    for layer in module.modules():
        if isinstance(layer, Linear) and type(layer.base_layer) is nn.Linear and list(layer.lora_A) == ["default"] and not layer.lora_variant:
            layer.forward = MethodType(_forward, layer)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = self.base_layer(x)
    if self.disable_adapters or self.merged:
        return out
    a, b = self.lora_A["default"].weight.to(x.dtype), self.lora_B["default"].weight
    return out + (x @ a.t()) @ (b * self.scaling["default"]).to(x.dtype).t()


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
