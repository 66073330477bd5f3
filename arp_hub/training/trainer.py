"""The story of a run: from data and a model, through planning and training, to a saved compressed model.

load -> dense training (optional) -> plan -> fit -> refine (optional) -> ramp and hold -> decompose
-> fine-tune (optional) -> save
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ..decomposition import decompose, to_dense
from ..effort import Effort
from ..hub.load import load_checkpoint as load_weights
from ..layers.apply_plan import apply_plan
from ..layers.model import count_params
from ..penalty import AdaptiveRankPenalty
from ..plan import RankPlan
from ..planning.make_plan import make_plan
from ..processes import Processes
from ..refinement import refine
from ..schemes import Factors
from .checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_tensors, writing
from .config import TrainConfig
from .data.excerpts import calibration_counts, calibration_images, refinement_images
from .evaluate import Scores, evaluate
from .inputs import load_data_and_model, load_teacher
from .loop import train
from .machine import affordable, make_accelerator
from .optimizer import check_optimizer
from .phases import Phase, Run, check_schedule
from .preemption import Preempted, Sigterm
from .processes import shared_factors, shared_plan
from .results import all_numbers, publish, save
from .resume import check_found, check_settings, fixed_settings
from .run_folder import DENSE, REFINEMENT, RunFolder, dense_of
from .runlog import RunLog


def run(config: TrainConfig) -> dict[str, Any]:
    """Run all phases and save the finished model in ``config.output``.

    Args:
        config: The settings.

    Returns:
        All numbers of the run, as ``metrics.json`` beside the model holds them.

    Raises:
        ArpHubError: If the settings, the data, the weights or the folders do not fit, or if another run writes to the
            same folders: before any training.
        Preempted: On SIGTERM. During training the state is saved first; at other times the last checkpoint is complete.
    """
    sigterm = Sigterm()
    with sigterm.listening():
        check_optimizer(config)
        accelerator = make_accelerator(config)
        folder = RunFolder(config, accelerator)
        try:
            with folder.locked():
                return _run(config, accelerator, folder, sigterm)
        except Preempted:
            accelerator.end_training()  # threads of the process group must end before Python does
            raise


def _run(config: TrainConfig, accelerator: Accelerator, folder: RunFolder, sigterm: Sigterm) -> dict[str, Any]:
    """The story, inside the locked folder: check everything, train, save, publish."""
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    with processes.agreed():
        found = find_checkpoint(config.resume, folder.checkpoints)
    check_found(found, config.resume, processes)
    with processes.agreed():  # the main process must not change the folder while others check it
        start = load_checkpoint(found) if found else None
        folder.check(start)
    data, model = load_data_and_model(config)
    teacher = load_teacher(config, data, model)
    config = affordable(config, accelerator, data)
    check_schedule(config, data)
    settings = fixed_settings(config, accelerator, data)
    if start and found:
        check_settings(start, settings, found)
    folder.begin(config, start)
    log = RunLog(accelerator, config, (start.phase, start.step) if start else None)
    this = Run(config, accelerator, data, log, settings, sigterm)
    if start:
        this.scores, this.plan, this.began = dict(start.scores), start.plan, this.began - start.seconds
        log.note("resumed from '%s'", found)
    dense = _dense_model(this, model, start)
    compressed, plan = _compressed_model(this, dense, teacher or dense, start)
    metrics = save(this, dense, compressed, all_numbers(this, plan))
    if accelerator.is_main_process:
        (config.run_folder / REFINEMENT).unlink(missing_ok=True)
    accelerator.end_training()
    publish(this)
    return metrics


def _dense_model(run: Run, model: nn.Module, start: Checkpoint | None) -> nn.Module:
    """The dense model, trained if the settings ask for it, measured, and stored in the run's folder for resuming."""
    config, kept = run.config, run.config.run_folder / DENSE
    model.to(run.accelerator.device)
    if start and start.phase != "dense":
        source = dense_of(start)
        load_weights(model, source)
        if source != kept:
            _keep_dense(run, model, kept)
        return model.eval()
    if config.dense_epochs:
        _check_budget(run, model)
        if start:
            start.load_into(model, "model")
        phase = Phase("dense", model, config.dense_epochs, config.rates()["dense_lr"])
        model = train(run, phase, start)
    model.eval()
    run.scores["dense"] = _score(run, model, "dense model")
    _keep_dense(run, model, kept)
    return model


def _keep_dense(run: Run, model: nn.Module, path: Path) -> None:
    """Store the dense model in the run's folder, for resuming."""
    if run.accelerator.is_main_process:
        with writing(path):
            save_tensors(path, model.state_dict())


def _compressed_model(
    run: Run, dense: nn.Module, teacher: nn.Module, start: Checkpoint | None
) -> tuple[nn.Module, RankPlan]:
    """Compress a copy of the dense model, then fine-tune its factors if the settings ask for it."""
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
        rate = config.rates()["finetune_lr"]
        phase = Phase("finetune", model, config.finetune_epochs, rate, guide, frozen_norms=config.freeze_norms)
        model = train(run, phase, start if start and start.phase == "finetune" else None)
        run.scores["finetuned"] = _score(run, model, "fine-tuned model")
    return model.eval(), plan


def _penalised_model(
    run: Run, dense: nn.Module, teacher: nn.Module | None, start: Checkpoint | None
) -> tuple[nn.Module, RankPlan]:
    """Train a copy of the dense model with the penalty, then decompose it, which changes nothing after the hold."""
    config = run.config
    model = copy.deepcopy(dense).requires_grad_(True)
    factors = None
    if start:
        plan = RankPlan.from_dict(start.plan)
        if config.start_from == "fit":  # the fit has made plain convolutions of weight-standardised ones
            to_dense(apply_plan(model, plan))
        start.load_into(model, "model")
    else:
        plan, factors = _plan_and_fit(run, model)
        if not config.epochs:
            return model, plan
        to_dense(model)
    penalty = AdaptiveRankPenalty(
        model, plan, total_steps=run.total_steps(config.epochs), ramp=config.ramp, factors=factors
    )
    if start:
        start.load_into(penalty, "penalty")
    phase = Phase("compress", model, config.epochs, config.lr, teacher, penalty, config.freeze_norms)
    model = train(run, phase, start)
    if config.ema_decay:  # an average of low-rank weights is only nearly low-rank: project it
        penalty = AdaptiveRankPenalty(model, plan, total_steps=1, ramp=0, factors=penalty.factors())
        penalty.step()
    run.scores["before_decomposition"] = _score(run, model, "before decomposition")
    decompose(model, plan, factors=penalty.factors())
    run.scores["decomposed"] = _score(run, model, "decomposed")
    return model, plan


def _plan_and_fit(run: Run, model: nn.Module) -> tuple[RankPlan, dict[str, Factors] | None]:
    """Make the plan. With ``start_from="fit"``, also decompose the model by it, in place, and return the factors."""
    config, show = run.config, run.log.main and sys.stderr.isatty()
    images, counts = _calibration(run)
    plan = make_plan(model, calibration=images, effort=config.effort, progress=show, **_budget(config))
    plan = shared_plan(run.accelerator, plan)
    run.plan = plan.to_dict()
    run.log.note("plan: %d layers are decomposed, %d stay dense", len(plan.layers), len(plan.dense))
    if config.start_from == "dense":
        return plan, None
    dense = copy.deepcopy(model)
    decompose(model, plan, calibration=images, effort=config.effort, progress=show)
    run.scores["fit"] = {**_score(run, model, "data-aware fit, untrained"), **counts}
    if config.refine_minutes or config.refine_steps:
        _refine(run, model, dense, show)
    return plan, shared_factors(run.accelerator, model)


def _refine(run: Run, model: nn.Module, dense: nn.Module, progress: bool) -> None:
    """Refine the fit on unlabelled images; a stopped run goes on from the state in its folder."""
    config = run.config
    images, held_out = refinement_images(run.data, config.refine_images, seed=config.seed, workers=config.workers)
    steps = min((limit for limit in (config.max_steps, config.refine_steps) if limit), default=0)
    bound: dict[str, Any] = {"steps": steps} if steps else {"minutes": config.refine_minutes}
    state = config.run_folder / REFINEMENT
    bound |= {"seed": config.seed, "state": state, "keep_state": True, "progress": progress}
    done = refine(model, dense, images, held_out=held_out, **bound)
    # with the scores, because checkpoints hold these
    run.scores["refined"] = {**_score(run, model, "refined on unlabelled images"), "refinement": asdict(done)}


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


def _calibration(run: Run) -> tuple[Tensor | None, dict[str, int]]:
    """The calibration images and their numbers; None and nothing for a plan and fit by weights alone."""
    config = run.config
    count = config.calibration_images
    if count == 0:
        return None, {}
    if config.max_steps:
        trial = config.max_steps * 4  # a trial run takes four calibration images a step
        count = trial if count is None else min(count, trial)
    limits: dict[str, Any] = {"copies": config.calibration_copies, "most": Effort.of(config.effort).images}
    used, copies = calibration_counts(run.data, count, **limits)
    images = calibration_images(run.data, count, **limits, seed=config.seed, workers=config.workers)
    return images, {"calibration_images": used, "calibration_copies": copies}


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
