"""``arp-hub run``: scripts such as those of timm, unedited, on compressed models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import half_rank_plan, search_path
from hub_server import ALICE
from PIL import Image

import arp_hub
from arp_hub_cli.app import app

VALIDATE = '''
"""Does what timm's validate.py does: parse, build, load, loop, print."""
import argparse, json, sys
import timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, ParseKwargs, accuracy
from beside import CRITERION

parser = argparse.ArgumentParser(description="validate")
parser.add_argument("data", nargs="?", metavar="DIR")
parser.add_argument("--data-dir")
parser.add_argument("--model", "-m", default="resnet18")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--num-classes", type=int)
parser.add_argument("-b", "--batch-size", type=int, default=4)
parser.add_argument("-j", "--workers", type=int, default=0)
parser.add_argument("--pretrained", action="store_true")

def main():
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes, **args.model_kwargs)
    config = resolve_data_config(vars(args), model=model)
    dataset = create_dataset("", args.data or args.data_dir)
    loader = create_loader(dataset, batch_size=args.batch_size, use_prefetcher=False, device=torch.device("cpu"),
                           num_workers=args.workers, persistent_workers=False,
                           **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")})
    meter = AverageMeter()
    model.eval()
    with torch.no_grad():
        for images, target in loader:
            output = model(images)
            loss = CRITERION(output, target)
            meter.update(accuracy(output, target)[0].item(), len(images))
    params = sum(parameter.numel() for parameter in model.parameters())
    print("--result")
    print(json.dumps({"top1": meter.avg, "params": params, "images": meter.count, "argv": sys.argv,
                      "kwargs": {key: str(value) for key, value in args.model_kwargs.items()}}))
    return 0 if loss.isfinite() else 1

if __name__ == "__main__":
    sys.exit(main())
'''
TRAIN = """
import argparse
import timm, timm.optim, timm.utils, torch

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--fail", default="")
args = parser.parse_args()
model = timm.create_model(args.model, pretrained=True)
optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01)
before = [parameter.detach().clone() for parameter in model.parameters()]
loss = torch.nn.functional.cross_entropy(model.train()(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))
loss.backward()
optimizer.step()
assert all((old != new).any() for old, new in zip(before, model.parameters()) if new.grad.any())
if args.fail:
    raise RuntimeError(args.fail)
print("trained", type(model).__name__)
"""
RESULT = "--result\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts, images, and a compressed model in ``out``."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "timm").mkdir()
    (folder / "timm/validate.py").write_text(VALIDATE)
    (folder / "timm/train.py").write_text(TRAIN)
    (folder / "timm/beside.py").write_text("import torch\nCRITERION = torch.nn.CrossEntropyLoss()\n")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    model = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    plan = half_rank_plan(model, {"layer2.0.conv1": "cp", "layer3.0.conv1": "channel"})
    arp_hub.save_pretrained(arp_hub.decompose(model, plan), folder / "out")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: object) -> tuple[Any, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app(["run", *(str(word) for word in words)])
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def params(folder: Path) -> int:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_script_builds_a_compressed_model_and_keeps_its_words(call: Any, place: Path) -> None:
    words = ("--model", f"local-dir:{place / 'out'}", "--pretrained", "--model-kwargs", "drop_rate=0.1", "x_y=2")
    script = place / "timm" / "validate.py"
    code, out, err = call(script, place / "photos", *words[:-1], "-b", 3)
    assert code == 0, err
    found = json.loads(out.partition(RESULT)[2])
    assert found["params"] == params(place / "out") and found["images"] == 6
    assert found["kwargs"] == {"drop_rate": "0.1"}
    assert found["argv"] == [str(script), str(place / "photos"), *words[:-1], "-b", "3"]


def test_help_and_bad_options_are_the_script_s_own(call: Any, place: Path) -> None:
    code, out, _ = call(place / "timm" / "validate.py", "--help")
    assert code == 0 and "--model-kwargs" in out and "usage: validate.py" in out
    code, out, err = call(place / "timm" / "validate.py", "--nosuch")
    assert code == 2 and "unrecognized arguments: --nosuch" in err


def test_exit_codes_and_tracebacks_are_the_script_s_own(call: Any, place: Path) -> None:
    script, model = place / "timm" / "train.py", ("--model", f"local-dir:{place / 'out'}")
    code, out, _ = call(script, *model)
    assert (code, out) == (0, "trained ResNet\n")
    code, _, err = call(script, *model, "--fail", "out of memory")
    assert code == 1 and "RuntimeError: out of memory" in err and "arp_hub_cli" not in err and err.count("File ") == 1
    for body, expected in (
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('no')", "no"),
        ("raise KeyboardInterrupt", 130),
    ):
        (place / "timm" / "end.py").write_text(body)
        code, _, err = call(place / "timm" / "end.py")
        assert code == expected and err == ("interrupted\n" if code == 130 else "")


def test_a_script_that_is_not_there_is_refused(call: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "nix.py", tmp_path):
        code, out, err = call(path)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and "no script at" in err


def test_python_m_arp_hub_runs_a_script_with_loader_workers(place: Path) -> None:
    command = [sys.executable, "-m", "arp_hub", "run", "timm/validate.py", "photos", "-j", "1", "--pretrained"]
    environment = {"PYTHONPATH": search_path(Path(__file__).parents[2]), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-m", "local-dir:out"], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.partition(RESULT)[2])["params"] == params(place / "out")


def test_a_script_loads_from_the_hub(place: Path, client: Any) -> None:
    assert client.arp_hub("push", place / "out", "alice/for-scripts", "--no-dense", token=ALICE).code == 0
    words = (place / "photos", "--model", "hf-hub:alice/for-scripts", "--pretrained")
    done = client.arp_hub("run", place / "timm" / "validate.py", *words, token=None)
    assert done.code == 0, done.err
    assert json.loads(done.out.partition(RESULT)[2])["params"] == params(place / "out")


EXPORT = """
import argparse
import timm
from timm.utils.model import reparameterize_model
from timm.utils.onnx import onnx_export

parser = argparse.ArgumentParser()
parser.add_argument("output")
parser.add_argument("--model")
args = parser.parse_args()
model = reparameterize_model(timm.create_model(args.model, pretrained=True, exportable=True))
onnx_export(model, args.output, input_size=(3, 32, 32), check=True)
"""


@pytest.mark.slow
def test_a_script_exports_to_onnx(call: Any, place: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    (place / "timm" / "onnx_export.py").write_text(EXPORT)
    code, _, err = call(place / "timm" / "onnx_export.py", place / "x.onnx", "--model", f"local-dir:{place / 'out'}")
    assert code == 0, err
    images = torch.randn(1, 3, 32, 32)
    session = runtime.InferenceSession(str(place / "x.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = timm.create_model(f"local-dir:{place / 'out'}", pretrained=True).eval()(images)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
