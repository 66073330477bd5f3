"""The model card: what the model is, how to load it, and the numbers of ``metrics.json``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("templates") / "card.md"

_ROWS = {
    "params": ("parameters", "{:,d}"),
    "macs": ("multiply-accumulates", "{:,d}"),
    "top1": ("top-1, %", "{:.2f}"),
    "top5": ("top-5, %", "{:.2f}"),
    "loss": ("cross-entropy, nats", "{:.4f}"),
}
_FACTS = ("data", "split", "images", "trained", "calibration_images", "seed", "seconds", "processes")


def model_card(config: Mapping[str, Any], metrics: Mapping[str, Any], name: str) -> str:
    """Render the card.

    Args:
        config: The model's ``config.json``.
        metrics: Its ``metrics.json``. A number that is not there has no line on the card.
        name: What to load the model by: ``local-dir:FOLDER`` or ``hf-hub:USER/NAME``.

    Returns:
        Markdown with a YAML head, as the Hub takes it.
    """
    args = config.get("model_args", {})
    decomposed = "plan" in args
    card = ModelCard.from_template(
        ModelCardData(
            library_name="timm",
            license=config["pretrained_cfg"].get("license"),
            pipeline_tag="image-classification" if config["num_classes"] else "image-feature-extraction",
            tags=["arp-hub", "timm", *(["low-rank"] if decomposed else [])],
        ),
        template_path=str(TEMPLATE),
        title=name.partition(":")[2].rpartition("/")[2],
        name=name,
        backbone=args.get("backbone", config["architecture"]),
        decomposed=decomposed,
        numbers=_numbers(metrics, decomposed),
        input_size=" x ".join(str(side) for side in metrics["input_size"]),
        layers=len(args["plan"]["layers"]) if decomposed else 0,
        schemes=_schemes(args["plan"]) if decomposed else "",
        facts=list(_facts(metrics)),
        command=metrics.get("command"),
    )
    return str(card.content).rstrip() + "\n"


def _numbers(metrics: Mapping[str, Any], decomposed: bool) -> str:
    dense, kept = metrics.get("dense", {}), metrics.get("kept", {})
    rows = []
    for key, (label, form) in _ROWS.items():
        if key in metrics:
            before = form.format(dense[key]) if key in dense else ""
            share = f"{100 * kept[key]:.1f} %" if key in kept else ""
            rows.append((label, before, form.format(metrics[key]), share))
    if not decomposed:
        return _table(("", "this model"), [(label, value) for label, _, value, _ in rows])
    return _table(("", "dense", "this model", "kept"), rows)


def _schemes(plan: Mapping[str, Any]) -> str:
    """For every scheme: the number of its layers, and their ranks."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for layer in plan["layers"].values():
        ranks[layer["scheme"]].append(layer["rank"])
    rows = []
    for scheme, found in ranks.items():
        low, high = min(found), max(found)
        rows.append((f"`{scheme}`", str(len(found)), str(low) if low == high else f"{low} to {high}"))
    return _table(("scheme", "layers", "ranks"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers and stand to the right."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))


def _facts(metrics: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key in _FACTS:
        if metrics.get(key) is not None:
            yield key.replace("_", " "), _inline(metrics[key])
    for key in ("hardware", "versions"):
        if found := metrics.get(key):
            text = ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, Mapping) else found
            yield key, _inline(text)


def _inline(value: Any) -> str:
    """A value inside one line of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
