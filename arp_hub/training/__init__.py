"""Training on Accelerate: data, configuration, the phases from a dense model to a saved low-rank one."""

from .command import main
from .config import TrainConfig
from .data.dataset import ImageData, Split, StreamedSplit, calibration_images, load_data, refinement_images
from .evaluate import Scores, evaluate
from .trainer import run

__all__ = [
    "ImageData",
    "Scores",
    "Split",
    "StreamedSplit",
    "TrainConfig",
    "calibration_images",
    "evaluate",
    "load_data",
    "main",
    "refinement_images",
    "run",
]
