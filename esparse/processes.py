"""The processes that `torchrun` or `accelerate launch` started, each with its share of the tokens: all choose alike."""

import os

import torch
from torch import distributed


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one to speak, of those that were started together, whether or not they have joined yet."""
    return os.environ.get("RANK", "0") == "0"


def join_ranks() -> None:
    """Join the processes that were started together, if any were: nccl between GPUs, else gloo."""
    if "RANK" in os.environ and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave_ranks() -> None:
    """End the group, if there is one: a thread of gloo that outlives the interpreter now and then aborts a process which has
    done all its work, and torchrun then ends the others as failed."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def together() -> None:
    """Wait for the other ranks, if there are any."""
    if ranks() > 1:
        distributed.barrier()


def summed(total: torch.Tensor) -> torch.Tensor:
    """A sum over this process's tokens, made in place one over those of all."""
    if ranks() > 1:
        distributed.all_reduce(total)
    return total


def everyone(value) -> list:
    """A value of every rank, in order."""
    found = [value] * ranks()
    if ranks() > 1:
        distributed.all_gather_object(found, value)
    return found


def of_first(value):
    """The first rank's value, which the others need not have."""
    found = [value]
    if ranks() > 1:
        distributed.broadcast_object_list(found)
    return found[0]
