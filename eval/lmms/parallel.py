"""Where the model of this process goes when `accelerate launch` runs several of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vlmprune.runtime.errors import UserError, brief
from vlmprune.runtime.loading import pick_device
from vlmprune.runtime.status import note

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["place"]

CPU_COMMAND = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."


def place(device: str, device_map: str | None) -> tuple[str, Accelerator | None]:
    """The device of this process, and the accelerator that ties it to the others, if there are any.

    lmms-eval deals out documents by the variables RANK and WORLD_SIZE, whether or not the processes can talk to each
    other, so the process group must stand before it starts.

    Raises:
        UserError: no such device, or processes that cannot be tied together; the message names the command that works.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world < 2:
        return alone(device), None
    if device_map is not None:
        raise UserError("device_map spreads one model over GPUs, and here every process has its own: use one of both.")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device}: with several processes it is auto, cuda or cpu, and each takes its own GPU.")
    kind = pick_device(device)
    accelerator = tied(kind, world)
    return "cpu" if kind == "cpu" else f"cuda:{accelerator.local_process_index}", accelerator


def alone(device: str) -> str:
    """The device of a process that is the only one, which somebody may not have meant."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "MASTER_ADDR" in os.environ:
        note(f"accelerate launch --cpu started one process only. For N processes on a CPU: {CPU_COMMAND}")
    return pick_device(device)


def tied(kind: str, world: int) -> Accelerator:
    """What ties `world` processes on devices of a kind together; raises as of `place`."""
    from accelerate import Accelerator

    way = f"For processes on a CPU, start them by: {CPU_COMMAND}"
    try:
        accelerator = Accelerator(cpu=True) if kind == "cpu" else Accelerator()
    except ValueError as error:
        raise UserError(f"the processes cannot be tied together: {brief(error)} {way}") from error
    if accelerator.num_processes != world:  # lmms-eval's command made an accelerator that knows of one process
        raise UserError(f"there are {world} processes, and accelerate ties {accelerator.num_processes} together. {way}")
    return accelerator
