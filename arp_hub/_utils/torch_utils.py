"""Context managers for the modes of torch and of modules, and digests of tensors."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def ambient_modes_off() -> Iterator[None]:
    """Switch autocast, inference mode, a default device and ``model.compile()`` off.

    Tensors that are made inside are whole and can be trained, and hooks see every layer.
    """
    here = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    compiles = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # since torch 2.6
    eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        with here, eager:
            yield


def kept_activations(model: nn.Module) -> dict[int, Tensor]:
    """What `copy.deepcopy` takes as ``memo``, so that it copies a model which keeps activations of its last pass."""
    kept = (leaf for module in model.modules() for leaf in tree_leaves(list(vars(module).values())))
    return {id(leaf): leaf.detach() for leaf in kept if isinstance(leaf, Tensor) and not leaf.is_leaf}


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A digest of the values of tensors, the same on all devices."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
