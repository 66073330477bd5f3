"""FSDP2: weights, gradients and optimiser states sharded over the processes, as Accelerate's plugin configures it.

Accelerate shards on GPUs only: on CPUs, `Accelerator` drops its FSDP plugin and trains by data parallelism. It also
maps an optimiser's parameters to their shards by address, which small parameters share when their shard is empty. So
recipes read the plugin, shard with ``torch.distributed.fsdp.fully_shard``, and then build the optimiser. That is the
same on CPUs and GPUs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast
from torch import Tensor, nn

from ..errors import ArpHubError
from ..layers.sharding import as_shard, gathered, is_sharded
from ..layers.trace import input_size_of, meta_copy
from .config import TrainConfig

_OPTIMIZERS = (
    "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamw", "adan", "adanw", "adopt", "adoptw", "lamb", "lambw",
    "laprop", "lars", "lion", "momentum", "nadam", "nadamw", "nesterov", "radam", "rmsprop", "rmsproptf", "sgd", "sgdw",
)  # fmt: skip
"""timm's optimisers that step on shards as on whole weights. Others fail, or keep states of other shapes."""


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The FSDP plugin that `accelerate launch` asks for, if any."""
    if plugin := getattr(accelerator.state, "fsdp_plugin", None):
        return cast(FullyShardedDataParallelPlugin, plugin)
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    several = accelerator.distributed_type == DistributedType.MULTI_CPU  # one process has nothing to shard
    return FullyShardedDataParallelPlugin() if asked and several else None


def check_fsdp(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse what FSDP2 cannot be combined with.

    Raises:
        ArpHubError: Naming both settings.
    """
    plugin = fsdp_plugin(accelerator)
    if plugin is None:
        return
    for name, found, way_out in (
        ("cuda_graphs=true", config.cuda_graphs, "leave cuda_graphs out"),
        (f"torchcompile={config.torchcompile}", config.torchcompile, "leave torchcompile out"),
        ("dynamo_config", accelerator.state.dynamo_plugin.backend.value != "NO", "leave dynamo_config out"),
        ("sync_bn=true", config.sync_bn, "leave sync_bn out"),
        ("mixed_precision=fp16", config.mixed_precision == "fp16", "choose mixed_precision=bf16"),
        ("clip_mode=agc", config.clip_grad and config.clip_mode == "agc", "choose clip_mode=norm"),
        (
            f"optimizer={config.optimizer}",
            config.optimizer.lower() not in _OPTIMIZERS,
            f"choose from {', '.join(_OPTIMIZERS)}",
        ),
        ("fsdp_offload_params=true", _offloads(plugin), "set it to false"),
        ("fsdp_activation_checkpointing=true", plugin.activation_checkpointing, "set it to false"),
        ("fsdp_ignored_modules", plugin.ignored_modules, "leave it out"),
    ):
        if found:
            raise ArpHubError(f"{name} and fsdp_version=2 cannot be combined: {way_out}, or train with DDP")


def _offloads(plugin: FullyShardedDataParallelPlugin) -> bool:
    return "CPUOffload" in type(plugin.cpu_offload).__name__


class Shards:
    """Shards one model in place, and gives it back whole.

    Args:
        model: The whole model, on its device.
        plugin: What decides which modules are gathered at a time, and whether they stay gathered until the backward
            pass.
        accelerator: The run's accelerator.

    Raises:
        ArpHubError: If the model lacks a class that the plugin names, or holds a parameter that cannot be sharded.
    """

    def __init__(self, model: nn.Module, plugin: FullyShardedDataParallelPlugin, accelerator: Accelerator) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.plugin = plugin
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.groups = _groups(model, plugin)
        meta = {id(weight): _on_meta(weight) for weight in model.parameters()}
        self.skeleton = copy.deepcopy(model, meta)
        self.shard(model)

    def shard(self, model: nn.Module) -> None:
        """Shard the model, or one of the same structure."""
        from torch.distributed.fsdp import fully_shard

        model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
        kept: Any = self.plugin.reshard_after_forward
        try:
            for name in self.groups:
                group = model.get_submodule(name)
                group.register_forward_hook(_no_view)  # before that of FSDP2
                fully_shard(group, mesh=self.mesh, reshard_after_forward=kept)
            fully_shard(model, mesh=self.mesh)
        except (NotImplementedError, ValueError) as error:
            raise ArpHubError(f"FSDP2 cannot shard the model: {error}. Train with DDP") from error

    def whole(self, model: nn.Module) -> nn.Module:
        """A copy with whole weights. All processes call this together, and each gets one."""
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        known: dict[int, Any] = {id(own): buffers[name].clone() for name, own in self.skeleton.named_buffers()}
        for name, own in self.skeleton.named_parameters():
            known[id(own)] = nn.Parameter(gathered(weights[name].detach()).clone(), own.requires_grad)
        return copy.deepcopy(self.skeleton, known)


def _no_view(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Copy a view, because in-place changes of it, as in ``x += y``, would drop the hook that gathers for backward."""
    return output.clone() if isinstance(output, Tensor) and output._base is not None else output


def _on_meta(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)


def _groups(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> list[str]:
    """Names of the modules whose weights are gathered together, inner ones first, by the plugin's policy.

    A module that is not called is none of them, because its weights are gathered when it is called.
    """
    try:
        plugin.set_auto_wrap_policy(model)
    except ValueError as error:
        raise ArpHubError(f"fsdp_transformer_layer_cls_to_wrap: {error}") from error
    policy: Any = plugin.auto_wrap_policy
    if not isinstance(policy, partial):
        return []
    classes, least = tuple(policy.keywords.get("transformer_layer_cls", ())), plugin.min_num_params
    twin, called = meta_copy(model).eval(), set[str]()
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        twin(torch.zeros(1, *input_size_of(model), device="meta"))
    chosen = [
        name
        for name, module in model.named_modules()
        if name in called - {""}
        and (isinstance(module, classes) if classes else sum(w.numel() for w in module.parameters()) > least)
    ]
    return chosen[::-1]


def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the statistics of the first, as DDP does before each step."""
    floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not floats:
        return
    flat = broadcast(torch.cat([buffer.flatten().float() for buffer in floats]))
    for buffer, values in zip(floats, flat.split([buffer.numel() for buffer in floats]), strict=True):
        buffer.copy_(values.view(buffer.shape))


def gathered_state(state: Any, keep: bool) -> Any:
    """A tree of states with whole tensors. All processes call this together.

    Args:
        state: Dictionaries of tensors and plain values.
        keep: Whether this process needs them. The others get None in place of tensors.
    """
    if isinstance(state, Mapping):
        return {name: gathered_state(value, keep) for name, value in state.items()}
    if not isinstance(state, Tensor) or not is_sharded(state):
        return state
    whole = gathered(state.detach())
    return whole.cpu() if keep else None


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard what a checkpoint holds whole, as the parameters are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and is_sharded(parameter) and value.shape == parameter.shape:
                state[name] = as_shard(value, parameter)
