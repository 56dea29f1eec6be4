"""The parameters that train: float32 for the optimizer, whatever type the model computes in, and this process's part where they are shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fiducial.core.errors import ConfigError


def refuse_float16(module: nn.Module) -> None:
    """Raises ConfigError for weights in which small gradients become zero and large ones infinite, unless losses are scaled, which no loop here does."""
    if any(p.dtype == torch.float16 for p in module.parameters()):
        raise ConfigError("float16 weights cannot be trained without scaling the loss", hint="open the model with --dtype bfloat16, or float32")


class Trainables:
    """Parameters with `requires_grad` and tensors that are trained besides, each with a float32 master copy where it is of a smaller type.

    Small updates of bfloat16 weights round away; masters keep them. Gradients of every row are added up in float32. The master of a
    parameter that FSDP shares out is an ordinary tensor: the part that lies here, cut along its first dimension.
    """

    def __init__(self, module: nn.Module, besides: Mapping[str, Tensor] | None = None) -> None:
        self.named: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad} | dict(besides or {})
        self.shared_out = frozenset(n for n, p in self.named.items() if isinstance(p, DTensor))
        """Those of which each process has a part."""
        self.masters = {n: p if p.dtype == torch.float32 and n not in self.shared_out else _here(p).float().requires_grad_() for n, p in self.named.items()}

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
            grad = _here(p.grad)
            master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
            p.grad = None

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds gradients of all of `named`, in their order, to those of the masters."""
        for master, grad in zip(self.masters.values(), grads, strict=True):
            if grad is not None:
                # in the weight's own layout: torch's fused AdamW reads memory on a CPU without a look at strides
                master.grad = torch.empty_like(master).copy_(grad) if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the masters into the model, and forgets gradients."""
        for name, p in self.named.items():
            master = self.masters[name]
            if p.dtype != torch.float32:  # otherwise the master is the parameter, or the memory of its part
                _here(p).copy_(master)
            master.grad = None

    def whole(self, name: str, part: Tensor, *, keep: bool) -> Tensor:
        """A tensor of all parts, on the CPU, from a master or a moment of it; every process takes part, and those that do not keep it get nothing."""
        p = self.named[name]
        if not isinstance(p, DTensor) or part.ndim == 0:
            return part
        found = DTensor.from_local(part.detach(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()).full_tensor()
        return found.cpu() if keep else found.new_empty(0)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What of a whole tensor belongs here."""
        p = self.named.get(name)
        if not isinstance(p, DTensor) or whole.ndim == 0:
            return whole
        parts, here = whole.chunk(p.device_mesh.size()), p.device_mesh.get_local_rank()
        return parts[here] if here < len(parts) else whole[:0]


def _here(p: Tensor) -> Tensor:
    """The values that lie here, in the same memory, without history."""
    return p.detach().to_local() if isinstance(p, DTensor) else p.detach()
