"""Random weights in the shape of a model's configuration, to pretrain from."""

from __future__ import annotations

from typing import Any

import torch

from fiducial.core.errors import ConfigError, nearest
from fiducial.models import adapters
from fiducial.models.local import LocalModel
from fiducial.models.scoring import Engine
from fiducial.training.options import TrainOptions


def begin_from_scratch(model: LocalModel, options: TrainOptions) -> None:
    """Gives `model` random weights, the same for the same seed and sizes; its tokenizer stays. Raises ConfigError for options that do not fit together."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not options.from_scratch:
        raise ConfigError("sizes are those of a model from scratch", hint="give --from-scratch too, or leave out --sizes")
    if options.lora_rank or adapters.is_adapted(model.module):
        raise ConfigError("an adapter on random weights learns little", hint="give --lora-rank 0, and a model without an adapter")
    module: Any = model.module
    changes, old = options.sizes or {}, module.config.to_dict()
    fixed = {"model_type", "vocab_size", "architectures"}
    for key in changes:
        if key not in old.keys() - fixed:
            raise ConfigError(f"sizes: the model's configuration has no '{key}' to change", hint=nearest(key, old.keys() - fixed))
    attention = {"attn_implementation": module.config._attn_implementation}
    dtype = next(module.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        # boundary to foreign model code: sizes that do not divide, or fit no layer, fail in many ways
        try:
            config = AutoConfig.for_model(**(old | changes))
            fresh = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            raise ConfigError(f"sizes: {adapters.first_line(error)}", hint="check that the sizes fit together") from error
    fresh.generation_config = module.generation_config
    model.module = fresh.to(model.device).eval()
    # The self-check cannot tell a wrong mask on such small weights, and texts to learn from share little.
    model.engine = Engine(model.module, backend="padded")
    model.changed()
