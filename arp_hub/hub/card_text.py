"""The tables and sentences of the model card, from ``metrics.json`` and the plan. Missing numbers are left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .card_names import data_name, inline, model_name

_ROWS = {
    "params": ("parameters", lambda n: f"{n:,d}"),
    "macs": ("multiply-accumulates", lambda n: f"{n:,d}"),
    "bytes": ("weights", lambda n: f"{n / 1e6:,.2f} MB"),
    "top1": ("top-1, %", lambda n: f"{n:.2f}"),
    "top5": ("top-5, %", lambda n: f"{n:.2f}"),
    "loss": ("cross-entropy, nats", lambda n: f"{n:.4f}"),
}
_STAGES = {
    "dense": "dense",
    "fit": "decomposed without training",
    "refined": "refined without labels",
    "before_decomposition": "after penalty training, before decomposition",
    "decomposed": "decomposed",
    "finetuned": "after fine-tuning the factors",
}
_SETTINGS = {
    "optimizer": "optimiser {}",
    "lr": "learning rate {}",
    "batch_size": "batch size {}",
    "weight_decay": "weight decay {:g}",
    "schedule": "{} schedule",
    "mixed_precision": "mixed precision {}",
}
_NOISE = 0.03
"""Difference of a latency from the dense model's, as a share, that is not called faster or slower: it is noise."""


def summary(metrics: Mapping[str, Any]) -> str:
    """The end of the first sentence: the savings, and the accuracy."""
    dense, text = metrics.get("dense", {}), ""
    if "params" in dense:
        text = f"compressed to {_percent(metrics['params'], dense['params'])} of its parameters"
    if "macs" in dense and "macs" in metrics:
        text += f" and {_percent(metrics['macs'], dense['macs'])} of its multiply-accumulates"
    return f"{text} by low-rank decomposition" if text else "in low-rank form"


def accuracy(metrics: Mapping[str, Any]) -> str:
    """One sentence: the accuracy, the data, and the dense model's accuracy. Empty if none was measured."""
    if "top1" not in metrics:
        return ""
    dense = metrics.get("dense", {})
    where = f" on {found}" if (found := _data(metrics)) else ""
    before = f"; the dense model reaches {dense['top1']:.2f} %" if "top1" in dense else ""
    return f"Top-1 accuracy is {metrics['top1']:.2f} %{where}{before}."


def numbers(metrics: Mapping[str, Any], decomposed: bool, exported: Mapping[str, Any]) -> str:
    """A table that compares the compressed model with the dense one.

    Args:
        metrics: ``metrics.json``.
        decomposed: Whether the model is decomposed.
        exported: Size and accuracy of an exported int8 model, as `card_exports.int8` finds them; may be empty.
    """
    dense, rows = metrics.get("dense", {}), []
    for key, (label, form) in _ROWS.items():
        if key in metrics:
            before = dense.get(key)
            share = _percent(metrics[key], before) if before and key in ("params", "macs", "bytes") else ""
            small = form(exported[key]) if key in exported else ""
            rows.append([label, "" if before is None else form(before), form(metrics[key]), share, small])
    for timing in _timings(metrics):
        label = f"latency, batch {timing['batch_size']}, ms"
        rows.append([label, *(f"{ms:.2f}" for ms in _medians(timing)), f"{_share_of_time(timing)} %", ""])
    if not decomposed:
        return _table(("", "this model"), [(label, value) for label, _, value, *_ in rows])
    head = ("", "dense", "compressed", "of dense", "compressed, int8")
    columns = len(head) if exported else len(head) - 1
    return _table(head[:columns], [row[:columns] for row in rows])


def notes(metrics: Mapping[str, Any]) -> str:
    """How the numbers of the table were measured."""
    size = " x ".join(str(side) for side in metrics["input_size"])
    parts = [f"Multiply-accumulates are counted for one image of {size}."]
    if "top1" in metrics and metrics.get("images"):
        where = f" of {found}" if (found := _data(metrics)) else ""
        parts.append(f"Accuracy is measured on {metrics['images']:,d} images{where}.")
    if timings := _timings(metrics):
        places = dict.fromkeys(_place(timing) for timing in timings)
        parts.append(f"Latency is the median of runs that alternate between the two models, on {'; '.join(places)}.")
    return " ".join(parts)


def stages(metrics: Mapping[str, Any]) -> str:
    """The accuracy after each stage of a run."""
    scores = metrics.get("scores", {})
    rows = [
        (label, f"{scores[stage]['top1']:.2f}", f"{scores[stage]['top5']:.2f}", f"{scores[stage]['loss']:.4f}")
        for stage, label in _STAGES.items()
        if stage in scores
    ]
    return _table(("", "top-1, %", "top-5, %", "cross-entropy, nats"), rows) if rows else ""


def schemes(plan: Mapping[str, Any]) -> str:
    """For every scheme: the number of its layers, and their ranks."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for layer in plan["layers"].values():
        ranks[layer["scheme"]].append(layer["rank"])
    rows = []
    for scheme, found in ranks.items():
        low, high = min(found), max(found)
        rows.append((f"`{scheme}`", str(len(found)), str(low) if low == high else f"{low} to {high}"))
    return _table(("scheme", "layers", "ranks"), rows)


def decomposed_layers(metrics: Mapping[str, Any]) -> str:
    """Every decomposed layer with its scheme, rank and sizes."""
    rows = []
    for layer in metrics.get("layers", ()):
        if layer["scheme"]:
            groups = f" in {layer['groups']} groups" if layer["groups"] > 1 else ""
            share = f"{100 * layer['params_after'] / layer['params']:.0f} %"
            sizes = (f"{layer['params']:,d}", f"{layer['params_after']:,d}", share)
            rows.append(
                (f"`{layer['name']}`", f"{layer['shape']}, {layer['scheme']}{groups}", str(layer["rank"]), *sizes)
            )
    return _table(("layer", "shape and scheme", "rank", "parameters", "after", "kept"), rows) if rows else ""


def dense_layers(metrics: Mapping[str, Any]) -> str:
    """The layers that stay dense, by reason."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for layer in metrics.get("layers", ()):
        if not layer["scheme"]:
            found[layer["reason"]].append(layer)
    rows = [
        (inline(reason), _some([f"`{layer['name']}`" for layer in layers]), str(len(layers)), f"{_sum(layers):,d}")
        for reason, layers in found.items()
    ]
    return _table(("reason", "layers", "count", "parameters"), rows) if rows else ""


def facts(metrics: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """How the numbers came about, as pairs of label and value."""
    if where := _data(metrics):
        yield "measured on", where
    if count := metrics.get("calibration_images"):
        copies = metrics.get("calibration_copies")
        more = f", each with {copies} augmented cop{'y' if copies == 1 else 'ies'}" if copies else ""
        yield "calibration images", f"{count:,d} without labels{more}"
    if (runs := metrics.get("runs")) is not None:
        yield "training runs", inline(runs)
    if metrics.get("seed") is not None:
        yield "seed", inline(metrics["seed"])
    if metrics.get("seconds") is not None:
        yield "duration", _duration(metrics["seconds"])
    if (processes := metrics.get("processes")) and processes != 1:
        yield "processes", inline(processes)
    for key in ("hardware", "versions"):
        if found := metrics.get(key):
            words = ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, Mapping) else found
            yield key, inline(words)


def recipe(metrics: Mapping[str, Any]) -> str:
    """How the weights were made, in a few sentences."""
    config, refined = metrics.get("config"), _refined(metrics.get("refinement"))
    count = metrics.get("calibration_images")
    how = f"fitted to each layer's output on {_unlabelled(count)}" if count else "computed from the weights"
    if metrics.get("trained") is False:
        begin = "No labels were used" if refined else "No training"
        return f"{begin}: the factors were {how}.{refined}"
    if not isinstance(config, Mapping):
        return ""
    return f"{_trained(config, how)}{refined} All settings are in `metrics.json`."


def _trained(config: Mapping[str, Any], how: str) -> str:
    """The phases of a recipe's run that took place, with their settings; ``how`` the factors were fitted."""
    parts, learns = [], bool(config.get("epochs") or config.get("finetune_epochs"))
    if epochs := config.get("dense_epochs"):
        parts.append(f"The dense model was trained for {_epochs(epochs)}.")
    if epochs := config.get("epochs"):
        start = "the fitted model" if config.get("start_from") == "fit" else "the dense model"
        parts.append(f"Trained with the adaptive rank penalty for {_epochs(epochs)}, starting from {start}.")
    elif "epochs" in config:
        parts.append(f"The factors were {how}.")
    if epochs := config.get("finetune_epochs"):
        parts.append(f"The factors were fine-tuned for {_epochs(epochs)}.")
    if learns and config.get("distill"):
        teacher = model_name(str(config["teacher"])) if config.get("teacher") else ""
        parts.append(f"The loss distils from {f'`{teacher}`' if teacher else 'the dense model'}.")
    if learns or config.get("dense_epochs"):
        values = {**config, "lr": _rates(config)}
        shown = [
            form.format(values[key]) for key, form in _SETTINGS.items() if values.get(key) not in (None, "", "no", 0)
        ]
        if shown:
            parts.append(f"Settings: {', '.join(shown)}.")
    return " ".join(parts)


def _rates(config: Mapping[str, Any]) -> str:
    """The learning rate of each phase that took place."""
    rate = config.get("lr") or 0
    phases = {
        "dense training": (config.get("dense_epochs"), config.get("dense_lr") or rate),
        "penalty": (config.get("epochs"), rate),
        "fine-tuning": (config.get("finetune_epochs"), config.get("finetune_lr") or rate / 10),
    }
    rates = {phase: f"{value:g}" for phase, (epochs, value) in phases.items() if epochs and value}
    if len(set(rates.values())) <= 1:
        return next(iter(rates.values()), "")
    return ", ".join(f"{value} ({phase})" for phase, value in rates.items())


def _unlabelled(count: int) -> str:
    return f"{count:,d} unlabelled image{'' if count == 1 else 's'}"


def _epochs(count: Any) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def _refined(refinement: Any) -> str:
    """A sentence on what a refinement did, as `arp_hub.Refinement` has it; empty without one."""
    if not isinstance(refinement, Mapping):
        return ""
    before, after = refinement["before"], refinement["after"]
    where = f"on {refinement['held_out']:,d} other images"
    done = f" The fit was refined on {_unlabelled(refinement['images'])} for {_duration(refinement['seconds'])}"
    if after >= before:
        return f"{done}, but no step brought it closer to the dense model's predictions {where}: the fit is unchanged."
    digits = next((n for n in range(3, 7) if round(before, n) != round(after, n)), 6)
    return (
        f"{done}. The divergence from the dense model's predictions fell from {before:.{digits}f} to "
        f"{after:.{digits}f} nats {where}."
    )


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def limits(metrics: Mapping[str, Any], decomposed: bool) -> list[str]:
    """The limitations of the model, in plain words."""
    dense, found = metrics.get("dense", {}), []
    if metrics.get("merged_from"):
        pass  # its card has the accuracy
    elif "top1" not in metrics:
        found.append("No accuracy was measured: evaluate the model on your data before you rely on it.")
    elif "top1" in dense and (lost := round(dense["top1"], 2) - round(metrics["top1"], 2)) > 0.005:
        found.append(f"It is {lost:.2f} points of top-1 less accurate than the dense model on the images measured.")
    if metrics.get("random_weights"):
        found.append("The dense model had random weights: the numbers show sizes and timings, not a useful accuracy.")
    if metrics.get("random_classifier"):
        found.append("Its classifier has random weights: train it before you rely on the classes.")
    config = metrics.get("config")
    if isinstance(config, Mapping) and (steps := config.get("max_steps")):
        found.append(f"It comes from a trial run of at most {steps} steps in each phase.")
    phases = config if isinstance(config, Mapping) else {}
    if metrics.get("shared_images") and any(phases.get(f"{name}epochs") for name in ("dense_", "", "finetune_")):
        found.append(
            "The data has only one split: the model was trained and tested on the same images. Both accuracies are too "
            "high. Compare them with each other, not with those of other models."
        )
    elif metrics.get("shared_images"):
        found.append(
            "The data has only one split: calibration used some of the test images, without their labels. Both "
            "accuracies may therefore be too high. Compare them with each other, not with those of other models."
        )
    if decomposed:
        found += _speed(metrics)
    found.append(
        "It recognises only the classes of its training data, and inherits the weaknesses and biases of its dense form."
    )
    return found


def _speed(metrics: Mapping[str, Any]) -> list[str]:
    timings = _timings(metrics)
    if not timings:
        return [
            "Its latency was not measured. Fewer parameters do not always mean a lower latency: a chain of small "
            "layers can be slower than one large layer, especially for single images on a GPU. Measure it on your "
            "device."
        ]
    found = []
    for timing in timings:
        share, where = _share_of_time(timing), f"on {_place(timing)} at batch {timing['batch_size']}"
        if share > 100 * (1 + _NOISE):
            found.append(f"Slower than the dense model {where}: it takes {share} % of the dense model's time.")
        elif share > 100 * (1 - _NOISE):
            found.append(f"As fast as the dense model {where}, within the noise: it takes {share} % of the time.")
    return [*found, "Latency differs on other devices, batch sizes and precisions: measure it on yours."]


def _medians(timing: Mapping[str, Any]) -> tuple[float, float]:
    """Median latency of the dense and the compressed model in milliseconds."""
    return timing["dense_latency_ms"]["median"], timing["latency_ms"]["median"]


def _share_of_time(timing: Mapping[str, Any]) -> int:
    """Time of the compressed model in per cent of the dense model's, of the medians that the card shows."""
    before, after = _medians(timing)
    return round(100 * after / before)


def _timings(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The measurements that compare with the dense form, as `Benchmark.to_dict` gives them."""
    return [timing for timing in metrics.get("latency", ()) if "ratio" in timing]


def _place(timing: Mapping[str, Any]) -> str:
    """The device and settings of a measurement."""
    threads = f"{timing['threads']} thread{'s' if timing['threads'] > 1 else ''}" if timing["device"] == "cpu" else ""
    layout = "channels last" if timing.get("channels_last") else ""
    compiled = "compiled" if timing.get("compiled") else ""
    where = timing.get("hardware") or timing["device"]
    in_torch = timing.get("runtime", "torch") == "torch"
    numbers = timing["dtype"] if in_torch else f"{timing['runtime']}, {timing['precision']}"
    return ", ".join(filter(None, (where, threads, numbers, layout, compiled)))


def _data(metrics: Mapping[str, Any]) -> str:
    """The data that accuracy was measured on: ``CIFAR-10, test split``."""
    name, split = inline(data_name(metrics)), metrics.get("split")
    return f"{name}, {inline(split)} split" if name and split else name


def _percent(after: float, before: float) -> str:
    return f"{100 * after / before:.1f} %"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    rows = list(rows)
    numeric = [index > 0 and all(_is_number(row[index]) for row in rows) for index in range(len(head))]
    ruler = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[\d.,]*( to \d+)?( %| MB)?", text) is not None


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _sum(layers: Iterable[Mapping[str, Any]]) -> int:
    return sum(layer["params"] for layer in layers)
