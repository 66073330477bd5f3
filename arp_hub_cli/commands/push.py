"""``arp-hub push``: publish a saved model on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import AsJson, card_option, hub_option
from ..terminal import interactive, note, print_json


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with a saved model.", show_default=False)],
    repo_id: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub; created if it does not exist.")
    ],
    token: Annotated[
        str | None,
        hub_option(metavar="TOKEN", help="Token for the Hub; by default HF_TOKEN, or that of `hf auth login`."),
    ] = None,
    private: Annotated[
        bool | None, hub_option("--private/--no-private", help="Whether a new repository is private.")
    ] = None,
    revision: Annotated[str | None, hub_option(metavar="BRANCH", help="Branch to write to; by default main.")] = None,
    tag: Annotated[str | None, hub_option(metavar="TAG", help="Tag for this version, such as v1.")] = None,
    create_pr: Annotated[
        bool, hub_option("--create-pr", help="Open a pull request instead of writing to the branch.")
    ] = False,
    message: Annotated[str | None, hub_option(metavar="TEXT", help="Title of the commit.")] = None,
    dense_revision: Annotated[
        str,
        hub_option(
            metavar="BRANCH",
            help="Branch for the dense model with merged weights, which plain timm loads.",
            show_default=True,
        ),
    ] = "dense",
    no_dense: Annotated[bool, hub_option("--no-dense", help="Do not push that branch.")] = False,
    base_model: Annotated[str | None, card_option(metavar="USER/NAME", help="The dense model on the Hub.")] = None,
    dataset: Annotated[str | None, card_option(metavar="USER/NAME", help="The data set on the Hub.")] = None,
    license: Annotated[str | None, card_option(metavar="NAME", help="The license; by default the backbone's.")] = None,
    with_latency: Annotated[
        bool, card_option("--bench", help="Measure the latency here, at batch sizes 1 and 32.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a saved model with its card, in one commit on each branch.

    The next push keeps what you write between the owner's marks of the card.

    Example:
        arp-hub push out me/resnet50-arp --tag v1
    """
    from huggingface_hub.utils import disable_progress_bars

    from arp_hub.hub.push import check_push, push_to_hub
    from arp_hub.reports.tables import printable

    if not interactive():
        disable_progress_bars()
    if with_latency:
        check_push(repo_id, token=token)
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
        print(printable(f"published: {done.url}"))
        note(f'load it with timm.create_model("hf-hub:{done.repo_id}{at}", pretrained=True) after `import arp_hub`')


def _latency(folder: Path) -> list[dict[str, Any]]:
    """Latency of a saved model and of its dense form on this machine."""
    from arp_hub._utils.environment import environment
    from arp_hub.reports.benchmark import benchmark
    from arp_hub.timing import Workload

    from ..inputs import ModelChoice, open_model

    network, _ = open_model(ModelChoice(f"local-dir:{folder}"))
    hardware = environment()["hardware"]
    place = {"hardware": hardware.get("gpu", hardware["cpu"])}
    return [{**benchmark(network, Workload(size)).to_dict(), **place} for size in (1, 32)]
