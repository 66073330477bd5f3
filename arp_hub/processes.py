"""Work that the processes of ``torch.distributed`` share.

All processes call the same functions with the same arguments. Each does its share, and exchanges the results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from .errors import ArpHubError

_Thing = TypeVar("_Thing")
_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others to begin: the time that they may differ by in loading data and measuring."""


@dataclass(frozen=True)
class Processes:
    """The processes that share some work.

    Attributes:
        index: Number of this process.
        count: Number of all processes; 1 for work that is not shared.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def meeting(cls, what: str, same: Callable[[], Mapping[str, object]]) -> Processes:
        """All processes of ``torch.distributed``, once each has come here.

        Args:
            what: The function that they call, for messages.
            same: Gives the arguments that must be the same in all processes, by name.

        Raises:
            ArpHubError: If a process does not come, or has other arguments.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return ALONE
        found = cls(dist.get_rank(), dist.get_world_size())
        if dist.get_backend() == "gloo":  # other backends cannot tell who is missing
            try:
                dist.monitored_barrier(timeout=_PATIENCE)
            except RuntimeError as error:
                raise ArpHubError(
                    f"{what} shares its work among {found.count} processes, and not all of them have called it: call "
                    f"it in every process, or before the process group is initialised ({error})"
                ) from error
        with found.agreed():
            given = same()
        for name, value in given.items():
            if other := [number for number, one in enumerate(found.gather(value)) if one != value]:
                raise ArpHubError(
                    f"{what} shares its work among {found.count} processes, but process {other[0]} has other values of "
                    f"{name} than process {found.index}: pass the same in all of them"
                )
        return found

    def together(self, things: Iterable[_Thing]) -> Iterator[_Thing]:
        """All things, in every process. A failure to make one of them is that of all processes."""
        left, done = iter(things), object()
        while True:
            with self.agreed():
                thing = next(left, done)
            if thing is done:
                return
            yield cast(_Thing, thing)

    def shared_out(self, costs: Mapping[str, float], work: Callable[[str], _Thing]) -> Iterator[tuple[str, _Thing]]:
        """Tasks and their results, in the order of ``costs``. Each task is done by one process.

        Args:
            costs: Cost of each task, by name: the largest are given out first, each to the least busy process.
            work: Does a task. Tensors in its result must be on the CPU.
        """
        if self.count == 1:
            for name in costs:
                yield name, work(name)
            return
        busy, owners = [0.0] * self.count, {}
        for name in sorted(costs, key=lambda one: -costs[one]):
            owners[name] = busy.index(min(busy))
            busy[owners[name]] += costs[name]
        done = {}
        with self.agreed():
            done = {name: work(name) for name in costs if owners[name] == self.index}
        every = self.gather(done)
        for name in costs:
            yield name, every[owners[name]][name]

    def gather(self, value: _Thing) -> list[_Thing]:
        """The values of all processes, in their order. Tensors in them must be on the CPU."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return cast("list[_Thing]", values)

    def of_first(self, work: Callable[[], _Thing]) -> _Thing:
        """What ``work`` returns in the first process, the only one that runs it."""
        with self.agreed():
            value = work() if self.index == 0 else None
        if self.count == 1:
            return cast(_Thing, value)
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return cast(_Thing, values[0])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.count == 1:
            return
        for tensor in tensors:
            there = tensor.cuda() if dist.get_backend() == "nccl" else tensor.contiguous()
            dist.all_reduce(there)
            tensor.copy_(there)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Do work of this process alone. If it fails in one process, it fails in all of them."""
        if self.count == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for number, message in enumerate(messages):
            if message is not None:
                raise ArpHubError(f"process {number} of {self.count} failed: {message}")


def first_to_end() -> bool:
    """Whether this is the first process of a launch that asks, so that it alone prints why all of them end.

    The store of the launcher knows, also before the processes join. Launchers without one, such as ``srun``, start
    processes that all print.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10)
        )
        return bool(store.add(f"arp_hub/ended/{attempt}", 1) == 1)
    except RuntimeError:  # the launcher has ended, so that nobody else may have printed
        return True


ALONE = Processes()
"""One process, which shares its work with no other."""
