"""Effects of hostile content and of races on pushes and loads, with a table of cases for each kind."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import low_rank_model
from hub_client import QUICK, Client
from hub_server import ALICE, HubServer
from safetensors.torch import load_file, save_file

import arp_hub
from arp_hub import ArpHubError
from arp_hub._utils.secrets import printable, redact
from arp_hub.hub.card import _license, by_hand, keep_by_hand
from arp_hub.hub.load import load_model, read_weights
from arp_hub.models._untrusted import read_header


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = low_rank_model("cifar_resnet20", {"layer1.0.conv1": "cp"})
    return arp_hub.save_pretrained(model, tmp_path_factory.mktemp("saved") / "model", metrics={"top1": 50.0})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return arp_hub.save_pretrained(timm.create_model("cifar_resnet20"), tmp_path_factory.mktemp("dense") / "model")


def race(hub: HubServer, client: Client, folder: Path) -> None:
    """Two pushes at once: the repository is complete afterwards, and is what a push that said so published."""
    hub.mend()
    hub.repos = {}
    code = (
        f"{QUICK}\nimport sys\nfrom arp_hub_cli.app import app\nsys.argv = ['arp-hub', 'push', folder, 'alice/model']"
    )
    codes = [f"{code} + ['--tag', 'v{number}']\napp()" for number in (0, 1)]
    done = client.side_by_side(codes, token=ALICE, folder=folder)
    assert any(each.code == 0 for each in done), [each.err for each in done]
    repo = hub.repos["alice/model"]
    for branch in ("main", "dense"):
        assert "model.safetensors" in repo.files(branch)
    for number, each in enumerate(done):
        assert "Traceback" not in each.err
        if each.code == 0:
            for tag in (f"v{number}", f"v{number}-dense"):
                assert "model.safetensors" in repo.files(tag)


def test_two_pushes_at_once_lose_nothing(hub: HubServer, client: Client, folder: Path) -> None:
    for _ in range(2):
        race(hub, client, folder)


@pytest.mark.slow
def test_thirty_pushes_in_pairs_lose_nothing(hub: HubServer, client: Client, folder: Path) -> None:
    for _ in range(15):
        race(hub, client, folder)


def test_a_loser_leaves_what_the_winner_made(hub: HubServer, client: Client, folder: Path) -> None:
    """The winner commits to the new repository and its new branch just before the loser's own commit."""
    hub.mend()
    hub.repos = {}

    def winner() -> None:
        repo = hub.repos["alice/model"]
        for branch in ("dense", "main"):
            repo.commit(f"refs/heads/{branch}", {".gitattributes": b"", "theirs": b"1"}, f"theirs, {branch}")

    hub.fault("POST .*/commit/dense", winner, 1)
    done = client.arp_hub("push", folder, "alice/model", token=ALICE)
    assert done.code == 2 and "somebody else changed the repository" in done.last_line
    assert all("theirs" in hub.repos["alice/model"].files(branch) for branch in ("main", "dense"))


WAITS = {
    "seconds": {"Retry-After": "1000000"},
    "more digits than int() takes": {"Retry-After": "9" * 5000},
    "rate limit": {"RateLimit": '"api";r=0;t=1000000'},
    "rate limit with spaces": {"RateLimit": '"api"; r = 0; t = 1000000'},
}


@pytest.mark.parametrize("case", WAITS)
def test_an_endless_wait_is_not_obeyed(hub: HubServer, client: Client, folder: Path, case: str) -> None:
    hub.mend()
    hub.repos = {}
    hub.headers = WAITS[case]
    hub.fault("POST .*/preupload/", 429)
    code = """
import time, arp_hub
waits = []
time.sleep = waits.append
try:
    arp_hub.push_to_hub(folder, "alice/model", dense_revision=None)
except arp_hub.ArpHubError as error:
    print(error)
print(max(waits))
"""
    try:
        done = client.run(code, token=ALICE, folder=folder)
    finally:
        hub.headers = {}
    assert done.code == 0 and "too many requests" in done.out, done.err + done.out
    assert 0 < float(done.out.split()[-1]) <= 10


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf_oauth_eyJhbGciOi.x-y_z", "***"),
        ("hf_aBc12", "***"),
        ("hf_" + "a1B" * 12, "***"),
        ("https://host/hf_" + "aB" * 17, "https://host/***"),
        ("HF_TOKEN=secret", "HF_TOKEN=***"),
        ("Bearer abc", "Bearer ***"),
        ("--token x", "--token ***"),
        ("me/hf_resnet20small", "me/hf_resnet20small"),
        ("hf_transfer hf_hub_id", "hf_transfer hf_hub_id"),
        ("me/hf_ResNet20small", "me/hf_ResNet20small"),
    ],
)
def test_what_is_a_token(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("bad", ["\x1b[31m", "\r", "\x00", "\x9b31m", "\u202e", "\ud800", "\u200b"])
def test_no_message_holds_what_a_terminal_obeys(bad: str) -> None:
    assert bad not in str(ArpHubError(f"layer '{bad}'")) and printable("conv1 é …") == "conv1 é …"


def test_a_long_name_does_not_fill_the_terminal() -> None:
    message = str(ArpHubError(f"layer '{'x' * 10**6}': choose another"))
    assert len(message) < 2000 and message.endswith("choose another")


def test_a_linked_picture_is_not_published(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.mend()
    hub.repos = {}
    mine, private = Path(shutil.copytree(folder, tmp_path / "model")), tmp_path / "private.png"
    private.write_bytes(b"private")
    (mine / "spectra.png").symlink_to(private)
    done = client.arp_hub("push", mine, "alice/model", "--no-dense", token=ALICE)
    assert done.code == 0 and "'spectra.png' is a link" in done.err, done.err
    assert "spectra.png" not in hub.repos["alice/model"].files()


METRICS: dict[str, Any] = {
    "a list": [],
    "text for a number": {"params": "x"},
    "layers that are numbers": {"layers": [1]},
    "dense as text": {"dense": "x"},
    "a million rows": {"layers": [{}] * 10**6},
    "NaN": {"top1": float("nan")},
}


@pytest.mark.parametrize("name", METRICS)
def test_hostile_metrics_are_refused(name: str, hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.mend()
    hub.repos = {}
    mine = Path(shutil.copytree(folder, tmp_path / "model"))
    change, good = METRICS[name], json.loads((mine / "metrics.json").read_text())
    (mine / "metrics.json").write_text(json.dumps({**good, **change} if isinstance(change, dict) else change))
    done = client.arp_hub("push", mine, "alice/model", "--no-dense", token=ALICE)
    assert done.code == 2 and "metrics.json" in done.err and "Traceback" not in done.err, done.err
    assert hub.repos == {}


def test_sixty_thousand_owner_marks_take_no_time() -> None:
    start = time.process_time()
    assert by_hand("<!-- owner: x -->\n" * 60_000) == ""
    card = "---\na: 1\n---\n<!-- owner: mine -->\n\n<!-- /owner -->\n"
    assert keep_by_hand(card, "<!-- owner: x -->\n" * 60_000) == card
    assert time.process_time() - start < 1


def test_every_licence_of_timm_is_one_that_the_hub_takes() -> None:
    for name in ("dinov3-license", "cvnets-license", "fastvit-license", "seer-license"):
        made = _license(name, {})
        assert made["license"] == "other" and made["license_name"] == name and made["license_link"].startswith("https:")
    assert _license("apache-2.0", {}) == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("prefix", "outer"), [("module.", ""), ("_orig_mod.", ""), ("model.", ""), ("module.", "_orig_mod."),
                          ("_orig_mod.", "model."), ("model.", "module._orig_mod.")],
)  # fmt: skip
def test_checkpoints_of_wrapped_models_load(prefix: str, outer: str, tmp_path: Path) -> None:
    model = timm.create_model("cifar_resnet20")
    state = {f"{outer}{prefix}{key}": value for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    assert read_weights(tmp_path / "x.safetensors").keys() == model.state_dict().keys()


def test_the_advice_to_run_a_pickle_is_not_passed_on(tmp_path: Path) -> None:
    torch.save({"x": Path("a")}, tmp_path / "x.pth")
    with pytest.raises(ArpHubError) as refused:
        read_weights(tmp_path / "x.pth")
    assert "weights_only" not in str(refused.value)


def _config(**args: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_args": {**config["model_args"], **args}}))

    return change


def _weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        save_file({**found, "fc.bias": change(found["fc.bias"])}, folder / "model.safetensors")

    return edit


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DENSE: dict[str, Callable[[Path], None]] = {
    "random weights": _config(pretrained_strict=False),
    "a filter": _config(pretrained_filter_fn="x"),
    "an unknown argument": _config(no_such_argument=1),
    "NaN": _weights(lambda t: t * float("nan")),
    "float8": _weights(lambda t: t.to(torch.float8_e4m3fn)),
    "integers": _weights(lambda t: t.to(torch.int8)),
    "a pickle": _pickle,
}


@pytest.mark.parametrize("name", DENSE)
def test_a_hostile_dense_folder_is_refused(name: str, dense: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(dense, tmp_path / "model"))
    DENSE[name](mine)
    with pytest.raises(ArpHubError):
        load_model(f"local-dir:{mine}")


@pytest.mark.parametrize("prefix", ["local-dir:", ""])
def test_a_good_dense_folder_loads_as_saved(dense: Path, prefix: str) -> None:
    loaded, saved = load_model(f"{prefix}{dense}").state_dict(), load_file(dense / "model.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())
    assert load_model(f"{prefix}{dense}", num_classes=3).fc.out_features == 3


def _header(entries: dict[str, Any], path: Path) -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


@pytest.mark.parametrize("entries", [
    {f"x{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(200_000)},
    {"x" * 10**6: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
], ids=["200,000 tensors", "a name of 1 MB"])  # fmt: skip
def test_an_outsized_header_is_refused(entries: dict[str, Any], tmp_path: Path) -> None:
    path = _header(entries, tmp_path / "model.safetensors")
    start = time.process_time()
    with pytest.raises(ArpHubError, match="allowed"):
        read_header(path)
    assert time.process_time() - start < 1


LOADS = {
    "a model": ("load_model('resnet18')", "check the network"),
    "a data set": ("load_data('nobody/nothing', load_model('cifar_resnet20'))", "that you can reach"),
}


@pytest.mark.parametrize("case", LOADS)
def test_without_a_network_a_load_gives_up_at_once(client: Client, case: str) -> None:
    call, says = LOADS[case]
    code = f"""
import time, datasets, huggingface_hub.constants as c
c.ENDPOINT = datasets.config.HF_ENDPOINT = 'http://127.0.0.1:9'
c.HUGGINGFACE_CO_URL_TEMPLATE = c.ENDPOINT + '/{{repo_id}}/resolve/{{revision}}/{{filename}}'
from arp_hub.hub.load import load_model
from arp_hub.training import load_data
waits = []
time.sleep = waits.append
try:
    {call}
except ValueError as error:
    print(error)
assert sum(waits) < 5, waits
"""
    done = client.run(code, token=None)
    assert done.code == 0 and says in done.out, done.err + done.out
