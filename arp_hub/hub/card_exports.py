"""What a card says of the exports in its folder, from their ``export.json``. It leaves out what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_names import inline


def int8(export: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Size and accuracy of this model in int8, from the first ``export.json`` of such a file; empty without one.

    Accuracy is left out unless it is of the images that the card's own accuracy is of: then that of the model in
    PyTorch is the same.

    Args:
        export: Content of an ``export.json``, or several by the names of their folders.
        metrics: Numbers of the card.
    """
    for record in _records(export).values():
        if not isinstance(record, Mapping) or record.get("precision") != "int8":
            continue
        if record.get("params") != metrics.get("params"):  # of another model, such as the dense one
            continue
        found = {"bytes": record.get("size_bytes")}
        parity = record.get("parity")
        if isinstance(parity, Mapping) and _same_images(parity, metrics):
            found["top1"] = parity.get("top1")
        return {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {}


def _same_images(parity: Mapping[str, Any], metrics: Mapping[str, Any]) -> bool:
    """Whether a file was checked on the images of the card's accuracy, by their number and the model's own top-1."""
    if parity.get("images") != metrics.get("images") or not _numbers(parity, "torch_top1") or "top1" not in metrics:
        return False
    return abs(parity["torch_top1"] - metrics["top1"]) < 0.01


def _records(export: Any) -> Mapping[str, Any]:
    """The exports by the names of their folders; one that is given alone has no name."""
    if not isinstance(export, Mapping):
        return {}
    return {"": export} if "format" in export else export


def exports(export: Any) -> str:
    """A list of the exported files with their parity and latency; empty without any.

    Args:
        export: Content of an ``export.json``, or several by the names of their folders.
    """
    return "\n".join(line for name, record in _records(export).items() if (line := _exported(str(name), record)))


def _exported(folder: str, record: Any) -> str:
    """One file: what it is, how it compares with PyTorch, and how fast it is."""
    if not isinstance(record, Mapping) or not isinstance(record.get("file"), str):
        return ""
    parity, latency = record.get("parity"), record.get("latency")
    parts = [f"`{inline(f'{folder}/' if folder else '')}{inline(record['file'])}`"]
    about = [record[key] for key in ("format", "precision") if isinstance(record.get(key), str)]
    if isinstance(record.get("size_bytes"), int):
        about.append(f"{record['size_bytes'] / 1e6:.2f} MB")
    parts.append(f" ({inline(', '.join(about))})" if about else "")
    found = []
    if isinstance(parity, Mapping) and _numbers(parity, "agreement", "images", "divergence"):
        images = f"{parity['images']:,d} {inline(parity.get('source') or '')}".rstrip()
        top1 = f"top-1 {parity['top1']:.2f} %, " if _numbers(parity, "top1") else ""
        if top1 and _numbers(parity, "torch_top1"):
            top1 = f"top-1 {parity['top1']:.2f} % (in PyTorch {parity['torch_top1']:.2f} %), "
        found.append(
            f"{top1}same top-1 class as PyTorch for {parity['agreement']:.1f} % of {images} images, divergence "
            f"{parity['divergence']:.2g} nats"
        )
    if isinstance(latency, Mapping) and isinstance(latency.get("latency_ms"), Mapping):
        found += _file_latency(latency)
    return f"- {''.join(parts)}{': ' if found else ''}{'; '.join(found)}."


def _file_latency(latency: Mapping[str, Any]) -> list[str]:
    """Latency of a file, and that of its dense form in the same runtime and precision."""
    if not _numbers(latency, "batch_size", "threads") or not _numbers(latency["latency_ms"], "median"):
        return []
    threads = f"{latency['threads']} thread{'s' if latency['threads'] > 1 else ''}"
    text = f"{latency['latency_ms']['median']:.3g} ms at batch {latency['batch_size']} on {threads}"
    dense = latency.get("dense_latency_ms")
    if isinstance(dense, Mapping) and _numbers(dense, "median"):
        text += f", the dense model {dense['median']:.3g} ms"
    return [text]


def _numbers(entry: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(entry.get(key), int | float) for key in keys)
