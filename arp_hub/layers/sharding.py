"""Weights that FSDP2 (``torch.distributed.fsdp.fully_shard``) shards: each process holds a part of a DTensor."""

from __future__ import annotations

from typing import Any, cast

import torch
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


@torch.no_grad()
def write(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a whole value into a parameter. Of a sharded one, each process writes its own part, without communication.

    Args:
        parameter: The parameter.
        value: The value, the same in all processes.
    """
    if is_sharded(parameter):
        value = as_shard(value.to(parameter.dtype), parameter)
    parameter.copy_(value)


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
