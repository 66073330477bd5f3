"""What a run starts from: the data, the dense model and the teacher, checked against each other."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from .._utils.torch_utils import evaluating
from ..errors import ArpHubError
from ..hub.client import FAILURES
from ..hub.load import change_config, is_saved_model, load_model, set_input_size
from ..models.arguments import unknown_argument
from ..planning.make_plan import check_plannable
from .config import ARGUMENTS, TrainConfig
from .data.augment import Augmentation
from .data.dataset import ImageData, load_data
from .data.input_format import input_format, note_crop
from .data.splits import StreamedSplit
from .evaluate import why_not_measured

_logger = logging.getLogger(__name__)


def load_data_and_model(config: TrainConfig) -> tuple[ImageData, nn.Module]:
    """The data and the dense model. If the classifier will be trained, it gets as many classes as the data has.

    Raises:
        ArpHubError: If either cannot be loaded, if ``exclude`` names a layer that the model lacks, or if trained
            weights have another number of classes than the data.
    """
    checkpoint = config.checkpoint
    pretrained = config.pretrained or is_saved_model(config.model)
    torch.manual_seed(config.seed)
    model = _dense_model(config, pretrained=pretrained)
    check_plannable(model, config.exclude)
    data = load_data(
        config.data,
        model,
        image_key=config.image_key or None,
        label_key=config.label_key or None,
        val_fraction=config.val_fraction,
        seed=config.seed,
        augmentation=Augmentation(
            config.auto_augment,
            config.color_jitter,
            config.train_crop_mode,
            config.reprob,
            config.remode,
            config.recount,
            config.train_img_size,
        ),
        max_bad_images=config.max_bad_images,
        streaming=config.streaming,
        epoch_images=config.epoch_images,
        data_dir=config.data_dir,
        train_split=config.train_split,
        test_split=config.test_split,
    )
    if not len(data.train):
        raise ArpHubError(
            f"data '{config.data}' does not tell how many images split '{data.train.name}' has: set epoch_images, the "
            "number of images of an epoch"
        )
    if isinstance(data.train, StreamedSplit) and config.aug_repeats > 1:
        raise ArpHubError(
            f"aug_repeats={config.aug_repeats} needs images that are read at random, and data '{config.data}' is a "
            "stream: set aug_repeats=0"
        )
    if data.num_classes != model.num_classes:
        if (checkpoint or pretrained) and not config.dense_epochs:
            raise ArpHubError(
                f"data '{config.data}' has {data.num_classes} classes, model '{config.model}' has "
                f"{model.num_classes}: set dense_epochs to train a new classifier, or choose the right model"
            )
        torch.manual_seed(config.seed)
        model = _with_classes(config, model, data.num_classes, pretrained)
    if config.dense_epochs:  # the classifier learns the numbers of the data, whatever it has learnt before
        change_config(model, {"label_names": list(data.class_names) or None, "label_descriptions": None})
    elif reason := why_not_measured(model, data.test):
        raise ArpHubError(f"model '{config.model}' does not fit the labels of data '{config.data}': {reason}")
    if config.crop_pct not in (None, data.form.crop_pct):
        _logger.warning("crop_pct=%g has no effect: images as small as these are not cropped", config.crop_pct)
    note_crop(model, data.form)
    if config.train_img_size:
        _check_size(model, (config.train_img_size,) * 2, f"model '{config.model}'", config)
    if not checkpoint and not pretrained and not config.dense_epochs:
        _logger.warning("no trained weights and dense_epochs=0: penalty training starts from random weights")
    return data, model


def _with_classes(config: TrainConfig, model: nn.Module, classes: int, pretrained: bool) -> nn.Module:
    """The model with another number of classes. Only its classifier is new where the weights are trained ones."""
    if not config.checkpoint:
        return _dense_model(config, pretrained=pretrained, num_classes=classes)
    found = _dense_model(dataclasses.replace(config, checkpoint=""), pretrained=False, num_classes=classes)
    own = found.state_dict()
    trained = {key: value for key, value in model.state_dict().items() if value.shape == own[key].shape}
    found.load_state_dict(trained, strict=False)
    return found


def _loaded(config: TrainConfig, given: dict[str, Any]) -> nn.Module:
    """The model with some arguments. If its weights cannot be loaded, the error says how to start without them."""
    try:
        return load_model(config.model, config.checkpoint or None, **given)
    except ArpHubError as error:
        cause = error.__cause__
        named = cause and unknown_argument(cause, given)
        if isinstance(cause, FAILURES) and not named and given.get("pretrained") and not is_saved_model(config.model):
            raise ArpHubError(f"{error}; or give a checkpoint, or pretrained=False for random weights") from cause
        raise


def _dense_model(config: TrainConfig, **arguments: Any) -> nn.Module:
    """The dense model with the arguments that the settings give it.

    Raises:
        ArpHubError: If it cannot be loaded, or does not take an argument; naming the setting.
    """
    named = {argument: setting for setting, argument in ARGUMENTS.items() if getattr(config, setting)}
    given = {argument: getattr(config, setting) for argument, setting in named.items()}
    given |= {**(config.model_kwargs or {}), **arguments}
    try:
        model = _loaded(config, given)
    except ArpHubError as error:
        unknown = unknown_argument(error.__cause__, given) if error.__cause__ else None
        if unknown == "img_size" and unknown in named:  # the model takes images of any size
            del given["img_size"]
            model = _loaded(config, given)
        elif unknown in named:
            raise ArpHubError(
                f"{named[unknown]}={given[unknown]}: the model '{config.model}' takes no argument '{unknown}': leave "
                f"{named[unknown]} out"
            ) from error
        else:
            raise
    if config.img_size:
        set_input_size(model, (3, config.img_size, config.img_size))
    if config.crop_pct:
        change_config(model, {"crop_pct": config.crop_pct})
    return model


@torch.no_grad()
def _check_size(model: nn.Module, size: tuple[int, int], name: str, config: TrainConfig) -> None:
    """Refuse training images of a size that a model does not take."""
    try:
        with evaluating(model):
            model(next(model.parameters()).new_zeros(1, 3, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if config.train_img_size:
            raise ArpHubError(
                f"train_img_size={config.train_img_size}: {name} does not take images of this size ({reason:.200}). "
                "Transformers of timm do with the argument dynamic_img_size=True in model_kwargs"
            ) from error
        raise ArpHubError(
            f"{name} does not take the training images, which have {size[0]} x {size[1]} pixels ({reason:.200}): "
            "choose another teacher, or set img_size to the size that it takes"
        ) from error


def load_teacher(config: TrainConfig, data: ImageData, model: nn.Module) -> nn.Module | None:
    """The teacher that the settings name; None if the dense model teaches, or if there is no distillation.

    Raises:
        ArpHubError: If it cannot be loaded, or if its classes or the normalisation of its images differ.
    """
    if not config.teacher:
        return None
    checkpoint = config.teacher_checkpoint or None
    try:
        teacher = load_model(config.teacher, checkpoint, pretrained=checkpoint is None)
    except ArpHubError as error:
        raise ArpHubError(
            f"cannot load the teacher: {error} (teacher_checkpoint reads its weights from a file)"
        ) from error
    if teacher.num_classes != data.num_classes:
        raise ArpHubError(
            f"teacher '{config.teacher}' has {teacher.num_classes} classes, data '{config.data}' has "
            f"{data.num_classes}: choose a teacher that was trained on this data"
        )
    if reason := why_not_measured(teacher, data.train):
        raise ArpHubError(f"teacher '{config.teacher}' does not fit the labels: {reason}")
    theirs, ours = input_format(teacher), input_format(model)
    if (theirs.mean, theirs.std) != (ours.mean, ours.std):
        raise ArpHubError(
            f"teacher '{config.teacher}' normalises images by mean {theirs.mean} and std {theirs.std}, model "
            f"'{config.model}' by {ours.mean} and {ours.std}, but both get the same images: choose another teacher"
        )
    size = (config.train_img_size,) * 2 if config.train_img_size else data.form.size
    _check_size(teacher, size, f"teacher '{config.teacher}'", config)
    return teacher
