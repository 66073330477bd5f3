"""The settings of a run that say what to compress, to which size, in which phases, and where the results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..effort import EFFORTS
from ..schemes import SCHEMES
from .config_fields import setting


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The model and the images."""

    model: str = setting("model and data", "", "dense model: a timm name, a saved folder or hf-hub:USER/NAME")
    checkpoint: str = setting("model and data", "", "weights of the dense model: a safetensors or torch weights file")
    model_kwargs: dict[str, Any] | None = setting(
        "model and data", None, "arguments of the model, such as img_size=112 pad_type=same; kept with the saved model"
    )
    drop: float = setting("model and data", 0.0, "dropout rate of the model", low=0, below=1)
    drop_path: float = setting(
        "model and data", 0.0, "rate of stochastic depth: the model skips residual branches at random", low=0, below=1
    )
    pretrained: bool = setting("model and data", False, "start from the weights published under a timm name")
    data: str = setting(
        "model and data",
        "digits",
        "'digits', a folder of parquet files, tar shards or class folders, a pattern of shards, a Hub id, timm:NAME",
    )
    data_dir: str = setting("model and data", "", "folder of a data set of timm")
    train_split: str = setting("model and data", "", "split to train on; by default train")
    test_split: str = setting("model and data", "", "split to test on; by default test, or else validation")
    streaming: bool = setting(
        "model and data", False, "read tar shards, parquet files or a Hub dataset in order, without a download"
    )
    epoch_images: int = setting(
        "model and data", 0, "images of an epoch of a stream; 0: all training images, where the data tells them", low=0
    )
    image_key: str = setting("model and data", "", "image column; by default the one of type Image")
    label_key: str = setting("model and data", "", "label column; by default the one of type ClassLabel")
    val_fraction: float = setting(
        "model and data", 0.0, "share of the training images held out for validation", low=0, below=1
    )
    max_bad_images: int = setting(
        "model and data",
        0,
        "images of a split that may fail to decode; each is named and becomes the mean colour",
        low=0,
    )
    workers: int = setting("model and data", 4, "DataLoader workers of each process, for large images", low=0)
    img_size: int | None = setting(
        "model and data", None, "side in pixels of calibration and test images; by default that of the model", low=1
    )
    train_img_size: int | None = setting(
        "model and data", None, "side in pixels of training images; by default that of test images", low=1
    )
    crop_pct: float | None = setting(
        "model and data",
        None,
        "share of a large test image that its centre crop keeps; by default that of the model",
        above=0,
        high=1,
    )


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """The size of the compressed model, and the effort of plan and fit."""

    keep_params: float | None = setting("budget", None, "share of the parameters to keep", above=0, below=1)
    keep_macs: float | None = setting("budget", None, "share of the multiply-accumulates to keep", above=0, below=1)
    schemes: tuple[str, ...] = setting(
        "budget",
        (),
        "schemes to choose from; by default all, but group_in and group_out for k x k layers only",
        choices=tuple(SCHEMES),
    )
    rank_multiple: int = setting("budget", 1, "ranks are multiples of this", low=1)
    exclude: tuple[str, ...] | None = setting(
        "budget", None, "layers that stay dense, by name or pattern; by default the first convolution"
    )
    calibration_images: int | None = setting(
        "budget",
        None,
        "unlabelled training images for plan and fit; by default 1,024 held in memory, or 256 others; 0: none",
        low=0,
    )
    calibration_copies: int | None = setting(
        "budget",
        None,
        "augmented copies added for each calibration image; by default 1 for images held in memory, 0 for others",
        low=0,
    )
    effort: str = setting(
        "budget", "balanced", "preset that trades CPU time of plan and fit for accuracy", choices=tuple(EFFORTS)
    )


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """The phases and their lengths."""

    dense_epochs: int = setting("phases", 0, "epochs of dense training before the plan is made", low=0)
    epochs: int = setting(
        "phases",
        10,
        "epochs of penalty training, ramp and hold together; 0: none, so that fine-tuning starts from the fit",
        low=0,
    )
    ramp: float = setting(
        "phases", 0.65, "share of penalty training that is the ramp; the rest is the hold", low=0, below=1
    )
    refine_minutes: float = setting(
        "phases", 0.0, "minutes of refining the fit on unlabelled images, before the penalty; 0: none", low=0
    )
    refine_steps: int = setting("phases", 0, "optimiser steps of that refinement, in place of minutes", low=0)
    refine_images: int | None = setting(
        "phases",
        None,
        "training images to refine the fit on; by default 1,000, or up to 10,000 small ones held in memory",
        low=20,
        needs=("refine_minutes", "refine_steps"),
    )
    finetune_epochs: int = setting("phases", 0, "epochs of fine-tuning the factors after decomposition", low=0)
    start_from: str = setting(
        "phases",
        "fit",
        "whether penalty training starts from the data-aware fit or from the dense model",
        choices=("fit", "dense"),
    )
    freeze_norms: bool = setting("phases", False, "keep BatchNorm statistics fixed in penalty training and fine-tuning")
    max_steps: int = setting(
        "phases",
        0,
        "trial run: at most this many steps in each phase, with few images for fit and test; 0: no limit",
        low=0,
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Folders, checkpoints, log and devices."""

    output: str = setting("run", "", "folder for the finished model; by default runs/MODEL")
    resume: str = setting(
        "run", "", "checkpoint folder to resume from; 'auto': the newest one of this output, if any", bare="auto"
    )
    overwrite: bool = setting("run", False, "replace a finished model and start a new run")
    push_to_hub: str = setting("run", "", "USER/NAME to publish the finished model as; checked before training")
    hub_private: bool = setting("run", False, "make a new repository on the Hub private", needs=("push_to_hub",))
    seed: int = setting("run", 0, "seed of every random choice", low=0, high=2**32 - 1)
    checkpoint_every: int = setting("run", 0, "steps between checkpoints; 0: one per epoch", low=0)
    keep_checkpoints: int = setting("run", 2, "checkpoints to keep", low=1)
    log_every: int = setting("run", 50, "steps between tracker entries", low=1)
    tracker: str = setting("run", "tensorboard", "experiment tracker of Accelerate, or none; skipped if not installed")
    cpu: bool = setting("run", False, "use CPUs even if there is a GPU; required for several CPU processes")
