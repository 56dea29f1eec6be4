"""Checkpoints that resume exactly: weights, optimizer moments, random state and the place in the data, as one folder renamed into place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiducial.core.errors import StorageError
from fiducial.core.store import sync_folder

STATE = "state.json"


def save(folder: Path, *, step: int, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Writes `folder/checkpoint-<step>` and then removes older ones. A crash leaves the last complete one. Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target, beside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}"
    moments = optimizer.state_dict()
    tensors = {f"{i}.{name}": value for i, values in moments["state"].items() for name, value in values.items() if isinstance(value, Tensor)}
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file({k: v.detach().contiguous() for k, v in weights.items()}, beside / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()} | {"rng": torch.get_rng_state()}, beside / "optimizer.safetensors")
        (beside / STATE).write_text(json.dumps({"step": step} | state), encoding="utf-8")
        sync_folder(beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
    except OSError as error:
        raise StorageError.from_os(error, target) from error
    except SafetensorError as error:  # how it reports a full disk
        raise StorageError(f"{target} cannot be written: {error}", hint="check the disk, then go on with --resume") from error
    for old in _complete(folder):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, *, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Puts the newest complete checkpoint into `weights` and `optimizer` and returns its state; None when there is none."""
    from safetensors.torch import load_file

    found = _complete(folder)
    if not found:
        return None
    newest = max(found, key=_step)
    stored = load_file(newest / "weights.safetensors")
    if set(stored) != set(weights) or any(stored[k].shape != weights[k].shape for k in stored):
        raise StorageError(f"{newest} belongs to another model or adapter", hint="start a new run, or resume with the options of the old one")
    with torch.no_grad():
        for name, value in stored.items():
            weights[name].copy_(value)
    tensors = load_file(newest / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    current = optimizer.state_dict()
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": current["param_groups"]})
    state: dict[str, Any] = json.loads((newest / STATE).read_text(encoding="utf-8"))
    return state


def clear(folder: Path) -> None:
    """Removes all checkpoints; called when the model itself has been written."""
    for old in _complete(folder):
        shutil.rmtree(old, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _complete(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoint-*") if (p / STATE).is_file()]
