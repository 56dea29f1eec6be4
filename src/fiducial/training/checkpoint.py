"""Checkpoints that resume exactly: weights, optimizer moments, random state and the place in the data, as one folder renamed into place."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiducial.core.errors import StorageError
from fiducial.core.store import disk_errors, sync_folder, sync_tree

log = logging.getLogger(__name__)

STATE = "state.json"

Piece = Callable[[str, Tensor], Tensor]
"""From the name of a weight and a tensor of its shape or its part's (the weight, a moment): the whole of it, or the part that lies here."""


def save(
    folder: Path,
    *,
    step: int,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    whole: Piece = lambda _, value: value,
    write: bool = True,
) -> None:
    """Writes `folder/checkpoint-<step>` and then removes older ones. A crash leaves the last complete one. Raises StorageError.

    `optimizer` has the weights in their order. With several processes all call it, for `whole` may need all of them, and one writes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target, beside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}"
    names = list(weights)
    found = {name: whole(name, value.detach()) for name, value in weights.items()}
    states = optimizer.state_dict()["state"].items()
    moments = {f"{i}.{name}": whole(names[i], value) for i, values in states for name, value in values.items() if isinstance(value, Tensor)}
    if not write:
        return
    try:
        with disk_errors(target):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            save_file({k: v.contiguous() for k, v in found.items()}, beside / "weights.safetensors")
            save_file({k: v.contiguous() for k, v in moments.items()} | {"rng": torch.get_rng_state()}, beside / "optimizer.safetensors")
            (beside / STATE).write_text(json.dumps({"step": step} | state), encoding="utf-8")
            sync_tree(beside)
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
            sync_folder(folder)
    except SafetensorError as error:
        raise StorageError.passed(f"{target} cannot be written: {error}", hint="check the disk") from error
    for old in folder.glob("*checkpoint-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def load(
    folder: Path,
    *,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    admit: Callable[[dict[str, Any]], None] = lambda _: None,
    part: Piece = lambda _, value: value,
) -> dict[str, Any] | None:
    """Puts the newest readable checkpoint into `weights` and `optimizer` and returns its state; None when there is none.

    `admit` is shown the state first, and raises if it is of something else; nothing has been changed then.
    """
    from safetensors import SafetensorError

    for newest in sorted(_complete(folder), key=_step, reverse=True):
        try:
            state, stored, tensors = _read(newest)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("%s is damaged and left out: %s", newest, error)
            continue
        admit(state)
        _put(newest, {name: part(name, value) for name, value in stored.items()}, tensors, weights, optimizer, part)
        return state
    return None


def origin(folder: Path) -> str | None:
    """What the newest readable checkpoint says that it was trained from; None when there is none."""
    for newest in sorted(_complete(folder), key=_step, reverse=True):
        try:
            return str(json.loads((newest / STATE).read_text(encoding="utf-8"))["origin"])
        except (OSError, ValueError, KeyError):
            continue
    return None


def _read(newest: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    from safetensors.torch import load_file

    state: dict[str, Any] = json.loads((newest / STATE).read_text(encoding="utf-8"))
    return state, load_file(newest / "weights.safetensors"), load_file(newest / "optimizer.safetensors")


def _put(
    newest: Path, stored: dict[str, Tensor], tensors: dict[str, Tensor], weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, part: Piece
) -> None:
    if set(stored) != set(weights) or any(stored[k].shape != weights[k].shape for k in stored):
        raise StorageError(f"{newest} belongs to another model or adapter", hint="start a new run, or resume with the options of the old one")
    with torch.no_grad():
        for name, value in stored.items():
            weights[name].copy_(value)
    torch.set_rng_state(tensors.pop("rng"))
    current = optimizer.state_dict()
    states: dict[int, dict[str, Tensor]] = {}
    names = list(weights)
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = part(names[int(index)], value)
    optimizer.load_state_dict({"state": states, "param_groups": current["param_groups"]})


def clear(folder: Path) -> None:
    """Removes all checkpoints; called when the model itself has been written."""
    for old in folder.glob("*checkpoint-*"):
        shutil.rmtree(old, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _complete(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoint-*") if (p / STATE).is_file()]
