"""The parameters that train: float32 for the optimizer, whatever type the model computes in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Trainables:
    """Parameters with `requires_grad` and tensors that are trained besides, each with a float32 master copy where it is of a smaller type.

    Small updates of bfloat16 weights round away; masters keep them. Gradients of every row are added up in float32.
    """

    def __init__(self, module: nn.Module, besides: Mapping[str, Tensor] | None = None) -> None:
        self.named: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad} | dict(besides or {})
        self.masters = {n: p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for n, p in self.named.items()}

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer updates, float32."""
        return list(self.masters.values())

    def collect(self) -> None:
        """Moves the gradients of a backward pass to the masters."""
        for name, p in self.named.items():
            master = self.masters[name]
            if master is p or p.grad is None:
                continue
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the masters into the model, and forgets gradients."""
        for name, p in self.named.items():
            master = self.masters[name]
            if master is not p:
                p.copy_(master)
            master.grad = None
