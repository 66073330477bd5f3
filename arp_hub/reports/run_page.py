"""``report.html`` of a run: what it did, in one file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, TemplateError
from markupsafe import Markup

from ..errors import ArpHubError
from .svg import bars, heatmap, line_chart

REPORT = "report.html"
_PHASES = ("dense", "compress", "finetune")


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` from what a run has left in its folder so far.

    It shows loss, accuracy and learning rate over epochs, the violation of every layer over time, ranks, spectra, and
    accuracy against size. Everything is inline, names are escaped, and there is no script.

    Args:
        folder: A run's folder (``OUTPUT-run``), finished or under way: with ``log.jsonl``, ``metrics.json`` or both.

    Returns:
        The file.

    Raises:
        ArpHubError: If the folder holds neither file, or one that cannot be read.

    Example:
        >>> write_report("runs/quickstart-run")  # doctest: +SKIP
        PosixPath('runs/quickstart-run/report.html')
    """
    folder = Path(folder)
    log, metrics = _read_lines(folder / "log.jsonl"), _read_object(folder / "metrics.json")
    if not log and not metrics:
        raise ArpHubError(f"'{folder}' holds no log.jsonl and no metrics.json: give a run's folder (OUTPUT-run)")
    text = render(log, metrics, folder.name)
    temporary = folder / f".{REPORT}.{os.getpid()}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / REPORT)
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
            finished=bool(metrics),
            sizes=_sizes(metrics),
            charts=_charts(log, metrics),
            scores=[(name.replace("_", " "), score) for name, score in metrics.get("scores", {}).items()],
            facts=_facts(metrics),
            command=metrics.get("command"),
        )
    except (AttributeError, LookupError, TemplateError, TypeError, ValueError) as error:
        raise ArpHubError(f"the numbers of '{title}' are not those of a run ({error!r}): make them anew") from error


def _charts(log: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """Heading, explanation and picture of every chart."""
    numbered = list(enumerate(log, start=1))
    phases = [phase for phase in _PHASES if any(entry["phase"] == phase for entry in log)]

    def curve(key: str) -> dict[str, list[tuple[float, float]]]:
        return {phase: [(k, entry[key]) for k, entry in numbered if entry["phase"] == phase] for phase in phases}

    held_out = [(float(k), entry["val"]["top1"]) for k, entry in numbered if "val" in entry]
    accuracy = curve("top1")
    if held_out:
        accuracy["held out"] = held_out
    penalised = [(k, entry) for k, entry in numbered if "violations" in entry]
    layers = list(dict.fromkeys(name for _, entry in penalised for name in entry["violations"]))
    rows = {name: [entry["violations"].get(name) for _, entry in penalised] for name in layers}
    return [
        ("Loss", "Mean over each epoch, in nats.", line_chart(curve("loss"), "epoch", "loss")),
        ("Accuracy", "Top-1 on training images as they were trained on.", line_chart(accuracy, "epoch", "top-1, %")),
        ("Learning rate", "At the last step of each epoch.", line_chart(curve("lr"), "epoch", "learning rate")),
        (
            "Violations",
            "Squared distance of each layer from its rank, relative to its weight: 1 is all of it, blank is none.",
            heatmap(rows, [f"epoch {k}" for k, _ in penalised]),
        ),
        ("Ranks", "Scheme and rank of every decomposed layer, next to the largest rank of the plan.", _ranks(metrics)),
        *_spectra(metrics),
    ]


def _ranks(metrics: Mapping[str, Any]) -> Markup:
    layers = metrics.get("plan", {}).get("layers", {})
    largest = max((layer["rank"] * layer.get("groups", 1) for layer in layers.values()), default=1)
    values = {}
    for name, layer in layers.items():
        groups = layer.get("groups", 1)
        text = f"{layer['scheme']}, {layer['rank']}" + (f" x {groups}" if groups > 1 else "")
        values[name] = (layer["rank"] * groups / largest, text)
    return bars(values, "rank of every decomposed layer")


def _spectra(metrics: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    found = []
    for title, spectra in (
        ("Spectra before", metrics.get("dense", {}).get("spectra")),
        ("Spectra after", metrics.get("spectra")),
    ):
        if spectra:
            series = {
                name: [(k / max(1, len(values) - 1), max(value, 1e-8)) for k, value in enumerate(values)]
                for name, values in spectra.items()
            }
            chart = line_chart(series, "index / full rank", "singular value / largest", log=True)
            found.append((title, "Singular values of every layer; the first layer is the palest.", chart))
    return found


def _sizes(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Accuracy and size: what, dense, this model, share kept."""
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


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands behind the numbers: settings, hardware, versions."""
    names = ("data", "split", "images", "bad_images", "seed", "processes", "seconds")
    groups = [{name: metrics[name] for name in names if name in metrics}]
    groups += [metrics.get(name, {}) for name in ("hardware", "versions", "config")]
    pairs = ((key, value) for group in groups for key, value in group.items() if value not in (None, "", []))
    return list(dict.fromkeys((str(key).replace("_", " "), str(value)) for key, value in pairs))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; the last line of a run under way may be half-written."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and {"phase", "loss", "top1", "lr"} <= entry.keys():
            entries.append(entry)
    return entries


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArpHubError(f"cannot read '{path}': {error}") from error
    if not isinstance(found, dict):
        raise ArpHubError(f"'{path}' holds no metrics: it is not a JSON object")
    return found
