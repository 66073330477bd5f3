"""The end of ``arp-hub compress``: what the model was and is, and the commands that come next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import nn

from arp_hub.refinement import Refinement
from arp_hub.reports.tables import printable
from arp_hub.timing import Workload


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of a model, which is the size of its weights file but for a short header."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def before_after(title: str, dense: Mapping[str, Any], compressed: Mapping[str, Any], split: str | None) -> Table:
    """Size and accuracy of the dense and of the compressed model, side by side.

    Args:
        title: What was done to which model.
        dense: ``params``, ``macs``, ``bytes`` and, where images have labels, ``top1`` and ``images``.
        compressed: The same of the compressed model.
        split: Name of the split that ``top1`` was measured on.
    """
    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "dense", "compressed", "kept"):
        table.add_column(name, justify="right" if name else "left")
    for label, key in (("parameters", "params"), ("multiply-accumulates", "macs")):
        table.add_row(label, f"{dense[key]:,}", f"{compressed[key]:,}", _share(dense[key], compressed[key]))
    sizes = [f"{figures['bytes'] / 1e6:,.2f} MB" for figures in (dense, compressed)]
    table.add_row("weights on disk", *sizes, _share(dense["bytes"], compressed["bytes"]))
    if "top1" in dense:
        label = printable(f"top-1 ({split}, {dense['images']:,} images)")
        table.add_row(label, *(f"{figures['top1']:.2f} %" for figures in (dense, compressed)))
    return table


def _share(before: int, after: int) -> str:
    return f"{100 * after / max(1, before):.1f} %"


def refinement_effect(done: Refinement) -> str:
    """One sentence: what a refinement did to the divergence from the dense model."""
    where = f"nats on {done.held_out:,} held-out images"
    if done.after < done.before:
        return (
            f"refined on {done.images:,} unlabelled images: divergence from the dense model {done.before:.3g} -> "
            f"{done.after:.3g} {where}\n"
        )
    return (
        f"refinement did not lower the divergence from the dense model ({done.before:.3g} {where}): the saved model is "
        "the fit without it. Longer refinement or more images may help\n"
    )


def next_steps(folder: Path, data: Mapping[str, str | None], measured: bool, workload: Workload | None) -> str:
    """Commands that can be copied: measure the saved model, export it, publish it, load it.

    Args:
        folder: Where the model was saved.
        data: The options ``--data``, ``--image-key``, ``--label-key`` and ``--streaming``; None for those not given.
        measured: Whether the data has labels that the model was measured on.
        workload: The forward pass that was timed for a latency budget.
    """
    model = ("--model", f"local-dir:{folder}")
    options = [word for name, value in data.items() if value is not None for word in (name, value) if word]
    lines = [_command("evaluate", *model, *options)] if measured else []
    if workload is not None:
        timed = ["--batch-size", str(workload.batch_size)]
        if workload.in_torch:
            timed += ["--dtype", workload.dtype]
        else:
            timed += ["--runtime", workload.runtime, "--precision", workload.precision]
        lines.append(_command("bench", *model, *timed, *["--channels-last"] * workload.channels_last))
    elif not measured:
        lines.append(_command("bench", *model))
    lines.append(_command("export", f"local-dir:{folder}", "--format", "onnx"))
    lines.append(_command("push", str(folder), "USER/NAME"))
    load = f"import timm, arp_hub; model = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"
    shell = "\n".join(f"  {line}" for line in lines)
    return f"saved to {folder}\n\nNext, in the shell:\n{shell}\nNext, in Python:\n  {load}"


def _command(*words: str) -> str:
    return shlex.join(("arp-hub", *words))
