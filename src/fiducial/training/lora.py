"""LoRA through peft: adapters on all linear layers, off for the reference, merged on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fiducial.core.errors import ConfigError
from fiducial.models import adapters


def attach(module: nn.Module, *, rank: int, alpha: int | None = None, targets: str | list[str] = "all-linear", seed: int = 0) -> nn.Module:
    """A peft model with a fresh adapter on all linear layers (or those named); base weights frozen. Alpha defaults to twice the rank."""
    from peft import LoraConfig

    if adapters.is_adapted(module):
        raise ConfigError("the model already carries an adapter", hint="merge it first, or train from its base model")
    if rank < 1:
        raise ConfigError(f"a LoRA rank of {rank} trains nothing", hint="use 1 or more, or lora_rank=0 for full fine-tuning")
    with torch.random.fork_rng():  # the adapter's start depends on the seed alone
        torch.manual_seed(seed)
        return adapters.add(module, LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, task_type="CAUSAL_LM"))


def make_trainable(module: nn.Module) -> None:
    """Gradients for the adapter alone, or for all weights of a model without one."""
    adapted = adapters.is_adapted(module)
    for name, p in module.named_parameters():
        p.requires_grad_(not adapted or "lora_" in name)


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
