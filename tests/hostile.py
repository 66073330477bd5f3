"""Load hostile model folders one by one. A program of its own, so that its memory can be measured.

python hostile.py FOLDER      one JSON line a case: outcome, CPU seconds, growth of peak memory
"""

from __future__ import annotations

import copy
import json
import resource
import shutil
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

import arp_hub
from arp_hub.hub.load import load_model

BIG = 10**9
NO_PLAN: dict[str, Any] = {"format_version": 1, "layers": {}}
Config = dict[str, Any]


def args(**changes: Any) -> Callable[[Config], Any]:
    return lambda config: {**config, "model_args": {**config["model_args"], **changes}}


def vit(**changes: Any) -> Callable[[Config], Any]:
    return args(backbone="vit_tiny_patch16_224", plan=NO_PLAN, **changes)


def layer(name: str = "layer1.0.conv1", **changes: Any) -> Callable[[Config], Any]:
    entry = {"scheme": "cp", "rank": 16, "groups": 1, **changes}
    return args(plan={"format_version": 1, "layers": {name: entry}})


def cfg(**changes: Any) -> Callable[[Config], Any]:
    return lambda config: {**config, "pretrained_cfg": {**config["pretrained_cfg"], **changes}}


def top(**changes: Any) -> Callable[[Config], Any]:
    return lambda config: {**config, **changes}


CONFIGS: dict[str, Callable[[Config], Any]] = {
    "rank of a thousand million": layer(rank=BIG),
    "rank of 400 digits": layer(rank=10**400),
    "groups of a thousand million": layer(scheme="group_in", groups=BIG),
    "full rank that the file lacks": layer("layer4.1.conv2", scheme="channel", rank=512),
    "a plan of 30,000 layers": args(plan={"format_version": 1, "layers": {f"x{k}": {} for k in range(30_000)}}),
    "NUL in a name": layer("layer1\0.conv"),
    "half a character in a name": layer("\ud800"),
    "a dunder as a name": layer("__class__.__init__"),
    "an empty name": layer(""),
    "a plan that is text": args(plan="x" * 10**6),
    "no plan": args(plan=None),
    "classes, top": top(num_classes=BIG),
    "classes, argument": args(num_classes=BIG),
    "classes as text": top(num_classes="x"),
    "negative classes": top(num_classes=-3),
    "a hundred million blocks": args(layers=[10**8] * 4),
    "two thousand blocks": args(layers=[2000] * 4),
    "input channels": args(in_chans=BIG),
    "negative input channels": args(in_chans=-1),
    "image size": vit(img_size=60_000),
    "depth": vit(depth=BIG),
    "depth within the numbers allowed": vit(depth=60_000),
    "a window as large as the image": args(backbone="swin_tiny_patch4_window7_224", window_size=1000, plan=NO_PLAN),
    "a giant behind small weights": args(backbone="vit_gigantic_patch14_clip_224", plan=NO_PLAN),
    "nested arguments": args(layers=json.loads("[" * 50 + "]" * 50)),
    "long arguments": args(layers=[1] * 20_000),
    "NaN as an argument": args(drop_rate=float("nan")),
    "a file as checkpoint_path": args(checkpoint_path="/etc/passwd"),
    "a file in an overlay": args(pretrained_cfg_overlay={"file": "/etc/passwd"}),
    "a cache folder": args(cache_dir="/etc"),
    "a function to call": args(block="os.system"),
    "an activation to import": args(act_layer="os.system"),
    "a feature class": args(features_only=True, feature_cls="os.system"),
    "a path as backbone": args(backbone="../../etc/passwd"),
    "itself as backbone": args(backbone="arp_lowrank"),
    "an unknown argument": args(no_such_argument=1),
    "arguments that are a list": top(model_args=[1]),
    "an unknown cfg key": cfg(evil=1),
    "input size of a thousand million": cfg(input_size=[3, BIG * 10, 32]),
    "input size as text": cfg(input_size="abc"),
    "no input size": cfg(input_size=None),
    "a hundred thousand classifiers": cfg(classifier=["fc"] * 10**5),
    "a number as classifier": cfg(classifier=5),
    "NaN as mean": cfg(mean=[float("nan")] * 3),
    "a cfg that is a list": top(pretrained_cfg=[1]),
    "label names that are a number": top(label_names=[1, 2]),
    "an architecture that is a number": top(architecture=5),
    "another architecture": top(architecture="resnet18"),
    "blocks of a dense model": lambda c: {**top(architecture="resnet18")(c), "model_args": {"layers": [2000] * 4}},
    "a list": lambda config: [config],
}


def write_config(text: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change({name: value.clone() for name, value in load_file(file).items()}), file)

    return edit


def poison(value: float) -> Callable[[Path], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["layer2.1.conv1.weight"][0, 0, 0, 0] = value
        return tensors

    return weights(change)


def lie(folder: Path) -> None:
    """A header that declares a tensor of 10**12 numbers."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["fc.weight"]["shape"] = [10**12]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def pickled(folder: Path) -> None:
    """Weights that would run a command if they were unpickled, under every name that timm looks for."""
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pth", "model.bin"):
        torch.save({"fc.weight": _Bomb(folder / "opened")}, folder / name)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


FILES: dict[str, Callable[[Path], Any]] = {
    "config nested 200,000 deep": write_config('{"architecture":' + "[" * 200_000 + "]" * 200_000 + "}"),
    "config with a number of a million digits": write_config('{"architecture":"arp_lowrank","x":' + "9" * 10**6 + "}"),
    "config of 20 MB": write_config('{"architecture":"arp_lowrank","x":"' + "a" * 20_000_000 + '"}'),
    "config that is no UTF-8": write_config(b"\xff\xfe"),
    "config that is empty": write_config(""),
    "NaN weight": poison(float("nan")),
    "infinite weight": poison(float("inf")),
    "integer weights": weights(lambda found: {name: value.to(torch.int8) for name, value in found.items()}),
    "weights of other shapes": weights(lambda found: {name: value.flatten()[:1] for name, value in found.items()}),
    "30,000 tensors too many": weights(lambda found: found | {f"x{k}": torch.zeros(1) for k in range(30_000)}),
    "one tensor too many": weights(lambda found: found | {"x": torch.zeros(1)}),
    "one tensor too few": weights(lambda found: {name: found[name] for name in found if name != "fc.bias"}),
    "weights cut short": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-100]
    ),
    "a header of 2**62 bytes": lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62)),
    "a header that lies": lie,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pickles instead of weights": pickled,
}


def folders(base: Path) -> dict[str, Callable[[Path], Any]]:
    """Every case as a change to a copy of a good folder."""
    good = json.loads((base / "config.json").read_text(encoding="utf-8"))
    changes = {name: write_config(json.dumps(change(copy.deepcopy(good)))) for name, change in CONFIGS.items()}
    return changes | FILES


def peak() -> float:
    """Peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(place: Path) -> dict[str, Any]:
    """Load a folder, and return the outcome."""
    before, start = peak(), time.process_time()
    try:
        load_model(f"local-dir:{place}")
        error, message = None, ""
    except Exception as raised:
        error, message = type(raised).__name__, str(raised)
    return {"error": error, "message": message, "seconds": time.process_time() - start, "memory": peak() - before,
            "opened": (place / "opened").exists()}  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    network = timm.create_model("resnet18", num_classes=10)
    plan = {"layer1.0.conv1": arp_hub.LayerPlan("cp", 16), "layer2.0.conv1": arp_hub.LayerPlan("channel", 16)}
    base = arp_hub.save_pretrained(arp_hub.decompose(network, arp_hub.RankPlan(plan)), home / "base")
    for warm in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        with torch.device("meta"):
            timm.create_model(warm)
    for name, change in {"a good folder": lambda folder: None, **folders(base)}.items():
        place = home / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(base, place)
        change(place)
        print(json.dumps({"case": name, **measure(place)}), flush=True)
