"""Results that all processes of a run must share exactly, although rounding may differ between machines."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from ..layers.model import low_rank_layers
from ..plan import RankPlan
from ..schemes import Factors


def shared_plan(accelerator: Accelerator, plan: RankPlan) -> RankPlan:
    """The plan of the main process."""
    if accelerator.num_processes == 1:
        return plan
    text = torch.tensor(list(plan.to_json().encode()), device=accelerator.device)
    size = broadcast(torch.tensor([len(text)], device=accelerator.device))
    padded = text.new_zeros(int(size))
    padded[: len(text)] = text[: len(padded)]
    return RankPlan.from_json(bytes(broadcast(padded).tolist()).decode())


def shared_factors(accelerator: Accelerator, model: nn.Module) -> dict[str, Factors]:
    """The factors of a decomposed model, after every process has taken over the weights of the main process."""
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            tensor.copy_(broadcast(tensor.contiguous()))
    return {
        name: tuple(factor.detach().clone() for factor in layer.factor_weights())
        for name, layer in low_rank_layers(model).items()
    }
