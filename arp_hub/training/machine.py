"""The machine that a run trains on: its devices and processes, and the batch sizes that they can share."""

from __future__ import annotations

import dataclasses
import logging
import os

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration

from ..errors import ArpHubError
from .compiling import check_backend
from .config import TrainConfig
from .data.dataset import ImageData
from .fsdp import check_fsdp, fsdp_plugin
from .runlog import tracker_name

_logger = logging.getLogger(__name__)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ArpHubError: If this machine lacks the precision, the processes or the GPU that the settings ask for, or if its
            processes cannot share a batch evenly.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if configured not in ("", "no") and config.mixed_precision == "no":
        raise ArpHubError(
            f"Accelerate is configured for mixed_precision={configured}, and the run for no: set "
            f"mixed_precision={configured}, or start it with `accelerate launch --mixed_precision no`"
        )
    if config.torchcompile:
        check_backend(config.torchcompile)
    try:
        accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation,
            log_with=tracker_name(config),
            project_config=ProjectConfiguration(project_dir=str(config.run_folder)),
        )
    except ImportError as error:  # of DeepSpeed, or of FSDP2 with an old torch
        raise ArpHubError(f"Accelerate cannot train here as `accelerate config` says: {error}") from error
    except ValueError as error:
        if isinstance(error, ArpHubError):
            raise
        raise ArpHubError(
            f"this machine or process does not support mixed_precision={config.mixed_precision} with "
            f"cpu={config.cpu}: {error}"
        ) from error
    if accelerator.device.type == "mps":
        raise ArpHubError(
            "Apple GPUs (mps) have no float64, which the fit needs: train on the CPU with cpu=True (--cpu)"
        )
    _meet(accelerator)
    if other := _unsupported(accelerator):
        raise ArpHubError(
            f"recipes train with DDP or FSDP2, not with {other}: choose MULTI_GPU, MULTI_CPU, or FSDP with "
            "fsdp_version: 2 in `accelerate config`"
        )
    check_fsdp(config, accelerator)
    if config.sync_bn and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise ArpHubError(
            f"sync_bn needs GPUs, but this run has {accelerator.num_processes} processes on CPUs: leave sync_bn out"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ArpHubError(
            f"{launched} processes were launched, but each would train by itself: add --cpu to train on CPUs "
            "with several processes"
        )
    if config.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        raise ArpHubError(
            f"cuda_graphs needs one process on a CUDA GPU, but this run has {accelerator.num_processes} on "
            f"{accelerator.device.type}: leave cuda_graphs out"
        )
    parts = _parts(config, accelerator)
    if config.batch_size % parts:
        pairs = ", each with an even number of images for mixup and cutmix" if _mixes_pairs(config) else ""
        raise ArpHubError(
            f"batch_size={config.batch_size} cannot be divided among {accelerator.num_processes} processes with "
            f"accumulation={config.accumulation} parts{pairs}: choose a multiple of {parts}"
        )
    return accelerator


def _meet(accelerator: Accelerator) -> None:
    """Wait until all processes have joined: one that is refused and ends before breaks the connections of others."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes == 1 and dist.is_available() and dist.is_initialized():
        dist.barrier()  # without --cpu, Accelerate joins processes that have no GPU, and takes each for the only one


def _unsupported(accelerator: Accelerator) -> str | None:
    """A way to share a model among processes that recipes do not support, by its name."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        return str(accelerator.distributed_type.value)
    plugin = fsdp_plugin(accelerator)
    old = (
        accelerator.distributed_type == DistributedType.FSDP
        if plugin is None
        else getattr(plugin, "fsdp_version", 1) != 2
    )
    return "FSDP1" if old else None


def affordable(config: TrainConfig, accelerator: Accelerator, data: ImageData) -> TrainConfig:
    """The settings of a trial run on a CPU, with at most a million pixels a step, so that it takes seconds.

    All other runs keep their batch size.
    """
    if not config.max_steps or accelerator.device.type != "cpu":
        return config
    parts, (height, width) = _parts(config, accelerator), data.train.images.form.size
    pixels = config.train_img_size**2 if config.train_img_size else height * width
    most = max(parts, 2**20 // pixels // parts * parts)
    if config.batch_size <= most:
        return config
    _logger.warning("trial run on a CPU: %d images a step instead of batch_size=%d", most, config.batch_size)
    return dataclasses.replace(config, batch_size=most)


def _parts(config: TrainConfig, accelerator: Accelerator) -> int:
    """The number that must divide a batch: parts for processes and accumulation, in pairs for mixup and cutmix."""
    return accelerator.num_processes * config.accumulation * (2 if _mixes_pairs(config) else 1)


def _mixes_pairs(config: TrainConfig) -> bool:
    return bool(config.mixup or config.cutmix)
