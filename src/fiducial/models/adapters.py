"""Adapters of peft: put on a model without copying it, and saved with the name of the model they belong to."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from fiducial.core.errors import ModelError

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
"""Beside the adapter: how fiducial opens its base model, for example {"uri": "smollm2"}. peft itself only knows folders and hub names."""


def is_adapted(module: torch.nn.Module) -> bool:
    """Whether peft wraps it. Does not import peft, which takes seconds: without it nothing can be wrapped."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


def base_of(folder: Path) -> str:
    """How the base model of the adapter in `folder` is opened. Raises ModelError where the folder does not say."""
    for name, key in ((BASE, "uri"), (CONFIG, "base_model_name_or_path")):
        try:
            uri = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if uri:
            beside = folder / uri
            return str(beside.resolve()) if beside.is_dir() else str(uri)
    raise ModelError(f"{folder} holds an adapter but does not say of which model", hint=f"write base_model_name_or_path into its {CONFIG}")


def put_on(module: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """A model with the adapter in `folder`; it shares its weights with `module`, which stays as it was."""
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}", hint="give a folder that `save` or peft's save_pretrained wrote as safetensors")
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with _calm():
            adapted: torch.nn.Module = PeftModel.from_pretrained(sharing(module), str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} does not fit: {first_line(error)}", hint="open it on the model it was trained on") from error
    quicken(adapted)
    return adapted.eval()


def add(module: torch.nn.Module, config: Any) -> torch.nn.Module:
    """A model with a new, trainable adapter of this peft configuration; it shares its weights with `module`, which stays as it was."""
    from peft import get_peft_model

    with _calm():
        adapted: torch.nn.Module = get_peft_model(sharing(module), config)
    quicken(adapted)
    return adapted.eval()


def quicken(module: torch.nn.Module) -> None:
    """Makes plain LoRA layers compute in the base layer's type; others (DoRA, quantised, with a bias, several adapters) keep peft's own forward.

    Adapters are float32, since updates of bfloat16 weights round away at the learning rates in use. peft computes in float32 too,
    which makes a forward pass 2.3 times as slow as the base model's; here the matrices are cast instead of the activations, and
    gradients arrive in float32 through the cast. Adapters run in evaluation mode, also while they are trained, so `lora_dropout`
    never acts, here as in peft's own forward. Trained tokens are put into what the embedding gives: peft puts the whole matrix together anew
    in each pass.
    """
    import torch
    from peft.tuners.lora import Linear
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in module.modules():
        if isinstance(layer, TrainableTokensLayer) and type(layer.base_layer) in (torch.nn.Embedding, torch.nn.Linear):
            if list(layer.trainable_tokens_delta) == ["default"]:
                layer.forward = MethodType(_with_tokens, layer)
            continue
        if not isinstance(layer, Linear) or type(layer.base_layer) is not torch.nn.Linear:
            continue
        if list(layer.lora_A) == ["default"] and not layer.lora_variant and layer.lora_B["default"].bias is None:
            layer.forward = MethodType(_forward, layer)


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    import torch

    from fiducial.models.lowrank import adapted

    layer = self.base_layer
    if self.disable_adapters or self.merged:
        out: torch.Tensor = layer(x)
        return out
    a, b, scale = self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]
    watched = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    elsewhere = "forward" in vars(layer)  # accelerate fetches weights there
    if watched or elsewhere or any(p.requires_grad for p in layer.parameters()) or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        change: torch.Tensor = (x @ a.to(x.dtype).t()) @ (b * scale).to(x.dtype).t()
        return torch.add(layer(x), change)
    return adapted(x, layer.weight, layer.bias, a, b, scale)


def _with_tokens(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Embeddings of tokens, or logits of states, with the rows of the trained tokens in the place of the base layer's."""
    import torch

    out: torch.Tensor = self.base_layer(x)
    if self.disable_adapters or self.merged:
        return out
    tokens, rows = self.token_indices["default"], self.trainable_tokens_delta["default"].to(out.dtype)
    if isinstance(self.base_layer, torch.nn.Linear):
        index, bias = torch.tensor(tokens, device=out.device), self.base_layer.bias
        return out.index_copy(-1, index, torch.nn.functional.linear(x, rows, None if bias is None else bias[index]))
    for token, row in zip(tokens, rows, strict=True):
        out = torch.where((x == token)[..., None], row, out)
    return out


def sharing(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of the structure around the same memory: layers can be replaced in one without the other noticing."""
    import torch

    memo: dict[int, Any] = {id(p): torch.nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)


def save(module: torch.nn.Module, folder: Path, *, base: str) -> None:
    """Writes the adapter, and `base` beside it."""
    wrapped: Any = module
    # rows of new tokens are part of the adapter; peft would write the whole embedding besides
    whole = False if wrapped.active_peft_config.to_dict().get("trainable_token_indices") else "auto"
    wrapped.save_pretrained(str(folder), save_embedding_layers=whole)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form, not filled in
    (folder / BASE).write_text(json.dumps({"uri": base}), encoding="utf-8")


@contextmanager
def _calm() -> Iterator[None]:
    """peft 0.21 asks for an attribute that transformers 5.23 has renamed, which is no concern of the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def first_line(error: Exception) -> str:
    """The first line of a foreign error's text; the rest is advice about a library the user did not call."""
    return str(error).strip().partition("\n")[0]
