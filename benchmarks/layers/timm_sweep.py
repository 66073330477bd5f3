"""Decompose the smallest model of every timm family and check timm's entry points on it.

    python -m benchmarks.layers.timm_sweep            # one model for each family: the checks of timm_checks.py
    python -m benchmarks.layers.timm_sweep --fits     # the same models: planned, fitted and refined on images
    python -m benchmarks.layers.timm_sweep --exports  # the same models: torch.compile, torch.export, ONNX, TorchScript
    python -m benchmarks.layers.timm_sweep --all      # every architecture: planned on the meta device
    python -m benchmarks.layers.timm_sweep --docs     # write docs/supported-models.md from the results

Each family runs in its own process under a time limit, so that one crash does not end the sweep. Results are written
after each family. Families with a result are skipped, unless ``--family`` names them.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 - imported once, before the forks
import timm
import torch
import torch._dynamo  # noqa: F401 - imported once, before the forks
from torch import nn

import arp_hub
import arp_hub.reports.plots
import arp_hub.reports.summary  # noqa: F401 - imported once, before the forks
from arp_hub._utils.environment import environment
from arp_hub.layers.model import count_params
from benchmarks.layers.timm_checks import (
    CHECKS,
    EXPORTS,
    Case,
    feasible_plan,
    flat,
    make_case,
    random_model,
    run_check,
    smallest_size,
)
from benchmarks.layers.timm_fits import FITS, make_fitted
from benchmarks.rows import HERE, load_results, results_file

RESULTS = results_file("timm_sweep")
DOCS = HERE.parent / "docs" / "supported-models.md"
LARGEST = 60_000_000
KEEP = 0.5


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=[], help="run these families, even if they have results")
    parser.add_argument("--model", help="run this model instead of the family's smallest; needs one --family")
    parser.add_argument("--fits", action="store_true", help="plan, fit and refine the models of the families on images")
    parser.add_argument("--exports", action="store_true", help="export the models of the families")
    parser.add_argument("--all", action="store_true", help="plan every architecture on the meta device")
    parser.add_argument("--docs", action="store_true", help="write docs/supported-models.md")
    parser.add_argument("--limit", type=float, default=600, help="time limit for a family, in seconds")
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = load_results(RESULTS)
    if args.docs:
        write_docs(results)
        return
    here = environment()
    results = {"hardware": here["hardware"]} | results | {key: here[key] for key in ("versions", "command")}
    families = families_of_timm()
    kind = "architectures" if args.all else "fits" if args.fits else "exports" if args.exports else "families"
    part = results.setdefault(kind, {})
    for family in args.family or sorted(families, key=list({**results.get("smallest", {}), **families}).index):
        if family in part and family not in args.family:
            continue
        began = time.perf_counter()
        if args.all:
            row = in_process(lambda names=families[family]: plan_all(names), args.limit)
        else:
            least = results.setdefault("smallest", {})
            if not args.model and family not in least:
                least[family] = smallest(families[family])
            row = check_family(args.model or least[family], kind, args.limit)
        row["seconds"] = round(time.perf_counter() - began, 1)
        if here["hardware"] != results["hardware"]:
            row["hardware"] = here["hardware"]
        part[family] = row
        save(results)
        print(summary(family, row), flush=True)


def families_of_timm() -> dict[str, list[str]]:
    """The architectures of every model file of timm; those that other packages register are left out."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        package, _, family = timm.models.model_entrypoint(name).__module__.rpartition(".")
        if package == "timm.models":
            families.setdefault(family, []).append(name)
    return families


def smallest(names: list[str]) -> str:
    """The architecture with the fewest parameters."""
    return str(in_process(lambda: {"name": min(names, key=meta_params)}, 600)["name"])


def meta_params(name: str) -> int:
    """Parameters of an architecture, counted on the meta device."""
    with torch.device("meta"):
        return count_params(timm.create_model(name))


def in_process(call: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """Run a call in its own process; an error is returned as a result."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"

        def target() -> None:
            try:
                row = call()
            except Exception as error:  # one family must not end the sweep
                row = {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]}
            path.write_text(json.dumps(row), encoding="utf-8")

        process = multiprocessing.get_context("fork").Process(target=target)
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            return {"error": f"not done within {limit:.0f} s"}
        if not path.exists():
            return {"error": f"the process ended with code {process.exitcode}"}
        return dict(json.loads(path.read_text(encoding="utf-8")))


def check_family(name: str, kind: str, limit: float) -> dict[str, Any]:
    """Run all checks of one model; a model above the largest size is only planned."""
    if in_process(lambda: {"params": meta_params(name)}, limit)["params"] > LARGEST:
        return {"model": name, **(in_process(lambda: plan_one(name), limit) if kind == "families" else {})}
    with tempfile.TemporaryDirectory() as folder:
        if kind == "fits":
            return {"model": name, **in_process(lambda: fit_model(name), limit)}
        if kind == "exports":
            return {"model": name, **in_process(lambda: export_model(name, Path(folder)), limit)}
        row = {"model": name, **in_process(lambda: check_model(name, Path(folder)), limit)}
        if "checks" in row:
            row["checks"]["fresh process"] = in_process(lambda: reload(Path(folder)), limit).get("error", "ok")
    return row


def check_model(name: str, folder: Path) -> dict[str, Any]:
    """Decompose one model at full rank and to half of its parameters, save both, and run every check."""
    case = make_case(name, folder)
    row: dict[str, Any] = {"input_size": case.size, "planning_seconds": round(case.planning_seconds, 2)}
    row |= {**shares(case.dense, case.plan), "params_after": count_params(case.half)}
    checks: dict[str, str] = {}
    try:
        arp_hub.save_pretrained(arp_hub.to_dense(copy.deepcopy(case.half)), folder / "to_dense")
        checks["save after to_dense"] = "ok"
    except arp_hub.ArpHubError as error:
        checks["save after to_dense"] = f"n/a: refused: {error}"
    with torch.no_grad():
        torch.save({"images": case.images, "outputs": flat(case.half(case.images))}, folder / "expected.pt")
    checks |= {check: run_check(case, check) for check in CHECKS}
    return {**row, "checks": checks, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def fit_model(name: str) -> dict[str, Any]:
    """Plan and fit one model on images, to half of its parameters, and refine it."""
    fitted = make_fitted(name, KEEP)
    checks = {check: run_check(fitted, check, FITS) for check in FITS}
    return {"checks": checks, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def export_model(name: str, folder: Path) -> dict[str, Any]:
    """Decompose one model to half of its parameters and export it in every way."""
    size = smallest_size(name)
    dense = random_model(name, size)
    plan = feasible_plan(dense, KEEP)
    half = arp_hub.decompose(copy.deepcopy(dense), plan)
    arp_hub.save_pretrained(half, folder / "half")
    case = Case(name, size, dense.eval(), half, half.eval(), folder, plan, 0.0)
    return {"checks": {check: run_check(case, check) for check in EXPORTS}}


def shares(model: nn.Module, plan: arp_hub.RankPlan) -> dict[str, Any]:
    """Number of parameters, their share in decomposable layers, and the shares that stay dense by reason."""
    total, modules = count_params(model), dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    reasons: dict[str, list[int]] = {}
    budget = 0
    for name, reason in plan.dense.items():
        if name in modules:
            own = modules[name].named_parameters(recurse=False)
            count = sum(p.numel() for n, p in own if n.startswith("weight"))
        else:
            count = parameters[name].numel()
        if reason.startswith("the budget"):
            budget += count
        else:
            layers = reasons.setdefault(reason, [0, 0])
            layers[0] += 1
            layers[1] += count
    planned = sum(modules[name].weight.numel() for name in plan.layers)
    return {
        "params": total,
        "eligible": round((planned + budget) / total, 4),
        "dense": {reason: {"layers": n, "share": round(count / total, 4)} for reason, (n, count) in reasons.items()},
    }


def reload(folder: Path) -> dict[str, Any]:
    """Load the saved model in a process that has not seen it, and compare its outputs bit by bit."""
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = timm.create_model(f"local-dir:{folder / 'half'}", pretrained=True).eval()
    with torch.no_grad():
        outputs = flat(model(expected["images"]))
    if not all(torch.equal(y, z) for y, z in zip(outputs, expected["outputs"], strict=True)):
        return {"error": "fails: another output"}
    return {}


def plan_one(name: str) -> dict[str, Any]:
    """Plan one architecture on the meta device."""
    began = time.perf_counter()
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = feasible_plan(model, KEEP)
    seconds = time.perf_counter() - began
    return {"planning_seconds": round(seconds, 2), **shares(model, plan), "planned": len(plan.layers)}


def plan_all(names: list[str]) -> dict[str, Any]:
    """Plan architectures on the meta device, one by one."""
    rows = {}
    for name in names:
        try:
            rows[name] = plan_one(name)
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"models": rows, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def summary(family: str, row: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "error" in row:
        return f"{family}: {row.get('model', '')} {row['error']}"
    if "models" in row:
        bad = [f"{name}: {one['error']}" for name, one in row["models"].items() if "error" in one]
        return f"{family}: {len(row['models'])} planned in {row['seconds']:.0f} s, {row['peak_mb']} MB {bad}"
    bad = [f"{check}: {result}" for check, result in row.get("checks", {}).items() if result.startswith("fails")]
    counts = Counter(result.partition(":")[0] for result in row.get("checks", {}).values())
    return f"{family}: {row['model']} {dict(counts)} in {row['seconds']:.0f} s {bad}"


def save(results: dict[str, Any]) -> None:
    """Write the results in one step."""
    RESULTS.parent.mkdir(exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


INTRO = """---
hide: [toc]
---

# Supported models

All {architectures} architectures of timm {timm} can be planned, in {families} families. A family is one of timm's model
files. The smallest architecture of {checked} families is tested in full. The {planned} families above 60 M parameters
are planned by shape.

Every test has three parts, with random weights at the smallest image size:

- **Full rank:** every feature map and entry point gives the output of the dense model, within a relative error of 1e-3.
- **Half of the parameters:** the output is finite, the number of parameters is as planned, and a new process loads the
  model bit for bit.
- **On images**, in {fitted} families: planned and fitted on images, the model is closer to the dense one than a fit to
  the weights alone at the same ranks. Refinement takes it no further away, and changes nothing that is to stay.

| column | holds |
|---|---|
| decomposable | share of the parameters in layers that a plan may choose, without the first convolution |
| stays dense | kinds of layers with at least 1 % of the parameters that stay dense |
| exceptions | entry points that do not work, explained [below](#exceptions) |

| family | smallest model | parameters | decomposable | stays dense | exceptions |
|---|---|---|---|---|---|
"""
END = """
## Exceptions

| family | entry point | reason |
|---|---|---|
{exceptions}
## What is tested

{entry_points}.

On images: {on_images}. Without a chain of blocks, refinement trains the whole model from the first step on; so it is
in {unchained} of the {fitted} families.

{exported} families also export through torch.compile, torch.export, ONNX and TorchScript, {exports_excepted} of them
with an exception. Planning a tested model takes at most {slowest} of CPU time.

This page is written by `python -m benchmarks.layers.timm_sweep --docs` from `benchmarks/results/timm_sweep.json`. The
file also lists what the dense models do not support. It holds runs of timm {timm} and torch {torch}, seed 0, on
{threads} thread of {cpu}.
"""
SHORT = (
    (r"depthwise: .*", "depthwise"),
    (r"a parameter of the model itself, .*", "parameters outside of layers"),
    (r"layers of type (\w+) .*", r"\1"),
)
"""Reasons of a plan, and their form in a table cell."""


def write_docs(results: dict[str, Any]) -> None:
    """Write docs/supported-models.md from the results."""
    families = {family: row for family, row in results.get("families", {}).items() if "params" in row}
    checked = {family: row for family, row in families.items() if "checks" in row}
    exports, architectures = results.get("exports", {}), results.get("architectures", {})
    fits = {family: row for family, row in results.get("fits", {}).items() if "checks" in row}
    rows = [one for part in architectures.values() for one in part.get("models", {}).values()]
    seconds, slowest = max(((row["planning_seconds"], row["model"]) for row in checked.values()), default=(0, "none"))
    large = len(families) - len(checked)
    cpus = {row.get("hardware", results["hardware"])["cpu"] for row in (*families.values(), *fits.values())}
    text, exceptions = "", []
    for family in sorted(results["smallest"]):
        row = families.get(family)
        if row is None:
            error = results.get("families", {}).get(family, {}).get("error", "not run yet")
            text += f"| {family} | {results['smallest'][family]} | | | | {error} |\n"
            continue
        parts = (row, fits.get(family, {}), exports.get(family, {}))
        stays = [f"{short(reason)} {one['share']:.0%}" for reason, one in row["dense"].items() if one["share"] >= 0.01]
        found = [line.partition(": ") for part in parts for line in problems(part)]
        exceptions += [(family, check, reason.removeprefix("exception: ")) for check, _, reason in found]
        text += (
            f"| {family} | {row['model']} | {row['params'] / 1e6:.1f} M | {row['eligible']:.0%} "
            f"| {', '.join(stays)} | {', '.join(check for check, _, _ in found)} |\n"
        )
    numbers = dict(
        timm=results["versions"]["timm"],
        torch=results["versions"]["torch"],
        threads=results["hardware"]["threads"],
        cpu=" and ".join(sorted(cpus)),
        families=len(results["smallest"]),
        checked=len(checked),
        planned=large,
        exported=sum("checks" in row and not failures(row) for row in exports.values()),
        exports_excepted=sum(bool(problems(row)) and not failures(row) for row in exports.values()),
        architectures=f"{sum('error' not in row for row in rows):,}",
        slowest=f"{seconds:.1f} s ({slowest})",
        entry_points="Entry points: " + ", ".join(f"`{check}`" for check in [*CHECKS, *EXPORTS]),
        on_images=", ".join(f"`{check}`" for check in FITS),
        fitted=sum(not failures(row) for row in fits.values()),
        unchained=sum(row["checks"]["blocks"].startswith("n/a") for row in fits.values()),
        exceptions="".join(f"| {family} | `{check}` | {cell(reason)} |\n" for family, check, reason in exceptions),
    )
    if sum("error" not in row for row in rows) != sum(map(len, families_of_timm().values())):
        raise SystemExit("some architectures have no plan: run them first, or mend them")
    DOCS.write_text(INTRO.format(**numbers) + text + END.format(**numbers), encoding="utf-8")


def short(reason: str) -> str:
    """A plan's reason as a table cell says it."""
    for pattern, form in SHORT:
        reason = re.sub(pattern, form, reason)
    return reason


def problems(row: dict[str, Any]) -> list[str]:
    """The checks of a row that fail or are listed as known exceptions."""
    return [
        f"{check}: {result}" for check, result in row.get("checks", {}).items() if not result.startswith(("ok", "n/a"))
    ]


def failures(row: dict[str, Any]) -> list[str]:
    """The checks of a row that fail."""
    return [line for line in problems(row) if ": exception: " not in line]


def cell(line: str) -> str:
    """A line as a table cell: shortened, and without characters that end a cell."""
    return " ".join(line.replace("|", "/").split())[:400]


if __name__ == "__main__":
    main()
