"""Jobs that several processes run side by side, as a launcher would start them."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def by_processes(job: Callable[[int, int, Path], Any], world: int, folder: Path) -> list[Any]:
    """What each of some processes returns.

    Args:
        job: Called with the number of a process, the number of all, and the folder.
        world: Number of all processes.
        folder: A folder that does not exist yet.
    """
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "arp_hub", "torch.distributed.fsdp"])
    every = [context.Process(target=_work, args=(job, rank, world, folder)) for rank in range(world)]
    for one in every:
        one.start()
    for one in every:
        one.join(200)
        assert one.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def by_group(job: Callable[[], Any], world: int, folder: Path) -> list[Any]:
    """What each of some processes returns, which have joined a process group of ``torch.distributed``."""
    return by_processes(functools.partial(_in_a_group, job), world, folder)


def _work(job: Callable[[int, int, Path], Any], rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(job(rank, world, folder), folder / f"{rank}.pt")


def _in_a_group(job: Callable[[], Any], rank: int, world: int, folder: Path) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder / 'store'}")
    try:
        return job()
    finally:
        dist.destroy_process_group()
