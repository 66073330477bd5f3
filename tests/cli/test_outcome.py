"""``arp-hub compress`` ends with a table, the place of the model, and commands that can be copied."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from arp_hub.timing import Workload
from arp_hub_cli.app import app
from arp_hub_cli.outcome import next_steps

COMPRESS = (
    "compress --model cifar_resnet20 --no-pretrained --keep-params 0.5 --schemes channel --effort fast --data digits "
    "--calibration-images 16 --calibration-copies 0 --max-images 16"
).split()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app(list(words))
        return (int(stop.value.code or 0), *capsys.readouterr())

    return run


def test_compress_ends_with_a_summary_whose_commands_run(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*COMPRESS, "--output", "my models/it's")
    assert code == 0, err
    rows = {line.split("  ")[0].strip(): line.split("  ")[1:] for line in out.splitlines() if "  " in line.strip()}
    found = {name: [cell.strip() for cell in cells if cell.strip()] for name, cells in rows.items()}
    metrics = json.loads(Path("my models/it's/metrics.json").read_text())
    dense, kept = metrics["dense"]["params"], metrics["params"]
    assert found["parameters"] == [f"{dense:,}", f"{kept:,}", f"{100 * kept / dense:.1f} %"]
    assert found["multiply-accumulates"][:2] == [f"{metrics['dense']['macs']:,}", f"{metrics['macs']:,}"]
    size = Path("my models/it's/model.safetensors").stat().st_size
    assert float(found["weights on disk"][1].removesuffix(" MB")) == pytest.approx(size / 1e6, rel=0.05)
    assert found["top-1 (test, 16 images)"] == [f"{metrics['dense']['top1']:.2f} %", f"{metrics['top1']:.2f} %"]
    assert "saved to my models/it's" in out
    evaluate, export, push, load = (line.strip() for line in out.splitlines()[-5:] if line.startswith("  "))
    assert shlex.split(export) == ["arp-hub", "export", "local-dir:my models/it's", "--format", "onnx"]
    assert shlex.split(push) == ["arp-hub", "push", "my models/it's", "USER/NAME"]
    code, again, err = call(*shlex.split(evaluate)[1:], "--max-images", "16", "--json")
    assert code == 0 and json.loads(again)["top1"] == metrics["top1"]
    names: dict[str, Any] = {}
    exec(load, names)
    assert sum(parameter.numel() for parameter in names["model"].parameters()) == kept


CASES = {
    "no labels": ({"--data": "x"}, False, None, ["bench --model local-dir:out"]),
    "no data": ({"--data": None}, False, None, ["bench --model local-dir:out"]),
    "columns": (
        {"--data": "a b", "--image-key": "img", "--label-key": None},
        True, None, ["evaluate --model local-dir:out --data 'a b' --image-key img"],
    ),
    "a latency budget": (
        {"--data": "x"}, True, Workload(8, "bfloat16", True),
        ["evaluate --model local-dir:out --data x",
         "bench --model local-dir:out --batch-size 8 --dtype bfloat16 --channels-last"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_next_steps_follow_what_was_given(case: str) -> None:
    data, measured, workload, expected = CASES[case]
    text = next_steps(Path("out"), data, measured, workload)
    assert re.findall(r"^  arp-hub (.*)$", text, re.M) == [
        *expected,
        "export local-dir:out --format onnx",
        "push out USER/NAME",
    ]


def test_a_finished_model_is_not_replaced_by_accident(call: Any, tmp_path: Path) -> None:
    words = [*COMPRESS[: COMPRESS.index("--data")], "--output", str(tmp_path / "out")]
    assert call(*words)[0] == 0
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text() + "\nMy notes.\n")
    code, out, err = call(*words)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "already holds a model" in err and "--overwrite" in err
    assert card.read_text().endswith("My notes.\n")
    assert call(*words, "--overwrite")[0] == 0


def test_json_stays_one_object(call: Any, tmp_path: Path) -> None:
    words = COMPRESS[: COMPRESS.index("--data")]
    code, out, _ = call(*words, "--output", str(tmp_path / "out"), "--json")
    found = json.loads(out)
    assert code == 0 and found["output"] == str(tmp_path / "out")
    assert found["weights_bytes"] < 4 * found["dense"]["params"]
