"""The optimiser of a phase: whether it can be used, its schedule, clipping, and its state in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from ..errors import ArpHubError
from .config import TrainConfig
from .layer_decay import layer_groups

_OWN = frozenset({"lr", "weight_decay", "momentum", "layer_decay", "opt"})
"""Arguments of timm's optimisers that are settings of a run."""


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimiser that cannot train here.

    Raises:
        ArpHubError: If it needs a package that is not installed, or second derivatives, or refuses ``opt_kwargs``.
    """
    name = config.optimizer
    bad = (ImportError, AssertionError, AttributeError, TypeError, RuntimeError, ValueError)
    try:
        create_optimizer_v2(nn.Linear(1, 1), opt=name, lr=config.lr)
    except bad as error:
        raise ArpHubError(f"optimizer '{name}' cannot be used here ({error}): choose another") from error
    if own := _OWN.intersection(config.opt_kwargs or ()):
        raise ArpHubError(f"opt_kwargs must not hold '{min(own)}', which is a setting of its own: set {min(own)}")
    info = get_optimizer_info(name.lower())
    for argument, taken in (("betas", info.has_betas), ("eps", info.has_eps)):
        if argument in (config.opt_kwargs or ()) and not taken:  # timm would drop it without a word
            raise ArpHubError(f"opt_kwargs={config.opt_kwargs}: optimizer '{name}' takes no '{argument}': leave it out")
    if config.momentum != type(config).momentum and not info.has_momentum:
        raise ArpHubError(f"momentum={config.momentum} has no effect with optimizer '{name}': leave momentum out")
    try:  # without layer decay, which means nothing for one layer
        make_optimizer(nn.Linear(1, 1), dataclasses.replace(config, layer_decay=None), config.lr)
    except bad as error:
        raise ArpHubError(f"opt_kwargs={config.opt_kwargs}: optimizer '{name}' refuses them ({error})") from error
    if info.second_order:
        raise ArpHubError(f"optimizer '{name}' needs second derivatives, which a run does not compute: choose another")


def make_optimizer(model: nn.Module, config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser that the settings name, for all weights of a model."""
    decay = config.layer_decay
    return create_optimizer_v2(
        model,
        opt=config.optimizer,
        lr=lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        param_group_fn=None if decay is None else lambda model: layer_groups(model, config.weight_decay, decay),
        **_tuples(config.opt_kwargs or {}),
    )


def _tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with lists as tuples, as optimisers expect ``betas``."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}


def highest_rate(optimizer: torch.optim.Optimizer) -> float:
    """The current learning rate; with ``layer_decay``, that of the last layers."""
    return max(group["lr"] for group in optimizer.param_groups)


def clipped_parameters(model: nn.Module, config: TrainConfig) -> list[nn.Parameter]:
    """The parameters whose gradients ``clip_grad`` bounds: all, but for adaptive clipping those of the classifier."""
    classifier: Any = getattr(model, "get_classifier", None)
    head = classifier() if config.clip_mode == "agc" and classifier else None
    heads = head if isinstance(head, tuple) else (head,)  # distilled transformers have two
    left_out = {id(weight) for part in heads if isinstance(part, nn.Module) for weight in part.parameters()}
    return [weight for weight in model.parameters() if id(weight) not in left_out]


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int, steps_per_epoch: int) -> Scheduler:
    """The timm schedule over the steps of a phase, so that it also fits a phase shortened by ``max_steps``.

    Raises:
        ArpHubError: If timm has no such schedule.
    """
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=steps,
        decay_epochs=max(1, steps // 3),
        decay_rate=0.9 if config.schedule == "poly" else 0.1,  # for timm the power of the polynomial, too
        decay_milestones=[steps // 2, steps * 3 // 4],
        warmup_epochs=min(round(config.warmup_epochs * steps_per_epoch), steps // 2),
        warmup_lr=min(config.warmup_lr, highest_rate(optimizer)),
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    if schedule is None:
        raise ArpHubError(f"schedule: timm has no '{config.schedule}'")
    return schedule


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The plain values of an optimiser's parameter groups, because LAMB and Adan keep their step count there.

    Values of other types, such as dtypes, never change, so that a resumed run already has them.
    """
    plain = (bool, int, float, str, list, tuple, Tensor, type(None))
    return [
        {name: value for name, value in group.items() if name != "params" and isinstance(value, plain)}
        for group in optimizer.param_groups
    ]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Any], groups: Sequence[Mapping[str, Any]] | None
) -> None:
    """Restore an optimiser from a checkpoint.

    Args:
        optimizer: A new optimiser of the same model.
        state: Its state for each parameter.
        groups: The values of its groups; None for checkpoints that lack them.
    """
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})
    for group, values in zip(optimizer.param_groups, groups or (), strict=False):
        group.update({name: tuple(v) if isinstance(group.get(name), tuple) else v for name, v in values.items()})
