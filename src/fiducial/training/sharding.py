"""Weights shared out over processes with FSDP2, for training that does not fit on one device.

The configuration of `accelerate launch` asks for it; nothing else does. Each process keeps a part of every weight, gradient and moment,
and gathers the weights of one block at a time while a row goes through it. The engine calls parts of a model, so its whole row is what
FSDP sees as the forward pass. Afterwards every process has the whole model again.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fiducial.core.errors import ConfigError, ModelError
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.passes import anatomy

if TYPE_CHECKING:
    from accelerate import Accelerator

IDLE = Paths([(0, 0)], [1])
"""A row of no meaning, for a process that has none left while others have."""
ROW = "fiducial_row"
"""What the engine's row is called on the model while FSDP watches over it."""
NEEDED = {
    "FSDP_VERSION": ("fsdp_version", "2", "1"),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", "true", "true"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false", "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false", "false"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("fsdp_cpu_ram_efficient_loading", "false", "false"),
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no", "no"),
}
"""Variable in which accelerate hands an option on -> (the option, the value that is supported, the value when it is not set)."""


def wanted(accelerator: Accelerator) -> bool:
    """Whether weights are to be shared out. Raises ConfigError for an option of FSDP that would be ignored here."""
    if accelerator.num_processes == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for variable, (option, value, default) in NEEDED.items():
        said = os.environ.get(variable, default).lower()
        if said != value:
            raise ConfigError(f"{option} is {said} in the configuration of accelerate, and only {value} is supported", hint="see docs/guides/bigger-models.md")
    return True


def share_out(model: LocalModel, accelerator: Accelerator) -> nn.Module:
    """Leaves this process its part of every weight, in place; gives the structure of the model as it was, for `put_together`.

    Raises ModelError when the model does not give the same numbers afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    engine, plain, part = model.engine, _hollow(model.module), anatomy(model.module)
    before = engine.score(IDLE).path_logp
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in (*part.layers, part.causal):
        # resharded also at the root: weights that stay whole between passes would not follow the optimizer
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for module in part.causal.modules():
        if isinstance(module, FSDPModule):  # losses are shares of the step's, so gradients are added up and not averaged
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(part.causal, ROW, engine.compute)
    register_fsdp_forward_method(part.causal, ROW)
    engine.compute = getattr(part.causal, ROW)
    # the first pass also settles where FSDP keeps its parts
    gap = float((engine.score(IDLE).path_logp - before).abs().max())
    if not gap <= engine.verdict.tolerance:
        raise ModelError(f"{type(part.causal).__name__} gives other numbers when shared out ({gap:.2g} nats)", hint="train it on one device")
    return plain


def put_together(model: LocalModel, plain: nn.Module) -> None:
    """Gives the model its whole weights in the structure that `share_out` gave; every process takes part, and has all of them."""
    from torch.distributed.tensor import DTensor

    parts = dict(model.module.named_parameters(remove_duplicate=False))
    whole: dict[int, nn.Parameter] = {}
    for name, hollow in plain.named_parameters():
        p = parts[name].detach()
        whole[id(hollow)] = nn.Parameter(p.full_tensor() if isinstance(p, DTensor) else p, requires_grad=hollow.requires_grad)
    for module in plain.modules():
        module._parameters.update({name: whole[id(p)] for name, p in module._parameters.items() if p is not None})
    model.module = plain
    model.changed()


def _hollow(module: nn.Module) -> nn.Module:
    """A copy of the structure whose weights take no memory; what was tied is tied."""
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)
