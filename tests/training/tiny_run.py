"""A run that takes a second: its settings, and the files of its checkpoints."""

from __future__ import annotations

from arp_hub.training import TrainConfig

TINY = {
    "model": "test_vit", "data": "digits", "keep_params": 0.5, "schemes": ("channel",), "start_from": "dense",
    "calibration_images": 0, "dense_epochs": 1, "epochs": 1, "max_steps": 2, "ramp": 0.5, "batch_size": 8,
    "checkpoint_every": 1, "keep_checkpoints": 9, "lr": 1e-3, "cpu": True, "tracker": "none",
}  # fmt: skip
STATE, TENSORS, SUMS = "state.json", "state.safetensors", "SHA256SUMS"


def config(folder, **changes):
    return TrainConfig(**{**TINY, "output": str(folder / "out"), **changes})
