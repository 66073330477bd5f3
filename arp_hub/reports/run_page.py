"""``report.html`` of a run: what it did, in one file that needs nothing else."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, TemplateError
from markupsafe import Markup

from .._utils.files import read_text, write_atomically
from .._utils.parse import parse_json, read_json
from ..errors import ArpHubError, checked_path
from .model_figures import decays_figure
from .plots import can_draw, inline_svg
from .run_figures import curves_figure, rank_bars_figure, violations_figure

REPORT = "report.html"
_PHASES = ("dense", "compress", "finetune")
_HEADINGS = {
    "model": "Model and data",
    "keep_params": "Budget",
    "dense_epochs": "Phases",
    "batch_size": "Optimisation",
    "distill": "Regularisation",
    "output": "Output",
}
"""The first setting of each group of `TrainConfig`, with the heading of the group."""


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` from what a run has left in its folder so far.

    It shows loss, accuracy and learning rate over epochs, the violation of every layer over time, ranks, spectra, and
    accuracy and size. Everything is inline, names are escaped, and there is no script. The pictures need the extra
    ``plots``; without it the page has its tables and says how to install it.

    Args:
        folder: A run's folder (``OUTPUT-run``), finished or under way: with ``log.jsonl``, ``metrics.json`` or both.

    Returns:
        The file.

    Raises:
        ArpHubError: If the folder holds neither file, or one that cannot be read, or cannot be written to.

    Example:
        >>> write_report("runs/quickstart-run")  # doctest: +SKIP
        PosixPath('runs/quickstart-run/report.html')
    """
    folder = checked_path(folder, "folder")
    log, metrics = _read_lines(folder / "log.jsonl"), _read_object(folder / "metrics.json")
    if not log and not metrics:
        raise ArpHubError(f"'{folder}' holds no log.jsonl and no metrics.json: give a run's folder (OUTPUT-run)")
    text = render(log, metrics, folder.name)
    # a name in a JSON file may hold half of a surrogate pair, which UTF-8 cannot encode
    try:
        write_atomically(folder / REPORT, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise ArpHubError(f"cannot write '{folder / REPORT}': {error}") from error
    return folder / REPORT


def render(log: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], title: str) -> str:
    """The page as text.

    Args:
        log: The entries of ``log.jsonl``.
        metrics: ``metrics.json``, or an empty mapping while the run is under way.
        title: Name of the run.
    """
    environment = Environment(
        loader=PackageLoader("arp_hub.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    try:
        return environment.get_template("report.html").render(
            title=title,
            state=_state(bool(log) or "config" in metrics, bool(metrics)),
            sizes=_sizes(metrics),
            charts=[one for one in _charts(log, metrics) if log or one[2]] if can_draw() else None,
            scores=[(name.replace("_", " "), score) for name, score in metrics.get("scores", {}).items()],
            facts=_facts(metrics),
            command=metrics.get("command"),
        )
    except (AttributeError, LookupError, TemplateError, TypeError, ValueError) as error:
        raise ArpHubError(f"the numbers of '{title}' are not those of a run ({error!r}): run it again") from error


def _state(trained: bool, finished: bool) -> str:
    if not trained:
        return "A model that was compressed without training."
    return "A finished run." if finished else "The run is not finished. Its end adds the numbers of the finished model."


def _charts(log: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[tuple[str, str, Markup | None]]:
    """Heading, explanation and picture of every chart; no picture where there are no values yet."""
    numbered = dict(enumerate(log, start=1))
    phases = [phase for phase in _PHASES if any(entry["phase"] == phase for entry in log)]

    def curves(key: str) -> dict[str, dict[int, Any]]:
        return {phase: {k: entry[key] for k, entry in numbered.items() if entry["phase"] == phase} for phase in phases}

    accuracy = curves("top1")
    if held_out := {k: entry["val"]["top1"] for k, entry in numbered.items() if entry.get("val")}:
        accuracy["held out"] = held_out
    violations: dict[str, dict[int, Any]] = {}
    for k, entry in numbered.items():
        for name, value in (entry.get("violations") or {}).items():
            violations.setdefault(name, {})[k] = value
    return [
        _chart("Loss", "Mean over each epoch, in nats.", curves_figure, curves("loss"), "loss"),
        _chart(
            "Accuracy",
            f"Top-1 on augmented training images{' and on held-out ones' if held_out else ''}. "
            "The axis starts at the lowest value.",
            functools.partial(curves_figure, from_lowest=True),
            accuracy,
            "top-1, %",
        ),
        _chart("Learning rate", "At the last step of each epoch.", curves_figure, curves("lr"), "learning rate"),
        _chart(
            "Violations",
            "Squared distance of each layer to its low-rank set, relative to its squared weight. Zero is blank.",
            violations_figure,
            violations,
        ),
        _chart("Ranks", "Scheme and rank of every decomposed layer.", rank_bars_figure, _ranks(metrics)),
        _chart(
            "Spectra",
            "Singular values of each layer in its scheme. The plan keeps the coloured part and cuts the grey part.",
            decays_figure,
            _spectra(metrics),
            _cuts(metrics),
        ),
    ]


def _chart(
    heading: str, text: str, draw: Callable[..., Any], data: Mapping[str, Any], *more: Any
) -> tuple[str, str, Markup | None]:
    # The labels of the SVG and all text in it are escaped by the XML writers.
    return heading, text, Markup(inline_svg(heading, draw, data, *more)) if data else None


def _ranks(metrics: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Rank of one group, and a text with scheme, rank and groups, by layer."""
    found = {}
    for name, layer in metrics.get("plan", {}).get("layers", {}).items():
        rank, groups = layer["rank"], layer.get("groups", 1)
        found[name] = (rank, f"{layer['scheme']}, {rank}" + (f" x {groups}" if groups > 1 else ""))
    return found


def _cuts(metrics: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Scheme, and rank of one group, by layer."""
    layers = metrics.get("plan", {}).get("layers", {})
    return {name: (layer["scheme"], layer["rank"]) for name, layer in layers.items()}


def _spectra(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Spectra by layer. Entries without the full rank are left out."""
    found = metrics.get("spectra") or {}
    return {name: entry for name, entry in found.items() if isinstance(entry, Mapping) and entry.get("values")}


def _sizes(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Label, dense model, this model and share kept, for accuracy and size."""
    dense, kept, rows = metrics.get("dense", {}), metrics.get("kept", {}), []
    for key, label, form in (
        ("params", "parameters", "{:,d}"),
        ("macs", "multiply-accumulates", "{:,d}"),
        ("top1", "top-1, %", "{:.2f}"),
        ("top5", "top-5, %", "{:.2f}"),
        ("loss", "cross-entropy, nats", "{:.4f}"),
    ):
        if key in metrics:
            before = form.format(dense[key]) if key in dense else ""
            share = f"{100 * kept[key]:.1f} %" if key in kept else ""
            rows.append((label, before, form.format(metrics[key]), share))
    return rows


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Measurement, settings, hardware and versions of the run: a heading, and pairs of name and value."""
    names = ("data", "split", "images", "bad_images", "seed", "processes", "seconds")
    groups: dict[str, dict[str, Any]] = {"Measurement": {name: metrics[name] for name in names if name in metrics}}
    heading = "Settings"
    for name, value in metrics.get("config", {}).items():
        heading = _HEADINGS.get(name, heading)
        groups.setdefault(heading, {})[name] = value
    groups |= {"Hardware": metrics.get("hardware", {}), "Versions": metrics.get("versions", {})}
    found = []
    for title, group in groups.items():
        pairs = [(str(key).replace("_", " "), str(value)) for key, value in group.items() if _set(value)]
        if pairs:
            found.append((title, pairs))
    return found


def _set(value: Any) -> bool:
    return value not in (None, "", [], {})


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; the last line of a run under way may be half-written."""
    if not path.is_file():
        return []
    entries = []
    try:
        text = read_text(path, errors="replace")
    except OSError as error:
        raise ArpHubError(f"cannot read '{path}': {error}") from error
    for line in text.splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"phase", "loss", "top1", "lr"} <= entry.keys():
            entries.append(entry)
    return entries


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise ArpHubError(f"cannot read '{path}': {error}: mend or delete the file") from error
    if not isinstance(found, dict):
        raise ArpHubError(f"'{path}' holds no metrics: it is not a JSON object")
    return found
