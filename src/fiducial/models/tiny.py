"""Tiny random models of many architectures: two layers, a few thousand weights, milliseconds per pass. For tests and examples.

Weights are drawn wide enough that outputs are far from uniform, so that a wrong mask or position shows.
"""

from __future__ import annotations

from typing import Any

import torch

from fiducial.core.errors import ModelError, nearest

_DENSE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_COMMON = {"max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma2": _DENSE | {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": _DENSE | {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": _DENSE | {"sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 64},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "jamba": _DENSE
    | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False},
    "qwen3_moe": _DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma4_text": _DENSE
    | {"sliding_window": 8, "hidden_size_per_layer_input": 0, "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": _DENSE | {"attention_chunk_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 512},
    "lfm2": _DENSE | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "qwen3_next": _DENSE
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
"""Architecture (a transformers model type) -> its reduced configuration."""


def tiny(architecture: str, *, seed: int = 0, vocab: int = 128, dtype: torch.dtype = torch.float32, attention: str | None = None, **config: Any) -> Any:
    """A random causal language model in evaluation mode, the same for the same arguments. The generator of torch is left alone.

    `config` overrides entries of its transformers configuration; `attention` names the attention implementation. gemma2, gemma3_text,
    gemma4_text and mistral have a sliding window of 8 positions, llama4_text blocks of 8, gpt_neo a window of 64 rows.

    >>> sum(p.numel() for p in tiny("llama").parameters()) < 50_000
    True
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture not in SIZES:
        raise ModelError(f"there is no tiny '{architecture}'", hint=nearest(architecture, SIZES))
    settings = AutoConfig.for_model(architecture, **(_COMMON | SIZES[architecture] | {"vocab_size": vocab} | config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extra = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, **extra)
    return model.eval()
