"""The model card: how to load the model, what it is, and its numbers from ``metrics.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .._utils.parse import parse_yaml
from ..reports.model_figures import decays_figure, moved, ranks_figure, violation_figure
from ..reports.plots import can_draw, save_figure
from . import card_exports
from . import card_text as text
from .card_names import command, plain_data_name

TEMPLATE = Path(__file__).with_name("templates") / "card.md"
PICTURES = {
    "ranks.png": "Rank and parameters of each decomposed layer",
    "spectra.png": "Singular values of each dense layer in its scheme: the plan keeps the coloured part",
    "violation.png": "Distance of the layers from their ranks during training",
}
"""Files that `draw_pictures` may write, with their captions."""
_OPEN, _CLOSE = re.compile(r"<!-- owner: [^>\n]{0,200}-->\n"), "<!-- /owner -->"
_PROJECT = "https://github.com/arp-hub/arp-hub"
_TIMM = "https://github.com/huggingface/pytorch-image-models#licenses"
"""Where timm lists the licences of its weights."""
_LISTED_LICENSES = frozenset(
    """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
    lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa
    odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib""".split()
)
"""Values that the Hub accepts for ``license:`` (https://huggingface.co/docs/hub/repositories-licenses)."""
_TAGS, _TAGS_OF_DECOMPOSED = ("arp-hub", "timm"), ("low-rank", "model-compression")
"""Tags of every card, and of those of decomposed models."""
_OF_OTHER = {"license_name", "license_link"}
"""Keys of the card's head that name a license which the Hub does not list."""
_RELATION = "finetune"
_GENERATED = {*ModelCardData(model_name="").__dict__, "base_model_relation", "model-index"} - {"language", *_OF_OTHER}
"""Keys of the card's head that every push writes; keys that an owner adds are kept."""


UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What `draw_pictures` and `model_card` raise if an entry of the metrics has an unexpected type."""


def model_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    name: str,
    *,
    pictures: Sequence[str] = (),
    dense: str | None = None,
    tag: str | None = None,
    export: Any = None,
) -> str:
    """Render the card.

    Args:
        config: The model's ``config.json``.
        metrics: Its ``metrics.json``. The card leaves out lines whose numbers are missing.
        name: The name to load the model by: ``local-dir:FOLDER`` or ``hf-hub:USER/NAME``.
        pictures: Pictures in the card's folder, named as in `PICTURES`.
        dense: Revision that holds the merged model, if any.
        tag: Tag of this version, if any.
        export: The folder's exports, as `export_files.read_export` finds them, if any: the card lists them, and its
            table has a column for an int8 model.

    Returns:
        Markdown with a YAML head, in the Hub's format.
    """
    if config["num_classes"] <= 5 and metrics.get("top5") == 100:  # as it always is
        metrics = {key: value for key, value in metrics.items() if key != "top5"}
    args = config.get("model_args", {})
    plan = args.get("plan")
    backbone = args.get("backbone", config["architecture"])
    card = ModelCard.from_template(
        card_data(config, metrics, name),
        template_path=str(TEMPLATE),
        title=_title(name),
        name=name,
        repository=_repository(name),
        project=_PROJECT,
        backbone=backbone,
        stock=not backbone.startswith("cifar_"),
        decomposed=plan is not None,
        merged_from=metrics.get("merged_from"),
        summary=text.summary(metrics),
        accuracy=text.accuracy(metrics),
        classes=config["num_classes"],
        channels=metrics["input_size"][0],
        dense=dense,
        tag=tag,
        numbers=text.numbers(metrics, plan is not None, card_exports.int8(export, metrics)),
        notes=text.notes(metrics),
        exports=card_exports.exports(export),
        stages=text.stages(metrics),
        layers=len(plan["layers"]) if plan else 0,
        schemes=text.schemes(plan) if plan else "",
        decomposed_layers=text.decomposed_layers(metrics),
        dense_layers=text.dense_layers(metrics),
        pictures=[(file, PICTURES[file]) for file in PICTURES if file in pictures],
        facts=list(text.facts(metrics)),
        recipe=text.recipe(metrics),
        command=command(metrics),
        limits=text.limits(metrics, plan is not None),
    )
    return str(card.content).rstrip() + "\n"


def card_data(config: Mapping[str, Any], metrics: Mapping[str, Any], name: str) -> ModelCardData:
    """The card's head. It lists results only if accuracy was measured on known data."""
    decomposed = "plan" in config.get("model_args", {})
    base, dataset = metrics.get("base_model"), metrics.get("dataset")
    results = _results(metrics)
    return ModelCardData(
        model_name=_title(name) if results else None,
        eval_results=results or None,
        library_name="timm",
        **_license(metrics.get("license") or config["pretrained_cfg"].get("license"), metrics),
        pipeline_tag="image-classification" if config["num_classes"] else "image-feature-extraction",
        base_model=base,
        base_model_relation=_RELATION if base else None,
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"] if results else None,
        tags=[*_TAGS, *(_TAGS_OF_DECOMPOSED if decomposed else ())],
    )


def draw_pictures(folder: Path, metrics: Mapping[str, Any]) -> list[str]:
    """Draw the pictures that the metrics have numbers for; none if matplotlib is missing.

    Returns:
        The names of the pictures.
    """
    if not can_draw():
        return []
    figures = {}
    rows = [row for row in metrics.get("layers", ()) if row["scheme"]]
    if rows:
        figures["ranks.png"] = ranks_figure(rows)
    spectra = metrics.get("spectra") or {}
    spectra = {name: found for name, found in spectra.items() if not isinstance(found, list)}  # an older format
    if spectra and rows:
        figures["spectra.png"] = decays_figure(spectra, {row["name"]: (row["scheme"], row["rank"]) for row in rows})
    if moved(history := metrics.get("history", ())):
        figures["violation.png"] = violation_figure(history)
    for file, figure in figures.items():
        save_figure(figure, folder / file)
    return list(figures)


def keep_by_hand(card: str, *earlier: str) -> str:
    """Copy the owner's edits from earlier cards into the new one. Of two cards that differ, the first counts.

    These are the text between the two owner's marks, and the keys of the head that arp_hub does not write.
    """
    notes = next(filter(None, map(by_hand, earlier)), "")
    if notes and (place := _owner_place(card)):
        card = f"{card[: place.start]}{notes}\n{card[place.stop :]}"
    for one in earlier:
        card = _keep_head(card, one)
    return card


def _keep_head(card: str, earlier: str) -> str:
    """Copy the owner's tags and entries from the head of an earlier card."""
    before, head = _head(earlier), _head(card)
    written = _GENERATED - {key for key in _origin_by_hand(before) if key not in head}
    if head.get("license", "other") != "other":
        written |= _OF_OTHER
    kept = {key: value for key, value in before.items() if key not in head and key not in written}
    if "base_model" in kept and "base_model_relation" in before:
        kept["base_model_relation"] = before["base_model_relation"]
    extra = [tag for tag in _tags(before) if tag not in (*_tags(head), *_TAGS, *_TAGS_OF_DECOMPOSED)]
    if not kept and not extra:
        return card
    head = {**head, **kept, "tags": [*_tags(head), *extra]}
    new = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{new}---\n{_parts(card)[2].lstrip()}"


def _origin_by_hand(head: Mapping[str, Any]) -> set[str]:
    """Keys that a push writes if it knows them, where the owner may have written them in this head.

    A push gives its base the relation `_RELATION`, and lists its data set in the results, too.
    """
    keys = {"license"}
    if head.get("base_model_relation") != _RELATION:
        keys |= {"base_model"}
    named, results = head.get("datasets"), str(head.get("model-index"))
    if not (isinstance(named, list) and any(str(name) in results for name in named)):
        keys |= {"datasets"}
    return keys


def by_hand(card: str) -> str:
    """The owner's text between the marks of a card."""
    place = _owner_place(card)
    return card[place].strip() if place else ""


def _owner_place(card: str) -> slice | None:
    """Where the owner's text is: between the first opening mark and the next closing one."""
    opening = _OPEN.search(card)
    end = card.find(_CLOSE, opening.end()) if opening else -1
    return slice(opening.end(), end) if opening and end >= 0 else None


def _license(name: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The licence in the Hub's format: ``other`` with a name and a link if the Hub does not list it."""
    if not name or str(name).lower() in _LISTED_LICENSES:
        return {"license": name and str(name).lower()}
    base = metrics.get("base_model")
    link = metrics.get("license_link") or (f"https://huggingface.co/{base}" if base else _TIMM)
    return {"license": "other", "license_name": str(name), "license_link": link}


def _title(name: str) -> str:
    kind, _, rest = name.partition(":")
    return (_repository(name).partition(":")[2] if kind == "hf-hub" else rest).rpartition("/")[2]


def _repository(name: str) -> str:
    """A name without its revision."""
    return name.partition("@")[0] if name.startswith("hf-hub:") else name


def _results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    data = metrics.get("dataset") or metrics.get("data")
    if not data:
        return []
    part = f" ({metrics['images']:,d} images of the split)" if metrics.get("limited") else ""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=str(data) if metrics.get("dataset") else "imagefolder",
            dataset_name=plain_data_name(metrics) + part,
            dataset_split=metrics.get("split"),
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(metrics[key], 4),
        )
        for key, label in (("top1", "top-1 accuracy, %"), ("top5", "top-5 accuracy, %"))
        if key in metrics
    ]


def _head(card: str) -> dict[str, Any]:
    """The YAML head of a card, empty if it cannot be read."""
    parts = _parts(card)
    try:
        head = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except ValueError:
        head = {}
    return head if isinstance(head, dict) else {}


def _parts(card: str) -> list[str]:
    """What stands before, in and behind the head of a card."""
    return re.split(r"^---\n", card, maxsplit=2, flags=re.M)


def _tags(head: Mapping[str, Any]) -> list[str]:
    tags = head.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
