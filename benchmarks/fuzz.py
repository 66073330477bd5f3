"""Coverage-guided fuzzing of every reader of untrusted files, which may raise no error but `ArpHubError`.

    pip install atheris
    python benchmarks/fuzz.py --runs 100000 --output benchmarks/results/fuzz.json

Each target runs in its own process under libFuzzer (through atheris), starting from valid inputs. Half of the mutations
change the JSON tree, half the bytes. The script counts accepted and refused inputs, and stops at any other exception.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAN = {
    "format_version": 1,
    "layers": {
        "layer1.0.conv1": {"scheme": "cp", "rank": 16, "groups": 1},
        "fc": {"scheme": "group_out", "rank": 4, "groups": 2},
    },
    "dense": {"conv1": "first convolution"},
}
CFG = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "crop_pct": 0.9, "num_classes": 10,
       "classifier": "fc", "first_conv": "conv1", "label_names": ["a", "b"]}  # fmt: skip
CONFIG = {"architecture": "arp_lowrank", "num_classes": 10, "model_args": {"backbone": "resnet18", "plan": PLAN,
          "layers": [2, 2], "act_layer": "relu", "drop_rate": 0.1}, "pretrained_cfg": CFG}  # fmt: skip
METRICS = {"top1": 70.5, "top5": 90.0, "loss": 1.5, "images": 100, "params": 1000, "macs": 5000, "seed": 0,
           "data": "digits", "split": "test", "dense": {"top1": 71.0, "params": 2000, "macs": 9000},
           "kept": {"params": 0.5, "macs": 0.55}, "plan": PLAN, "config": {"keep_params": 0.5, "epochs": 3},
           "scores": {"dense": {"top1": 71.0, "top5": 91.0, "loss": 1.4, "images": 100}}, "license": "mit",
           "history": [{"phase": "compress", "step": 3, "stage": "ramp", "violation": 0.1, "violations": {"fc": 0.1}}],
           "versions": {"torch": "2.9"}, "hardware": {"cpu": "x"}, "command": "run.py", "seconds": 3.5}  # fmt: skip
LOG = [{"phase": phase, "epoch": 1, "epochs": 2, "step": 4, "loss": 1.5, "top1": 30.5, "lr": 0.1, "seconds": 2.0,
        "stage": "hold", "violation": 0.1, "violations": {"fc": 0.1}, "val": {"top1": 30.0, "images": 9}}
       for phase in ("dense", "compress")]  # fmt: skip
DENSE = {"architecture": "cifar_resnet20", "num_classes": 10, "num_features": 64, "pretrained_cfg": CFG,
         "model_args": {"num_classes": 10, "drop_rate": 0.1}}  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ARP_HUB_PICTURES": "0", "HF_HUB_OFFLINE": "1"}
SHARES = {"plan": 0.4, "config": 0.15, "weights": 0.15, "settings": 0.05, "checkpoint": 0.1, "log": 0.05,
          "metrics": 0.05, "dense": 0.05}  # fmt: skip
"""Share of each target in all inputs. Fast readers get more, so that no target takes more than minutes."""
WORDS = """format_version layers dense requires scheme rank groups cp tucker2 group_in null NaN Infinity -1 1e999 true
[] {} model_args pretrained_cfg architecture backbone input_size __tensor__ __dict__ settings dtype shape data_offsets
F32 keep_params schemes !!python/object/apply:os.system &a *a <<:""".split()
VALUES = [
    None,
    True,
    -1,
    0,
    2**31,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "../../etc/passwd",
    [],
    {},
    [[]],
]


def targets(place: Path) -> dict[str, tuple[list[bytes], Callable[[bytes], None]]]:
    """For each target: valid inputs, and the function that reads one."""
    import safetensors.torch
    import torch

    from arp_hub import LayerPlan, RankPlan, decompose, save_pretrained
    from arp_hub.errors import ArpHubError
    from arp_hub.hub.card import model_card
    from arp_hub.hub.load import load_model
    from arp_hub.hub.staging import UNFIT, _read_metrics
    from arp_hub.models._untrusted import check_args, check_cfg, read_config, read_header
    from arp_hub.reports.run_page import write_report
    from arp_hub.training import TrainConfig
    from arp_hub.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from arp_hub.training.config import read_config as read_settings
    from arp_hub.training.runlog import read_log

    file = place / "input"

    def plan(data: bytes) -> None:
        found = RankPlan.from_json(data.decode("utf-8", "surrogateescape"))
        if RankPlan.from_json(found.to_json()) != found:
            raise AssertionError("a plan changed on its way through JSON")

    def config(data: bytes) -> None:
        file.write_bytes(data)
        found = read_config(file)
        check_args(found.get("model_args", {}), "fuzz")
        check_cfg(found.get("pretrained_cfg", {}), "fuzz")

    def header(data: bytes) -> None:
        file.write_bytes(data)
        shapes = read_header(file)
        if sum(len(shape) for shape in shapes.values()) > len(data):
            raise AssertionError("more dimensions than bytes")

    def settings(data: bytes) -> None:
        file.write_bytes(data)
        TrainConfig.from_layers({"model": "resnet18"}, read_settings(file))

    state = {"model": {"w": torch.zeros(2)}, "list": [1, None, {"k": 0.5}]}
    saved = save_checkpoint(place / "checkpoints", Checkpoint("dense", 1, {"lr": 1}, {}, PLAN, 1.0, state), keep=1)
    good = (saved / "state.json").read_bytes()
    (saved / "SHA256SUMS").unlink()  # without checksums, more of the checkpoint is read

    def checkpoint(data: bytes) -> None:
        (saved / "state.json").write_bytes(data)
        load_checkpoint(saved)

    run_folder, model_folder = place / "run", place / "model"
    run_folder.mkdir()
    (run_folder / "log.jsonl").write_text("\n".join(map(json.dumps, LOG)))
    save_pretrained(load_model("cifar_resnet20"), model_folder)
    small = decompose(load_model("cifar_resnet20"), RankPlan({"layer1.0.conv1": LayerPlan("cp", 4)}))
    save_pretrained(small, place / "small")
    numbers = METRICS | json.loads((place / "small" / "metrics.json").read_text())
    (run_folder / "metrics.json").write_text(json.dumps(numbers))

    def log(data: bytes) -> None:
        (run_folder / "log.jsonl").write_bytes(data)
        read_log(run_folder / "log.jsonl")
        write_report(run_folder)

    def metrics(data: bytes) -> None:
        (run_folder / "metrics.json").write_bytes(data)
        try:
            model_card(CONFIG, _read_metrics(run_folder), "hf-hub:user/name")
        except UNFIT as error:  # a push converts them in the same way
            raise ArpHubError(str(error)) from error
        write_report(run_folder)

    def dense(data: bytes) -> None:
        (model_folder / "config.json").write_bytes(data)
        load_model(f"local-dir:{model_folder}")

    def guarded(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def run(data: bytes) -> None:
            global refused
            try:
                read(data)
            except ArpHubError:
                refused += 1

        return run

    tensors = safetensors.torch.save({"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)})
    return {
        "plan": ([json.dumps(PLAN).encode()], guarded(plan)),
        "config": ([json.dumps(CONFIG).encode()], guarded(config)),
        "weights": ([tensors], guarded(header)),
        "settings": ([b"model: resnet50\nkeep_params: 0.5\nschemes: [cp]\nlr: 1e-3\n"], guarded(settings)),
        "checkpoint": ([good], guarded(checkpoint)),
        "log": ([(run_folder / "log.jsonl").read_bytes()], guarded(log)),
        "metrics": ([json.dumps(numbers).encode()], guarded(metrics)),
        "dense": ([json.dumps(DENSE).encode()], guarded(dense)),
    }


refused = 0


def mutated(data: bytes, largest: int, seed: int) -> bytes:
    """A change to some node of a JSON tree, or to the bytes."""
    import atheris

    dice = random.Random(seed)
    if dice.random() < 0.5 and b"\n{" in data:  # a log: a change to one of its lines
        lines = data.split(b"\n")
        number = dice.randrange(len(lines))
        lines[number] = mutated(lines[number], largest, seed + 1)
        return b"\n".join(lines)[:largest]
    skip = 8 if data[8:9] == b"{" else 0  # a safetensors file: the header's length, then JSON
    size = int.from_bytes(data[:8], "little") if skip else len(data)
    if dice.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):
            tree = json.loads(data[skip : skip + size])
            text = json.dumps(_changed(tree, dice)).encode()
            head = len(text).to_bytes(8, "little") if skip else b""
            return (head + text + data[skip + size :])[:largest]
    return atheris.Mutate(data, largest)


def _changed(tree: Any, dice: random.Random) -> Any:
    """A copy of a tree with one node replaced, removed, doubled or renamed."""
    if isinstance(tree, dict) and tree and dice.random() < 0.85:
        key = dice.choice(sorted(tree))
        rest = {name: value for name, value in tree.items() if name != key}
        way = dice.random()
        if way < 0.1:
            return rest
        if way < 0.2:
            return {**rest, dice.choice(WORDS): tree[key]}
        return {**tree, key: _changed(tree[key], dice)}
    if isinstance(tree, list) and tree and dice.random() < 0.7:
        place = dice.randrange(len(tree))
        return [*tree[:place], _changed(tree[place], dice), *tree[place + dice.randrange(2) :]]
    return dice.choice([*VALUES, *WORDS, tree])


def fuzz(name: str, runs: int, seed: int, place: Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["arp_hub"]):
        found = targets(place)
    warnings.simplefilter("ignore")
    inputs, read = found[name]
    for data in inputs:
        read(data)
    if refused:
        raise SystemExit(f"target '{name}' refuses its valid inputs, so that mutations of them try nothing")
    corpus = place / "corpus"
    corpus.mkdir()
    for number, data in enumerate(inputs):
        (corpus / f"good{number}").write_bytes(data)
    words = place / "words"
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    count, start, before = 0, time.perf_counter(), _peak()

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        read(data)
        if count == runs:
            result = {
                "inputs": count,
                "refused": refused,
                "taken": count - refused,
                "seconds": round(time.perf_counter() - start, 1),
                "memory_growth_mib": round(_peak() - before, 1),
                "coverage_corpus": len(list(corpus.iterdir())),
            }
            print("RESULT " + json.dumps(result), flush=True)

    longest = max(4096, *(2 * len(data) for data in inputs))
    limits = [f"-runs={runs}", f"-seed={seed}", f"-max_len={longest}", "-rss_limit_mb=4096", "-timeout=60"]
    limits.append(f"-dict={words}")
    atheris.Setup([sys.argv[0], *limits, "-verbosity=0", str(corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Fuzz every target, one process after the other, and write the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs in total")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the totals")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.target:
        fuzz(args.target, args.runs, args.seed, args.place)
        return
    results: dict[str, Any] = {}
    for name, share in SHARES.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--target", name, "--place", folder]
            command += ["--runs", str(round(share * args.runs))]
            command += ["--seed", str(args.seed)]
            done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if done.returncode or line is None:
            sys.exit(f"target '{name}' failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        results[name] = json.loads(line.removeprefix("RESULT "))
        print(name, results[name], file=sys.stderr)
    from arp_hub._utils.environment import environment

    total = {key: sum(found[key] for found in results.values()) for key in ("inputs", "refused", "taken")}
    report = {**environment(), "seed": args.seed, "total": {**total, "other_exceptions": 0}, "targets": results}
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
