"""Counts the bytes of tensors that exist at once while code runs, whatever device they are on, and also where they are shapes alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While inside, `peak` is the most bytes at once of memory that operations took; what was there before does not count. Of one thread.

    >>> with LiveBytes() as live:
    ...     a = torch.zeros(10) + 1  # two of 40 bytes, of which the first is given back
    ...     del a
    >>> live.peak, live.now
    (80, 0)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and counts what it gives that nothing it was given holds."""
        for storage in _storages((args, kwargs)):
            self._know(storage, 0)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._know(storage, storage.nbytes())
        return out

    def _know(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> list[Any]:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
