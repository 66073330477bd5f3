"""What planning and fitting trade between CPU time and accuracy: one frozen class, three presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .errors import ArpHubError


@dataclass(frozen=True)
class Effort:
    """Bounds on the work of `make_plan` and `decompose`.

    The defaults are the preset ``"balanced"``. Work is counted in multiply-accumulates (MACs). Rows of
    ``benchmarks/results/effort.json`` show what the measured presets cost and reach.

    Attributes:
        images: Calibration images to use at most, evenly spaced over those given; 0 for all. More images lower the
            sampling error of second moments, and every pass costs in proportion.
        moment_macs: MACs of the forward pass that planning takes second moments in. It bounds the images of that pass:
            error curves need fewer images than a fit.
        gradient_macs: MACs of each pass that takes gradients, forward and backward. It bounds the images of the pass.
        schemes_measured: Schemes of a layer whose error curves are measured on images. They are the best ones by the
            error of the weight, which costs little.
        curve_shares: Shares of a layer's parameters at which the error of an iterative scheme is measured. Between
            them the curve is a line in log-log scale.
        curve_iterations: L-BFGS iterations of each of these fits at most.
        curve_macs: MACs of each of these fits at most.
        start_sweeps: Sweeps of alternating least squares that the final fit of a layer starts from at most.
        fit_iterations: L-BFGS iterations of the final fit of a layer at most.
        fit_macs: MACs of the final fit of a layer at most.
        positions_macs: MACs that one image may add to a layer's second moment in `decompose`. On large maps it limits
            the patches that are used; neighbouring patches say much the same.
        curve_positions_macs: The same in `make_plan`.
        forward_macs: MACs of all forward passes of `decompose` together. Beyond it, layers are fitted on fewer images,
            and then several layers share a pass.
        norm_macs: MACs of the pass in which BatchNorm statistics are corrected.

    Example:
        >>> make_plan(model, keep_params=0.5, calibration=images, effort="fast")  # doctest: +SKIP
        >>> make_plan(model, keep_params=0.5, calibration=images, effort=Effort(fit_iterations=300))  # doctest: +SKIP
    """

    images: int = 0
    moment_macs: float = 3e11
    gradient_macs: float = 1e12
    schemes_measured: int = 2
    curve_shares: tuple[float, ...] = (0.08, 0.18, 0.35, 0.6)
    curve_iterations: int = 25
    curve_macs: float = 2e9
    start_sweeps: int = 60
    fit_iterations: int = 150
    fit_macs: float = 1.5e10
    positions_macs: float = 2.5e8
    curve_positions_macs: float = 1e8
    forward_macs: float = 5e12
    norm_macs: float = 6e11

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            least = 0 if field.name == "images" else 1e-9
            if field.type == "int" and isinstance(value, float):
                raise ArpHubError(f"effort: {field.name} must be a whole number, got {value!r}")
            if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and n >= least for n in numbers):
                raise ArpHubError(f"effort: {field.name} must be a number above {least:g}, got {value!r}")
        if len(self.curve_shares) < 2:
            raise ArpHubError(
                f"effort: curve_shares needs at least two shares to draw a curve, got {self.curve_shares!r}"
            )

    @classmethod
    def of(cls, effort: Effort | str) -> Effort:
        """The settings of a preset, or the given settings themselves.

        Raises:
            ArpHubError: If there is no such preset.
        """
        if isinstance(effort, Effort):
            return effort
        if not isinstance(effort, str) or effort not in EFFORTS:
            raise ArpHubError(
                f"unknown effort {effort!r}: choose {', '.join(EFFORTS)}, or pass an arp_hub.effort.Effort"
            )
        return EFFORTS[effort]


EFFORTS: dict[str, Effort] = {
    "fast": Effort(
        images=128,
        gradient_macs=3e11,
        schemes_measured=1,
        curve_shares=(0.2, 0.5),
        curve_iterations=15,
        start_sweeps=12,
        fit_iterations=60,
        fit_macs=5e9,
        positions_macs=5e7,
        curve_positions_macs=2.5e7,
        forward_macs=1e12,
    ),
    "balanced": Effort(),
    "thorough": Effort(
        moment_macs=2e12,
        gradient_macs=5e12,
        schemes_measured=4,
        curve_iterations=60,
        curve_macs=1e10,
        fit_iterations=400,
        fit_macs=1e11,
        positions_macs=1e9,
        curve_positions_macs=1e9,
        forward_macs=5e13,
        norm_macs=5e12,
    ),
}
"""The presets by name."""
