"""The command ``arp-hub``: plan, compress, evaluate, inspect."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
import typer
from rich.console import Console, RenderableType
from torch import Tensor, nn
from tqdm import tqdm
from typer.core import TyperGroup

from . import report, spectra
from .budget import make_plan
from .decompose import decompose
from .errors import ArpHubError
from .hub import check_folder, save_pretrained
from .layers import count_params
from .loading import load_model
from .plan import RankPlan
from .plots import check_picture_path, save_figure, spectra_figure
from .schemes import SCHEMES
from .structure import check_plan, plan_of
from .tracing import count_macs
from .training import ImageData, calibration_images, evaluate, load_data

Item = TypeVar("Item")

_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
"""What typer raises for a wrong option: it has no public name of its own."""


class _Group(TyperGroup):
    """Turns every user error into one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except (ArpHubError, _UsageError) as error:
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            print("error: " + " ".join(message.split()), file=sys.stderr)
            code = 2
        except typer.Abort:
            code = 130
        sys.exit(code)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Shrink vision models by low-rank decomposition. "
    "Exit codes: 0 fine; 2 bad input, with one line on stderr that says what to do; 130 interrupted.",
)

Model = Annotated[str, typer.Option(help="A timm name such as resnet50, local-dir:FOLDER, or hf-hub:USER/NAME.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights: a .safetensors file, or a torch file of tensors.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes of --checkpoint, where they are not the model's own.")]
InputSize = Annotated[
    tuple[int, int, int] | None,
    typer.Option(metavar="C H W", help="Input size; by default the model's own.", show_default=False),
]
Data = Annotated[
    str | None, typer.Option(help="digits, a folder of parquet files or of class folders, or a Hub dataset id.")
]
ImageKey = Annotated[str | None, typer.Option(help="Image column; by default the one of type Image.")]
LabelKey = Annotated[str | None, typer.Option(help="Label column; by default the one of type ClassLabel.")]
KeepParams = Annotated[float | None, typer.Option(help="Share of the parameters to keep, above 0 and below 1.")]
KeepMacs = Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep.")]
Schemes = Annotated[
    str | None, typer.Option(help=f"Schemes to choose from, with commas: {','.join(SCHEMES)}. By default all.")
]
RankMultiple = Annotated[int, typer.Option(help="Hold ranks to multiples of this, for the hardware.")]
Exclude = Annotated[
    str | None,
    typer.Option(
        help="Layers to leave dense, with commas: names, or patterns (layer1.*). By default the first convolution."
    ),
]
Calibration = Annotated[
    int, typer.Option("--calibration-images", help="Training images of --data to calibrate on; no labels are used.")
]
Workers = Annotated[int, typer.Option(help="Processes that decode large images.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default cuda where there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over --output, whatever it holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]


@app.command("plan")
def plan_command(
    model: Model,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    data: Data = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    schemes: Schemes = None,
    rank_multiple: RankMultiple = 1,
    exclude: Exclude = None,
    calibration: Calibration = 512,
    input_size: InputSize = None,
    workers: Workers = 0,
    device: Device = None,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="Plan file to write.")] = Path("plan.json"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Choose scheme, groups and rank of every layer under one budget: print the table, write the plan.

    Example: arp-hub plan --model resnet50 --keep-params 0.4 --output plan.json
    """
    options = _plan_options(keep_params, keep_macs, schemes, rank_multiple, exclude)
    _check_plan_file(output, overwrite)
    network = _model(model, checkpoint, num_classes, input_size, device, seed)
    images = _calibration(_data(data, network, image_key, label_key), calibration, seed, workers)
    made = make_plan(network, **options, calibration=images, progress=_interactive())
    summary = report.plan_report(network, made)
    made.save(output)
    if as_json:
        _print_json({"plan": made.to_dict(), "output": str(output), **summary.to_dict()})
    else:
        _print(report.plan_table(summary, f"Plan of {model}"), report.dense_table(summary))
        _note(f"plan written to {output}")


@app.command()
def compress(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder to save the decomposed model in.")],
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file, instead of a budget.")] = None,
    data: Data = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    schemes: Schemes = None,
    rank_multiple: RankMultiple = 1,
    exclude: Exclude = None,
    calibration: Calibration = 512,
    input_size: InputSize = None,
    max_images: Annotated[int | None, typer.Option(help="Measure accuracy on so many test images only.")] = None,
    workers: Workers = 0,
    device: Device = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Plan and decompose with no training, and save the result.

    Without --data on the weights alone. With --data each layer is fitted to its output on calibration images, and where
    there are labels, top-1 and top-5 are measured on the test split before and after.

    Example: arp-hub compress --model resnet50 --data path/to/images --keep-params 0.5 --output out
    """
    options = _plan_options(keep_params, keep_macs, schemes, rank_multiple, exclude, plan)
    check_folder(output, overwrite=overwrite)
    given = None if plan is None else RankPlan.load(plan)
    network = _model(model, checkpoint, num_classes, input_size, device, seed)
    if given is not None:
        check_plan(network, given)
    found = _data(data, network, image_key, label_key)
    images = _calibration(found, calibration, seed, workers)
    before = _figures(network, found, max_images, workers)
    start = time.perf_counter()
    made = given or make_plan(network, **options, calibration=images, progress=_interactive())
    decompose(network, made, images, progress=_interactive())
    seconds = time.perf_counter() - start
    after = _figures(network, found, max_images, workers)
    result: dict[str, Any] = {
        "model": model,
        "data": data,
        **({"split": "test"} if "top1" in after else {}),
        "calibration_images": 0 if images is None else len(images),
        "trained": False,
        "seconds": round(seconds, 2),
        "seed": seed,
        "dense": before,
        **after,
    }
    classes = found.class_names if found is not None and "top1" in after else ()
    save_pretrained(network, output, metrics=result, label_names=classes or None, overwrite=overwrite)
    if as_json:
        _print_json({**result, "output": str(output)})
    else:
        _print(report.figures_table({"dense": before, "decomposed": after}, f"{model}, no training, {seconds:.0f} s"))
        _note(f'saved; load it with timm.create_model("local-dir:{output}", pretrained=True) after `import arp_hub`')


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Annotated[str, typer.Option(help="digits, a folder of parquet files or of class folders, or a Hub id.")],
    split: Annotated[str, typer.Option(help="Which images: test, train, or a split of the data's own.")] = "test",
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    input_size: InputSize = None,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.", min=1)] = 256,
    max_images: Annotated[int | None, typer.Option(help="Stop after so many images.", min=1)] = None,
    workers: Workers = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 (per cent), loss (nats), parameters and multiply-accumulates.

    Example: arp-hub evaluate --model local-dir:out --data uoft-cs/cifar10 --json
    """
    network = _model(model, checkpoint, num_classes, input_size, device)
    found = load_data(data, network, image_key=image_key, label_key=label_key)
    _check_classes(network, found)
    scores = evaluate(network, found.split(split), batch_size=batch_size, workers=workers, max_images=max_images)
    result = {**scores, "params": count_params(network), "macs": count_macs(network)}
    if as_json:
        _print_json({"model": model, "data": data, "split": split, **result})
    else:
        _print(report.figures_table({model: result}, f"{data}, split {split}"))


@app.command()
def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    plan: Annotated[Path | None, typer.Option(help="A plan: shows how far each layer is from it.")] = None,
    data: Data = None,
    image_key: ImageKey = None,
    calibration: Calibration = 64,
    input_size: InputSize = None,
    workers: Workers = 0,
    device: Device = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show singular-value spectra, ranks and violations, layer by layer.

    Columns: full rank; the ranks that keep 90 and 99 % of the energy; the stable rank; scheme and rank of a decomposed
    layer or of --plan; and the relative squared distance from that plan. All for the fold of scheme 'channel'. With
    --data the spectrum is the one of the layer's output, on calibration images.

    Example: arp-hub inspect --model resnet50 --plot spectra.png
    """
    given = None if plan is None else RankPlan.load(plan)
    if plot is not None:
        check_picture_path(plot)
    network = _model(model, checkpoint, num_classes, input_size, device, seed)
    schemes = {} if given is None else check_plan(network, given)
    images = _calibration(_data(data, network, image_key, None), calibration, seed, workers)
    layers = spectra.decomposable_layers(network)
    if images is None:
        found = {name: spectra.spectrum(layer) for name, layer in _progress(layers, "spectra")}
    else:
        found = spectra.output_spectra(network, layers, images)
    shown = given or plan_of(network)
    distances = {
        name: spectra.violation(layers[name], scheme, shown.layers[name].rank)
        for name, scheme in _progress(schemes, "violations")
    }
    rows = report.spectrum_reports(network, found, shown, distances)
    metric = "weights" if images is None else "outputs"
    if plot is not None:
        ranks = {name: entry.rank for name, entry in shown.layers.items()}
        save_figure(spectra_figure(found, ranks, f"{model}: spectra of {metric}"), plot)
    if as_json:
        listed = [row.to_dict() for row in rows]
        _print_json({"model": model, "metric": metric, "layers": listed, "plot": plot and str(plot)})
    else:
        _print(report.spectrum_table(rows, f"{model}, {metric}"))


def _plan_options(
    keep_params: float | None,
    keep_macs: float | None,
    schemes: str | None,
    rank_multiple: int,
    exclude: str | None,
    plan: Path | None = None,
) -> dict[str, Any]:
    """Arguments of `make_plan`, checked before any work is done."""
    shares = {"keep_params": keep_params, "keep_macs": keep_macs}
    budget = {name: share for name, share in shares.items() if share is not None}
    if len(budget) + (plan is not None) != 1:
        raise ArpHubError("give exactly one of --keep-params and --keep-macs (or, to compress, a --plan)")
    for name, share in budget.items():
        if not 0 < share < 1:
            raise ArpHubError(f"{name} must lie between 0 and 1 (the share to keep, 0.5 for half), got {share:g}")
    chosen = _list(schemes)
    for name in chosen or ():
        if name not in SCHEMES:
            raise ArpHubError(f"unknown scheme '{name}': choose from {', '.join(SCHEMES)}")
    if rank_multiple < 1:
        raise ArpHubError(f"rank_multiple must be at least 1, got {rank_multiple}")
    return {**budget, "schemes": chosen, "rank_multiple": rank_multiple, "exclude": _list(exclude)}


def _list(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _check_plan_file(path: Path, overwrite: bool) -> None:
    """Refuse to write a plan over a file that is none."""
    if not path.parent.is_dir():
        raise ArpHubError(f"cannot write '{path}': there is no folder '{path.parent}'")
    if path.is_dir():
        raise ArpHubError(f"cannot write the plan '{path}': it is a folder")
    if path.exists() and not overwrite:
        try:
            RankPlan.load(path)
        except ArpHubError:
            raise ArpHubError(f"'{path}' exists and holds no plan: name another --output, or add --overwrite") from None


def _model(
    name: str,
    checkpoint: Path | None,
    num_classes: int | None,
    input_size: tuple[int, int, int] | None,
    device: str | None,
    seed: int = 0,
) -> nn.Module:
    place = _device(device)
    torch.manual_seed(seed)
    overlay: dict[str, Any] = {} if input_size is None else {"pretrained_cfg_overlay": {"input_size": input_size}}
    return load_model(name, checkpoint, num_classes=num_classes, **overlay).to(place)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArpHubError(f"cannot use the device '{name}': {str(error).splitlines()[0]}") from error
    return device


def _data(source: str | None, model: nn.Module, image_key: str | None, label_key: str | None) -> ImageData | None:
    if source is None:
        return None
    return load_data(source, model, image_key=image_key, label_key=label_key, require_labels=False)


def _calibration(data: ImageData | None, count: int, seed: int, workers: int) -> Tensor | None:
    return None if data is None else calibration_images(data, count, seed=seed, workers=workers)


def _figures(model: nn.Module, data: ImageData | None, max_images: int | None, workers: int) -> dict[str, Any]:
    """Size, and accuracy where there are labels."""
    size = {"params": count_params(model), "macs": count_macs(model)}
    if data is None or data.test.labels is None:
        return size
    _check_classes(model, data)
    return {**evaluate(model, data.test, workers=workers, max_images=max_images), **size}


def _check_classes(model: nn.Module, data: ImageData) -> None:
    """Refuse to measure a model on labels that it was not trained for, where the data tells its classes."""
    classes = getattr(model, "num_classes", None)
    if data.class_names and classes is not None and classes != data.num_classes:
        raise ArpHubError(
            f"the model has {classes} classes, the data '{data.name}' has {data.num_classes}: "
            "choose the model that was trained on this data"
        )


def _interactive() -> bool:
    return sys.stderr.isatty()


def _progress(items: Mapping[str, Item], title: str) -> Iterable[tuple[str, Item]]:
    return tqdm(items.items(), title, disable=not _interactive(), leave=False)


def _print(*tables: RenderableType) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for table in tables:
        console.print(table)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def _note(text: str) -> None:
    print(text, file=sys.stderr)
