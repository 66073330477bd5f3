"""``report.html`` of a run: what it did, in one file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, TemplateError
from markupsafe import Markup

from .._utils.files import read_text, write_atomically
from .._utils.parse import parse_json, read_json
from ..errors import ArpHubError, checked_path
from .plots import can_draw, curves_figure, decay_figure, inline_svg, rank_bars_figure, violations_figure

REPORT = "report.html"
_PHASES = ("dense", "compress", "finetune")


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
            finished=bool(metrics),
            sizes=_sizes(metrics),
            charts=_charts(log, metrics) if can_draw() else None,
            scores=[(name.replace("_", " "), score) for name, score in metrics.get("scores", {}).items()],
            facts=_facts(metrics),
            command=metrics.get("command"),
        )
    except (AttributeError, LookupError, TemplateError, TypeError, ValueError) as error:
        raise ArpHubError(f"the numbers of '{title}' are not those of a run ({error!r}): run it again") from error


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
            "Accuracy", "Top-1 on augmented training images and on held-out ones.", curves_figure, accuracy, "top-1, %"
        ),
        _chart("Learning rate", "At the last step of each epoch.", curves_figure, curves("lr"), "learning rate"),
        _chart(
            "Violations",
            "Squared distance of each layer to its low-rank set, relative to its squared weight. Zero is blank.",
            violations_figure,
            violations,
        ),
        _chart("Ranks", "Scheme and rank of every decomposed layer.", rank_bars_figure, _ranks(metrics)),
        *(
            _chart(title, "Singular values of every layer; the first layer is the palest.", decay_figure, spectra)
            for title, spectra in (
                ("Spectra before", metrics.get("dense", {}).get("spectra")),
                ("Spectra after", metrics.get("spectra")),
            )
            if spectra
        ),
    ]


def _chart(
    heading: str, text: str, draw: Callable[..., Any], data: Mapping[str, Any], *labels: str
) -> tuple[str, str, Markup | None]:
    # The labels of the SVG and all text in it are escaped by the XML writers.
    return heading, text, Markup(inline_svg(heading, draw, data, *labels)) if data else None


def _ranks(metrics: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Rank over all groups, and a text with scheme, rank and groups, by layer."""
    found = {}
    for name, layer in metrics.get("plan", {}).get("layers", {}).items():
        rank, groups = layer["rank"], layer.get("groups", 1)
        found[name] = (rank * groups, f"{layer['scheme']}, {rank}" + (f" x {groups}" if groups > 1 else ""))
    return found


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


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings, hardware and versions of the run."""
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
        raise ArpHubError(f"cannot read '{path}': {error}") from error
    if not isinstance(found, dict):
        raise ArpHubError(f"'{path}' holds no metrics: it is not a JSON object")
    return found
