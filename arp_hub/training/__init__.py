"""Training on Accelerate: data, configuration, the phases from a dense model to a saved low-rank one."""

from .data import ImageData, Split, calibration_images, load_data
from .evaluate import Scores, evaluate

__all__ = ["ImageData", "Scores", "Split", "calibration_images", "evaluate", "load_data"]
