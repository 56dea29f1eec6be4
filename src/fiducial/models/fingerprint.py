"""Which model is this? A hash of its weights, tokenizer and chat template."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiducial.core.errors import StorageError
from fiducial.core.records import digest
from fiducial.core.store import write_atomic
from fiducial.models.embedded import cache_root

if TYPE_CHECKING:
    import torch

LOOKED = 256
"""Values per tensor that are compared to notice training: even a step that rounds away on 99 % of them shows."""
STATE = ("padding", "truncation", "version")
"""Parts of a serialised tokenizer that say how it was called last, not what it does."""


def fingerprint(module: torch.nn.Module, tokenizer: Any) -> str:
    """16 hexadecimal digits over name, dtype, shape and bytes of every tensor, adapter options, tokenizer and chat template."""
    tensors = sorted(module.state_dict().items())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter lock
        lines = list(pool.map(_tensor, tensors))
    return digest([lines, _adapters(module), _tokenizer(tokenizer), tokenizer.chat_template])


def remembered(folders: tuple[Path, ...], dtype: str) -> Path:
    """Where the fingerprint of the model in these folders is kept; another file as soon as any of their files changes."""
    files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for folder in folders for p in sorted(folder.iterdir()) if p.is_file()]
    return cache_root() / "fingerprints" / digest([dtype, files])


def recall(place: Path) -> str:
    """The fingerprint kept there, or nothing."""
    try:
        text = place.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return text if len(text) == 16 else ""


def remember(place: Path, value: str) -> None:
    """Keeps it; a cache that cannot be written only costs time."""
    try:
        write_atomic(place, value)
    except (StorageError, OSError):
        return


def state(module: torch.nn.Module, tokenizer: Any) -> int:
    """Changes with the tokenizer, its template and, nearly always, the weights; a few milliseconds.

    Looks at memory, version and 256 values of every tensor. A fused optimiser leaves no other trace than the values, so a step that
    moves none of these goes unseen: after training, ask for the whole hash (`LocalModel.changed`).
    """
    import torch

    tensors = [*module.named_parameters(), *module.named_buffers()]
    facts = [(name, t.data_ptr(), 0 if t.is_inference() else t._version) for name, t in tensors]
    looked: dict[torch.device, list[torch.Tensor]] = {}
    for _, tensor in tensors:
        if tensor.is_meta:  # a model in outline has no values
            continue
        values = tensor.detach().reshape(-1)
        looked.setdefault(tensor.device, []).append(values[:: max(1, len(values) // LOOKED)].float())
    words = (id(tokenizer), len(tokenizer), str(tokenizer.chat_template))
    return hash((words, tuple(facts), *(torch.cat(values).cpu().numpy().tobytes() for values in looked.values())))


def _tensor(item: tuple[str, torch.Tensor]) -> str:
    import torch

    name, tensor = item
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _adapters(module: torch.nn.Module) -> dict[str, Any]:
    """Options of peft adapters: with the same tensors, another `lora_alpha` is another model."""
    from fiducial.models.adapters import is_adapted

    if not is_adapted(module):
        return {}
    configs: Any = module.peft_config
    places = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
    plain = {name: {k: v for k, v in config.to_dict().items() if k not in places} for name, config in configs.items()}
    return dict(json.loads(json.dumps(plain, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))))


def _tokenizer(tokenizer: Any) -> str:
    if not tokenizer.is_fast:
        return digest(sorted(tokenizer.get_vocab().items()))
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest({k: v for k, v in whole.items() if k not in STATE})
