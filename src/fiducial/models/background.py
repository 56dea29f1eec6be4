"""Asynchronous work behind a synchronous call."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import Any


class Background:
    """An event loop in a thread of its own, so that sampling also works where a loop is already running."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fiducial-remote", daemon=True)
        self._thread.start()

    def results(self, job: Callable[[queue.SimpleQueue[Any]], Coroutine[Any, Any, None]]) -> Generator[Any, None, None]:
        """What the coroutine `job(queue)` puts into its queue; then its error, if it has one. Leaving early cancels it."""
        out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        end = object()
        future: Future[None] = asyncio.run_coroutine_threadsafe(job(out), self._loop)
        future.add_done_callback(lambda _: out.put(end))
        try:
            while (item := out.get()) is not end:
                yield item
            future.result()
        finally:
            future.cancel()

    def end(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs a last coroutine and stops."""
        asyncio.run_coroutine_threadsafe(last, self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()
