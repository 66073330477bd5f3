"""Draw the pictures of the concepts page and the decision chart as SVG.

    python docs/img/make_concepts.py

`ramp.svg` shows a real training on scikit-learn's digits, which takes three minutes on one thread. The colours follow
the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import arp_hub
from arp_hub.schemes import SCHEMES, make_scheme
from arp_hub.schemes.shapes import ConvSpec, LayerShape
from arp_hub.training import load_data

HERE = Path(__file__).parent
INK, FAINT, DENSE, FACTOR, SECOND = "#26323c", "#8a949c", "#c3ccd3", "#1f7a8c", "#d9691f"
DARK = {INK: "#e4e9ec", FAINT: "#8f9aa2", DENSE: "#4a555e", FACTOR: "#4fb3c6", SECOND: "#f0944d"}
NAMES = {INK: "ink", FAINT: "faint", DENSE: "dense", FACTOR: "factor", SECOND: "second"}
LAYER = LayerShape(64, 64, (3, 3), padding=(1, 1))
LINEAR = LayerShape(256, 64)

matplotlib.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "arp_hub", "font.family": "sans-serif", "font.size": 13.5,
    "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
})  # fmt: skip


def save(figure: Figure, name: str, title: str) -> None:
    """Write a figure as an SVG whose colours follow the reader's scheme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    text = buffer.getvalue()
    light, dark = ("".join(f"--{NAMES[key]}:{colour};" for key, colour in scheme.items())
                   for scheme in ({key: key for key in NAMES}, DARK))  # fmt: skip
    for colour, variable in NAMES.items():
        text = text.replace(f": {colour}", f": var(--{variable})")
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    text = re.sub(r"(<svg[^>]*>)", lambda found: f"{found[1]}\n{style}", text, count=1)
    text = re.sub(r"font: [^;\"]*?([\d.]+)px[^;\"]*", r"font: \1px sans-serif", text)
    (HERE / name).write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without axes, in units of a tenth of an inch."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def block(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """A filled rectangle from its lower left corner."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str = FACTOR, height: float = 7) -> None:
    """A rounded box around its centre, with text."""
    shape = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=1.2",
                           facecolor="none", edgecolor=colour, linewidth=1.6)  # fmt: skip
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", linespacing=1.35)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", colour: str = FAINT
) -> None:
    """An arrow, with text beside its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.3,
                                   shrinkA=0, shrinkB=0))  # fmt: skip
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x + 1.2, y, text, ha="left", va="center", color=INK, fontsize=12.5)


def draw_rank() -> None:
    """A matrix of 64 x 576 numbers as the product of two factors at rank 16."""
    figure, axes = canvas(76, 22)
    scale, rank = 28 / 576, 16
    rows, columns = 64 * scale * 3, 576 * scale
    thin = rank * scale * 3
    block(axes, 2, 11 - rows / 2, columns, rows, DENSE)
    axes.text(2 + columns / 2, 17.5, "weight, 64 x 576", ha="center")
    axes.text(2 + columns / 2, 3, "36,864 numbers", ha="center", color=INK)
    axes.text(33.5, 11, "≈", ha="center", va="center", fontsize=18)
    block(axes, 37, 11 - rows / 2, thin, rows, SECOND)
    axes.text(37 + thin / 2, 17.5, "64 x 16", ha="center")
    block(axes, 43, 11 - thin / 2, columns, thin, FACTOR)
    axes.text(43 + columns / 2, 17.5, "16 x 576", ha="center")
    axes.text(43 + columns / 2 - 3, 3, "rank 16: 1,024 + 9,216 = 10,240 numbers", ha="center")
    save(figure, "rank.svg", "A weight as the product of two factors")


def draw_schemes() -> None:
    """Every scheme at half of the layer's parameters: the area of a bar is its number of parameters."""
    figure, axes = canvas(76, 60)
    y, unit = 57.0, 44 / LAYER.params
    for title, shape, names in (
        (
            f"3x3 convolution, 64 to 64 channels: {LAYER.params:,} parameters",
            LAYER,
            ("channel", "spatial", "group_in", "group_out", "cp", "tucker2"),
        ),
        (
            f"1x1 convolution, 64 to 256 channels: {LINEAR.params:,} parameters",
            LINEAR,
            ("channel",),
        ),
    ):
        scale = unit * LAYER.params / shape.params
        axes.text(1, y, title, va="center", fontweight="bold")
        y -= 4
        block(axes, 15, y - 1.4, shape.params * scale, 2.8, DENSE)
        axes.text(1, y, "dense", va="center")
        for name in names:
            y -= 5
            scheme = make_scheme(name, shape, 4 if name.startswith("group") else 1)
            rank = max(r for r in range(1, scheme.max_rank + 1) if scheme.params(r) <= shape.params / 2)
            x = 15.0
            axes.text(1, y, name, va="center", family="monospace", fontsize=12.5)
            for index, factor in enumerate(scheme.convs(rank)):
                size = factor.params
                width = size * scale
                block(axes, x, y - 1.4, max(width - 0.25, 0.1), 2.8, (FACTOR, SECOND, FACTOR)[index % 3])
                x += width
            forms = " → ".join(described(factor) for factor in scheme.convs(rank))
            axes.text(x + 0.8, y, f"{forms}, rank {rank}", va="center", fontsize=12)
        y -= 7
    assert set(SCHEMES) == {"channel", "spatial", "group_in", "group_out", "cp", "tucker2"}
    save(figure, "schemes.svg", "The six schemes at half of a layer's parameters")


def described(factor: ConvSpec) -> str:
    """The form of one factor, such as ``3x3``."""
    kernel = "x".join(map(str, factor.kernel_size))
    if factor.groups == 1:
        return kernel
    return f"{kernel} depthwise" if factor.groups == factor.in_channels else f"{kernel} in {factor.groups} groups"


def draw_fit() -> None:
    """The fit of layer 3: its input comes from the compressed network, its target from the dense one."""
    figure, axes = canvas(76, 27)
    for y, name, colours in ((21, "dense", [DENSE] * 4), (8, "compressed", [FACTOR, FACTOR, SECOND, DENSE])):
        axes.text(1, y, name, va="center")
        for index, colour in enumerate(colours):
            x = 24 + 15 * index
            done = name == "dense" or index < 2
            label = f"layer {index + 1}" + ("" if done else ("\nto fit" if index == 2 else "\nnot yet"))
            box(axes, x, y, 10, label, colour, 6.5)
            arrow(axes, (x - 10, y), (x - 5, y), colour=FAINT)
        arrow(axes, (74 - 0.0, y), (75.5, y), colour=FAINT)
    arrow(axes, (61.5, 21), (61.5, 11.2), colour=SECOND)
    axes.text(62.3, 14.6, "target: the\ndense output", va="center", fontsize=12)
    axes.text(46.5, 2.6, "input: from the compressed layers before it", ha="center", va="center", fontsize=12)
    save(figure, "fit.svg", "Layers are fitted one after the other")


def draw_plan() -> None:
    """Loss over parameters of three layers, with the ranks at which their slopes are equal."""
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    axes = figure.subplots()
    kept = torch.linspace(0.02, 1, 400)
    slope = -0.55
    curves = {"sensitive layer": (1.0, 3.5, SECOND), "average layer": (0.55, 5.0, FACTOR)}
    for name, (weight, decay, colour) in (curves | {"insensitive layer": (0.16, 6.0, FAINT)}).items():
        loss = weight * (-decay * kept).exp()
        steep = torch.diff(loss) / torch.diff(kept)
        at = int((steep - slope).abs().argmin())
        axes.plot(kept, loss, color=colour, linewidth=2, label=name)
        axes.plot(kept[at], loss[at], "o", color=colour, markersize=8)
        near = torch.tensor([max(float(kept[at]) - 0.14, 0.0), float(kept[at]) + 0.14])
        axes.plot(near, loss[at] + slope * (near - kept[at]), color=INK, linewidth=1.1)
    axes.legend(loc="upper right", frameon=False)
    axes.text(0.2, 0.72, "dots: one slope for all layers.\nA smaller budget makes it steeper.", fontsize=12.5)
    axes.set(xlabel="parameters of the layer that are kept", ylabel="predicted loss", xlim=(0, 1), ylim=(0, 0.95))
    axes.set_xticks([0, 0.5, 1], ["0", "half", "all"])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "plan.svg", "How a plan is chosen")


def draw_ramp() -> None:
    """Violations of three layers in a real training on the digits."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", num_classes=10)
    data = load_data("digits", model)
    images, labels = data.train.tensors()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps, warm = 320, 160
    plan = arp_hub.make_plan(model, keep_params=0.35)
    penalty = None
    shown, rows = list(plan.layers)[:: max(1, len(plan.layers) // 3)][:3], []
    for step in range(warm + steps):
        if step == warm:
            penalty = arp_hub.AdaptiveRankPenalty(model, plan, total_steps=steps, ramp=0.6, every=4)
        chosen = torch.randint(len(images), (64,))
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if penalty is not None:
            penalty.step()
            if step % 4 == 3:
                found = penalty.violations()
                rows.append((step - warm + 1, [found[name] for name in shown]))
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, 0.6 * steps, color=FACTOR, alpha=0.12, linewidth=0)
    for index, colour in enumerate((FACTOR, SECOND, FAINT)):
        axes.plot([step for step, _ in rows], [values[index] for _, values in rows], color=colour, linewidth=2,
                  label=shown[index])  # fmt: skip
    top = max(max(values) for _, values in rows) * 1.15
    axes.text(0.3 * steps, top * 0.96, "ramp: violations fall", ha="center", va="top")
    axes.text(0.8 * steps, top * 0.96, "hold: low rank\nafter every pull", ha="center", va="top")
    axes.set(xlabel="optimiser step", ylabel="violation", xlim=(0, steps), ylim=(0, top))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center right", frameon=False)
    save(figure, "ramp.svg", "Ramp and hold in a training on digits")


def draw_choice() -> None:
    """The decision chart of choose.md."""
    figure, axes = canvas(76, 62)
    box(axes, 38, 57, 34, "What must become smaller?", INK)
    for x, text in ((14, "size, memory"), (62, "latency")):
        arrow(axes, (38, 53.5), (x, 48.5))
        axes.text(x, 51.8, text, ha="center", fontsize=12.5)
    box(axes, 14, 45, 24, "keep_params", FACTOR)
    box(axes, 62, 45, 24, "keep_latency", FACTOR)
    arrow(axes, (14, 41.5), (29, 37))
    arrow(axes, (62, 41.5), (47, 37))
    box(axes, 38, 33.5, 46, "Do you have images like the task's?", INK)
    arrow(axes, (19, 30), (19, 25.5), "no")
    arrow(axes, (50, 30), (50, 25.5), "yes")
    box(axes, 14, 22, 24, "decompose\nthe weights alone", SECOND)
    box(axes, 50, 22, 34, "decompose with calibration,\nthen measure accuracy", FACTOR)
    arrow(axes, (38, 18.5), (14, 12.5))
    axes.text(15, 15.6, "good enough", ha="center", fontsize=12.5)
    arrow(axes, (44, 18.5), (44, 12.5))
    axes.text(43, 15.6, "no labels", ha="right", fontsize=12.5)
    arrow(axes, (62, 18.5), (66, 12.5))
    axes.text(65.5, 15.6, "labels", ha="left", fontsize=12.5)
    box(axes, 12, 8, 20, "save and publish", FACTOR, 8)
    box(axes, 39, 8, 24, "refine, or a\nhigher budget", SECOND, 8)
    box(axes, 65, 8, 20, "train with\nthe penalty", SECOND, 8)
    save(figure, "choose.svg", "Choosing a method")


def main() -> None:
    """Draw everything."""
    for draw in (draw_rank, draw_schemes, draw_fit, draw_plan, draw_choice, draw_ramp):
        draw()
        print(draw.__name__)


if __name__ == "__main__":
    main()
