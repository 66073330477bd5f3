"""The state of a refinement in one file, so that it goes on where it was stopped."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._utils.files import atomic_path
from ..errors import ArpHubError, cause

_logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a refinement stands.

    Attributes:
        phase: Number of the phase.
        rate: Learning rate of the phase, 0 before it is found.
        begin: Share of the work that was done when the phase took its first step at this rate.
        steps: Steps so far.
        seconds: Time so far.
        before: Divergence on the held-out images before the first step; below 0 if it is not known yet.
        least: The lowest divergence at the end of a phase.
        held_out: Number of held-out images that measure.
    """

    phase: int = 0
    rate: float = 0.0
    begin: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    before: float = -1.0
    least: float = -1.0
    held_out: int = 0


class StateFile:
    """Keeps progress, parameters and the optimiser's moments in a file; without a path it keeps nothing.

    Args:
        path: The file.
        settings: What the state depends on; a file with other settings is refused.
        digests: Digests of larger things that it depends on, by their name in a message.
        seconds: Time between saves.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        digests: Mapping[str, str] | None = None,
        seconds: float = 60.0,
    ) -> None:
        self._path, self._settings, self._digests, self._seconds = path, dict(settings), dict(digests or {}), seconds
        self._saved = time.monotonic()

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The progress and the tensors, if there is a file.

        Raises:
            ArpHubError: If it cannot be read, or is of another refinement.
        """
        if self._path is None or not self._path.exists():
            return None
        way_out = "delete it to start from the beginning"
        try:
            with safe_open(self._path, "pt") as file:
                saved = json.loads((file.metadata() or {})["refinement"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            progress = Progress(**saved["progress"])
            settings, digests = dict(saved["settings"]), dict(saved.get("digests", {}))
            if missing := {"parameters", "best"} - tensors.keys():
                raise KeyError(min(missing))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArpHubError(f"'{self._path}' holds no state of a refinement ({error}): {way_out}") from error
        for name, value in self._settings.items():
            if settings.get(name) != value:
                found = settings.get(name)
                raise ArpHubError(f"'{self._path}' is of a refinement with {name}={found}, not {value}: {way_out}")
        for name, digest in self._digests.items():
            if digests.get(name) != digest:
                raise ArpHubError(f"'{self._path}' is of a refinement with other {name}: {way_out}")
        return progress, tensors

    def due(self) -> bool:
        """Whether it is time to save."""
        return self._path is not None and time.monotonic() - self._saved > self._seconds

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file, in one step. If it cannot be written, a warning says so and the refinement goes on."""
        if self._path is None:
            return
        text = json.dumps({"progress": asdict(progress), "settings": self._settings, "digests": self._digests})
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with atomic_path(self._path) as new:
                save_file(plain, new, metadata={"refinement": text})
        except (OSError, SafetensorError) as error:
            _logger.warning("cannot save the state of the refinement in '%s': %s", self._path, cause(error))
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file, once the refinement is complete."""
        if self._path is None:
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("cannot delete '%s', the state of the complete refinement: %s", self._path, cause(error))


def moments_of(optimizer: torch.optim.Adam, parameters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    """Adam's moments of all parameters as vectors, and the number of its steps; empty before the first."""
    states = [optimizer.state.get(parameter) or {} for parameter in parameters]
    if not any(states):
        return {}
    blank = [torch.zeros_like(parameter) for parameter in parameters]
    found = {
        key: torch.cat([state.get(key, zero).flatten() for state, zero in zip(states, blank, strict=True)])
        for key in ("exp_avg", "exp_avg_sq")
    }
    return found | {"step": torch.stack([torch.as_tensor(state.get("step", 0.0)) for state in states])}


def restore_moments(
    optimizer: torch.optim.Adam, parameters: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimiser the moments that `moments_of` returned."""
    if "step" not in tensors:
        return
    sizes = [parameter.numel() for parameter in parameters]
    columns = [tensors[key].split(sizes) for key in ("exp_avg", "exp_avg_sq")]
    for parameter, step, mean, square in zip(parameters, tensors["step"], *columns, strict=True):
        if step:
            optimizer.state[parameter] = {
                "step": step.clone(),
                "exp_avg": mean.view_as(parameter).to(parameter),
                "exp_avg_sq": square.view_as(parameter).to(parameter),
            }
