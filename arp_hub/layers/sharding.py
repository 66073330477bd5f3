"""Weights that FSDP2 (``torch.distributed.fsdp.fully_shard``) shards: each process holds a part of a DTensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ArpHubError


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")  # by its method, because its class has moved between versions of torch


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor. For a sharded one, all processes call this together."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def as_shard(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as another one is, without communication.

    Args:
        value: The value, the same in all processes.
        like: A sharded tensor of the same shape.
    """
    from torch.distributed.tensor import DTensor, Replicate

    sharded = cast(Any, like)
    everywhere = [Replicate()] * sharded.device_mesh.ndim
    whole = DTensor.from_local(value, sharded.device_mesh, everywhere, run_check=False)
    return cast(Tensor, whole.redistribute(placements=sharded.placements))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor is free of NaN and infinite values. All processes call this together for sharded ones."""
    finite = torch.stack([local(one.detach()).isfinite().all() for one in tensors]).int()
    for mesh in dict.fromkeys(cast(Any, one).device_mesh for one in tensors if is_sharded(one)):
        for dimension in range(mesh.ndim):
            dist.all_reduce(finite, dist.ReduceOp.MIN, mesh.get_group(dimension))
    return [bool(one) for one in finite.tolist()]


@torch.no_grad()
def move(parameter: nn.Parameter, target: Tensor, share: Tensor | None = None) -> None:
    """Move a parameter to a value. Of a sharded one, each process moves its own part, without communication.

    Args:
        parameter: The parameter.
        target: The whole value, in single precision, the same in all processes.
        share: The share of the way to move, a number between 0 and 1; by default all of it.
    """
    own = local(parameter)
    if is_sharded(parameter):
        target = local(as_shard(target, parameter))
    own.copy_(target if share is None else torch.lerp(own.float(), target, share))


def sharers(parameter: nn.Parameter) -> Any:
    """The group of processes that hold the parts of a sharded parameter, in the order of their ranks; else None."""
    if not is_sharded(parameter):
        return None
    mesh = cast(Any, parameter).device_mesh
    return mesh.get_group(mesh.ndim - 1)  # the last dimension of a mesh shards, the others hold copies


def from_owner(tensors: Sequence[Tensor], owner: int, group: Any) -> None:
    """Replace tensors by those of one process of a group. All processes call this together."""
    for tensor in tensors:
        dist.broadcast(tensor, dist.get_global_rank(group, owner), group)


def check_unsharded(model: nn.Module) -> None:
    """Refuse a model whose parameters are sharded.

    Raises:
        ArpHubError: Naming the first one.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ArpHubError(
                f"parameter '{name}' is sharded over processes (FSDP2): gather the weights with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)), and load them into an unsharded model"
            )


def check_not_deepspeed(model: nn.Module) -> None:
    """Refuse a model that DeepSpeed trains: what is written into its weights is lost at the next step.

    Raises:
        ArpHubError: Naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        # ZeRO-3 numbers the parameters that it partitions; other stages link each one to the copy that they train
        if hasattr(parameter, "ds_id") or getattr(parameter, "_hp_mapping", None) is not None:
            raise ArpHubError(
                f"DeepSpeed trains a copy of parameter '{name}', which cannot be pulled: train with DDP or FSDP2"
            )
