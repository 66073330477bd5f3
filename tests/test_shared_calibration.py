"""Planning, fitting and refining by several processes: the same model as by one, and no process left waiting."""

from __future__ import annotations

import functools
import io
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
import torch.distributed as dist
from several_processes import by_group, by_processes
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from arp_hub import ArpHubError, LayerPlan, RankPlan, decompose, make_plan
from arp_hub.effort import Effort
from arp_hub_cli.app import app

EFFORT = Effort(fit_iterations=8, curve_iterations=3, curve_shares=(0.2, 0.5), start_sweeps=5, schemes_measured=1)
SWIN = {"num_classes": 10, "img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
NETWORKS = {
    "convolutions with BatchNorms, and a classifier that is fitted": ("cifar_resnet20", {}, 8),
    "attention": ("test_vit", {"num_classes": 10, "img_size": 32, "patch_size": 16}, 32),
    "depthwise convolutions": ("test_efficientnet", {"num_classes": 10}, 48),
    "attention in windows": ("swin_tiny_patch4_window7_224", SWIN, 64),
}
"""Name, arguments and image size by what is shared out differently."""
BATCHES = (4, 4, 4, 2, 1)
"""Images of each batch: more batches than processes, the last one of fewer images than processes."""
LARGE_BATCHES = (72, 72, 72, 36, 18)
"""As many as the fit of 64 columns of a classifier needs."""


def network(kind: str) -> nn.Module:
    name, arguments, _ = NETWORKS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of a network that has been trained
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def images(kind: str) -> list[Tensor]:
    torch.manual_seed(1)
    size, batches = NETWORKS[kind][2], LARGE_BATCHES if "classifier" in kind else BATCHES
    return [torch.randn(count, 3, size, size) for count in batches]


def compressed(kind: str) -> dict[str, Any]:
    """Plan and weights of a network planned and fitted by the processes of the group."""
    model = network(kind)
    plan = make_plan(model, keep_params=0.5, calibration=images(kind), effort=EFFORT)
    decompose(model, plan, images(kind), effort=EFFORT)
    return {"plan": plan.to_json(), "state": model.state_dict()}


class Failing:
    """Batches that one process cannot read when they are read for the n-th time."""

    def __init__(self, process: int, time: int) -> None:
        self.process, self.time, self.times = process, time, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.times += 1
        for number, batch in enumerate(images("attention")):
            if self.times == self.time and number == 1 and dist.get_rank() == self.process:
                raise OSError("the disk is gone")
            yield batch


def reads(call: Callable[[Any], object]) -> int:
    """How often a call reads its images."""
    counting = Failing(-1, 0)
    call(counting)
    return counting.times


def planned(batches: Any) -> object:
    return make_plan(network("attention"), keep_params=0.5, calibration=batches, effort=EFFORT)


def fitted(batches: Any) -> object:
    model = network("attention")
    return decompose(model, make_plan(model, keep_params=0.5), batches, effort=EFFORT)


def planned_by_latency() -> str:
    """A plan of this process, in which the first one finds wide layers slow and the other one all of them."""
    widths = {0: 64, 1: 0}[dist.get_rank()]

    def faster(layers: Any, *args: Any) -> Any:
        return {name: schemes for name, schemes in layers.items() if schemes[0].shape.out_channels <= widths}

    torch.manual_seed(0)
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), num_classes=10).eval()
    with (
        patch("arp_hub.planning.make_plan.faster_schemes", faster),
        patch("arp_hub.planning.make_plan.LatencyBudget", lambda share, times, *args: times),
        patch("arp_hub.planning.make_plan.LayerTimes", Everything),
    ):
        return make_plan(model, keep_latency=0.8, input_size=(3, 32, 32), schemes=["channel"]).to_json()


class Everything:
    """A budget that decomposes all layers that are given to it, to the rank 8."""

    def __init__(self, table: Any, sizes: Any, layers: Any, *args: Any) -> None:
        self._layers = layers

    def plan(self, losses: Any) -> RankPlan:
        return RankPlan({name: LayerPlan("channel", 8) for name in self._layers}, {})


def test_one_process_measures_latencies_for_all_without_images(tmp_path: Path) -> None:
    one, other = by_group(planned_by_latency, 2, tmp_path / "run")
    assert one == other and RankPlan.from_dict(json.loads(one)).layers


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except (ArpHubError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def other_network(rank: int) -> nn.Module:
    """A network whose classifier differs between processes."""
    model = network("attention")
    with torch.no_grad():
        model.get_parameter("head.bias").add_(rank)
    return model


def messages() -> dict[str, str]:
    """What this process says when one of two fails, or has other arguments."""
    rank, found = dist.get_rank(), {}
    for name, call in {"planning": planned, "fitting": fitted}.items():
        last = reads(call)
        for time in range(last, 1, -max(1, last // 5)):
            found[f"{name}, reading {time}"] = message(functools.partial(call, Failing(1, time)))
    every = images("attention")
    found["images"] = message(lambda: planned(every[: len(every) - rank]))
    shard = [torch.cat(every)[rank::2][:7]]
    found["shards"] = message(lambda: planned(shard))
    found["shuffled"] = message(lambda: fitted([torch.cat(every).roll(rank, 0)]))
    found["weights"] = message(lambda: make_plan(other_network(rank), keep_params=0.5, calibration=every))
    found["budget"] = message(lambda: make_plan(network("attention"), keep_params=0.5 - rank / 10, calibration=every))
    plan = make_plan(network("attention"), keep_params=0.5 - rank / 10)
    found["plan"] = message(lambda: decompose(network("attention"), plan, every))
    if rank == 0:  # the other one does not come
        found["alone"] = message(lambda: planned(every))
    return found


def several(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {kind: compressed(kind) for kind in kinds}


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_end_where_one_does(world: int, tmp_path: Path) -> None:
    kinds = list(NETWORKS)[world - 2 :: 2]  # each network by two processes or by three: one process takes 2 s for each
    found = by_group(functools.partial(several, kinds), world, tmp_path / "run")
    for kind, alone in several(kinds).items():
        if "classifier" in kind:
            assert not torch.equal(alone["state"]["fc.weight"], network(kind).fc.weight)
        for one in found:
            assert one[kind]["plan"] == alone["plan"], kind
            for name, value in alone["state"].items():
                assert torch.equal(one[kind]["state"][name], found[0][kind]["state"][name]), (kind, name)
                if value.is_floating_point():
                    difference = (one[kind]["state"][name] - value).norm() / value.norm().clamp_min(1e-6)
                    assert difference < 1e-4, (kind, name)


def wide_plan() -> str:
    """A plan of layers with more columns than samples, whose ranks a last digit of single precision would change."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, layers=(1, 1, 1, 1), channels=(16, 16, 128, 256)).eval()
    torch.manual_seed(1)
    batches = [torch.randn(2, 3, 64, 64) for _ in range(4)]
    return make_plan(model, keep_params=0.5, calibration=batches, effort=EFFORT).to_json()


def test_several_processes_plan_wide_layers_as_one_does(tmp_path: Path) -> None:
    assert by_group(wide_plan, 2, tmp_path / "run") == [wide_plan()] * 2


def images_seen() -> list[int]:
    """Images of each pass that this process makes to plan and fit a network, with and without gradients."""
    model, seen = network("depthwise convolutions"), [0, 0]

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen[output.requires_grad] += len(args[0])

    model.get_submodule("conv_stem").register_forward_hook(count)
    torch.manual_seed(1)
    large = torch.randn(24, 3, 224, 224)  # batches of six, which are back-propagated in five and one
    decompose(model, make_plan(model, keep_params=0.5, calibration=large, effort=EFFORT), large, effort=EFFORT)
    return seen


def test_processes_see_as_many_images_each(tmp_path: Path) -> None:
    first, second = by_group(images_seen, 2, tmp_path / "run")
    assert first == second
    assert first[1] == 36  # half of 24 images for each of three passes


def plan_in_stacks() -> str:
    """A plan of layers that are fitted four at a time, as on a GPU."""
    kind = next(iter(NETWORKS))
    with patch("arp_hub.planning.output_errors.stack_size", lambda weight: 4):
        return make_plan(network(kind), keep_params=0.5, calibration=images(kind), effort=EFFORT).to_json()


def test_several_processes_plan_stacks_of_layers_as_one_does(tmp_path: Path) -> None:
    assert by_group(plan_in_stacks, 2, tmp_path / "run") == [plan_in_stacks()] * 2


def test_failure_of_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    first, second = by_group(messages, 2, tmp_path / "run")
    failures = [name for name in first if "reading" in name]
    assert sum(first[name] != "no error" for name in failures) >= 4  # in checks, passes, gradients and fits
    for name in failures:
        if second[name] != "no error":
            assert "OSError: the disk is gone" in second[name]
            assert first[name] == "ArpHubError: process 1 of 2 failed: OSError: the disk is gone", name
    words = {"images": "calibration", "budget": "budget", "plan": "plan"}
    words |= {"shards": "calibration", "shuffled": "calibration", "weights": "the weights"}
    for name, word in words.items():
        assert f"process 1 has other values of {word} than process 0: pass the same" in first[name]
        assert f"process 0 has other values of {word} than process 1: pass the same" in second[name]
    assert "not all of them have called it" in first["alone"]


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random pictures in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for number in range(24):
            pixels = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=generator)
            place = folder / split / f"class{number % 2}" / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(pixels).save(place)
    return folder


def command(words: Sequence[str], port: int, rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What ``arp-hub`` prints and returns in this process, as `torch.distributed.run` starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    said, noted = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(noted), pytest.raises(SystemExit) as ended:
        app(list(words), prog_name="arp-hub")
    left = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return {"code": ended.value.code, "stdout": said.getvalue(), "stderr": noted.getvalue(), "threads": left}


def shared_command(folder: Path, *words: str) -> list[dict[str, Any]]:
    """``arp-hub`` by two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return by_processes(functools.partial(command, words, port), 2, folder / "run")


def test_command_shares_its_work_and_prints_once(picture_folder: Path, tmp_path: Path) -> None:
    options = ["--model", "test_vit", "--num-classes", "2", "--model-kwargs", "img_size=32", "--keep-params", "0.5"]
    options += ["--data", str(picture_folder / "train"), "--calibration-images", "16", "--effort", "fast"]  # one split
    options += ["--device", "cpu", "--no-pretrained", "--refine-steps", "4", "--refine-images", "20"]
    options += ["--output", str(tmp_path / "out"), "--json"]
    first, second = shared_command(tmp_path, "compress", *options)
    for one in (first, second):
        assert not one["code"], one["stderr"]
        assert not [thread for thread in one["threads"] if "gloo" in thread]  # they would abort Python at its end
    assert second["stdout"] == second["stderr"] == ""
    assert first["stderr"].count("\nwarning: data '") == 1 and "has one usable split" in first["stderr"]
    figures = json.loads(first["stdout"])
    small = timm.create_model(f"local-dir:{tmp_path / 'out'}")
    assert figures["params"] == sum(parameter.numel() for parameter in small.parameters())
    assert figures["refinement"]["steps"] >= 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["doctor"], "'arp-hub doctor' runs in one process, and 2 were started"),
        (["plan", "--model", "test_vit", "--keep-params", "0.5", "--device", "cuda:0"], "leave --device out"),
    ],
    ids=["one process", "one GPU"],
)
def test_command_refuses_processes_that_it_cannot_use(words: list[str], said: str, tmp_path: Path) -> None:
    for one in shared_command(tmp_path, *words):
        assert one["code"] == 2
        assert said in one["stderr"]
