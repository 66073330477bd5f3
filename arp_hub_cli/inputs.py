"""Turn command-line options into a model, its data and the arguments of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import timm
import torch
from torch import Tensor, nn

from arp_hub._utils.progress import stage, watched
from arp_hub.effort import EFFORTS
from arp_hub.errors import ArpHubError, check_writable
from arp_hub.hub.client import FAILURES
from arp_hub.hub.load import check_name, is_saved_model, load_model, set_input_size
from arp_hub.layers.trace import InputSize
from arp_hub.models.arguments import read_arguments
from arp_hub.plan import RankPlan
from arp_hub.refinement import LEAST_IMAGES, Refinement, refine
from arp_hub.refinement.state import StateFile
from arp_hub.schemes import SCHEMES
from arp_hub.timing import DTYPES, PRECISIONS, RUNTIMES, Workload
from arp_hub.training import ImageData, calibration_images, load_data, refinement_images

from .processes import is_first
from .terminal import note


def plan_options(
    keep_params: float | None,
    keep_macs: float | None,
    keep_latency: float | None,
    workload: Workload,
    schemes: str | None,
    rank_multiple: int | None,
    exclude: str | None,
    plan: Path | None = None,
) -> dict[str, Any]:
    """Arguments of `make_plan`, checked before any work is done."""
    shares = {"keep_params": keep_params, "keep_macs": keep_macs, "keep_latency": keep_latency}
    budget = {name: share for name, share in shares.items() if share is not None}
    if len(budget) + (plan is not None) != 1:
        raise ArpHubError(
            "give exactly one of --keep-params, --keep-macs and --keep-latency (or, to compress, a --plan)"
        )
    if keep_latency is None and workload != Workload():
        raise ArpHubError(
            "--batch-size, --dtype, --channels-last, --runtime and --precision apply to --keep-latency only: give it "
            "too, or leave them out"
        )
    if plan is not None and (schemes is not None or exclude is not None or rank_multiple is not None):
        raise ArpHubError("--schemes, --exclude and --rank-multiple cannot change a given --plan: leave them out")
    for name, share in budget.items():
        if not 0 < share < 1:
            raise ArpHubError(
                f"{_option(name)} must lie between 0 and 1 (the share to keep, 0.5 for half), got {share:g}"
            )
    chosen = _list(schemes)
    if chosen == ():
        raise ArpHubError(f"--schemes names none: choose from {', '.join(SCHEMES)}")
    for name in chosen or ():
        if name not in SCHEMES:
            raise ArpHubError(f"unknown scheme '{name}': choose from {', '.join(SCHEMES)}")
    if rank_multiple is not None and rank_multiple < 1:
        raise ArpHubError(f"--rank-multiple must be at least 1, got {rank_multiple}")
    timed = {} if keep_latency is None else {"workload": workload}
    return {**budget, **timed, "schemes": chosen, "rank_multiple": rank_multiple, "exclude": _list(exclude)}


def _option(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def _list(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def batch_sizes(text: str) -> list[int]:
    """Batch sizes from ``1,32``."""
    try:
        return [int(part) for part in _list(text) or ()] or [1]
    except ValueError:
        raise ArpHubError(f"--batch-size takes whole numbers separated by commas, such as 1,32, got '{text}'") from None


def timed_workload(batch_size: int, dtype: str, channels_last: bool, runtime: str, precision: str) -> Workload:
    """The forward pass to time, checked with messages that name the options."""
    if batch_size < 1:
        raise ArpHubError(f"--batch-size must be at least 1, got {batch_size}")
    if dtype not in DTYPES:
        raise ArpHubError(f"unknown --dtype '{dtype}': choose one of {', '.join(DTYPES)}")
    for option, given, names in (("--runtime", runtime, RUNTIMES), ("--precision", precision, PRECISIONS)):
        if given not in names:
            raise ArpHubError(f"unknown {option} '{given}': choose one of {', '.join(names)}")
    return Workload(batch_size, dtype, channels_last, runtime, precision)


def check_effort(name: str) -> None:
    """Refuse an unknown preset before any work."""
    if name not in EFFORTS:
        raise ArpHubError(f"unknown --effort '{name}': choose one of {', '.join(EFFORTS)}")


def effort_images(name: str) -> int:
    """Number of calibration images, with their copies, that a preset of effort uses at most; 0 for all."""
    return EFFORTS[name].images


def check_plan_file(path: Path, overwrite: bool) -> None:
    """Refuse to overwrite a file that is not a plan."""
    if not path.parent.is_dir():
        raise ArpHubError(f"cannot write '{path}': there is no folder '{path.parent}'")
    check_writable(path.parent, path)
    if path.is_dir():
        raise ArpHubError(f"cannot write the plan '{path}': it is a folder")
    if path.exists() and not overwrite:
        try:
            RankPlan.load(path)
        except ArpHubError:
            raise ArpHubError(
                f"'{path}' exists and is not a plan: choose another --output, or add --overwrite"
            ) from None


@dataclass(frozen=True)
class ModelChoice:
    """The options that name a model.

    Attributes:
        name: As `load_model` takes it.
        checkpoint: A weights file.
        pretrained: Whether to load pretrained weights; None loads them if the model has any.
        num_classes: Classes of a new classifier.
        model_kwargs: Arguments of the model as words ``NAME=VALUE``.
        input_size: Channels, height and width, if they differ from the model's.
        device: Name of a device; by default the GPU if there is one.
        seed: Seed of random weights.
    """

    name: str
    checkpoint: Path | None = None
    pretrained: bool | None = None
    num_classes: int | None = None
    model_kwargs: Sequence[str] | None = None
    input_size: InputSize | None = None
    device: str | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The model's arguments, checked before the model is built.

        Raises:
            ArpHubError: If an argument is malformed, or options contradict each other.
        """
        found = read_arguments(self.model_kwargs or (), "--model-kwargs")
        classes = found.setdefault("num_classes", self.num_classes)
        if self.num_classes is not None and classes != self.num_classes:
            raise ArpHubError(
                f"--num-classes {self.num_classes} and --model-kwargs num_classes={classes} differ: give one of them"
            )
        if self.input_size is not None:
            if min(self.input_size) < 1:
                raise ArpHubError(f"--input-size must be three numbers above 0, got {_words(self.input_size)}")
            check_name(self.name)
            if own := timm.get_pretrained_cfg(self.name) if timm.is_model(self.name) else None:
                self._check_channels(found.get("in_chans", own.input_size[0]))
                if own.fixed_input_size and "img_size" not in found:
                    found["img_size"] = list(self.input_size[1:])
        return found

    def take_input_size(self, model: nn.Module) -> None:
        """Set the input size of the model to ``--input-size``.

        Raises:
            ArpHubError: If the model does not take images of this size.
        """
        if self.input_size is None:
            return
        own = timm.models.get_model_input_config(model)
        channels, *sides = own["input_size"]
        self._check_channels(channels)
        if own["fixed_input_size"] and tuple(sides) != self.input_size[1:]:
            raise ArpHubError(
                f"--input-size {_words(self.input_size)}: '{self.name}' takes images of {sides[0]} x {sides[1]} "
                f"pixels: leave it out, or add --model-kwargs img_size={self.input_size[1]}"
            )
        set_input_size(model, self.input_size)

    def _check_channels(self, channels: int) -> None:
        given = cast(InputSize, self.input_size)
        if given[0] != channels:
            raise ArpHubError(
                f"--input-size {_words(given)}: '{self.name}' takes images of {channels} channels: give "
                f"--input-size {_words((channels, *given[1:]))}, or add --model-kwargs in_chans={given[0]}"
            )


@dataclass(frozen=True)
class RefineChoice:
    """The options of a refinement.

    Attributes:
        given: Whether ``--refine`` is given.
        minutes: ``--refine-minutes``.
        steps: ``--refine-steps``.
        images: ``--refine-images``; None for the usual number.
    """

    given: bool
    minutes: float | None
    steps: int | None
    images: int | None

    @property
    def wanted(self) -> bool:
        """Whether to refine: its length implies it."""
        return self.given or self.minutes is not None or self.steps is not None

    def check(self, data: str | None) -> None:
        """Refuse what makes no refinement, before any work.

        Raises:
            ArpHubError: In the words of the options.
        """
        if self.images is not None and not self.wanted:
            raise ArpHubError(f"--refine-images {self.images} has no effect without --refine: add --refine")
        if not self.wanted:
            return
        if data is None:
            lengths = {"--refine-minutes": self.minutes, "--refine-steps": self.steps}
            given = next((option for option, length in lengths.items() if length is not None), "--refine")
            raise ArpHubError(f"{given} needs unlabelled images: give --data")
        if self.minutes is not None and self.steps is not None:
            raise ArpHubError("--refine-minutes and --refine-steps both bound the refinement: give one of them")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ArpHubError(f"--refine-minutes must be a number above 0, got {self.minutes:g}")
        if self.steps is not None and self.steps < 1:
            raise ArpHubError(f"--refine-steps must be at least 1, got {self.steps}")
        if self.images is not None and self.images < LEAST_IMAGES:
            raise ArpHubError(f"--refine-images must be at least {LEAST_IMAGES}, got {self.images}")

    def check_state(self, output: Path, seed: int) -> None:
        """Refuse the state of a refinement with other settings, which an earlier command has left, before any work.

        Raises:
            ArpHubError: If there is one, or the file cannot be read.
        """
        if self.wanted:
            given = {"minutes": self.minutes} if self.minutes is not None else {}
            StateFile(state_file(output), {"steps": self.steps, "seed": seed, **given}).load()

    def check_data(self, data: ImageData | None) -> None:
        """Refuse data with too few images.

        Raises:
            ArpHubError: If so.
        """
        if self.wanted and data is not None and 0 < len(data.train) < LEAST_IMAGES:  # 0 if a stream has no count
            raise ArpHubError(
                f"refinement needs at least {LEAST_IMAGES} images, the training split has {len(data.train)}: "
                "give more, or leave the refinement out"
            )

    def run(
        self,
        model: nn.Module,
        dense: nn.Module,
        data: ImageData | None,
        output: Path,
        seed: int,
        workers: int,
        timed: RankPlan | None = None,
    ) -> Refinement | None:
        """Refine the model in place; None if no refinement is wanted. Ctrl-C says how to resume it.

        The state stays beside ``output`` until the caller has saved the model.

        Args:
            model: The decomposed model.
            dense: Its dense form.
            data: The data.
            output: Folder of the finished model; the state lies beside it.
            seed: Seed of the choice of images, and of the refinement.
            workers: DataLoader workers.
            timed: The plan, if timings made it, so that the same command would make another.
        """
        if data is None or not self.wanted:
            return None
        with stage("read images to refine on"):
            images, held_out = refinement_images(data, self.images, seed=seed, workers=workers)
        state = state_file(output)
        settings: dict[str, Any] = {"minutes": self.minutes, "steps": self.steps, "seed": seed}
        settings |= {"state": state, "keep_state": True, "progress": True}
        try:
            return refine(model, dense, images, held_out=held_out, **settings)
        except KeyboardInterrupt as stop:
            if not state.exists():
                raise
            if timed is None:
                raise KeyboardInterrupt(f"The same command resumes the refinement from '{state}'") from stop
            file = output.with_name(f"{output.name}-refinement-plan.json")
            if is_first():
                timed.save(file)
            raise KeyboardInterrupt(
                f"The same command resumes the refinement from '{state}', with --plan {file} in place of "
                "--keep-latency and of all options that need it or shape a plan"
            ) from stop


def state_file(output: Path) -> Path:
    """Where the state of a refinement lies: beside the folder of the finished model."""
    return output.with_name(f"{output.name}-refinement.safetensors")


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def open_model(choice: ModelChoice, meta: bool = False) -> tuple[nn.Module, dict[str, bool]]:
    """The model on its device, and whether its weights or only those of a new classifier are random.

    Args:
        choice: The options that name it.
        meta: Whether the command can work on shapes only.

    Raises:
        ArpHubError: If the model or device does not exist, options contradict each other, or weights do not load.
    """
    place, name, checkpoint, pretrained = _device(choice.device), choice.name, choice.checkpoint, choice.pretrained
    if place.type == "meta" and not meta:
        raise ArpHubError("--device meta holds no weights: only `plan` without --data works with it; choose cpu")
    if place.type == "meta" and (checkpoint is not None or pretrained):
        given = f"--checkpoint {checkpoint}" if checkpoint is not None else "--pretrained"
        raise ArpHubError(f"--device meta holds no weights: leave out {given}, or choose cpu")
    if pretrained and checkpoint is not None:
        raise ArpHubError(f"--pretrained and --checkpoint {checkpoint} both name weights: give one of them")
    has_own = is_saved_model(name) or timm.models.is_model_pretrained(name)
    if pretrained and not has_own and timm.is_model(name):
        raise ArpHubError(f"--pretrained: timm has no weights for '{name}': give --checkpoint, or --no-pretrained")
    arguments = choice.arguments()
    torch.manual_seed(choice.seed)
    if place.type == "meta":  # only the structure, which takes no memory
        with place:
            network = load_model(name, pretrained=False, **arguments)
        choice.take_input_size(network)
        return network, {"random_weights": False, "random_classifier": False}
    try:
        network = load_model(name, checkpoint, pretrained=pretrained, **arguments)
    except ArpHubError as error:
        if checkpoint is None and isinstance(error.__cause__, FAILURES) and not is_saved_model(name):
            raise ArpHubError(f"{error}; or give --checkpoint FILE, or --no-pretrained for random weights") from error
        raise
    choice.take_input_size(network)
    random = checkpoint is None and (pretrained is False or not has_own)
    if random:
        note(f"warning: the weights of '{name}' are random: give --checkpoint FILE, or a model that has weights")
    classes = None if random or checkpoint is not None else _classes_of_weights(network)
    if classes is not None:
        note(f"warning: the classifier is random, because the weights of '{name}' have {classes} classes, not "
             f"{network.num_classes}: give --checkpoint FILE")  # fmt: skip
    return network.to(place), {"random_weights": random, "random_classifier": classes is not None}


def _classes_of_weights(network: nn.Module) -> int | None:
    """The number of classes of a model's own weights, if it has another one itself."""
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    known, own = cfg.get("num_classes"), getattr(network, "num_classes", None)
    return known if own and known is not None and known != own else None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float64, device=device)  # which Apple GPUs lack
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        here = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        raise ArpHubError(f"cannot use --device {name}: choose one of {', '.join(here)}") from error
    return device


def open_data(
    source: str | None, model: nn.Module, image_key: str | None, label_key: str | None, streaming: bool = False
) -> ImageData | None:
    """The data, with or without labels; None without ``--data``."""
    return None if source is None else _load(source, model, image_key, label_key, False, streaming)


def open_labelled(
    source: str,
    model: nn.Module,
    image_key: str | None,
    label_key: str | None,
    streaming: bool = False,
    split: str = "test",
) -> ImageData:
    """The data, whose ``split`` must have labels; one of another name than the usual ones is taken for testing."""
    usual = split in ("train", "val", "validation", "test")
    given = (source, model, image_key, label_key)
    found = _load(*given, False, streaming, "" if usual else split)
    if found.split(split).label_range is None:
        found = _load(*given, True, streaming, "" if usual else split)  # its error names the columns and splits
    found.warn_of_shared_images()
    return found


def _load(
    source: str,
    model: nn.Module,
    image_key: str | None,
    label_key: str | None,
    labelled: bool,
    streaming: bool,
    test_split: str = "",
) -> ImageData:
    if not watched():
        datasets.disable_progress_bars()
    with stage("open the data"):
        return load_data(
            source,
            model,
            image_key=image_key,
            label_key=label_key,
            require_labels=labelled,
            streaming=streaming,
            test_split=test_split,
        )


def check_data_options(data: str | None, **given: Any) -> None:
    """Refuse options about the data where there are no data, before any work."""
    if data is None and (names := [_option(name) for name, value in given.items() if value not in (None, False)]):
        raise ArpHubError(f"{names[0]} is about images, and there are none: give --data, or leave {names[0]} out")


def open_images(
    data: ImageData | None, count: int | None, copies: int | None, seed: int, workers: int, most: int = 0
) -> Tensor | None:
    """Calibration images of the data, at most ``most`` with their copies; None without data."""
    if data is None:
        return None
    with stage("read calibration images"):
        return calibration_images(data, count, copies=copies, most=most, seed=seed, workers=workers)


def warn_of_few_images(images: int) -> None:
    """Warn where the calibration images are too few for a good plan and fit."""
    if 0 < images < 32:
        note(f"warning: calibration images: {images} in all. A few hundred make plan and fit more accurate")
