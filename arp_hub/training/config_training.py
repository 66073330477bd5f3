"""The settings of a run that decide how it trains: optimiser, augmentation, loss. Most have the names of timm's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config_fields import setting

_MIXING = ("mixup", "cutmix")


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings:
    """Steps, learning rates and the form of the computation."""

    batch_size: int = setting("optimisation", 128, "images per optimiser step, over all processes", low=1)
    accumulation: int = setting(
        "optimisation", 1, "forward passes into which each process splits its share of a batch", low=1
    )
    optimizer: str = setting("optimisation", "sgd", "timm optimiser")
    opt_kwargs: dict[str, Any] | None = setting(
        "optimisation", None, "further arguments of the optimiser, such as betas=(0.9,0.95) eps=1e-6"
    )
    lr: float = setting("optimisation", 0.05, "learning rate of penalty training", above=0)
    dense_lr: float | None = setting(
        "optimisation", None, "learning rate of dense training; by default lr", above=0, needs=("dense_epochs",)
    )
    finetune_lr: float | None = setting(
        "optimisation", None, "learning rate of fine-tuning; by default lr / 10", above=0, needs=("finetune_epochs",)
    )
    layer_decay: float | None = setting(
        "optimisation",
        None,
        "factor of the learning rate from each layer to the one before it; by default all layers have the same rate",
        above=0,
        high=1,
    )
    weight_decay: float = setting("optimisation", 1e-4, "weight decay", low=0)
    momentum: float = setting("optimisation", 0.9, "momentum", low=0, below=1)
    schedule: str = setting(
        "optimisation", "cosine", "timm schedule", choices=("cosine", "multistep", "poly", "step", "tanh")
    )
    warmup_epochs: float = setting("optimisation", 0.0, "epochs in which the learning rate rises", low=0)
    warmup_lr: float = setting(
        "optimisation", 0.0, "learning rate at which the warm-up begins", low=0, needs=("warmup_epochs",)
    )
    min_lr: float = setting("optimisation", 0.0, "learning rate at which cosine, poly and tanh schedules end", low=0)
    clip_grad: float = setting("optimisation", 0.0, "largest gradient norm, or the bound of clip_mode; 0: off", low=0)
    clip_mode: str = setting(
        "optimisation",
        "norm",
        "what clip_grad bounds: the norm of all gradients, each value, or the share of a unit's weights (agc)",
        choices=("norm", "value", "agc"),
        needs=("clip_grad",),
    )
    sync_bn: bool = setting(
        "optimisation", False, "BatchNorm statistics over the batches of all processes; needs GPUs if there are several"
    )
    channels_last: bool = setting(
        "optimisation", True, "channels-last memory layout, in which most convolutions run faster"
    )
    mixed_precision: str = setting(
        "optimisation", "no", "number format of the forward pass", choices=("no", "bf16", "fp16")
    )
    cuda_graphs: bool = setting(
        "optimisation", False, "replay each step from CUDA graphs: faster for small networks on one GPU"
    )
    torchcompile: str = setting(
        "optimisation",
        "",
        "backend of torch.compile for training steps, such as inductor",
        bare="inductor",
    )


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """How training images are varied and mixed."""

    auto_augment: str = setting(
        "augmentation", "", "timm augmentation in addition to crops and flips, such as rand-m9-mstd0.5"
    )
    color_jitter: float = setting(
        "augmentation", 0.0, "strength of colour jitter; skipped beside auto_augment, but for 3a", low=0
    )
    train_crop_mode: str = setting(
        "augmentation",
        "rrc",
        "random crops of large images: resized crops (rrc), or crops that keep the aspect ratio (rkrc, rkrr)",
        choices=("rrc", "rkrc", "rkrr"),
    )
    reprob: float = setting("augmentation", 0.0, "probability of random erasing", low=0, high=1)
    remode: str = setting(
        "augmentation",
        "pixel",
        "what random erasing fills in: zeros, one random colour, or random pixels",
        choices=("const", "rand", "pixel"),
        needs=("reprob",),
    )
    recount: int = setting("augmentation", 1, "largest number of erased rectangles", low=1, needs=("reprob",))
    aug_repeats: int = setting(
        "augmentation", 0, "versions of each image in a batch (repeated augmentation); 0 or 1: off", low=0
    )
    mixup: float = setting("augmentation", 0.0, "mixup alpha; 0: off", low=0)
    cutmix: float = setting("augmentation", 0.0, "cutmix alpha; 0: off", low=0)
    mixup_prob: float = setting(
        "augmentation", 1.0, "probability that a batch is mixed, by mixup or cutmix", low=0, high=1, needs=_MIXING
    )
    mixup_switch_prob: float = setting(
        "augmentation", 0.5, "probability of cutmix in place of mixup where both are on", low=0, high=1, needs=_MIXING
    )
    mixup_off_epoch: int = setting(
        "augmentation", 0, "epoch of a phase from which mixup and cutmix are off; 0: never", low=0, needs=_MIXING
    )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss and the moving average."""

    bce_loss: bool = setting(
        "loss and averaging", False, "binary cross-entropy of each class, in place of cross-entropy over all classes"
    )
    bce_target_thresh: float | None = setting(
        "loss and averaging",
        None,
        "targets above this become 1, all others 0; by default mixed and smoothed targets stay",
        low=0,
        below=1,
        needs=("bce_loss",),
    )
    bce_sum: bool = setting(
        "loss and averaging", False, "sum binary cross-entropy over classes instead of averaging", needs=("bce_loss",)
    )
    smoothing: float = setting("loss and averaging", 0.0, "label smoothing", low=0, below=1)
    distill: float = setting(
        "loss and averaging",
        0.0,
        "weight of distillation from the teacher, by default the dense model; the labels get 1 - weight",
        low=0,
        high=1,
    )
    temperature: float = setting("loss and averaging", 4.0, "temperature of distillation", above=0, needs=("distill",))
    teacher: str = setting(
        "loss and averaging", "", "another model to distil from: a timm name, a saved folder or hf-hub:USER/NAME"
    )
    teacher_checkpoint: str = setting("loss and averaging", "", "weights of the teacher; by default those of its name")
    ema_decay: float = setting(
        "loss and averaging", 0.0, "decay of the weights' moving average; 0: off", low=0, below=1
    )
    model_ema_warmup: bool = setting(
        "loss and averaging", False, "start the moving average with a small decay that rises", needs=("ema_decay",)
    )
