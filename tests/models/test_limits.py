"""What configurations say about lengths."""

import pytest
from transformers import Gemma3TextConfig, GPTNeoConfig, LlamaConfig, Qwen2Config, RecurrentGemmaConfig

from fiducial.models.limits import limits


def test_windows_with_masks_of_their_own_are_told_from_others():
    assert limits(LlamaConfig()) == limits(Qwen2Config(use_sliding_window=False))
    assert limits(Gemma3TextConfig(sliding_window=8)).window == 8
    assert limits(GPTNeoConfig(window_size=64)).foreign == 64
    assert limits(RecurrentGemmaConfig(attention_window_size=32)).foreign == 32


@pytest.mark.parametrize("key", ["sliding_window_size", "keep_window_size", "local_attention_window_len", "window_size", "local_attention"])
def test_any_other_key_of_a_window_counts(key):
    assert limits(LlamaConfig(**{key: 16})).foreign == 16
    assert limits(LlamaConfig(**{key: [16, 0, 12]})).foreign == 12


@pytest.mark.parametrize("config", [Gemma3TextConfig(sliding_window=8), Qwen2Config(max_window_layers=4), LlamaConfig(use_sliding_window=True)])
def test_counts_and_switches_are_no_sizes(config):
    assert limits(config).foreign is None


def test_the_turning_point_of_stretched_positions_is_found():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 40}
    found = limits(LlamaConfig(rope_parameters=rope | {"factor": 2.0}))
    assert (found.turn, found.drift) == (40, None)
    found = limits(LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, max_position_embeddings=64))
    assert (found.turn, found.drift) == (None, 64)
