"""Training on Accelerate: data, configuration, the phases from a dense model to a saved low-rank one."""

from .command import main
from .config import TrainConfig
from .data.dataset import ImageData, load_data
from .data.excerpts import calibration_images, refinement_images
from .data.input_format import note_crop
from .data.splits import Split, StreamedSplit
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
    "note_crop",
    "refinement_images",
    "run",
]
