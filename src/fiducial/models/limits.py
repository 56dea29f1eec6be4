"""Lengths at which a model changes its ways: windows of attention, and the turning point of stretched rotary positions.

Read from the configuration alone, in one place, for scoring and decoding alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KNOWN = ("sliding_window", "attention_chunk_size")
"""Keys of windows for which masks are made here, measured in positions."""
LOCAL = ("local_attention",)
"""Keys of windows that do not say so in their name."""
NO_SIZE = ("pattern", "layers", "num_", "use_")
"""What stands in keys that speak of windows and do not give their size."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the configuration says about lengths, in tokens; None where it says nothing."""

    window: int | None
    """Sliding window in positions."""
    block: int | None
    """Attention block length in positions."""
    foreign: int | None
    """Smallest window under any other key: how it is measured is unknown, and by row index (as GPT-Neo does) it is wrong in a tree."""
    turn: int | None
    """Longest batch of the first rotary frequencies; a longer one has others in all of its rows ("longrope")."""
    drift: int | None
    """Longest batch with fixed rotary frequencies; beyond it they depend on what was run before ("dynamic")."""


def limits(config: Any) -> Limits:
    """The limits of a transformers text configuration."""
    turn, drift = _turning(config, "longrope"), _turning(config, "dynamic")
    return Limits(_size(config, "sliding_window"), _size(config, "attention_chunk_size"), _foreign(config), turn, drift)


def setting(config: Any, name: str) -> Any:
    """An attribute of a transformers configuration, None where it has none of that name or refuses one value for layers that differ (Gemma 4)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return config.to_dict().get(name)


def _size(config: Any, name: str) -> int | None:
    return setting(config, name) or None


def _foreign(config: Any) -> int | None:
    sizes: list[int] = []
    for name, value in config.to_dict().items():
        if name not in KNOWN and (name in LOCAL or ("window" in name and not any(part in name for part in NO_SIZE))):
            values: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
            sizes += [size for size in values if isinstance(size, int) and not isinstance(size, bool) and size > 0]
    return min(sizes, default=None)


def _turning(config: Any, kind: str) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    # one set for the model, or one for each kind of layer
    sets = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    found = [_original(config, each) for each in sets if each.get("rope_type") == kind]
    return min((size for size in found if size), default=None)


def _original(config: Any, rope: Mapping[str, Any]) -> int | None:
    name = "original_max_position_embeddings"
    return rope.get(name) or getattr(config, name, None) or getattr(config, "max_position_embeddings", None)
