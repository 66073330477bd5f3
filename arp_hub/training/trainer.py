"""The phases of a run, in order, from a model and data to a saved low-rank model.

dense training (or given weights) -> plan -> fit -> ramp and hold -> decompose -> fine-tune (optional) -> save
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast
from timm.optim import create_optimizer_v2, get_optimizer_info
from torch import Tensor, nn

from .._utils.environment import environment
from .._utils.files import locked, remove_unfinished, write_atomically
from ..decomposition import decompose, to_dense
from ..errors import ArpHubError
from ..hub.load import hub_dataset, is_saved_model, load_model, published_name
from ..hub.load import load_checkpoint as load_weights
from ..hub.push import check_push, push_to_hub
from ..hub.save import METRICS, check_folder, save_pretrained
from ..layers.apply_plan import apply_plan
from ..layers.model import count_params, low_rank_layers
from ..penalty import AdaptiveRankPenalty
from ..plan import RankPlan
from ..planning.make_plan import make_plan
from ..reports.run_page import write_report
from ..reports.spectra import decays
from ..schemes import Factors
from .checkpoint import (
    STATE,
    Checkpoint,
    check_same,
    find_checkpoint,
    load_checkpoint,
    remove_later_checkpoints,
    remove_unfinished_checkpoints,
    save_tensors,
    writing,
)
from .config import TrainConfig, without_retired
from .data.dataset import ImageData, calibration_images, input_format, load_data
from .evaluate import Scores, evaluate
from .loop import Phase, Run, phase_steps, train
from .preemption import Preempted, Sigterm
from .runlog import RunLog, read_log, tracker_name

_logger = logging.getLogger(__name__)

_FREE = {"workers", "resume", "overwrite", "log_every", "keep_checkpoints", "checkpoint_every", "tracker", "output"}
_FREE |= {"max_bad_images", "push_to_hub", "hub_private", "cuda_graphs"}
"""Settings that a resumed run may change, because no number depends on them."""
LOCK = "run.lock"
"""Name of the file in a run's folder that the main process of a run locks."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Run all phases and save the finished model in ``config.output``.

    Args:
        config: The settings.

    Returns:
        All numbers of the run, as ``metrics.json`` beside the model holds them.

    Raises:
        ArpHubError: If the settings, the data, the weights or the folders do not fit, or if another run writes to the
            same folders: before any training.
        Preempted: If SIGTERM has come. Within a phase the state is saved first; elsewhere the last checkpoint is whole.
    """
    sigterm = Sigterm()
    with sigterm.listening():
        _check_optimizer(config)
        accelerator = _accelerator(config)
        try:
            with _alone(config, accelerator):
                return _run(config, accelerator, sigterm)
        except Preempted:
            accelerator.end_training()  # no thread of Gloo may outlive Python
            raise


def _run(config: TrainConfig, accelerator: Accelerator, sigterm: Sigterm) -> dict[str, Any]:
    found = find_checkpoint(config.resume, config.run_folder / "checkpoints")
    start = load_checkpoint(found) if found else None
    _check_folders(config, accelerator, start)
    data, model = _data_and_model(config)
    teacher = _teacher(config, data, model)
    config = _affordable(config, accelerator, data)
    _check_schedule(config, data)
    settings = _settings(config, accelerator, data)
    if start and found:
        check_same({**_defaults(), **without_retired(start.settings)}, settings, found)
    _open_folder(config, accelerator, start)
    log = RunLog(accelerator, config, (start.phase, start.step) if start else None)
    this = Run(config, accelerator, data, log, settings, sigterm)
    if start:
        this.scores, this.plan, this.began = dict(start.scores), start.plan, this.began - start.seconds
        log.note("resumed from '%s'", found)
    dense = _dense_model(this, model, start)
    result, plan = _low_rank_model(this, dense, teacher or dense, start)
    metrics = _save(this, dense, result, _metrics(this, plan))
    accelerator.end_training()
    _publish(this)
    return metrics


@contextmanager
def _alone(config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """Lock the run's folder on the main process.

    Raises:
        ArpHubError: If another run holds it, if it holds files that no run wrote, or if it cannot be written.
    """
    folder = config.run_folder
    if not accelerator.is_main_process:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise ArpHubError(f"'{folder}' is a file, where the run would keep its checkpoints: choose another output")
    if not config.overwrite and not _is_run_folder(folder):
        raise ArpHubError(
            f"'{folder}', where the run would keep its checkpoints, holds '{min(folder.iterdir()).name}', which no run "
            "wrote: choose another output, or delete all of it with --overwrite"
        )
    with ExitStack() as stack:
        try:
            with writing(folder):
                stack.enter_context(locked(folder / LOCK))
        except ArpHubError as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise ArpHubError(
                    f"another run writes in '{folder}' ({error.__cause__}): wait for its end, stop it, or choose "
                    "another output"
                ) from error
            raise
        yield


def _is_run_folder(folder: Path) -> bool:
    """Whether a folder may be cleared for a run: it is empty or missing, or a run wrote it."""
    if not folder.exists() or not any(folder.iterdir()) or (folder / LOCK).exists():
        return True
    return any(folder.glob(f"checkpoints/*/{STATE}"))


def _accelerator(config: TrainConfig) -> Accelerator:
    try:
        accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation,
            log_with=tracker_name(config),
            project_config=ProjectConfiguration(project_dir=str(config.run_folder)),
        )
    except ValueError as error:
        if isinstance(error, ArpHubError):
            raise
        raise ArpHubError(
            f"this machine or process cannot do mixed_precision={config.mixed_precision} with cpu={config.cpu}: {error}"
        ) from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ArpHubError(
            f"{launched} processes were launched, but each would train by itself: add --cpu to train on CPUs "
            "with several processes"
        )
    if config.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        raise ArpHubError(
            f"cuda_graphs needs one process on a GPU of CUDA, this run has {accelerator.num_processes} on "
            f"{accelerator.device.type}: leave cuda_graphs out"
        )
    parts = accelerator.num_processes * config.accumulation * _evenly(config)
    if config.batch_size % parts:
        pairs = ", of an even number of images for mixup and cutmix" if _evenly(config) == 2 else ""
        raise ArpHubError(
            f"batch_size={config.batch_size} cannot be shared by {accelerator.num_processes} processes in "
            f"accumulation={config.accumulation} parts each{pairs}: choose a multiple of {parts}"
        )
    return accelerator


def _check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimiser that needs a package that is missing, or second derivatives."""
    name = config.optimizer
    try:
        create_optimizer_v2(nn.Linear(1, 1), opt=name, lr=config.lr)
    except (ImportError, AssertionError, AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise ArpHubError(f"optimizer '{name}' cannot be used here ({error}): choose another") from error
    if get_optimizer_info(name.lower()).second_order:
        raise ArpHubError(f"optimizer '{name}' differentiates twice, which a run does not: choose another")


def _evenly(config: TrainConfig) -> int:
    """The number that divides the images of a forward pass: 2 with mixup or cutmix, which mix pairs, else 1."""
    return 2 if config.mixup or config.cutmix else 1


def _check_folders(config: TrainConfig, accelerator: Accelerator, start: Checkpoint | None) -> None:
    """Check, before any work, that nothing would be overwritten."""
    output, folder = Path(config.output), config.run_folder
    check_folder(output, overwrite=config.overwrite)
    if config.push_to_hub and accelerator.is_main_process:
        check_push(config.push_to_hub)
    if not config.overwrite and start is None:
        if output.exists() and any(output.iterdir()):
            raise ArpHubError(
                f"'{output}' holds a model already: choose another output, or replace it with --overwrite"
            )
        if (folder / "checkpoints").is_dir() and not config.resume:
            raise ArpHubError(
                f"a run is under way in '{folder}': go on with --resume auto, or start a new run with --overwrite"
            )
    accelerator.wait_for_everyone()  # nobody may open the folder while another still looks


def _open_folder(config: TrainConfig, accelerator: Accelerator, start: Checkpoint | None) -> None:
    folder = config.run_folder
    if accelerator.is_main_process:
        with writing(folder):
            remove_unfinished(Path(config.output))
            if start is None:
                _clear(folder)
            remove_unfinished_checkpoints(folder)
            remove_unfinished_checkpoints(folder / "checkpoints")  # here too: a finished phase saves none any more
            if start is not None:
                remove_later_checkpoints(folder / "checkpoints", start.phase, start.step)
            config.save(folder / "config.yaml")
    accelerator.wait_for_everyone()


def _clear(folder: Path) -> None:
    """Delete everything in a run's folder but its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _data_and_model(config: TrainConfig) -> tuple[ImageData, nn.Module]:
    """The data and the model. If the classifier will be trained, it gets as many classes as the data has."""
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
        _logger.warning("no weights to start from and dense_epochs=0: penalty training starts from random weights")
    return data, model


def _teacher(config: TrainConfig, data: ImageData, model: nn.Module) -> nn.Module | None:
    """The teacher, if it is not the dense model. It must take the same images and have the same classes."""
    if not config.teacher:
        return None
    checkpoint = config.teacher_checkpoint or None
    try:
        teacher = load_model(config.teacher, checkpoint, pretrained=checkpoint is None)
    except ArpHubError as error:
        raise ArpHubError(f"no teacher: {error} (teacher_checkpoint gives it the weights of a file)") from error
    if teacher.num_classes != data.num_classes:
        raise ArpHubError(
            f"teacher '{config.teacher}' has {teacher.num_classes} classes, data '{config.data}' has "
            f"{data.num_classes}: choose a teacher that was trained on this data"
        )
    theirs, ours = input_format(teacher), input_format(model)
    if (theirs.mean, theirs.std) != (ours.mean, ours.std):
        raise ArpHubError(
            f"teacher '{config.teacher}' normalises images by mean {theirs.mean} and std {theirs.std}, model "
            f"'{config.model}' by {ours.mean} and {ours.std}, and both are to see the same ones: choose another teacher"
        )
    return teacher


def _affordable(config: TrainConfig, accelerator: Accelerator, data: ImageData) -> TrainConfig:
    """The settings, with a smaller batch for a trial run on a CPU of a recipe that is meant for several GPUs."""
    if not config.max_steps or accelerator.device.type != "cpu":
        return config
    parts, (height, width) = (
        accelerator.num_processes * config.accumulation * _evenly(config),
        data.train.images.form.size,
    )
    most = max(parts, 2**20 // (height * width) // parts * parts)
    if config.batch_size <= most:
        return config
    _logger.warning("trial run on a CPU: %d images a step instead of batch_size=%d", most, config.batch_size)
    return dataclasses.replace(config, batch_size=most)


def _check_schedule(config: TrainConfig, data: ImageData) -> None:
    steps = phase_steps(config, data, config.epochs)
    if config.epochs and math.ceil(config.ramp * steps) >= steps:
        raise ArpHubError(
            f"ramp={config.ramp} leaves no step for the hold in {steps} steps: lower ramp, or raise epochs or max_steps"
        )


def _settings(config: TrainConfig, accelerator: Accelerator, data: ImageData) -> dict[str, Any]:
    """The settings that decide the numbers of a run, as checkpoints hold them."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    return settings | {"processes": accelerator.num_processes, "training images": len(data.train)}


def _defaults() -> dict[str, Any]:
    """The defaults of settings that a checkpoint may not hold."""
    return {item.name: item.default for item in dataclasses.fields(TrainConfig) if item.name not in _FREE}


def _dense_model(run: Run, model: nn.Module, start: Checkpoint | None) -> nn.Module:
    """The trained dense model, measured once, and kept in the run's folder for resuming."""
    config, kept = run.config, run.config.run_folder / "dense.safetensors"
    model.to(run.accelerator.device)
    if start and start.phase != "dense":
        load_weights(model, kept)
        return model.eval()
    if config.dense_epochs:
        _check_budget(run, model)
        if start:
            start.load_into(model, "model")
        average = train(run, Phase("dense", model, config.dense_epochs, config.dense_lr or config.lr), start)
        model = average or model
    model.eval()
    run.scores["dense"] = _score(run, model, "dense model")
    if run.accelerator.is_main_process:
        with writing(kept):
            save_tensors(kept, model.state_dict())
    return model


def _low_rank_model(
    run: Run, dense: nn.Module, teacher: nn.Module, start: Checkpoint | None
) -> tuple[nn.Module, RankPlan]:
    """Plan, penalise and decompose a copy of the dense model, then fine-tune its factors if the config asks for it."""
    config = run.config
    guide = teacher.to(run.accelerator.device).requires_grad_(False) if config.distill else None
    if start and start.phase == "finetune":
        plan = RankPlan.from_dict(start.plan)
        model = apply_plan(copy.deepcopy(dense), plan)
        start.load_into(model, "model")
    else:
        model, plan = _penalised_model(run, dense, guide, start if start and start.phase == "compress" else None)
    if config.finetune_epochs:
        model.requires_grad_(True)
        begin = start if start and start.phase == "finetune" else None
        rate = config.finetune_lr or config.lr / 10
        average = train(
            run,
            Phase("finetune", model, config.finetune_epochs, rate, guide, frozen_norms=config.freeze_norms),
            begin,
        )
        model = average or model
        run.scores["finetuned"] = _score(run, model, "fine-tuned model")
    return model.eval(), plan


def _penalised_model(
    run: Run, dense: nn.Module, teacher: nn.Module | None, start: Checkpoint | None
) -> tuple[nn.Module, RankPlan]:
    """Ramp, hold and decomposition, which changes nothing after the hold."""
    config = run.config
    model = copy.deepcopy(dense).requires_grad_(True)
    factors = None
    if start:
        plan = RankPlan.from_dict(start.plan)
        start.load_into(model, "model")
    else:
        images, show = _calibration(run), run.log.main and sys.stderr.isatty()
        plan = _same_everywhere(
            run.accelerator,
            make_plan(model, calibration=images, effort=config.effort, progress=show, **_budget(config)),
        )
        run.plan = plan.to_dict()
        run.log.note("plan: %d layers are decomposed, %d stay dense", len(plan.layers), len(plan.dense))
        if config.start_from == "fit":
            decompose(model, plan, calibration=images, effort=config.effort, progress=show)
            run.scores["fit"] = _score(run, model, "data-aware fit, untrained")
            factors = _factors(run.accelerator, model)
            if not config.epochs:
                return model, plan
            to_dense(model)
    penalty = AdaptiveRankPenalty(
        model, plan, total_steps=run.total_steps(config.epochs), ramp=config.ramp, factors=factors
    )
    if start:
        start.load_into(penalty, "penalty")
    average = train(
        run, Phase("compress", model, config.epochs, config.lr, teacher, penalty, config.freeze_norms), start
    )
    if average is not None:  # a mean of low-rank weights is not quite low-rank: bring it back
        model = average
        penalty = AdaptiveRankPenalty(model, plan, total_steps=1, ramp=0, factors=penalty.factors())
        penalty.step()
    run.scores["before_decomposition"] = _score(run, model, "before decomposition")
    decompose(model, plan, factors=penalty.factors())
    run.scores["decomposed"] = _score(run, model, "decomposed")
    return model, plan


def _check_budget(run: Run, model: nn.Module) -> None:
    """Refuse an impossible budget, or a layer that cannot be penalised, before the dense training."""
    config = run.config
    plan = make_plan(model, **_budget(config))
    if config.start_from == "dense":
        AdaptiveRankPenalty(model, plan, total_steps=run.total_steps(config.epochs), ramp=config.ramp)


def _budget(config: TrainConfig) -> dict[str, Any]:
    """The arguments of `make_plan` that are settings."""
    return {
        "keep_params": config.keep_params,
        "keep_macs": config.keep_macs,
        "schemes": list(config.schemes) or None,
        "rank_multiple": config.rank_multiple,
        "exclude": None if config.exclude is None else list(config.exclude),
    }


def _calibration(run: Run) -> Tensor | None:
    config = run.config
    count = config.calibration_images
    if count == 0:
        return None
    if config.max_steps:
        trial = config.max_steps * 4  # a trial run takes four calibration images a step
        count = trial if count is None else min(count, trial)
    return calibration_images(
        run.data, count, copies=config.calibration_copies, seed=config.seed, workers=config.workers
    )


def _score(run: Run, model: nn.Module, title: str) -> Scores:
    """Accuracy on the test split."""
    config = run.config
    limit = config.max_steps * 32 if config.max_steps else None  # a trial run takes 32 test images a step
    scores = evaluate(model, run.data.test, workers=config.workers, accelerator=run.accelerator, max_images=limit)
    run.log.note(
        "%s: top-1 %.2f, top-5 %.2f, loss %.4f on %d test images, %d parameters",
        title, scores["top1"], scores["top5"], scores["loss"], scores["images"], count_params(model),
    )  # fmt: skip
    return scores


def _same_everywhere(accelerator: Accelerator, plan: RankPlan) -> RankPlan:
    """The plan of the main process, on all processes: rounding may differ between machines."""
    if accelerator.num_processes == 1:
        return plan
    text = torch.tensor(list(plan.to_json().encode()), device=accelerator.device)
    size = broadcast(torch.tensor([len(text)], device=accelerator.device))
    padded = text.new_zeros(int(size))
    padded[: len(text)] = text[: len(padded)]
    return RankPlan.from_json(bytes(broadcast(padded).tolist()).decode())


def _factors(accelerator: Accelerator, model: nn.Module) -> dict[str, Factors]:
    """The factors of a decomposed model, made the same on all processes."""
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            tensor.copy_(broadcast(tensor.contiguous()))
    return {
        name: tuple(factor.detach().clone() for factor in layer.factor_weights())
        for name, layer in low_rank_layers(model).items()
    }


def _metrics(run: Run, plan: RankPlan) -> dict[str, Any]:
    """All numbers of the run with their provenance; those of the finished model are at the top level."""
    last = next(run.scores[name] for name in ("finetuned", "decomposed", "fit") if name in run.scores)
    return {
        **environment(),
        **last,
        "dense": run.scores["dense"],
        "scores": run.scores,
        "data": run.config.data,
        "split": run.data.test.name,
        **({"bad_images": bad} if (bad := run.data.bad_images(run.accelerator)) else {}),
        "seed": run.config.seed,
        "processes": run.accelerator.num_processes,
        "seconds": round(run.seconds, 1),
        "plan": plan.to_dict(),
        "config": run.config.to_dict(),
    }


def _save(run: Run, dense: nn.Module, model: nn.Module, metrics: dict[str, Any]) -> dict[str, Any]:
    """Save on the main process, with sizes, spectra and the training history added to the metrics."""
    config, output, names = run.config, run.config.output, run.data.class_names
    if run.accelerator.is_main_process:
        published = config.pretrained or is_saved_model(config.model)
        metrics = {
            **metrics,
            "base_model": published_name(config.model, dense) if published and not config.checkpoint else None,
            "dataset": hub_dataset(config.data),
            "shared_images": run.data.train.name == run.data.test.name,
            "dense": {**metrics["dense"], "spectra": decays(dense)},
            "spectra": decays(model),
            "history": [entry for entry in read_log(run.log.path) if "violation" in entry],
        }
        label_names = names if len(names) == model.num_classes else None
        save_pretrained(model, output, metrics=metrics, label_names=label_names, overwrite=True)
        text = (Path(output) / METRICS).read_text(encoding="utf-8")
        with writing(run.config.run_folder):
            write_atomically(run.config.run_folder / METRICS, text)
            write_report(run.config.run_folder)
        metrics = json.loads(text)
    run.accelerator.wait_for_everyone()
    run.log.note("saved in '%s': timm.create_model('local-dir:%s', pretrained=True) loads it", output, output)
    return metrics


def _publish(run: Run) -> None:
    """Push from the main process, after all others have finished."""
    if run.config.push_to_hub and run.accelerator.is_main_process:
        done = push_to_hub(run.config.output, run.config.push_to_hub, private=run.config.hub_private or None)
        run.log.note("published: %s", done.url)
