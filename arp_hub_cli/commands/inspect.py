"""``arp-hub inspect``: spectra, ranks and violations of the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..options import (
    AsJson,
    Checkpoint,
    Data,
    Device,
    ImageKey,
    InputSize,
    LabelKey,
    Model,
    ModelKwargs,
    NumClasses,
    Pretrained,
    Seed,
    Streaming,
    Workers,
    data_option,
    fit_option,
    output_option,
)
from ..terminal import print_json, print_tables


def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    plan: Annotated[
        Path | None, fit_option(metavar="FILE", help="A plan, to show the violation of each layer.", show_default=False)
    ] = None,
    data: Data = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    streaming: Streaming = False,
    calibration: Annotated[
        int | None,
        data_option(
            "--calibration-images",
            metavar="N",
            help="Training images of --data for the spectra of outputs; by default 64.",
            min=1,
            show_default=False,
        ),
    ] = None,
    input_size: InputSize = None,
    workers: Workers = 0,
    device: Device = None,
    seed: Seed = 0,
    plot: Annotated[
        Path | None, output_option(metavar="FILE", help="Picture to write: .png, .svg or .pdf.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show singular-value spectra, ranks and violations, layer by layer.

    Columns: full rank; the ranks that keep 90 and 99 % of the energy; the stable rank; scheme and rank of a decomposed
    layer or of --plan. The violation is the relative squared distance to that plan. Ranks are those of scheme
    'channel'. With --data, spectra are those of the layers' outputs on calibration images.

    Example:
        arp-hub inspect --model resnet50 --plot spectra.png
    """
    from arp_hub._utils.progress import counted
    from arp_hub.layers.apply_plan import check_plan, plan_of
    from arp_hub.plan import RankPlan
    from arp_hub.reports import spectra, summary, tables
    from arp_hub.reports.model_figures import spectra_figure
    from arp_hub.reports.plots import check_picture_path, save_figure

    from ..inputs import ModelChoice, check_data_options, open_data, open_images, open_model

    given = None if plan is None else RankPlan.load(plan)
    if plot is not None:
        check_picture_path(plot)
    check_data_options(
        data,
        image_key=image_key,
        label_key=label_key,
        streaming=streaming,
        calibration_images=calibration,
        workers=workers or None,
    )
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device, seed)
    network, random = open_model(choice)
    schemes = {} if given is None else check_plan(network, given)
    images = open_images(open_data(data, network, image_key, label_key, streaming), calibration or 64, 0, seed, workers)
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
        ranks = {name: entry.rank for name, entry in shown.layers.items() if entry.scheme == "channel"}
        save_figure(spectra_figure(found, ranks, f"{model}: spectra of {metric}"), plot)
    if as_json:
        listed = [row.to_dict() for row in rows]
        described = {"model": model, **random, "metric": metric}
        print_json({**described, "layers": listed, "plot": plot and str(plot)})
    else:
        print_tables(tables.spectrum_table(rows, f"{model}, {metric}"))
