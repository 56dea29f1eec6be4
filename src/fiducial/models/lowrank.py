"""A frozen linear layer with a low-rank change on it, forward and backward: every product once, added up where it is made.

Autograd would make the same products, and besides them a sum of the layer's output and the change, a sum of the two gradients of the
input, and a cast for each activation that meets float32 matrices.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def adapted(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """`x W^T + bias + scale (x A^T) B^T` for x [..., I], computed in x's type; gradients for x, A and B, those of A and B in their own type."""
    flat_NI = x.reshape(-1, x.shape[-1])
    # a view made inside could not be changed in place, as some models do
    return cast(Tensor, _Adapted.apply(flat_NI, weight_OI, bias_O, a_RI, b_OR, scale)).view(*x.shape[:-1], len(weight_OI))  # type: ignore[no-untyped-call]


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        a, b = a_RI.to(flat_NI.dtype), (b_OR * scale).to(flat_NI.dtype)
        low_NR = flat_NI @ a.t()
        learns = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(flat_NI if learns else None, low_NR if learns else None, weight_OI, a, b)
        ctx.scale, ctx.kinds = scale, (a_RI.dtype, b_OR.dtype)
        return F.linear(flat_NI, weight_OI, bias_O).addmm_(low_NR, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        flat_NI, low_NR, weight_OI, a, b = ctx.saved_tensors
        need_x, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        low_grad_NR = grad_NO @ b
        grad_x = (grad_NO @ weight_OI).addmm_(low_grad_NR, a) if need_x else None
        grad_a = (low_grad_NR.t() @ flat_NI).to(ctx.kinds[0]) if need_a else None
        # what comes out is a transpose: on a CPU grad^T low, [O, N] by [N, R] in bfloat16, takes twice as long
        grad_b = (low_NR.t() @ grad_NO).to(ctx.kinds[1]).mul_(ctx.scale).t() if need_b else None
        return grad_x, None, None, grad_a, grad_b, None
