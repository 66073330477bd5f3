"""The command ``arp-hub``: plan, compress, evaluate, bench, inspect, export, push, report, doctor.

Each command imports its modules when it runs, so that help is printed quickly.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .export import export_command
from .options import (
    DATA_HELP,
    MAX_IMAGES_HELP,
    AsJson,
    BatchSize,
    Calibration,
    ChannelsLast,
    Checkpoint,
    Copies,
    Data,
    Device,
    Dtype,
    Effort,
    Exclude,
    ImageKey,
    InputSize,
    KeepLatency,
    KeepMacs,
    KeepParams,
    LabelKey,
    Model,
    ModelKwargs,
    NumClasses,
    Overwrite,
    Pretrained,
    RankMultiple,
    Refine,
    RefineImages,
    RefineMinutes,
    RefineSteps,
    Schemes,
    Seed,
    Workers,
)
from .terminal import Group, interactive, note, print_json, print_tables

if TYPE_CHECKING:
    from torch import nn

    from arp_hub.training import ImageData, Split

app = typer.Typer(
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Shrink vision models by low-rank decomposition. "
    "Exit codes: 0 success; 1 doctor found a problem; 2 bad input, with one line on stderr that says what to do; "
    "130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"arp-hub {version('arp-hub')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command("plan")
def plan_command(
    model: Model,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    keep_latency: KeepLatency = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = "float32",
    channels_last: ChannelsLast = False,
    data: Data = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    schemes: Schemes = None,
    rank_multiple: RankMultiple = 1,
    exclude: Exclude = None,
    calibration: Calibration = None,
    copies: Copies = None,
    effort: Effort = "balanced",
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
    from arp_hub.planning.make_plan import make_plan
    from arp_hub.reports import summary, tables

    from .inputs import (
        ModelChoice,
        check_effort,
        check_plan_file,
        open_data,
        open_images,
        open_model,
        plan_options,
        timed_workload,
    )

    workload = timed_workload(batch_size, dtype, channels_last)
    options = plan_options(keep_params, keep_macs, keep_latency, workload, schemes, rank_multiple, exclude)
    check_effort(effort)
    check_plan_file(output, overwrite)
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device, seed)
    network, random_weights = open_model(choice, meta=data is None)
    images = open_images(open_data(data, network, image_key, label_key), calibration, copies, seed, workers)
    made = make_plan(network, **options, calibration=images, effort=effort, progress=True)
    counted = summary.plan_report(network, made)
    made.save(output)
    if as_json:
        described = {"plan": made.to_dict(), "output": str(output), "random_weights": random_weights}
        print_json({**described, **counted.to_dict()})
    else:
        print_tables(tables.plan_table(counted, f"Plan of {model}"), tables.dense_table(counted))
        note(f"plan written to {output}")


@app.command()
def compress(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder to save the decomposed model in.")],
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    keep_latency: KeepLatency = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = "float32",
    channels_last: ChannelsLast = False,
    plan: Annotated[Path | None, typer.Option(help="A plan file, instead of a budget.")] = None,
    data: Data = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    schemes: Schemes = None,
    rank_multiple: RankMultiple = 1,
    exclude: Exclude = None,
    calibration: Calibration = None,
    copies: Copies = None,
    effort: Effort = "balanced",
    input_size: InputSize = None,
    refine: Refine = False,
    refine_minutes: RefineMinutes = None,
    refine_steps: RefineSteps = None,
    refine_images: RefineImages = 1000,
    max_images: Annotated[int | None, typer.Option(help=f"Measure accuracy on {MAX_IMAGES_HELP}", min=1)] = None,
    workers: Workers = 0,
    device: Device = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Plan and decompose a model without training, and save the result.

    With --data, each layer is fitted to its output on calibration images; without it, only to its weights. If the data
    has labels, top-1 and top-5 are measured on the test split before and after.

    --refine adds ten minutes of gradient steps on unlabelled images. If it is interrupted, the same command resumes it
    from a file beside --output.

    Example: arp-hub compress --model resnet50 --data path/to/images --keep-params 0.5 --output out
    """
    from arp_hub._utils.progress import stage
    from arp_hub.decomposition import decompose
    from arp_hub.hub.load import hub_dataset, published_name
    from arp_hub.hub.save import check_folder, save_pretrained
    from arp_hub.layers.apply_plan import check_plan
    from arp_hub.plan import RankPlan
    from arp_hub.planning.make_plan import make_plan
    from arp_hub.reports import spectra, tables
    from arp_hub.training.data.dataset import calibration_counts

    from .inputs import (
        ModelChoice,
        RefineChoice,
        check_effort,
        open_data,
        open_images,
        open_model,
        plan_options,
        timed_workload,
    )

    workload = timed_workload(batch_size, dtype, channels_last)
    options = plan_options(keep_params, keep_macs, keep_latency, workload, schemes, rank_multiple, exclude, plan)
    check_effort(effort)
    refinement = RefineChoice(refine, refine_minutes, refine_steps, refine_images)
    refinement.check(data)
    check_folder(output, overwrite=overwrite)
    given = None if plan is None else RankPlan.load(plan)
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device, seed)
    network, random_weights = open_model(choice)
    if given is not None:
        check_plan(network, given)
    found = open_data(data, network, image_key, label_key)
    images = open_images(found, calibration, copies, seed, workers)
    counts = calibration_counts(found, calibration, copies) if found else (0, 0)
    test = _test_split(network, found)
    before, falls = _figures(network, test, max_images, workers), spectra.decays(network)
    dense = copy.deepcopy(network) if refinement.wanted else network
    start = time.perf_counter()
    made = given or make_plan(network, **options, calibration=images, effort=effort, progress=True)
    decompose(network, made, images, effort=effort, progress=True)
    refined = refinement.run(network, dense, found, output, seed, workers)
    seconds = time.perf_counter() - start
    after = _figures(network, test, max_images, workers)
    result: dict[str, Any] = {
        "model": model,
        "data": data,
        **({"split": test.name} if test else {}),
        "calibration_images": counts[0],
        "calibration_copies": counts[1],
        "effort": effort,
        "trained": False,
        **({"refinement": asdict(refined)} if refined else {}),
        "random_weights": random_weights,
        "seconds": round(seconds, 2),
        "seed": seed,
        "dense": before,
        **after,
    }
    names = found.class_names if found and test else ()
    metrics = {
        **result,
        "base_model": None if checkpoint or random_weights else published_name(model, network),
        "dataset": hub_dataset(data),
        "shared_images": bool(test and found and found.train.name == found.test.name),
        "plan": made.to_dict(),
        "dense": {**before, "spectra": falls},
        "spectra": spectra.decays(network),
    }
    with stage("save"):
        save_pretrained(network, output, metrics=metrics, label_names=names or None, overwrite=overwrite)
    if as_json:
        print_json({**result, "output": str(output)})
    else:
        title = f"{model}, {'refined without labels' if refined else 'no training'}, {seconds:.0f} s"
        print_tables(tables.comparison_table({"dense": before, "decomposed": after}, title))
        note(f'saved; load it with timm.create_model("local-dir:{output}", pretrained=True) after `import arp_hub`')


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    split: Annotated[str, typer.Option(help="Split to measure on: test, train, or any other of the data.")] = "test",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    input_size: InputSize = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 256,
    max_images: Annotated[int | None, typer.Option(help=f"Measure on {MAX_IMAGES_HELP}", min=1)] = None,
    workers: Workers = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 (per cent), loss (nats), parameters and multiply-accumulates.

    Example: arp-hub evaluate --model local-dir:out --data uoft-cs/cifar10 --json
    """
    from arp_hub._utils.progress import stage
    from arp_hub.layers.model import count_params
    from arp_hub.layers.trace import count_macs
    from arp_hub.reports import tables
    from arp_hub.training import evaluate

    from .inputs import ModelChoice, open_labelled, open_model

    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device)
    network, random_weights = open_model(choice)
    part = open_labelled(data, network, image_key, label_key).split(split)
    with stage("measure accuracy"):
        scores = evaluate(network, part, batch_size=batch_size, workers=workers, max_images=max_images)
    result = {**scores, "params": count_params(network), "macs": count_macs(network)}
    if as_json:
        print_json({"model": model, "random_weights": random_weights, "data": data, "split": split, **result})
    else:
        print_tables(tables.comparison_table({model: result}, f"{data}, split {split}"))


@app.command()
def bench(
    model: Model,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    batch_size: Annotated[
        str, typer.Option(help="Images per forward pass; several values separated by commas.")
    ] = "1,32",
    dtype: Dtype = "float32",
    channels_last: ChannelsLast = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile both models with torch.compile first.")] = False,
    seconds: Annotated[float, typer.Option(help="Seconds to measure each batch size.")] = 10.0,
    input_size: InputSize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of a compressed model and of its dense form, in turns: medians with quartiles.

    A ratio below 1 is faster than dense. With OMP_NUM_THREADS=1, times are CPU seconds, which other processes hardly
    affect.

    Example: arp-hub bench --model local-dir:out --batch-size 1,32 --json
    """
    from arp_hub._utils.environment import environment
    from arp_hub._utils.progress import counted
    from arp_hub.reports import tables
    from arp_hub.reports.benchmark import benchmark

    from .inputs import ModelChoice, batch_sizes, open_model, timed_workload

    workloads = [timed_workload(size, dtype, channels_last) for size in batch_sizes(batch_size)]
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device)
    network, random_weights = open_model(choice)
    found = [
        benchmark(network, workload, compiled=compiled, seconds=seconds)
        for workload in counted(workloads, "time batch sizes")
    ]
    if as_json:
        described = {"model": model, "random_weights": random_weights, **environment()}
        print_json({**described, "latency": [one.to_dict() for one in found]})
    else:
        print_tables(tables.latency_table(found, model))


@app.command()
def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    plan: Annotated[Path | None, typer.Option(help="A plan, to show the violation of each layer.")] = None,
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
    layer or of --plan; and the violation, the relative squared distance to that plan. Ranks are those of scheme
    'channel'. With --data, spectra are those of the layers' outputs on calibration images.

    Example: arp-hub inspect --model resnet50 --plot spectra.png
    """
    from arp_hub._utils.progress import counted
    from arp_hub.layers.apply_plan import check_plan, plan_of
    from arp_hub.plan import RankPlan
    from arp_hub.reports import spectra, summary, tables
    from arp_hub.reports.plots import check_picture_path, save_figure, spectra_figure

    from .inputs import ModelChoice, open_data, open_images, open_model

    given = None if plan is None else RankPlan.load(plan)
    if plot is not None:
        check_picture_path(plot)
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device, seed)
    network, random_weights = open_model(choice)
    schemes = {} if given is None else check_plan(network, given)
    images = open_images(open_data(data, network, image_key, None), calibration, 0, seed, workers)
    layers = spectra.decomposable_layers(network)
    if images is None:
        found = {name: spectra.spectrum(layer) for name, layer in counted(layers.items(), "spectra")}
    else:
        found = spectra.output_spectra(network, layers, images)
    shown = given or plan_of(network)
    distances = {
        name: spectra.violation(layers[name], scheme, shown.layers[name].rank)
        for name, scheme in counted(schemes.items(), "violations")
    }
    rows = summary.spectrum_reports(network, found, shown, distances)
    metric = "weights" if images is None else "outputs"
    if plot is not None:
        ranks = {name: entry.rank for name, entry in shown.layers.items()}
        save_figure(spectra_figure(found, ranks, f"{model}: spectra of {metric}"), plot)
    if as_json:
        listed = [row.to_dict() for row in rows]
        described = {"model": model, "random_weights": random_weights, "metric": metric}
        print_json({**described, "layers": listed, "plot": plot and str(plot)})
    else:
        print_tables(tables.spectrum_table(rows, f"{model}, {metric}"))


app.command("export")(export_command)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder with a saved model.", show_default=False)],
    repo_id: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub; created if it does not exist.")
    ],
    token: Annotated[
        str | None, typer.Option(help="Token for the Hub; by default HF_TOKEN, or that of `hf auth login`.")
    ] = None,
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to write to; by default main.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag for this version, such as v1.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of writing to the branch.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    dense_revision: Annotated[
        str, typer.Option(help="Branch for the dense model with merged weights, which plain timm loads.")
    ] = "dense",
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Do not push that branch.")] = False,
    base_model: Annotated[str | None, typer.Option(help="For the card: the dense model on the Hub.")] = None,
    dataset: Annotated[str | None, typer.Option(help="For the card: the data set on the Hub.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card; by default the backbone's.")] = None,
    with_latency: Annotated[
        bool, typer.Option("--bench", help="For the card: measure the latency here, at batch sizes 1 and 32.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a saved model with its card, in one commit on each branch.

    The next push keeps what you write between the owner's marks of the card.

    Example: arp-hub push out me/resnet50-arp --tag v1
    """
    from huggingface_hub.utils import disable_progress_bars

    from arp_hub.hub.push import push_to_hub

    if not interactive():
        disable_progress_bars()
    latency = _latency(folder) if with_latency else None
    about = {"base_model": base_model, "dataset": dataset, "license": license, "latency": latency}
    done = push_to_hub(
        folder,
        repo_id,
        token=token,
        private=private,
        revision=revision,
        tag=tag,
        create_pr=create_pr,
        commit_message=message,
        metrics={key: value for key, value in about.items() if value},
        dense_revision=None if no_dense else dense_revision,
    )
    if as_json:
        print_json(asdict(done))
    else:
        at = "" if done.revision == "main" and not tag else f"@{tag or done.revision}"
        note(f"published: {done.url}")
        note(f'load it with timm.create_model("hf-hub:{done.repo_id}{at}", pretrained=True) after `import arp_hub`')


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished or unfinished run: OUTPUT-run.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html into a run's folder: curves, violations, ranks, spectra, accuracy and size.

    A finished run already has one. Use this command to follow an unfinished run.

    Example: arp-hub report runs/quickstart-run
    """
    from arp_hub.reports.run_page import write_report

    path = write_report(folder)
    if as_json:
        print_json({"report": str(path)})
    else:
        note(f"report written to {path}")


@app.command("doctor")
def doctor_command(as_json: AsJson = False) -> None:
    """Check the installation: versions, devices, access to the Hub and login, disk space.

    Every problem is printed with its solution. The exit code is 1 if there is one.

    Example: arp-hub doctor
    """
    from . import doctor

    found = doctor.examine()
    if as_json:
        print_json(found)
    else:
        print_tables(doctor.table(found))
    for problem in found["problems"]:
        note(f"problem: {problem}")
    if found["problems"]:
        raise typer.Exit(1)
    note("no problem found")


def _latency(folder: Path) -> list[dict[str, Any]]:
    """Latency of a saved model and of its dense form on this machine."""
    from arp_hub._utils.environment import environment
    from arp_hub.reports.benchmark import benchmark
    from arp_hub.timing import Workload

    from .inputs import ModelChoice, open_model

    network, _ = open_model(ModelChoice(f"local-dir:{folder}"))
    hardware = environment()["hardware"]
    place = {"hardware": hardware.get("gpu", hardware["cpu"])}
    return [{**benchmark(network, Workload(size)).to_dict(), **place} for size in (1, 32)]


def _figures(model: nn.Module, test: Split | None, max_images: int | None, workers: int) -> dict[str, Any]:
    """Size, and accuracy if there are test images."""
    from arp_hub._utils.progress import stage
    from arp_hub.layers.model import count_params
    from arp_hub.layers.trace import count_macs
    from arp_hub.training import evaluate

    size = {"params": count_params(model), "macs": count_macs(model)}
    if test is None:
        return size
    with stage("measure accuracy"):
        return {**evaluate(model, test, workers=workers, max_images=max_images), **size}


def _test_split(model: nn.Module, data: ImageData | None) -> Split | None:
    """The test images, if they have labels that fit the classes of the model."""
    from arp_hub.training.evaluate import why_not_measured

    if data is None or data.test.labels is None:
        return None
    if reason := why_not_measured(model, data.test):
        note(f"accuracy is not measured: {reason}")
        return None
    return data.test
