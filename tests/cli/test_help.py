"""Help is complete at 80 columns, its examples run, and shells complete commands and options."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import typer
from hub_server import ME
from PIL import Image

from arp_hub.training import TrainConfig
from arp_hub_cli.app import app
from arp_hub_cli.command import split_example

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app(list(words), prog_name="arp-hub")
        return (int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_complete(call: Any, name: str) -> None:
    code, out, _ = call(name, "--help")
    lines, flat = out.splitlines(), " ".join(out.split())
    assert code == 0 and max(map(len, lines)) <= 80 and "…" not in out
    assert "x>=" not in flat and "<=" not in flat  # ranges of numbers are words
    for param in COMMANDS[name].params:
        for word in (*param.opts, *param.secondary_opts) if param.param_type_name == "option" else ():
            assert word in flat.split(), word
        assert " ".join((param.help or "").split()) in flat
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[0] == "Example:" and groups[-1] == "Other options:" and len(groups) == len(set(groups))
    assert out.partition("Other options:\n")[2].split()[0] == "--help"  # every other option has a group
    assert f"\n  arp-hub {name}" in out


def test_help_lists_the_commands_in_groups(call: Any) -> None:
    code, out, _ = call("--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    for name, command in COMMANDS.items():
        first = " ".join(command.help.split("\n\n")[0].split())
        assert first in " ".join(out.split()), name


TINY = {
    "--model resnet50": "--model test_resnet --no-pretrained --input-size 3 32 32",
    "uoft-cs/cifar10": "dogs",
    "path/to/images": "dogs --calibration-images 4 --seconds 0",
    "--batch-size 1,32": "--batch-size 1,2 --seconds 0.1",
    "--int8 --data dogs": "--int8 --data dogs --seconds 0 --calibration-images 4",
}
"""What examples name, and a small thing in its place."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that examples name, but for those that examples make."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(8):
            path = folder / "dogs" / split / str(number % 2) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    shutil.copy(path, folder / "photo.jpg")
    (folder / "runs/quickstart-run").mkdir(parents=True)
    entry = {"phase": "dense", "epoch": 1, "epochs": 3, "step": 9, "loss": 1.0, "top1": 50.0, "lr": 0.1, "seconds": 1.0}
    (folder / "runs/quickstart-run/log.jsonl").write_text(json.dumps(entry) + "\n")
    return folder


def words_of(example: str) -> list[str]:
    for name, tiny in TINY.items():
        example = example.replace(name, tiny)
    return shlex.split(example.replace("\\\n", ""))[1:]


def test_examples_in_help_run(call: Any, place: Path, monkeypatch: pytest.MonkeyPatch, client: Any, hub: Any) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    examples = {name: split_example(command.help)[1] for name, command in COMMANDS.items()}
    order = ["compress", *(name for name in examples if name != "compress")]  # `compress` makes the folder of others
    quick = ["--schemes", "channel", "--effort", "fast"]
    more = {"plan": quick, "compress": [*quick, "--calibration-copies", "0", "--model-kwargs", "num_classes=2"]}
    (place / "validate.py").write_text("import sys, timm\ntimm.create_model(sys.argv[2], pretrained=True)\n")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    if not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):  # the extra that `export` needs
        order.remove("export")
    for name in order:
        words = words_of(examples[name]) + more.get(name, [])
        if name == "push":  # in a process that knows the Hub of the tests alone
            done = client.arp_hub(words[0], place / words[1], *words[2:], token=ME)
            code, err = done.code, done.err
        else:
            code, _, err = call(*words)
        assert code == 0 or (name, code) == ("doctor", 1), (name, err)  # this machine may have problems
    assert timm.create_model(f"local-dir:{place}/out", pretrained=True).num_classes == 2


COMPLETED = {
    "a command": ("arp-hub comp", {"compress"}),
    "an option": ("arp-hub compress --keep", {"--keep-params", "--keep-macs", "--keep-latency"}),
    "a value": ("arp-hub compress --effort ", {"fast", "balanced", "thorough"}),
}


@pytest.mark.parametrize(("line", "expected"), COMPLETED.values(), ids=COMPLETED)
def test_shells_complete(call: Any, monkeypatch: pytest.MonkeyPatch, line: str, expected: set[str]) -> None:
    monkeypatch.setenv("_ARP_HUB_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    code, out, _ = call()
    assert code == 0 and set(out.split()) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_installs_for_a_shell(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shell: str
) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    monkeypatch.setenv("HOME", str(tmp_path))
    code, script, _ = call("--show-completion")
    assert code == 0 and f"_ARP_HUB_COMPLETE=complete_{shell}" in script
    code, out, _ = call("--install-completion")
    assert code == 0 and f"{shell} completion installed in {tmp_path}" in out.replace("\n", "")
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(script.strip() in text for text in written)


def test_the_page_of_the_command_line_is_that_of_the_code() -> None:
    made = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "_command_line.py"))
    page = made["PAGE"].read_text(encoding="utf-8")
    assert made["whole_page"](page) == page, "run: python docs/_command_line.py"
    for name in COMMANDS:
        assert f"### `arp-hub {name}`" in page
    for setting in TrainConfig.__dataclass_fields__:
        assert f"`--{setting.replace('_', '-')}`" in page
