"""Smaller attention heads in place of low-rank layers: what a ViT loses at equal numbers of parameters.

    python -m benchmarks.planning.smaller_heads list
    OMP_NUM_THREADS=1 python -m benchmarks.planning.smaller_heads run '*' --shared ../shared
    python -m benchmarks.planning.smaller_heads table

Nothing stands between query and key of a head, nor between its value and the projection::

    scores  = x (Wq^T Wk) x^T,    output = sum over heads of  (P x) (Wo Wv)^T

so each product may be truncated to a rank below the head's size, and the two maps of a pair share that rank without a
new layer. The best truncation in the metric of the inputs is an SVD of ``C^1/2 Wq^T Wk D^1/2`` and of ``Wo Wv E^1/2``:
C is the second moment of the queries' inputs with a constant for the bias, D that of the keys' inputs about the mean of
their image (softmax drops what all keys share), E that of the inputs averaged by the attention P of the head.

A row is SHARE/HOW: the share of the parameters of all attention layers that is kept; as truncated SVDs of qkv and
projection (``channel``), or by heads of one size for both pairs (``heads``), or of a smaller one for queries and keys
(``heads-SIZE``). Weights are truncated in the dense ViT, all other layers stay. Top-1 and the divergence of the
predictions are of training images that calibrate nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from arp_hub._utils.environment import environment
from benchmarks.networks import SEED, calibration_of, held_out_of, load_network
from benchmarks.rows import one_thread_command, results_file

RESULTS = results_file("smaller_heads")
IMAGES, HELD_OUT = 128, 1000
ROWS = ("channel", "heads", "heads-32", "heads-24", "heads-16")
SHARES = (0.75, 0.5)


@dataclass
class Inputs:
    """Second moments of the inputs of one attention layer.

    Attributes:
        query: Of its inputs with a constant 1, ``(D + 1, D + 1)``.
        key: Of its inputs about the mean of their image, ``(D, D)``.
        value: Of its inputs averaged by the attention of each head, ``(heads, D, D)``.
        projection: Of the inputs of its projection, ``(D, D)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    projection: Tensor


def main() -> None:
    """Parse the command line and do what it asks for."""
    rows = [f"{share}/{how}" for share in SHARES for how in ROWS]
    one_thread_command(__doc__, rows, RESULTS, measure, _short, table)


@torch.no_grad()
def measure(row: str, shared: Path) -> dict[str, Any]:
    """Truncate the attention of the dense ViT and compare its predictions."""
    share, how = float(row.split("/")[0]), row.split("/")[1]
    dense, moments, images, labels, expected = _dense(shared)
    small = copy.deepcopy(dense)
    for name, inputs in moments.items():
        layer = cast(Attention, small.get_submodule(name))
        if how == "channel":
            truncate_layers(layer, inputs, share)
        else:
            size = int(share * layer.head_dim)
            score = int(how.partition("-")[2] or size)
            truncate_heads(layer, inputs, score, min(layer.head_dim, 2 * size - score))
    found = _predictions(small, images)
    return {
        **environment(),
        "seed": SEED,
        "calibration_images": IMAGES,
        "held_out_images": HELD_OUT,
        "dense_top1": _top1(expected, labels),
        "top1": _top1(found, labels),
        "divergence": round(float(F.kl_div(found, expected, reduction="batchmean", log_target=True)), 5),
    }


def truncate_heads(layer: Attention, inputs: Inputs, score: int, output: int) -> None:
    """Truncate the products of every head, in place: that of query and key to ``score``, the other to ``output``.

    The rest of each head is zero, so that the layer keeps its shape.
    """
    heads, size, width = layer.num_heads, layer.head_dim, layer.qkv.in_features
    weight = layer.qkv.weight.double().view(3, heads, size, width)
    bias = layer.qkv.bias.double().view(3, heads, size)
    projection = layer.proj.weight.double().view(width, heads, size)
    new, new_bias, new_projection = (torch.zeros_like(part) for part in (weight, bias, projection))
    (left, left_inverse), (right, right_inverse) = _roots(inputs.query), _roots(inputs.key)
    for head in range(heads):
        query = torch.cat([weight[0, head], bias[0, head, :, None]], 1)
        u, s, v = _svd(left @ query.mT @ weight[1, head] @ right, score)
        query = ((left_inverse @ u) * s.sqrt()).mT
        new[0, head, :score], new_bias[0, head, :score] = query[:, :-1], query[:, -1]
        new[1, head, :score] = ((right_inverse @ v.mT) * s.sqrt()).mT
        root, inverse = _roots(inputs.value[head])
        u, s, v = _svd(projection[:, head] @ weight[2, head] @ root, output)
        new_projection[:, head, :output], new[2, head, :output] = u * s, v @ inverse
    # the attention of a token sums to one, so that the values' bias is one of the output
    constant = torch.einsum("ohs,hs->o", projection, bias[2])
    layer.qkv.weight.copy_(new.view(-1, width))
    layer.qkv.bias.copy_(new_bias.flatten())
    layer.proj.weight.copy_(new_projection.reshape(width, -1))
    layer.proj.bias.add_(constant)


def truncate_layers(layer: Attention, inputs: Inputs, share: float) -> None:
    """Truncate the two linear layers to a share of their parameters, in place."""
    for linear, moment in ((layer.qkv, inputs.query[:-1, :-1]), (layer.proj, inputs.projection)):
        rows, columns = linear.weight.shape
        root, inverse = _roots(moment)
        u, s, v = _svd(linear.weight.double() @ root, int(share * rows * columns / (rows + columns)))
        linear.weight.copy_((u * s) @ v @ inverse)


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a second moment and its inverse, with a ridge of 1e-4 of the diagonal's mean."""
    values, vectors = torch.linalg.eigh(moment)
    roots = (values.clamp_min(0) + 1e-4 * values.mean()).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _dense(shared: Path) -> tuple[nn.Module, dict[str, Inputs], list[Tensor], Tensor, Tensor]:
    """The dense ViT, its moments, held-out images in batches, their labels, and its log-probabilities."""
    model = load_network("vit", shared)
    calibration = calibration_of("vit", model, shared, IMAGES, copies=0, seed=SEED)
    held_out, labels = held_out_of("vit", model, shared, HELD_OUT, SEED).tensors()
    images = list(held_out.split(50))
    return model, _moments(model, calibration), images, labels, _predictions(model, images)


@torch.no_grad()
def _moments(model: nn.Module, images: Tensor) -> dict[str, Inputs]:
    """The moments of every attention layer, which a pass over the images adds up."""
    found: dict[str, Inputs] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            seen = _seen(cast(Attention, layer), args[0])
            old = found.get(name)
            found[name] = (
                seen if old is None else Inputs(*(getattr(old, key) + getattr(seen, key) for key in vars(old)))
            )

        return hook

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Attention)}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    for batch in images.split(32):
        model(batch)
    for hook in hooks:
        hook.remove()
    return found


def _seen(layer: Attention, x: Tensor) -> Inputs:
    """The moments of one batch ``(N, tokens, D)``."""
    parts = layer.qkv(x).unflatten(-1, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    attention = (query @ key.mT * layer.scale).softmax(-1)
    output = (attention @ value).transpose(1, 2).flatten(2)
    averaged = (attention @ x[:, None]).transpose(0, 1)
    one = torch.ones(*x.shape[:2], 1)
    return Inputs(
        _moment(torch.cat([x, one], -1)),
        _moment(x - x.mean(1, keepdim=True)),
        torch.stack([_moment(part) for part in averaged]),
        _moment(output),
    )


def _moment(rows: Tensor) -> Tensor:
    rows = rows.flatten(0, -2).double()
    return rows.mT @ rows / 1e4


@torch.no_grad()
def _predictions(model: nn.Module, images: list[Tensor]) -> Tensor:
    return torch.cat([model(batch).log_softmax(1) for batch in images])


def _top1(found: Tensor, labels: Tensor) -> float:
    return round(100 * float((found.argmax(1) == labels).double().mean()), 2)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a row: top-1 and divergence."""
    lines = ["| attention kept | how | top-1 | divergence |", "|---|---|---|---|"]
    for share in SHARES:
        for how in ROWS:
            if row := results.get(f"{share}/{how}"):
                size, _, score = how.partition("-")
                words = {"channel": "qkv and projection apart"}.get(size, "heads of one size")
                words = f"heads of {score} for queries and keys" if score else words
                lines.append(f"| {100 * share:.0f} % | {words} | {row['top1']:.2f} | {row['divergence']:.4f} |")
    return "\n".join(lines) + "\n"


def _short(row: dict[str, Any]) -> str:
    return f"top-1 {row['top1']:.2f} (dense {row['dense_top1']:.2f}), divergence {row['divergence']:.4f}"


if __name__ == "__main__":
    main()
