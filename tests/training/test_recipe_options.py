"""Training options of ImageNet recipes do what timm's do, also after decomposition, and runs resume with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import half_rank_plan
from PIL import Image
from safetensors.torch import load_file
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn
from torch._dynamo.utils import counters

import arp_hub
from arp_hub.errors import ArpHubError
from arp_hub.training import TrainConfig, load_data, run
from arp_hub.training.checkpoint import list_checkpoints
from arp_hub.training.data.augment import Augmentation
from arp_hub.training.data.batches import epoch_batches
from arp_hub.training.data.images import TrainBatch
from arp_hub.training.losses import Loss
from arp_hub.training.optimizer import make_optimizer
from arp_hub.training.sync_norms import SynchronisedNorms

TINY = {
    "model": "cifar_resnet20",
    "data": "digits",
    "keep_params": 0.5,
    "schemes": ("channel",),
    "start_from": "dense",
    "calibration_images": 0,
    "epochs": 1,
    "max_steps": 3,
    "ramp": 0.5,
    "batch_size": 8,
    "cpu": True,
    "tracker": "none",
}
MANY = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "opt_kwargs": {"betas": [0.8, 0.9], "eps": 1e-6},
    "layer_decay": 0.8,
    "warmup_epochs": 0.01,
    "warmup_lr": 1e-5,
    "min_lr": 1e-6,
    "clip_grad": 0.05,
    "clip_mode": "agc",
    "sync_bn": True,
    "reprob": 0.5,
    "recount": 2,
    "color_jitter": 0.3,
    "aug_repeats": 2,
    "train_img_size": 24,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 0.9,
    "mixup_switch_prob": 0.4,
    "mixup_off_epoch": 1,
    "smoothing": 0.1,
    "bce_loss": True,
    "bce_target_thresh": 0.2,
    "distill": 0.5,
    "ema_decay": 0.9,
    "model_ema_warmup": True,
    "drop": 0.1,
}
"""Nearly all options together."""


def config(tmp_path, **changes):
    return TrainConfig(**{**TINY, "output": str(tmp_path / "out"), **changes})


def weights(settings):
    return load_file(Path(settings.output) / "model.safetensors")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Save the time that a disk takes."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights of a run without any of the options."""
    settings = config(tmp_path_factory.mktemp("plain"))
    run(settings)
    return weights(settings)


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


class Stack(nn.Sequential):
    """A model without `group_matcher`, whose parameters timm numbers itself."""

    def __init__(self):
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(8)]
        super().__init__(*blocks, nn.Linear(16, 4))
        self.pretrained_cfg = {"classifier": "8"}


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (lambda: timm.create_model("test_resnet"), ["conv1.0", "layer1.0.conv1", "layer3.0.conv2", "fc"]),
        (lambda: timm.create_model("test_vit"), ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.5.mlp.fc1", "head"]),
        (Stack, ["0.0", "3.0", "7.0"]),
    ],
    ids=["ResNet", "ViT", "no matcher"],
)
def test_factors_have_the_rate_of_the_layer_that_they_replace(build, layers):
    settings = TrainConfig(model="resnet18", keep_params=0.5, layer_decay=0.5, weight_decay=0.1)

    def rates(model):
        groups = make_optimizer(model, settings, 1.0).param_groups
        found = {
            id(weight): (group["lr_scale"], group["weight_decay"]) for group in groups for weight in group["params"]
        }
        return {name: found[id(weight)] for name, weight in model.named_parameters()}

    model = build()
    layers = [name for name in layers if name in dict(model.named_modules())]
    dense = rates(model)
    theirs = create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert dense == {names[id(w)]: (g["lr_scale"], g["weight_decay"]) for g in theirs for w in g["params"]}
    assert len({scale for scale, _ in dense.values()}) > 2
    scheme = {name: "channel" for name in layers}
    decomposed = rates(arp_hub.decompose(model, half_rank_plan(model, scheme)))
    factors = [name for name in decomposed if name not in dense]
    assert len(factors) >= 2 * len(layers)
    for name in decomposed:
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        assert decomposed[name] == dense[f"{layer}.{name.rpartition('.')[2]}" if layer else name], name


def test_binary_cross_entropy_is_that_of_timm():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    base = {"model": "resnet18", "keep_params": 0.5, "bce_loss": True}
    for extra in ({}, {"smoothing": 0.1}, {"bce_target_thresh": 0.2, "bce_sum": True}):
        ours = Loss(TrainConfig(**base, **extra), 5).of_targets(logits, labels)
        theirs = BinaryCrossEntropy(
            extra.get("smoothing", 0), extra.get("bce_target_thresh"), sum_classes="bce_sum" in extra
        )
        assert ours == theirs(logits, labels)
    # with mixup, labels are smoothed when they are mixed, and once only
    mixing = Loss(TrainConfig(**base, mixup=0.5, smoothing=0.1, mixup_off_epoch=2), 5)
    mixing.begin_epoch(1)
    images = torch.randn(6, 3, 8, 8)
    mixed, targets = mixing.mixed(images.clone(), labels)
    assert not torch.equal(mixed, images)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 6)
    assert targets.min() == pytest.approx(0.02)
    assert mixing.of_targets(logits, targets) == F.binary_cross_entropy_with_logits(logits, targets)
    mixing.begin_epoch(2)
    mixed, targets = mixing.mixed(images.clone(), labels)
    assert torch.equal(mixed, images)
    assert torch.equal(targets.argmax(1), labels)


@pytest.mark.parametrize("summed", [False, True])
def test_distillation_compares_what_the_loss_compares(summed):
    torch.manual_seed(0)
    guide = torch.randn(6, 50)
    settings = TrainConfig(
        model="resnet18", keep_params=0.5, bce_loss=True, bce_sum=summed, distill=0.5, temperature=2.0
    )
    loss = Loss(settings, 50)
    logits = guide.clone().requires_grad_()
    nothing = loss.distilled(torch.zeros(()), logits, guide)
    nothing.backward()
    assert nothing.abs() < 1e-5
    assert logits.grad.abs().max() < 1e-6
    # a teacher that is sure of the labels weighs as much as the labels themselves
    labels = guide.argmax(1)
    sure = torch.full_like(guide, -40.0).scatter_(1, labels[:, None], 40.0)
    logits = torch.randn(6, 50)
    of_labels = loss.of_targets(logits, labels)
    of_teacher = (loss.distilled(of_labels, logits, sure) - 0.5 * of_labels) / 0.5
    heated = loss.of_targets(logits / 2, labels)
    assert of_teacher.item() == pytest.approx(4 * heated.item(), rel=1e-5)


def test_repeated_augmentation_shows_versions_of_each_image_to_different_processes():
    order = epoch_batches(100, 12, seed=1, epoch=0, repeats=3)
    assert order.shape == (8, 12)
    for batch in order:
        thirds = batch.view(3, 4)  # of three processes
        assert torch.equal(thirds[0], thirds[1]) and torch.equal(thirds[0], thirds[2])
        assert len(set(thirds[0].tolist())) == 4
    assert len(set(order.flatten().tolist())) == 32
    assert epoch_batches(100, 10, seed=1, epoch=0, repeats=4)[0].bincount().max() == 4


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing_is_that_of_timm_and_keyed_by_image(mode):
    model = timm.create_model("cifar_resnet20", num_classes=10)
    device = torch.device("cpu")

    def batch(share, **changes):
        data = load_data("digits", model, augmentation=Augmentation(**changes))
        jobs = [TrainBatch(torch.arange(16), seed=3, share=share)]
        return next(iter(data.train.images.training(jobs, device, 0)))

    plain, erased = batch(slice(0, 16)), batch(slice(0, 16), reprob=0.5, remode=mode, recount=2)
    changed = (plain != erased).flatten(1).any(1)
    assert 2 <= changed.sum() <= 14
    assert torch.equal(plain[~changed], erased[~changed])
    assert torch.equal(erased[8:], batch(slice(8, 16), reprob=0.5, remode=mode, recount=2))
    values = erased[plain != erased]
    assert (values == 0).all() if mode == "const" else values.std() > 0.2
    assert batch(slice(0, 16), img_size=24).shape[2:] == (24, 24)


def test_random_erasing_does_not_depend_on_the_crop(tmp_path):
    """Crops and erasing draw from the same generator, so that they need seeds of their own."""
    for kind in "ab":
        (tmp_path / "train" / kind).mkdir(parents=True)
        grey = np.linspace(0, 255, 200).astype("uint8")[None].repeat(200, 0)  # its spread tells the width of a crop
        Image.fromarray(grey).save(tmp_path / "train" / kind / "0.png")
    model = timm.create_model("test_resnet", num_classes=2)

    def batch(**changes):
        data = load_data(str(tmp_path), model, augmentation=Augmentation(**changes))
        jobs = [TrainBatch(torch.zeros(400, dtype=torch.long), seed=3, share=slice(0, 400))]
        return next(iter(data.train.images.training(jobs, torch.device("cpu"), 0)))

    plain, erased = batch(), batch(reprob=0.5)
    width = plain[:, 0].flatten(1).amax(1) - plain[:, 0].flatten(1).amin(1)
    changed = (plain != erased).flatten(1).any(1)
    assert 120 < changed.sum() < 280
    assert abs(float(width[changed].mean() - width[~changed].mean())) < 0.25 * float(width.std())


def test_large_images_are_augmented_in_the_workers(shared):
    model = timm.create_model("test_resnet")
    source, device = str(shared / "data" / "imagenet-sample"), torch.device("cpu")
    jobs = [TrainBatch(torch.arange(4), seed=3, share=slice(0, 4))]

    def batch(**changes):
        images = load_data(source, model, augmentation=Augmentation(**changes)).train.images
        return next(iter(images.training(jobs, device, 0)))

    plain, erased = batch(), batch(reprob=1.0, remode="const")
    assert plain.shape == (4, 3, 160, 160)
    same = (plain == erased).all(1).flatten(1).float().mean(1)
    assert ((same > 0.5) & (same < 0.99)).all()  # timm erases up to a third
    assert batch(img_size=96).shape == (4, 3, 96, 96)
    assert not torch.equal(plain, batch(train_crop_mode="rkrc"))


def test_a_run_with_nearly_all_options_resumes_to_the_same_weights(tmp_path, caplog):
    changes = MANY | {"finetune_epochs": 1, "checkpoint_every": 1, "keep_checkpoints": 99}
    settings = config(tmp_path, **changes)
    run(settings)
    assert not [record for record in caplog.records if record.name.startswith("timm.optim")]
    whole = weights(settings)
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())
    checkpoints = list_checkpoints(settings.run_folder / "checkpoints")
    assert [path.name for path in checkpoints[-4:]] == [f"finetune-0000000{step}" for step in range(4)]
    for name in ("finetune-00000002", "compress-00000001"):  # each removes the later ones
        at = next(path for path in checkpoints if path.name == name)
        run(config(tmp_path, **changes, resume=str(at), overwrite=True))
        assert differing(weights(settings), whole) == [], name


@pytest.mark.parametrize("changes", [{"sync_bn": True}, {"torchcompile": "eager"}], ids=["sync_bn", "torchcompile"])
def test_the_penalty_pulls_the_weights_that_are_trained(tmp_path, plain, changes):
    """In one process on a CPU, both change nothing at all: not the names, not the weights, not the layers that stay."""
    settings = config(tmp_path, **changes)
    counters.clear()
    scores = run(settings)["scores"]
    assert ("unique_graphs" in counters["stats"]) == ("torchcompile" in changes)
    assert differing(weights(settings), plain) == []
    assert scores["decomposed"]["loss"] == pytest.approx(scores["before_decomposition"]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["cifar_resnet20", "test_efficientnet"])
def test_synchronised_norms_leave_the_model_as_it_was(name):
    model = timm.create_model(name)  # the second one has a BatchNorm with an activation
    before, state = dict(model.named_modules()), {key: value.clone() for key, value in model.state_dict().items()}
    norms = SynchronisedNorms(model)
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"SyncBatchNorm", "SyncBatchNormAct"}
    assert not kinds & {"BatchNorm2d", "BatchNormAct2d"}
    model.train()(torch.randn(2, 3, 64, 64))
    norms.put_back()
    assert dict(model.named_modules()) == before
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) == ("running" not in key and "num_" not in key) for key in after)


def test_adaptive_clipping_spares_the_classifier(tmp_path):
    settings = config(tmp_path, epochs=1, clip_grad=1e-9, clip_mode="agc", weight_decay=0.0, dense_epochs=1)
    run(settings)
    dense = load_file(settings.run_folder / "dense.safetensors")
    torch.manual_seed(0)
    start = timm.create_model("cifar_resnet20", num_classes=10).state_dict()
    moved = {name for name in dense if (dense[name] - start[name]).abs().max() > 1e-6 and "running" not in name}
    assert {name for name in moved if "num_batches" not in name} == {"fc.weight", "fc.bias"}


def test_sizes_of_training_and_test_images(tmp_path, caplog):
    settings = config(
        tmp_path, model="test_vit", img_size=64, train_img_size=32, model_kwargs={"dynamic_img_size": True},
        crop_pct=0.9, drop_path=0.1, max_steps=2,
    )  # fmt: skip
    run(settings)
    model = timm.create_model(f"local-dir:{settings.output}", pretrained=True)
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert model.pretrained_cfg["crop_pct"] == 1.0  # the digits are too small to be cropped
    assert "crop_pct=0.9 has no effect" in caplog.text
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    settings = config(tmp_path / "convolutions", img_size=24, max_steps=2)  # takes no argument img_size
    run(settings)
    loaded = timm.create_model(f"local-dir:{settings.output}", pretrained=True)
    assert loaded.pretrained_cfg["input_size"] == (3, 24, 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": "vit_tiny_patch16_224", "train_img_size": 64},
            "train_img_size=64: model 'vit_.*dynamic_img_size=True",
        ),
        ({"drop_path": 0.1, "model": "vgg11_bn"}, "drop_path=0.1: the model 'vgg11_bn' takes no argument"),
        ({"optimizer": "adamw", "momentum": 0.5}, "momentum=0.5 has no effect with optimizer 'adamw': leave"),
        ({"opt_kwargs": {"betas": [0.9, 0.9]}}, "opt_kwargs={'betas': .*optimizer 'sgd' takes no 'betas'"),
        ({"opt_kwargs": {"size": 3}}, "opt_kwargs={'size': 3}: optimizer 'sgd' refuses them"),
        ({"opt_kwargs": {"lr": 3}}, "opt_kwargs must not hold 'lr'.*set lr"),
        ({"torchcompile": "fast"}, "torchcompile: torch has no backend 'fast' here: choose from .*inductor"),
        ({"auto_augment": "sometimes"}, "auto_augment: timm knows no augmentation 'sometimes'"),
        (
            {"teacher": "OTHER SIZE", "distill": 0.5},
            "teacher '.*' does not take the training images, which have 32 x 32 pixels .*: choose another teacher",
        ),
        ({"output": "."}, "output='.' names no folder to write: give one such as runs/mine"),
        ({"output": "/"}, "output='/' names no folder to write"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, changes, words):
    if changes.get("teacher") == "OTHER SIZE":
        normalised = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # as the student's images
        teacher = timm.create_model(
            "test_vit", num_classes=10, img_size=96, dynamic_img_size=False, pretrained_cfg_overlay=normalised
        )
        changes = {**changes, "teacher": f"local-dir:{arp_hub.save_pretrained(teacher, tmp_path / 'teacher')}"}
    with pytest.raises(ArpHubError, match=words):
        run(config(tmp_path, **changes))
    assert not (tmp_path / "out-run" / "checkpoints").exists()
    assert not (tmp_path / "out").exists()


def test_a_failed_compilation_names_the_option(tmp_path):
    with pytest.raises(ArpHubError, match=r"torchcompile=tvm: the model cannot be compiled"):
        run(config(tmp_path, torchcompile="tvm"))


def test_synchronised_norms_on_two_cpu_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ArpHubError, match="sync_bn needs GPUs, but this run has 2 processes on CPUs"):
        run(config(tmp_path, sync_bn=True))
