"""Several processes that train one model: what they agree on, gather, add up and share out. With one process nothing is sent anywhere."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
S = TypeVar("S")


def accelerator_on(device: torch.device) -> Accelerator:
    """What knows of the other processes. In a process that trained on another kind of device before, accelerate is begun anew; several keep theirs."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    cpu = device.type == "cpu"
    if PartialState._shared_state and (PartialState().device.type == "cpu") != cpu and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=cpu)
    if accelerator.num_processes > 1:
        _leave_in_the_end()
    return accelerator


@cache
def _leave_in_the_end() -> None:
    """Once for a process, however often it trains."""
    atexit.register(leave)


def leave() -> None:
    """Ends the connections to the other processes: their threads must not meet a Python that is being taken down, which can abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def agreed(accelerator: Accelerator, said: T) -> T:
    """What the main process says: clocks differ, and a process that stops alone leaves the others waiting."""
    told = [said]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def gathered(accelerator: Accelerator, own: T) -> list[T]:
    """What every process says, in their order."""
    found: list[Any] = [own]
    if accelerator.num_processes > 1:
        found *= accelerator.num_processes
        torch.distributed.all_gather_object(found, own)
    return found


def total(accelerator: Accelerator, own: Tensor) -> Tensor:
    """The sum of a tensor over processes; `own` is overwritten."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(own)
    return own


def shared(accelerator: Accelerator, items: Sequence[S], work: Callable[[Sequence[S]], list[T]]) -> list[T]:
    """What `work` says of every item, in their order, each process taking its share."""
    count = accelerator.num_processes
    found = gathered(accelerator, work(items[accelerator.process_index :: count]))
    return [found[i % count][i // count] for i in range(len(items))]
