"""Work on one model in several threads, on a CPU: two halves of a batch with a core each wait for each other once, while two cores inside
every product meet at each of its many small operations, which costs most where the machine has other work.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MOST = 4
"""Threads. With more of them Python's lock is what they wait for."""
TOKENS_EACH = 128
"""Fewer tokens to score are not worth a thread of their own."""


def threads(device: torch.device, parts: int) -> int:
    """How many threads work that falls into so many parts is worth; one where there is no CPU to divide."""
    return max(1, min(torch.get_num_threads(), MOST, parts)) if device.type == "cpu" else 1


def divided(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of the sizes in `count` parts of about the same sum, the largest first to the emptiest; those of a part ascend."""
    parts: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = sums.index(min(sums))
        parts[least].append(index)
        sums[least] += sizes[index]
    return [sorted(part) for part in parts]


def twins(module: torch.nn.Module, count: int) -> list[torch.nn.Module]:
    """`module` and copies of its structure around the same parameters, `count` together; itself alone where it cannot be copied.

    What is put on one for the time of a call (hooks, a way to attend, an adapter switched off) the others do not see.
    """
    held: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        return [module, *(copy.deepcopy(module, dict(held)) for _ in range(count - 1))]
    except (TypeError, RuntimeError, AttributeError):  # foreign models may hold what cannot be copied
        return [module]


def abreast(jobs: Sequence[Callable[[], Iterator[T]]]) -> Iterator[T]:
    """What the iterators give, in the order in which it comes; each runs in a thread of its own, with its share of the cores.

    The error of one is raised and ends the others at their next item, as does leaving early. Gradients are recorded unless a job
    says otherwise.
    """
    out: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    left = threading.Event()
    cores = torch.get_num_threads()

    def work(job: Callable[[], Iterator[T]]) -> None:
        torch.set_num_threads(max(1, cores // len(jobs)))
        try:
            for item in job():
                if left.is_set():
                    return
                out.put(("item", item))
            out.put(("end", None))
        except BaseException as error:  # the boundary of the thread: raised again where the items are taken
            out.put(("error", error))

    running = [threading.Thread(target=work, args=(job,), name="fiducial-abreast", daemon=True) for job in jobs]
    for thread in running:
        thread.start()
    ended = 0
    try:
        while ended < len(running):
            kind, value = out.get()
            if kind == "error":
                raise value
            if kind == "end":
                ended += 1
            else:
                yield value
    finally:
        left.set()
        for thread in running:
            thread.join()
        torch.set_num_threads(cores)  # threads to come take over the number that was set last


def together(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """What the functions give, each called in a thread of its own, in their order."""

    def only(number: int, job: Callable[[], T]) -> Iterator[tuple[int, T]]:
        yield number, job()

    found = dict(abreast([partial(only, number, job) for number, job in enumerate(jobs)]))
    return [found[number] for number in range(len(jobs))]
