"""What a run starts from: the data, the dense model and the teacher, checked against each other."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..errors import ArpHubError
from ..hub.load import is_saved_model, load_model
from .config import TrainConfig
from .data.dataset import ImageData, load_data
from .data.input_format import input_format

_logger = logging.getLogger(__name__)


def load_data_and_model(config: TrainConfig) -> tuple[ImageData, nn.Module]:
    """The data and the dense model. If the classifier will be trained, it gets as many classes as the data has.

    Raises:
        ArpHubError: If either cannot be loaded, or if trained weights have another number of classes than the data.
    """
    checkpoint = config.checkpoint or None
    pretrained = config.pretrained or is_saved_model(config.model)
    torch.manual_seed(config.seed)
    arguments = config.model_kwargs or {}
    model = load_model(config.model, checkpoint, pretrained=pretrained, **arguments)
    data = load_data(
        config.data,
        model,
        image_key=config.image_key or None,
        label_key=config.label_key or None,
        val_fraction=config.val_fraction,
        seed=config.seed,
        auto_augment=config.auto_augment,
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
    if data.num_classes != model.num_classes:
        if checkpoint or (pretrained and not config.dense_epochs):
            raise ArpHubError(
                f"data '{config.data}' has {data.num_classes} classes, model '{config.model}' has "
                f"{model.num_classes}: set dense_epochs to train a new classifier, or choose the right model"
            )
        torch.manual_seed(config.seed)
        model = load_model(config.model, pretrained=pretrained, **{**arguments, "num_classes": data.num_classes})
    if not checkpoint and not pretrained and not config.dense_epochs:
        _logger.warning("no trained weights and dense_epochs=0: penalty training starts from random weights")
    return data, model


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
    theirs, ours = input_format(teacher), input_format(model)
    if (theirs.mean, theirs.std) != (ours.mean, ours.std):
        raise ArpHubError(
            f"teacher '{config.teacher}' normalises images by mean {theirs.mean} and std {theirs.std}, model "
            f"'{config.model}' by {ours.mean} and {ours.std}, but both get the same images: choose another teacher"
        )
    return teacher
