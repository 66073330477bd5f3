"""The training loop of one phase: steps over epochs, with penalty, distillation, averaging, checkpoints and log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..errors import ArpHubError
from .checkpoint import Checkpoint, newest_whole, save_checkpoint
from .compiling import compiling
from .data.batches import training_batches
from .evaluate import evaluate
from .finite import fetched, first_not_finite, weights_not_finite
from .fsdp import Shards, fsdp_plugin, gathered_state, shard_optimizer_state, share_buffers
from .graphs import Forward, recorded_inference, recorded_training
from .losses import Loss
from .optimizer import clipped_parameters, group_values, highest_rate, make_optimizer, make_schedule, restore_optimizer
from .optimizer_state import check_optimizer_state
from .phases import Phase, Run
from .preemption import Preempted
from .seeds import seed_everything
from .sync_norms import SynchronisedNorms


def train(run: Run, phase: Phase, start: Checkpoint | None = None) -> nn.Module:
    """Train a phase to its end.

    Args:
        run: The run.
        phase: What to train, in place. FSDP2 leaves the phase's own model sharded.
        start: A checkpoint of this phase to resume from. The model and the penalty have its state already.

    Returns:
        The trained model with whole weights, or its moving average if the config asks for one.

    Raises:
        ArpHubError: If the loss or a weight becomes NaN or infinite, naming step, layer and last checkpoint, or if a
            checkpoint cannot be written.
        Preempted: On SIGTERM, after the state is saved.
    """
    return _Loop(run, phase, start).run_to_end()


@contextmanager
def _as_saved(model: nn.Module) -> Iterator[None]:
    """Let a model compute in its own precision, in which it is saved and tested, without Accelerate's autocast."""
    own = vars(model).get("forward") if "_original_forward" in vars(model) else None
    if own is not None:
        del model.forward
    try:
        yield
    finally:
        if own is not None:
            model.forward = own


class _Loop:
    """The training loop of one phase."""

    def __init__(self, run: Run, phase: Phase, start: Checkpoint | None) -> None:
        config, accelerator = run.config, run.accelerator
        self.run, self.phase, self.config, self.accelerator = run, phase, config, accelerator
        self.total = run.total_steps(phase.epochs)
        self.steps_before = run.steps_before(phase.name)
        self.step = start.step if start else 0
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = phase.model.to(accelerator.device).to(memory_format=layout).train()
        if phase.teacher:
            phase.teacher.to(memory_format=layout)
        self.layout = layout
        if phase.frozen_norms:
            _freeze_statistics(self.model)
        plugin = fsdp_plugin(accelerator)
        average = partial(ModelEmaV3, decay=config.ema_decay, use_warmup=config.model_ema_warmup, foreach=not plugin)
        self.ema = average(self.model) if config.ema_decay else None
        if self.ema and start:
            start.load_into(self.ema.module, "ema")
        self.shards = Shards(self.model, plugin, accelerator) if plugin else None
        if self.ema and self.shards:
            self.shards.shard(self.ema.module)
        self.norms = SynchronisedNorms(self.model) if config.sync_bn else None
        optimizer = make_optimizer(self.model, config, phase.lr)
        self.schedule = make_schedule(optimizer, config, self.total, run.steps_per_epoch)
        self.schedule.step_update(self.step)
        self.raw_optimizer = optimizer
        self.totals = torch.zeros(3, device=accelerator.device)  # of the epoch: summed loss, hits, images
        if start:
            self.restore(start)
        if self.shards:  # only with evaluation_mode does Accelerate leave a sharded model as it is
            self.wrapped = accelerator.prepare_model(self.model, evaluation_mode=True)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.forward: Forward = self.wrapped
        if config.torchcompile:
            self.forward = torch.compile(self.wrapped, backend=config.torchcompile)
        self.guide: Forward | None = self.teach if phase.teacher and config.distill else None
        self.recorded = not config.cuda_graphs
        self.criterion = Loss(config, run.data.num_classes)
        self.clipped = clipped_parameters(self.model, config)
        self.checkpoints = config.run_folder / "checkpoints"
        self.listen_every = 1 if accelerator.num_processes == 1 else 10  # steps between exchanges about SIGTERM

    def restore(self, start: Checkpoint) -> None:
        """Restore the optimiser, the loss scale and the totals that `save` writes."""
        state = start.state
        whole = self.shards.skeleton if self.shards else self.model
        check_optimizer_state(start, whole, lambda model: make_optimizer(model, self.config, self.phase.lr))
        restore_optimizer(self.raw_optimizer, state["optimizer"], state.get("groups"))
        if self.shards:
            shard_optimizer_state(self.raw_optimizer)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if "totals" in state:  # a row for each process
            rows = state["totals"].view(-1, 3)
            if self.accelerator.process_index < len(rows):
                self.totals += rows[self.accelerator.process_index].to(self.accelerator.device)

    def run_to_end(self) -> nn.Module:
        """Train all epochs that are left, and return the result with whole weights."""
        spe = self.run.steps_per_epoch
        bar = self.run.log.bar(self.phase.name, self.total, self.step)
        if self.step == 0:
            self.save()
        try:
            with self.run.sigterm.noted():
                while self.step < self.total:
                    epoch = self.step // spe
                    self.epoch(epoch, min((epoch + 1) * spe, self.total), bar)
        finally:
            bar.close()
            self.release()
        return self.whole(self.ema.module if self.ema else self.model)

    def whole(self, model: nn.Module) -> nn.Module:
        """The model, or a copy with whole weights if it is sharded."""
        return self.shards.whole(model).train(model.training) if self.shards else model

    def release(self) -> None:
        """Free what Accelerate prepared, including gradients and process group, while this object still exists."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        # left by Accelerate: the next phase would be taken for prepared, and not get mixed precision
        vars(self.model).pop("_is_accelerate_prepared", None)
        if self.norms:
            self.norms.put_back()
        del self.wrapped, self.forward, self.optimizer
        self.accelerator.free_memory()

    def epoch(self, epoch: int, end: int, bar: Any) -> None:
        """Train up to step ``end``, then log the epoch and save a checkpoint."""
        began = time.perf_counter()
        self.criterion.begin_epoch(epoch)
        every = self.config.checkpoint_every
        steps = range(self.step, end)
        micro = training_batches(self.run.data.train, self.config, self.accelerator, self.phase.name, steps)
        while self.step < end:
            lr = highest_rate(self.raw_optimizer)
            loss = self.one_step(micro)
            self.step += 1
            bar.update()
            if self.step % self.config.log_every == 0 or self.step == end:
                self.report(loss, lr, bar)
            stop = self.step % self.listen_every == 0 and self.run.sigterm.heard_by_any(self.accelerator)
            if self.step < end and (stop or (every and self.step % every == 0)):
                self.save()
            if stop and self.step < end:
                raise self.preempted()
        self.share_statistics()
        self.close_epoch(epoch, lr, time.perf_counter() - began)
        self.totals.zero_()
        self.save()
        if self.run.sigterm.heard_by_any(self.accelerator):
            raise self.preempted()

    def preempted(self) -> Preempted:
        """The exception that ends the run on SIGTERM, after its state is saved."""
        return Preempted(
            f"stopped by SIGTERM at step {self.step} of phase '{self.phase.name}', which is saved: "
            "continue with --resume auto"
        )

    def share_statistics(self) -> None:
        """Average BatchNorm statistics over processes, so that all evaluate the same model."""
        processes = self.accelerator.num_processes
        if processes > 1:
            distribute_bn(self.model, processes, reduce=True)
            if self.ema:  # take those of the main process, which checkpoints hold
                distribute_bn(self.ema.module, processes, reduce=False)

    def one_step(self, micro: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One optimiser step on this process's share of a global batch, with schedule, penalty and moving average."""
        accelerator, config = self.accelerator, self.config
        losses = []
        if self.shards:
            share_buffers(accelerator, self.model)
        for part in range(config.accumulation):
            images, labels = next(micro)
            images = images.contiguous(memory_format=self.layout)
            if not self.recorded:
                self.record(images)
            seed_everything(config.seed, self.phase.name, self.step, part, accelerator.process_index)
            with accelerator.accumulate(self.wrapped), compiling(config.torchcompile):
                loss = self.loss(images, labels)
                number = fetched(loss)
                accelerator.backward(loss)
                self.check_loss(number(), images)  # before the step changes the weights
                if accelerator.sync_gradients and config.clip_grad:
                    accelerator.unscale_gradients()
                    dispatch_clip_grad(self.clipped, config.clip_grad, mode=config.clip_mode)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        self.schedule.step_update(self.step + 1)
        if self.phase.penalty:
            self.phase.penalty.step()
        if self.ema:
            self.ema.update(self.model, self.step)
        return torch.stack(losses).mean()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of the labels, blended with distillation if there is a teacher."""
        images, target = self.criterion.mixed(images, labels)
        logits = self.forward(images).float()
        loss = self.criterion.of_targets(logits, target)
        hits = (logits.argmax(1) == labels).sum()
        self.totals += torch.stack([loss.detach() * len(labels), hits, hits.new_full((), len(labels))])
        return loss if self.guide is None else self.criterion.distilled(loss, logits, self.guide(images))

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The teacher's logits."""
        with self.accelerator.autocast():
            return cast(nn.Module, self.phase.teacher)(images).float()

    def record(self, images: Tensor) -> None:
        """Record forward, backward and teacher passes as CUDA graphs, which all later steps replay."""
        self.forward = recorded_training(self.wrapped, images)
        self.guide = recorded_inference(self.guide, images) if self.guide else None
        self.recorded = True

    def report(self, loss: Tensor, lr: float, bar: Any) -> None:
        """Show the numbers of this step in the progress bar and the tracker."""
        self.check_weights()
        top1 = (100 * self.totals[1] / self.totals[2]).item()
        values = {"loss": loss.item(), "top1": top1, "lr": lr}
        if self.phase.penalty:
            values["violation"] = _mean(self.phase.penalty.violations())
        bar.set_postfix({name: f"{number:.3g}" for name, number in values.items()})
        self.run.log.track(self.phase.name, self.steps_before + self.step, values)

    def check_loss(self, loss: float, images: Tensor) -> None:
        """Stop if the loss is NaN or infinite. With sharded weights, all processes look for the layer together."""
        bad = [] if math.isfinite(loss) else [f"the loss is {loss}"]
        if self.shards:
            bad = gather_object(bad)
        if not bad:
            return
        if self.norms and not self.shards:
            self.norms.put_back()  # other processes do not take part
        with self.accelerator.autocast():
            where = first_not_finite(self.model, images)
        raise self.diverged(bad[0], self.step + 1, where)

    def check_weights(self) -> None:
        """Stop if a step has made a weight NaN or infinite."""
        if where := weights_not_finite(self.model):
            raise self.diverged("weights are NaN or infinite", self.step, where)

    def diverged(self, what: str, step: int, where: str) -> ArpHubError:
        """The error for a loss or weight that is NaN or infinite."""
        last, _ = newest_whole(self.checkpoints)
        good = f"The last good checkpoint is '{last}'" if last else f"No checkpoint in '{self.checkpoints}' is whole"
        return ArpHubError(
            f"{what} at step {step} of phase '{self.phase.name}': {where}. {good}. Start a new run with a lower lr "
            f"(now {highest_rate(self.raw_optimizer):.4g}), clip_grad=5 or mixed_precision=no"
        )

    def close_epoch(self, epoch: int, lr: float, seconds: float) -> None:
        """Collect an epoch's numbers from all processes and log them."""
        loss, hits, count = self.accelerator.reduce(self.totals, "sum").tolist()
        entry: dict[str, Any] = {
            "phase": self.phase.name,
            "epoch": epoch + 1,
            "epochs": math.ceil(self.total / self.run.steps_per_epoch),
            "step": self.step,
            "loss": loss / count,
            "top1": 100 * hits / count,
            "lr": lr,
            "seconds": seconds,
        }
        if self.phase.penalty:
            violations = self.phase.penalty.violations()
            entry |= {"stage": self.phase.penalty.phase, "violation": _mean(violations), "violations": violations}
        if self.run.data.val is not None:
            judged = self.whole(self.ema.module if self.ema else self.model)
            if self.phase.penalty and self.phase.penalty.phase != "ramp":
                judged = self.phase.penalty.low_rank_copy(judged)  # the model that decomposing now would give
            with _as_saved(judged):
                entry["val"] = evaluate(
                    judged, self.run.data.val, workers=self.config.workers, accelerator=self.accelerator
                )
            self.run.log.track(self.phase.name, self.steps_before + self.step, {"val_top1": entry["val"]["top1"]})
        self.run.log.epoch(entry)

    def save(self) -> None:
        """Write a checkpoint on the main process while the others wait, unless a weight is NaN or infinite."""
        self.check_weights()
        totals = self.accelerator.gather(self.totals[None])
        first = self.accelerator.is_main_process
        large = {
            "model": self.model.state_dict(),
            "optimizer": self.raw_optimizer.state_dict()["state"],
            "ema": self.ema.module.state_dict() if self.ema else None,
        }
        if self.shards:
            large = gathered_state(large, keep=first)
        if first:
            penalty, scaler = self.phase.penalty, self.accelerator.scaler
            state = {
                **large,
                "groups": group_values(self.raw_optimizer),
                "penalty": penalty.state_dict() if penalty else None,
                "scaler": scaler.state_dict() if scaler else None,
                "totals": totals,
            }
            run = self.run
            checkpoint = Checkpoint(self.phase.name, self.step, run.settings, run.scores, run.plan, run.seconds, state)
            folder = self.checkpoints
            try:
                save_checkpoint(folder, checkpoint, self.config.keep_checkpoints)
            except (OSError, SafetensorError) as error:
                last, _ = newest_whole(folder)
                whole = f"The last whole one is '{last}'" if last else "No earlier one is whole"
                raise ArpHubError(
                    f"cannot write a checkpoint in '{folder}': {error}. {whole}. Free disk space or allow writing, "
                    "then continue with --resume auto"
                ) from error
        self.accelerator.wait_for_everyone()


def _freeze_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()


def _mean(violations: Mapping[str, float]) -> float:
    return sum(violations.values()) / max(1, len(violations))
