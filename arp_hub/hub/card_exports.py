"""What a card says of the exports in its folder, from their ``export.json``. It leaves out what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_names import inline


def int8(export: Any, images: Any = None) -> dict[str, Any]:
    """Size and accuracy of the int8 model that an ``export.json`` describes; empty without one.

    Args:
        export: Content of the file. Entries may lie at any depth, and need ``bytes``, ``size_bytes`` or ``top1``.
        images: Number of images that the card's accuracy is of. Accuracy on other images is left out.
    """
    if isinstance(export, Mapping):
        for name, entry in export.items():
            if "int8" in str(name) and isinstance(entry, Mapping) and (found := _figures(entry, images)):
                return found
        if export.get("int8") is True or export.get("precision") == "int8":
            return _figures(export, images)
        export = list(export.values())
    entries = export if isinstance(export, list) else []
    return next((found for entry in entries if (found := int8(entry, images))), {})


def _figures(entry: Mapping[str, Any], images: Any) -> dict[str, Any]:
    """The numbers of an entry that the table has rows for."""
    parity = entry.get("parity")
    same = isinstance(parity, Mapping) and parity.get("images") == images
    own = {"bytes": entry.get("size_bytes"), **(parity if isinstance(parity, Mapping) and same else {}), **entry}
    keys = ("bytes", "top1", "top5", "loss")
    return {key: own[key] for key in keys if isinstance(own.get(key), int | float)}


def exports(export: Any) -> str:
    """A list of the exported files with their parity and latency; empty without any.

    Args:
        export: Content of an ``export.json``, or several by the names of their folders.
    """
    if not isinstance(export, Mapping):
        return ""
    records = {"": export} if "format" in export else export
    return "\n".join(line for name, record in records.items() if (line := _exported(str(name), record)))


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
