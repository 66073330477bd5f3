"""BatchNorm over the batches of all processes, while a model trains."""

from __future__ import annotations

from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


class SynchronisedNorms:
    """Puts synchronised BatchNorm layers into a model, and the plain ones back.

    Both share parameters and statistics. So optimisers, penalties and checkpoints work as before, and the model is
    evaluated, compressed and saved with its own layers.

    Args:
        model: The model, on its device, before it is wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.plain = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if name and isinstance(module, BatchNorm)
        }
        convert_sync_batchnorm(model)

    def put_back(self) -> None:
        """Restore the plain layers."""
        for name, module in self.plain.items():
            parent, _, key = name.rpartition(".")
            self.model.get_submodule(parent).add_module(key, module)
