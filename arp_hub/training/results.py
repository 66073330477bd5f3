"""What a finished run leaves behind: the numbers, the saved model, the report and a published copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from .._utils.environment import environment
from .._utils.files import write_atomically
from ..hub.load import change_config, hub_dataset, is_saved_model, published_name
from ..hub.push import push_to_hub
from ..hub.save import METRICS, write_folder
from ..layers.apply_plan import plan_of
from ..plan import RankPlan
from ..reports.run_page import write_report
from ..reports.spectra import decays
from .checkpoint import writing
from .phases import Run
from .runlog import read_log


def all_numbers(run: Run, plan: RankPlan) -> dict[str, Any]:
    """The numbers of a run and where they come from. The scores of the finished model are at the top level."""
    last = next(run.scores[name] for name in ("finetuned", "decomposed", "refined", "fit") if name in run.scores)
    return {
        **environment(),
        **last,
        "dense": run.scores["dense"],
        "scores": run.scores,
        **{key: value for key, value in run.scores.get("fit", {}).items() if key.startswith("calibration_")},
        **({"refinement": refined["refinement"]} if (refined := run.scores.get("refined")) else {}),
        "data": run.config.data,
        "split": run.data.test.name,
        **({"limited": True} if run.config.max_steps and last["images"] != len(run.data.test) else {}),
        **({"bad_images": bad} if (bad := run.data.bad_images(run.accelerator)) else {}),
        "seed": run.config.seed,
        "processes": run.accelerator.num_processes,
        "seconds": round(run.seconds, 1),
        "plan": plan.to_dict(),
        "config": run.config.to_dict(),
    }


def save(run: Run, dense: nn.Module, model: nn.Module, metrics: dict[str, Any]) -> dict[str, Any]:
    """Save the model and the report on the main process.

    Args:
        run: The run.
        dense: The dense model that the run started from.
        model: The compressed model.
        metrics: The numbers so far.

    Returns:
        The numbers with sizes, spectra and training history, as ``metrics.json`` holds them, and the settings.
    """
    config, output, names = run.config, run.config.output, run.data.class_names
    if run.accelerator.is_main_process:
        published = config.pretrained or is_saved_model(config.model)
        metrics = {
            **metrics,
            "base_model": published_name(config.model, dense) if published and not config.checkpoint else None,
            "dataset": hub_dataset(config.data),
            "shared_images": run.data.shares_images,
            "spectra": decays(dense, plan_of(model)),
            "history": [entry for entry in read_log(run.log.path) if "violation" in entry],
        }
        if config.checkpoint or not published:  # the licence of weights that are not in this model
            change_config(model, {"license": None})
        label_names = names if len(names) == model.num_classes else None
        # what was put into the folder since the run began stays
        write_folder(model, Path(output), metrics=metrics, label_names=label_names, keep=not config.overwrite)
        text = (Path(output) / METRICS).read_text(encoding="utf-8")
        with writing(config.run_folder):
            write_atomically(config.run_folder / METRICS, text)
            write_report(config.run_folder)
        metrics = json.loads(text) | {"config": config.to_dict()}  # with whole paths, which the file leaves out
    run.accelerator.wait_for_everyone()
    run.log.note("saved in '%s': timm.create_model('local-dir:%s', pretrained=True) loads it", output, output)
    return metrics


def publish(run: Run) -> None:
    """Push the saved model from the main process, if the settings ask for it."""
    if run.config.push_to_hub and run.accelerator.is_main_process:
        done = push_to_hub(run.config.output, run.config.push_to_hub, private=run.config.hub_private or None)
        run.log.note("published: %s", done.url)
