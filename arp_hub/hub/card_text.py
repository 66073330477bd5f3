"""The tables and sentences of the model card, from ``metrics.json`` and the plan. Missing numbers are left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_ROWS = {
    "params": ("parameters", lambda n: f"{n:,d}"),
    "macs": ("multiply-accumulates", lambda n: f"{n:,d}"),
    "bytes": ("weights file", lambda n: f"{n / 1e6:,.2f} MB"),
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
_FACTS = {
    "data": "data",
    "split": "split for the accuracy",
    "images": "images in the accuracy measurement",
    "calibration_images": "unlabelled calibration images",
    "calibration_copies": "augmented copies of each calibration image",
    "seed": "seed",
    "seconds": "seconds",
    "processes": "processes",
}
_RECIPE = tuple(
    "epochs ramp start_from finetune_epochs dense_epochs optimizer lr batch_size weight_decay schedule distill "
    "teacher mixed_precision".split()
)
_FASTER = 0.97
"""Share of the dense model's time up to which a model is called faster: timings are that uncertain."""


def summary(metrics: Mapping[str, Any]) -> str:
    """One line: the savings in size and compute, and the accuracy."""
    dense, parts = metrics.get("dense", {}), []
    if "params" in dense:
        share = 100 * metrics["params"] / dense["params"]
        parts.append(f"{metrics['params']:,d} parameters instead of {dense['params']:,d} ({share:.1f} %)")
    if "macs" in dense and "macs" in metrics:
        parts.append(f"{100 * metrics['macs'] / dense['macs']:.1f} % of the multiply-accumulates")
    if "top1" in metrics:
        before = f" instead of {dense['top1']:.2f} %" if "top1" in dense else ""
        parts.append(f"top-1 {metrics['top1']:.2f} %{before}")
    return ", ".join(parts)


def numbers(metrics: Mapping[str, Any], decomposed: bool) -> str:
    """A table that compares the decomposed model with the dense one."""
    dense, rows = metrics.get("dense", {}), []
    for key, (label, form) in _ROWS.items():
        if key in metrics:
            before = dense.get(key)
            share = f"{100 * metrics[key] / before:.1f} %" if before and key in ("params", "macs", "bytes") else ""
            rows.append((label, "" if before is None else form(before), form(metrics[key]), share))
    for timing in _timings(metrics):
        before, after = timing["dense_latency_ms"]["median"], timing["latency_ms"]["median"]
        label = f"latency, batch {timing['batch_size']}, ms"
        rows.append((label, f"{before:.2f}", f"{after:.2f}", f"{100 * timing['ratio']['median']:.0f} %"))
    if not decomposed:
        return _table(("", "this model"), [(label, value) for label, _, value, _ in rows])
    return _table(("", "dense", "this model", "of dense"), rows)


def notes(metrics: Mapping[str, Any]) -> str:
    """How the numbers of the table were measured."""
    size = " x ".join(str(side) for side in metrics["input_size"])
    parts = [f"Multiply-accumulates are counted for one image of {size}."]
    if "top1" in metrics and metrics.get("images"):
        where = f" of `{metrics['data']}`" if metrics.get("data") else ""
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
        (_inline(reason), _some([f"`{layer['name']}`" for layer in layers]), str(len(layers)), f"{_sum(layers):,d}")
        for reason, layers in found.items()
    ]
    return _table(("reason", "layers", "count", "parameters"), rows) if rows else ""


def facts(metrics: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """How the numbers were measured, as pairs of label and value."""
    for key, label in _FACTS.items():
        if metrics.get(key) is not None:
            yield label, _inline(metrics[key])
    for key in ("hardware", "versions"):
        if found := metrics.get(key):
            words = ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, Mapping) else found
            yield key, _inline(words)


def recipe(metrics: Mapping[str, Any]) -> str:
    """How the weights were made, in one or two sentences."""
    config, refined = metrics.get("config"), _refined(metrics.get("refinement"))
    if metrics.get("trained") is False:
        count = metrics.get("calibration_images")
        how = f"fitted to each layer's output on {count:,d} unlabelled images" if count else "computed from the weights"
        if not refined:
            return f"No training: the factors were {how}."
        return f"No labels: the factors were {how}, then {refined}."
    if not isinstance(config, Mapping):
        return ""
    settings = ", ".join(f"{key} {config[key]}" for key in _RECIPE if config.get(key) not in (None, "", 0))
    before = f"The fit was {refined}. " if refined else ""
    return f"{before}Trained with the adaptive rank penalty: {settings}. All settings are in `metrics.json`."


def _refined(refinement: Any) -> str:
    """What a refinement did, as `arp_hub.Refinement` has it; empty without one."""
    if not isinstance(refinement, Mapping):
        return ""
    seconds = refinement["seconds"]
    duration = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    return (
        f"refined on {refinement['images']:,d} unlabelled images for {duration} "
        f"(divergence from the dense model's predictions: {refinement['before']:.3f} nats before, "
        f"{refinement['after']:.3f} after, on {refinement['held_out']:,d} others)"
    )


def limits(metrics: Mapping[str, Any], decomposed: bool) -> list[str]:
    """The limitations of the model, in plain words."""
    dense, found = metrics.get("dense", {}), []
    if metrics.get("merged_from"):
        pass  # its card has the accuracy
    elif "top1" not in metrics:
        found.append("No accuracy was measured: evaluate the model on your data before you rely on it.")
    elif "top1" in dense and round(dense["top1"] - metrics["top1"], 2) > 0:
        lost = dense["top1"] - metrics["top1"]
        found.append(f"It is {lost:.2f} points of top-1 less accurate than its dense form on the images measured.")
    if metrics.get("shared_images"):
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
            "layers can be slower than one large layer, especially at large batch sizes on a GPU. Measure it on your "
            "device."
        ]
    found = [
        f"Smaller but not faster on {_place(timing)} at batch {timing['batch_size']}: it takes "
        f"{100 * timing['ratio']['median']:.0f} % of the dense model's time."
        for timing in timings
        if timing["ratio"]["median"] > _FASTER
    ]
    return [*found, "Latency differs on other devices, batch sizes and precisions: measure it on yours."]


def _timings(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The measurements that compare with the dense form, as `arp_hub.bench.Benchmark.to_dict` gives them."""
    return [timing for timing in metrics.get("latency", ()) if "ratio" in timing]


def _place(timing: Mapping[str, Any]) -> str:
    """The device and settings of a measurement."""
    threads = f"{timing['threads']} thread{'s' if timing['threads'] > 1 else ''}" if timing["device"] == "cpu" else ""
    layout = "channels last" if timing.get("channels_last") else ""
    compiled = "compiled" if timing.get("compiled") else ""
    where = timing.get("hardware") or timing["device"]
    return ", ".join(filter(None, (where, threads, timing["dtype"], layout, compiled)))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    rows = list(rows)
    numeric = [index > 0 and all(_is_number(row[index]) for row in rows) for index in range(len(head))]
    ruler = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[\d.,]*( to \d+)?( %| MB)?", text) is not None


def _inline(value: Any) -> str:
    """A value inside one line of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _sum(layers: Iterable[Mapping[str, Any]]) -> int:
    return sum(layer["params"] for layer in layers)
