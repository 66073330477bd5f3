"""A stranger's dense model on the Hub: it loads as published, or is refused before it costs anything."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_client import Client
from hub_server import ALICE, HubServer, Repo
from safetensors.torch import load, save

import arp_hub

Files = dict[str, bytes]
BIG = 10**9


def args(**changes: Any) -> Callable[[Files], None]:
    """Change the arguments of the model."""
    return config(lambda found: found["model_args"].update(changes))


def cfg(**changes: Any) -> Callable[[Files], None]:
    """Change the pretrained_cfg."""
    return config(lambda found: found["pretrained_cfg"].update(changes))


def top(**changes: Any) -> Callable[[Files], None]:
    """Change entries at the top of the config."""
    return config(lambda found: found.update(changes))


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        found = json.loads(files["config.json"])
        change(found)
        files["config.json"] = json.dumps(found).encode()

    return edit


def bias(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Files], None]:
    """Change one tensor of the weights."""

    def edit(files: Files) -> None:
        found = load(files["model.safetensors"])
        files["model.safetensors"] = save({**found, "fc.bias": change(found["fc.bias"])})

    return edit


def pickled(keep: bool) -> Callable[[Files], None]:
    """Weights as a pickle, beside the safetensors file or in its place."""

    def edit(files: Files) -> None:
        files["pytorch_model.bin"] = b"cos\nsystem\n(S'touch opened'\ntR."
        if not keep:
            del files["model.safetensors"]

    return edit


def lying(files: Files) -> None:
    """A header that declares a tensor of 10^12 numbers."""
    data = files["model.safetensors"]
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["fc.weight"]["shape"] = [10**12]
    text = json.dumps(header).encode()
    files["model.safetensors"] = struct.pack("<Q", len(text)) + text + data[8 + size :]


def vit(**changes: Any) -> Callable[[Files], None]:
    """The config of a ViT, whose position embedding grows with the image, and the small weights of another network."""
    size = {"input_size": [3, 224, 224], "fixed_input_size": True, "classifier": "head", "first_conv": None, **changes}
    return config(lambda found: found.update(architecture="vit_tiny_patch16_224", pretrained_cfg=size))


FINE: dict[str, Callable[[Files], None]] = {
    "as published": lambda files: None,
    "a pickle beside the weights": pickled(keep=True),
    "another file by url": cfg(url="ENDPOINT/evil.pth"),
    "another repository": cfg(hf_hub_id="alice/evil"),
    "another file name": cfg(hf_hub_filename="evil.bin"),
    "a file of this machine": cfg(file="/etc/passwd", source="file"),
    "a loader of the model's own": cfg(custom_load=True),
    "weights in the config": cfg(state_dict={}),
}
REFUSED: dict[str, Callable[[Files], None]] = {
    "lenient loading": args(pretrained_strict=False),
    "a filter": args(pretrained_filter_fn="os.system"),
    "a checkpoint of this machine": args(checkpoint_path="/etc/passwd"),
    "an overlay with a url": args(pretrained_cfg_overlay={"url": "ENDPOINT/evil.pth"}),
    "a cfg among the arguments": args(pretrained_cfg={"file": "/etc/passwd"}),
    "weights among the arguments": args(pretrained=True),
    "a cache": args(cache_dir="/etc"),
    "feature maps": args(features_only=True),
    "a class of features": args(feature_cls="os.system"),
    "a device": args(device="meta"),
    "a dtype": args(dtype="float64"),
    "a filter of arguments": args(kwargs_filter=["num_classes"]),
    "an unknown argument": args(no_such_argument=1),
    "nested arguments": args(drop_rate=json.loads("[" * 50 + "]" * 50)),
    "classes, argument": args(num_classes=BIG),
    "classes, top": top(num_classes=BIG),
    "names of classes that are a number, top": top(label_names=5),
    "channels": args(in_chans=BIG),
    "an unknown cfg entry": cfg(evil=1),
    "an unknown architecture": top(architecture="evil_net"),
    "an architecture of numbers": top(architecture=5),
    "a giant behind small weights": top(architecture="vit_gigantic_patch14_clip_224"),
    "two thousand blocks": config(lambda c: c.update(architecture="resnet18", model_args={"layers": [2000] * 4})),
    "an image size by the arguments": config(
        lambda c: c.update(architecture="vit_tiny_patch16_224", model_args={"img_size": 60_000})
    ),
    "an image size by the cfg": vit(input_size=[3, 60_000, 60_000]),
    "channels by the cfg": vit(input_size=[10**6, 224, 224]),
    "NaN": bias(lambda t: t * float("nan")),
    "infinity": bias(lambda t: t / 0),
    "float8": bias(lambda t: t.to(torch.float8_e4m3fn)),
    "integers": bias(lambda t: t.to(torch.int8)),
    "complex": bias(lambda t: t.to(torch.complex64)),
    "another shape": bias(lambda t: t[:1]),
    "a pickle alone": pickled(keep=False),
    "a header that lies": lying,
    "weights cut short": lambda files: files.update({"model.safetensors": files["model.safetensors"][:-100]}),
    "a config that is no JSON": lambda files: files.update({"config.json": b"\xff"}),
    "a config of 20 MB": lambda files: files.update({"config.json": b'{"architecture":"x","y":"' + b"a" * 20_000_000}),
}

LOAD = """
import json, resource, time, warnings
from pathlib import Path
from arp_hub.hub.load import load_model
warnings.simplefilter("ignore")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for number in range(count):
    before, start = peak(), time.process_time()
    try:
        model = load_model(f"hf-hub:alice/case{number}")
        error, message = None, str(float(sum(p.double().abs().sum() for p in model.state_dict().values())))
    except Exception as raised:
        error, message = type(raised).__name__, str(raised)
    print(json.dumps([error, message, time.process_time() - start, peak() - before, Path("opened").exists()]))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, float]:
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20")
    folder = arp_hub.save_pretrained(model, tmp_path_factory.mktemp("dense") / "model")
    total = float(sum(value.double().abs().sum() for value in model.state_dict().values()))
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}, total


@pytest.fixture(scope="module")
def outcomes(hub: HubServer, client: Client, published: tuple[Files, float]) -> dict[str, list[Any]]:
    """Every case, loaded from the Hub by one process."""
    hub.mend()
    cases = FINE | REFUSED
    for number, change in enumerate(cases.values()):
        files = dict(published[0])
        change(files)
        files["config.json"] = files["config.json"].replace(b"ENDPOINT", hub.endpoint.encode())
        hub.repos[f"alice/case{number}"] = repo = Repo()
        repo.commit("refs/heads/main", files, "x")
    done = client.run(LOAD, token=ALICE, count=len(cases))
    assert done.code == 0, done.err
    return dict(zip(cases, map(json.loads, done.out.splitlines()), strict=True))


@pytest.mark.parametrize("case", FINE)
def test_only_the_weights_of_the_repository_are_read(
    hub: HubServer, outcomes: dict[str, list[Any]], published: tuple[Files, float], case: str
) -> None:
    error, message, *_, opened = outcomes[case]
    assert error is None and float(message) == published[1], message
    assert not opened
    assert hub.asked("evil|[.]bin|[.]pth") == 0


@pytest.mark.parametrize("case", REFUSED)
def test_the_rest_is_refused_at_once(outcomes: dict[str, list[Any]], case: str) -> None:
    error, message, seconds, memory, opened = outcomes[case]
    assert error == "ArpHubError", (error, message)
    assert 10 < len(message) < 1500
    assert seconds < 2 and memory < 150 and not opened, (seconds, memory)
