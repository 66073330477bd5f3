"""Recipes with Accelerate's FSDP2 plugin: two processes with shards end where two with DDP end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from hub_client import Client
from safetensors.torch import load_file

from arp_hub import AdaptiveRankPenalty, RankPlan, to_dense
from arp_hub.errors import ArpHubError
from arp_hub.training import TrainConfig, run
from arp_hub.training.checkpoint import load_checkpoint

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "10000",
}
WORDS = ("--no-pretrained", "--tracker", "none", "--schemes", "channel", "--cpu", "--data", "digits")
TRIAL = (
    *("--batch-size", "16", "--calibration-images", "0", "--dense-epochs", "1", "--epochs", "1"),
    *("--start-from", "dense"),  # a fit to a few images would amplify the rounding of the dense training
)
PHASES = (*TRIAL, "--finetune-epochs", "1", "--val-fraction", "0.1", "--accumulation", "2", "--clip-grad", "1")
VIT = (
    *("--model", "test_vit", *PHASES, "--max-steps", "4", "--ema-decay", "0.9", "--distill", "0.5"),
    *("--checkpoint-every", "1", "--keep-checkpoints", "99"),
)
DOUBLE = """
import torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
"""
"""Code that makes a run compute in double precision from end to end."""


def train(
    client: Client, output: Path, *words: str, environment: dict[str, str] | None = None, before: str = ""
) -> list[str]:
    """Run a recipe on two processes, and return what they say."""
    ended = client.recipe_on_two(
        "any_backbone.py", "--output", output, *WORDS, *words, environment=environment, before=before
    )
    assert [done.code for done in ended] == [0, 0], [done.err for done in ended]
    return [done.err for done in ended]


def apart(a: Path, b: Path) -> float:
    """The largest difference of two runs in the weights of their dense and compressed models."""
    dense = [load_file(path.with_name(f"{path.name}-run") / "dense.safetensors") for path in (a, b)]
    small = [to_dense(timm.create_model(f"local-dir:{path}", pretrained=True)).state_dict() for path in (a, b)]
    return max((x[name].double() - y[name].double()).abs().max().item() for x, y in (dense, small) for name in x)


@pytest.fixture(scope="module")
def sharded(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with FSDP2 that keeps all checkpoints."""
    output = tmp_path_factory.mktemp("sharded") / "out"
    said = train(client, output, *VIT, environment=FSDP2)
    assert "Warning" not in "".join(said)
    return output


def violations(run: Path, step: int) -> dict[str, float]:
    """Relative violations of the whole weights in a checkpoint of penalty training."""
    checkpoint = load_checkpoint(run.with_name(f"{run.name}-run") / "checkpoints" / f"compress-{step:08}")
    state = checkpoint.state
    kind = next(iter(state["model"].values())).dtype
    model = timm.create_model(checkpoint.settings["model"], num_classes=10).to(kind)
    model.load_state_dict(state["model"])
    plan = RankPlan.from_dict(checkpoint.plan)
    penalty = AdaptiveRankPenalty(model, plan, total_steps=40)
    penalty.load_state_dict(state["penalty"])
    return penalty.violations()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("model", "optimizer", "before", "most"),
    [
        pytest.param("test_vit", "sgd", "", 1e-5, id="vit"),
        pytest.param("test_vit", "lamb", DOUBLE, 1e-9, id="vit with LAMB"),
        pytest.param("cifar_resnet20", "sgd", DOUBLE, 1e-9, id="resnet20"),
    ],
)
def test_shards_end_where_whole_weights_end(client, tmp_path, model, optimizer, before, most):
    """DDP and FSDP2 sum gradients in another order, and nothing else differs.

    So the difference must be rounding that training amplifies. In float32, a transformer with SGD shows that directly.
    The others show it in float64, where a mistake in the scale, order or statistics of a step would stay as large.
    Measured after 40 steps of dense training:

    - ResNet-20: 5e-2 in float32, at most 2e-12 in float64. In float32 the weights differ by 6e-8 after one step. In the
      second, ReLUs whose input is near zero switch, and gradients differ by 4e-3. With softplus in their place it is
      5e-6. DDP with and without ``channels_last``, which also round differently, part in the same way.
    - LAMB: 3e-6 in float32, 4e-15 in float64. It divides each gradient by its own size, small ones too.
    """
    words = ("--model", model, "--optimizer", optimizer, *PHASES, "--max-steps", "40", "--checkpoint-every", "20")
    words += ("--keep-checkpoints", "99")
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    train(client, ddp, *words, before=before)
    train(client, fsdp, *words, before=before, environment=FSDP2)
    assert apart(ddp, fsdp) < most
    scores = [json.loads((path / "metrics.json").read_text())["scores"] for path in (ddp, fsdp)]
    for name, found in scores[0].items():
        assert scores[1][name]["loss"] == pytest.approx(found["loss"], rel=10 * most), name
    halfway = violations(ddp, 20)
    assert violations(fsdp, 20) == pytest.approx(halfway, rel=100 * most)
    assert min(halfway.values()) > 1e-4  # in the ramp: there is something to compare


@pytest.mark.slow
def test_bf16_is_for_passes_only(client, sharded, tmp_path):
    """Weights stay in float32. One rounding to bf16 is 2**-8."""
    words = (*VIT, "--mixed-precision", "bf16")
    train(client, tmp_path / "ddp", *words)
    train(client, tmp_path / "fsdp", *words, environment=FSDP2)
    state = load_checkpoint(tmp_path / "fsdp-run" / "checkpoints" / "dense-00000004").state
    assert {value.dtype for value in state["model"].values()} == {torch.float32}
    logs = [path.with_name(f"{path.name}-run") / "log.jsonl" for path in (tmp_path / "ddp", tmp_path / "fsdp", sharded)]
    losses = [[json.loads(line)["loss"] for line in log.read_text().splitlines()] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=2**-8)
    assert losses[1] != losses[2], "not in bf16"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shards", "whole weights"])
@pytest.mark.parametrize("name", ["compress-00000002", "finetune-00000003"])
def test_a_checkpoint_continues_with_shards_and_with_whole_weights(client, sharded, tmp_path, way, name):
    shutil.copytree(sharded.with_name("out-run"), tmp_path / "out-run")
    words = (*VIT, "--overwrite", "--resume", str(tmp_path / "out-run" / "checkpoints" / name))
    train(client, tmp_path / "out", *words, environment=FSDP2 if way == "shards" else None)
    assert apart(sharded, tmp_path / "out") < 1e-5


@pytest.mark.slow
def test_checkpoints_hold_whole_weights_and_states_and_name_another_number_of_processes(client, sharded, tmp_path):
    path = sharded.with_name("out-run") / "checkpoints" / "dense-00000002"
    state = load_checkpoint(path).state
    shapes = [parameter.shape for parameter in timm.create_model("test_vit", num_classes=10).parameters()]
    assert sorted(moments["momentum_buffer"].shape for moments in state["optimizer"].values()) == sorted(shapes)
    done = client.recipe(
        "any_backbone.py", "--output", tmp_path / "out", *WORDS, *VIT, "--resume", path, token=None, before=""
    )
    assert done.code == 2
    assert "processes: 2 in the checkpoint, 1 now" in done.err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_both_processes(client, tmp_path):
    words = (*WORDS, "--model", "cifar_resnet20", *TRIAL, "--max-steps", "3", "--lr", "1e30")
    for done in client.recipe_on_two("any_backbone.py", "--output", tmp_path / "out", *words, environment=FSDP2):
        assert done.code == 2
        assert re.search(r"error: (the loss is|weights are).*phase 'dense'.*layer '", done.err), done.err


@pytest.mark.parametrize(
    ("setting", "environment", "message"),
    [
        ({"torchcompile": "eager"}, {}, "torchcompile=eager"),
        ({"cuda_graphs": True}, {}, "cuda_graphs=true"),
        ({"sync_bn": True}, {}, "sync_bn=true"),
        ({"clip_grad": 0.1, "clip_mode": "agc"}, {}, "clip_mode=agc"),
        ({"optimizer": "cadamw"}, {}, "optimizer=cadamw"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true"),
        ({}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing=true"),
    ],
)
def test_what_shards_cannot_do_is_refused_before_any_work(tmp_path, monkeypatch, setting, environment, message):
    """Two processes are stood in for."""
    for name, value in (FSDP2 | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.MULTI_CPU))
    config = TrainConfig(
        model="cifar_resnet20", data="digits", keep_params=0.5, cpu=True, output=str(tmp_path / "out"), **setting
    )
    with pytest.raises(ArpHubError, match=f"{message} and fsdp_version=2 cannot be combined: .*or train with DDP"):
        run(config)
    assert not (tmp_path / "out-run").exists()


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("multi_node", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_files(name, kind):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType(kind)
    assert config.fsdp_config.get("fsdp_version") == (2 if kind == "FSDP" else None)
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config)), "an entry that Accelerate does not know"
