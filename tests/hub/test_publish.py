"""Publishing and loading with the official client and timm in new processes, against a Hub on loopback."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load, low_rank_model, outputs
from hub_client import ROOT, Client, Done, environment
from hub_server import ALICE, BOB, ME, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import arp_hub
from arp_hub.hub.card import keep_by_hand, model_card
from arp_hub.layers.apply_plan import plan_of

NAME = "alice/model"
NUMBERS = {
    "top1": 61.25,
    "top5": 90.5,
    "data": "someone/pets",
    "dataset": "someone/pets",
    "split": "validation",
    "base_model": "timm/test_resnet.r160_in1k",
    "dense": {"top1": 62.5},
}


@pytest.fixture(autouse=True)
def fresh(hub: HubServer) -> None:
    hub.mend()
    hub.repos = {}
    hub.objects.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = low_rank_model("test_resnet", {"layer1.0.conv1": "cp", "layer4.0.conv2": "channel"}, num_classes=5)
    place = tmp_path_factory.mktemp("saved") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARP_HUB_PICTURES", "1")
        return arp_hub.save_pretrained(model, place, metrics=NUMBERS, label_names=["a", "b", "c", "d", "e"])


def push(client: Client, *words: object, token: str = ALICE) -> dict[str, Any]:
    done = client.arp_hub("push", *words, "--json", token=token)
    assert done.code == 0, done.err
    return json.loads(done.out)


def fresh_process(code: str, home: Path, hub: HubServer, token: str | None = None) -> Done:
    """A new process with an empty HF_HOME."""
    env = environment(home, hub.endpoint, token)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    return Done(done.returncode, done.stdout, done.stderr)


LOADER = """
import sys, timm, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
x = torch.ones(1, 3, 96, 96)
run = lambda source, **kw: timm.create_model(source, pretrained=True, **kw).eval()(x).detach()
found = {"dense": run("hf-hub:alice/model@dense"), "tagged dense": run("hf-hub:alice/model@v1-dense")}
assert "arp_hub" not in sys.modules
import arp_hub
found |= {"main": run("hf-hub:alice/model"), "tag": run("hf-hub:alice/model@v1")}
found["elsewhere"] = run("hf-hub:alice/model", cache_dir=HOME + "/other")
found["folder"] = run(f"local-dir:{arp_hub.download('alice/model@v1')}")
save_file(found, HOME + "/found.safetensors")
"""
LOAD_ALL = """
import timm, arp_hub
for name in ("alice/model@v1", "alice/model"):
    timm.create_model("hf-hub:" + name, pretrained=True)
    assert arp_hub.download(name).is_dir()
"""
OFFLINE = f"""
{LOAD_ALL}
for asked in ({{}}, {{"local_dir": str(arp_hub.download("alice/model"))}}):
    try:
        arp_hub.download("alice/never", **asked)
        print("whatever lies there")
    except arp_hub.ArpHubError as error:
        print(error)
"""


def test_everybody_loads_it_in_one_line(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    said = push(client, folder, NAME, "--tag", "v1", "--private")
    assert said["url"] == f"{hub.endpoint}/{NAME}" and said["dense_revision"] == "dense" and said["tag"] == "v1"
    assert hub.repos[NAME].private
    refused = client.run("import timm, arp_hub\ntimm.create_model('hf-hub:alice/model', pretrained=True)", token=None)
    assert refused.code == 1 and "RepositoryNotFoundError" in refused.err
    done = fresh_process(f"HOME = {str(tmp_path)!r}\n{LOADER}", tmp_path, hub, ALICE)
    assert done.code == 0, done.err
    found = load_file(tmp_path / "found.safetensors")
    model, x = load(folder), torch.ones(1, 3, 96, 96)
    expected = outputs(model, x)[0]
    assert all(torch.equal(found[name], expected) for name in ("main", "tag", "elsewhere", "folder"))
    merged = outputs(arp_hub.to_dense(model), x)[0]
    assert torch.equal(found["dense"], merged) and torch.equal(found["tagged dense"], merged)
    assert client.run(LOAD_ALL, token=ALICE).code == 0
    requests = len(hub.requests)
    offline = client.run(f"import huggingface_hub.constants as c\nc.HF_HUB_OFFLINE = True\n{OFFLINE}", token=None)
    assert offline.code == 0 and len(hub.requests) == requests, offline.err
    assert "cannot download 'alice/never'" in offline.out and "the cache does not hold" in offline.out


def test_one_commit_on_each_branch_and_no_pickle(hub: HubServer, client: Client, folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"not ours to publish")
    try:
        push(client, folder, NAME)
    finally:
        (folder / "optimizer.pt").unlink()
    repo = hub.repos[NAME]
    assert list(repo.messages.values()) == ["initial commit", "Publish model", "Publish model"]
    files = {"README.md", "config.json", "metrics.json", "model.safetensors"}
    assert repo.files().keys() - {".gitattributes"} == {*files, "ranks.png"}
    assert repo.files("dense").keys() - {".gitattributes"} == files
    assert json.loads(repo.files("dense")["config.json"])["architecture"] == "test_resnet"


def test_a_second_push_refreshes_and_keeps_what_was_written_by_hand(
    hub: HubServer, client: Client, folder: Path, tmp_path: Path
) -> None:
    export = {"onnx/export.json": b"{}", "onnx/model.onnx": b"of the first weights"}
    for name, content in export.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    push(client, folder, NAME, "--tag", "v1")
    repo = hub.repos[NAME]
    assert export.items() <= repo.files().items()
    (folder / "onnx" / "model.onnx").rename(folder / "onnx" / "model.xml")
    push(client, folder, NAME, "--tag", "v1.0.1")
    assert "onnx/model.onnx" not in repo.files() and "onnx/model.xml" in repo.files()
    (folder / "onnx" / "model.xml").rename(folder / "onnx" / "model.onnx")
    push(client, folder, NAME, "--tag", "v1.0.2")
    shutil.rmtree(folder / "onnx")
    push(client, folder, NAME, "--tag", "v1.1", "--license", "mit")
    assert export.items() <= repo.files().items()  # they are of these weights
    by_hand = repo.files()["README.md"].decode()
    by_hand = by_hand.replace(
        "between these two lines -->\n", "between these two lines -->\nAsk Ann | <b>about</b> \\1 cats."
    )
    by_hand = by_hand.replace("\ntags:\n", "\nlanguage: en\nco2: small\ntags:\n- cats\n")
    mine = {"notes.txt": b"mine", "onnx/notes.txt": b"mine", "other/model.onnx": b"mine"}
    repo.commit("refs/heads/main", {**repo.files(), "README.md": by_hand.encode(), **mine}, "by hand")
    model = low_rank_model("test_resnet", {"layer4.0.conv2": "channel"}, num_classes=5)
    again = arp_hub.save_pretrained(model, tmp_path / "again", metrics={"top1": 59.5, "data": "someone/pets"})
    assert not (again / "ranks.png").exists()
    push(client, again, NAME, "--tag", "v2")
    files = repo.files()
    assert files["model.safetensors"] == (again / "model.safetensors").read_bytes()
    assert json.loads(files["metrics.json"])["top1"] == 59.5
    assert not files.keys() & {"ranks.png", *export} and mine.items() <= files.items()
    card = ModelCard(files["README.md"].decode())
    assert "Ask Ann | <b>about</b> \\1 cats." in card.text and "| top-1, % |  | 59.50 |" in card.text
    assert "61.25" not in card.content and card.data.datasets is None and card.data.base_model is None
    assert card.data.language == "en" and card.data.to_dict()["co2"] == "small" and "cats" in card.data.tags
    assert "ranks.png" in repo.files("v1") and "ranks.png" not in repo.files("v2")
    commits = len(repo.commits)
    push(client, again, NAME, "--tag", "v2b")
    assert len(repo.commits) == commits + 1  # the card names the tag; the merged model is the same


def test_notes_of_the_local_card_are_published(hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = arp_hub.save_pretrained(low_rank_model("test_resnet", {"layer4.0.conv2": "cp"}), tmp_path / "mine")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("\n\n<!-- /owner -->", "\nFrom my desk.\n<!-- /owner -->"))
    push(client, folder, NAME, "--no-dense")
    assert b"\nFrom my desk.\n<!-- /owner -->" in hub.repos[NAME].files()["README.md"]
    assert "@dense" not in hub.repos[NAME].files()["README.md"].decode()


def test_branches_and_pull_requests(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder, NAME)
    repo = hub.repos[NAME]
    main = repo.refs["refs/heads/main"]
    said = push(client, folder, NAME, "--revision", "trial", "--message", "Try this")
    assert said["revision"] == "trial" and said["dense_revision"] == "trial-dense"
    assert repo.refs["refs/heads/main"] == main and repo.messages[repo.refs["refs/heads/trial"]] == "Try this"
    assert b'"hf-hub:alice/model@trial"' in repo.files("trial")["README.md"]
    said = push(client, folder, NAME, "--create-pr", "--license", "mit", token=BOB)
    assert said["url"].endswith("/alice/model/discussions/1") and said["revision"] == "refs/pr/1"
    assert repo.refs["refs/heads/main"] == main and b"license: mit" in repo.files("refs/pr/1")["README.md"]
    code = "import timm, arp_hub; timm.create_model('hf-hub:alice/model@refs/pr/1', pretrained=True)"
    assert client.run(code, token=None).code == 0


def test_what_lies_beside_an_export_stays_private(hub: HubServer, client: Client, folder: Path) -> None:
    place = folder / "onnx"
    place.mkdir()
    for name in ("export.json", "model.onnx", "calibration.pt", ".env", "notes.txt"):
        (place / name).write_bytes(b"{}")
    try:
        push(client, folder, NAME, "--no-dense")
    finally:
        shutil.rmtree(place)
    assert {name for name in hub.repos[NAME].files() if "/" in name} == {"onnx/export.json", "onnx/model.onnx"}


TAKEN = {
    "one branch for both": (["--dense-revision", "main"], "cannot both be 'main': choose another --dense-revision"),
    "a tag like the branch": (["--revision", "v1", "--tag", "v1"], "the tag 'v1' would have the name of a branch"),
    "a tag like the merged branch": (["--tag", "dense"], "the tag 'dense' would have the name of a branch"),
    "a tag like a branch that exists": (["--tag", "old"], "the tag 'old' would have the name of a branch"),
    "a tag like main": (["--tag", "main"], "the tag 'main' would have the name of a branch"),
    "a branch like a tag": (["--dense-revision", "v0"], "'v0' is a tag of 'alice/model', not a branch"),
    "a public repository": (["--private"], "exists and is public, so that a push does not make it private"),
}


def test_names_and_visibility_are_checked_before_any_upload(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder, NAME, "--no-dense", "--tag", "v0")
    push(client, folder, NAME, "--no-dense", "--revision", "old")
    repo = hub.repos[NAME]
    before = dict(repo.refs)
    for words, message in TAKEN.values():
        done = client.arp_hub("push", folder, NAME, *words, token=ALICE)
        assert done.code == 2 and message in " ".join(done.err.split()), done.err
        assert repo.refs == before
    push(client, folder, NAME, "--no-private")


def test_an_old_merged_model_is_named(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder, NAME)
    done = client.arp_hub("push", folder, NAME, "--no-dense", token=ALICE)
    assert done.code == 0 and "the branch 'dense' of 'alice/model' stays as it is" in " ".join(done.err.split())


def test_a_card_that_is_no_text_is_named(hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = arp_hub.save_pretrained(low_rank_model("test_resnet", {"layer4.0.conv2": "cp"}), tmp_path / "mine")
    (folder / "README.md").write_bytes("Grüße".encode("latin-1"))
    done = client.arp_hub("push", folder, NAME, token=ALICE)
    assert done.code == 2 and re.search(r"README.{1,3}md.* not UTF-8", " ".join(done.err.split())), done.err
    assert "save it as UTF-8" in " ".join(done.err.split())
    assert NAME not in hub.repos or not hub.repos[NAME].files().keys() & {"config.json"}


def test_class_names_and_the_licence_are_those_of_the_model(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """Also on the branch of the merged model, and after a push of a model that was loaded."""
    model = low_rank_model("test_resnet", {"layer4.0.conv2": "channel"}, num_classes=2)
    metrics = {"license": "my-licence", "license_link": "https://example.org/licence"}
    folder = arp_hub.save_pretrained(model, tmp_path / "out", metrics=metrics, label_names=["cat", "dog"])
    push(client, folder, NAME)
    again = arp_hub.save_pretrained(load(folder), tmp_path / "again")
    repo = hub.repos[NAME]
    for config in (
        repo.files()["config.json"],
        repo.files("dense")["config.json"],
        (again / "config.json").read_bytes(),
    ):
        assert json.loads(config)["label_names"] == ["cat", "dog"]
    for branch in ("main", "dense"):
        assert b"license_link: https://example.org/licence" in repo.files(branch)["README.md"]


def test_latency_is_measured_for_the_card(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder, NAME, "--no-dense", "--bench")
    files = hub.repos[NAME].files()
    assert [timing["batch_size"] for timing in json.loads(files["metrics.json"])["latency"]] == [1, 32]
    assert re.search(r"\| latency, batch 32, ms \| [\d.,]+ \| [\d.,]+ \| \d+ % \|", files["README.md"].decode())


def test_organisations_and_names_without_one(hub: HubServer, client: Client, folder: Path) -> None:
    assert push(client, folder, "acme/model", "--no-dense")["repo_id"] == "acme/model"
    assert push(client, folder, "short", "--no-dense")["repo_id"] == "alice/short"
    assert hub.repos.keys() == {"acme/model", "alice/short"}


def test_a_model_is_pushed_as_it_is(hub: HubServer, client: Client) -> None:
    code = """
import timm, arp_hub
model = timm.create_model("test_resnet").eval()
arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=0.8, schemes=["channel"]))
before = {key: value.clone() for key, value in model.state_dict().items()}
done = arp_hub.push_to_hub(model, "alice/model", metrics={"top1": 12.5, "dense": {"top1": 13.0}})
assert done.repo_id == "alice/model" and not done.tag
assert all(value.equal(before[key]) for key, value in model.state_dict().items())
"""
    done = client.run(code, token=ALICE)
    assert done.code == 0, done.err
    assert b"| top-1, % | 13.00 | 12.50 |" in hub.repos[NAME].files()["README.md"]


def test_a_token_given_outright_works_and_is_not_written_down(hub: HubServer, client: Client, folder: Path) -> None:
    done = client.arp_hub("push", folder, NAME, "--token", ALICE, token=None)
    assert done.code == 0, done.err
    assert all(ALICE.encode() not in data for files in hub.repos[NAME].commits.values() for data in files.values())
    code = "import timm, sys, arp_hub\nsys.argv = ['train.py', '--token', token, '--lr', '1']\n"
    saved = client.run(code + "arp_hub.save_pretrained(timm.create_model('test_resnet'), out, metrics={'note': token})",
                       token=None, out=folder.parent / "other")  # fmt: skip
    assert saved.code == 1  # the child process does not know the name `token`
    saved = client.run(f"token = {ALICE!r}\n{code}arp_hub.save_pretrained(timm.create_model('test_resnet'), out, "
                       "metrics={'note': token})", token=None, out=folder.parent / "other")  # fmt: skip
    assert saved.code == 0, saved.err
    assert "--token *** --lr 1" in (folder.parent / "other" / "metrics.json").read_text()
    assert all(ALICE.encode() not in path.read_bytes() for path in (folder.parent / "other").iterdir())
    assert ALICE not in (folder.parent / "other" / "metrics.json").read_text()


# --- the card -------------------------------------------------------------------------------------------------------


def test_the_clients_own_validation_takes_the_card(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder, NAME)
    code = """
from huggingface_hub import ModelCard
card = ModelCard.load("alice/model")
card.validate()
data = card.data.to_dict()
results = data.pop("model-index")[0]["results"]
print(data)
print([(r["dataset"]["type"], m["value"]) for r in results for m in r["metrics"]])
"""
    done = client.run(code, token=None)
    assert done.code == 0, done.err
    assert hub.asked("validate-yaml") == 3  # once for each of two branches, once here
    for part in (
        "'library_name': 'timm'", "'pipeline_tag': 'image-classification'", "'license': 'apache-2.0'",
        "'base_model': 'timm/test_resnet.r160_in1k'", "'base_model_relation': 'finetune'",
        "'datasets': ['someone/pets']",
        "('someone/pets', 61.25)", "('someone/pets', 90.5)",
    ):  # fmt: skip
        assert part in done.out


def card_of(folder: Path, **changes: Any) -> ModelCard:
    config = json.loads((folder / "config.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics = {key: value for key, value in {**metrics, **changes}.items() if value is not None}
    return ModelCard(model_card(config, metrics, "hf-hub:alice/model", pictures=["ranks.png"]))


def test_a_missing_number_is_a_missing_line(folder: Path) -> None:
    whole, bare = card_of(folder), card_of(folder, top1=None, top5=None, dataset=None, base_model=None, layers=None)
    assert len(whole.data.eval_results) == 2 and "| top-1, % | 62.50 | 61.25 |" in whole.text
    assert bare.data.eval_results is None and bare.data.datasets is None and bare.data.base_model is None
    assert "top-1" not in bare.text and "No accuracy was measured" in bare.text
    assert "<details>" in whole.text and "<details>" not in bare.text
    unknown_data = card_of(folder, data=None, dataset=None)
    assert unknown_data.data.eval_results is None and "61.25" in unknown_data.text


def test_the_card_says_where_the_model_is_not_faster(folder: Path) -> None:
    timing = {"device": "cpu", "threads": 2, "dtype": "float32", "dense_latency_ms": {"median": 4.0}}
    fast = {**timing, "batch_size": 1, "latency_ms": {"median": 2.0}, "ratio": {"median": 0.5}}
    slow = {**timing, "batch_size": 32, "latency_ms": {"median": 4.4}, "ratio": {"median": 1.1}}
    card = card_of(folder, latency=[fast, slow]).text
    assert "| latency, batch 1, ms | 4.00 | 2.00 | 50 % |" in card
    assert "Slower than the dense model on cpu, 2 threads, float32 at batch 32: it takes 110 % of the" in card
    assert "float32 at batch 1:" not in card and "was not measured" not in card
    assert "latency was not measured" in card_of(folder).text


def test_the_card_names_the_teacher(folder: Path) -> None:
    for teacher, named in (("resnet50", True), ("", False)):  # without one, it is the dense model
        config = {"epochs": 2, "distill": 0.9, "teacher": teacher}
        card = card_of(folder, config=config).text
        assert "Trained with the adaptive rank penalty for 2 epochs" in card
        assert f"The loss distils from {'`resnet50`' if named else 'the dense model'}." in card


def test_the_card_shows_what_became_of_every_layer(folder: Path) -> None:
    card = card_of(folder)
    assert re.search(r"\| `layer1.0.conv1` \| 32 -> 32, 3x3, cp \| \d+ \| 9,216 \| [\d,]+ \| \d+ % \|", card.text)
    assert "| not decomposed | `conv1.0`," in card.text
    assert "![Rank and parameters of each decomposed layer](ranks.png)" in card.text


@pytest.mark.usefixtures("pictures")
def test_pictures_of_spectra_and_violations(tmp_path: Path) -> None:
    from arp_hub.reports.spectra import decays

    model = low_rank_model("test_resnet", {"layer1.0.conv1": "cp", "layer4.0.conv2": "channel"})
    dense = arp_hub.to_dense(copy.deepcopy(model))
    history = [
        {"step": step, "stage": "hold" if step > 2 else "ramp", "violation": 10.0**-step, "violations": {"fc": 0.1}}
        for step in range(1, 4)
    ]
    numbers = {"spectra": decays(dense, plan_of(model)), "history": history}
    folder = arp_hub.save_pretrained(model, tmp_path / "out", metrics=numbers)
    assert {path.name for path in folder.glob("*.png")} == {"ranks.png", "spectra.png", "violation.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    card = (folder / "README.md").read_text()
    assert all(f"]({path.name})" in card for path in folder.glob("*.png"))


def test_an_unreadable_earlier_card_is_no_obstacle(folder: Path) -> None:
    card = str(card_of(folder).content)
    for earlier in ("", "no head", "---\n: [\n---\ntext", "---\n- a\n---\n", "---\ntags: 3\n---\n"):
        assert keep_by_hand(card, earlier) == card


# --- recipes, README, other libraries -------------------------------------------------------------------------------

TRIAL = ["--cpu", "--max-steps", "2", "--ramp", "0.5", "--batch-size", "8", "--tracker", "none", "--dense-epochs", "1",
         "--data", "digits", "--start-from", "dense", "--calibration-images", "0", "--schemes", "channel"]  # fmt: skip


@pytest.mark.usefixtures("pictures")
def test_a_recipe_publishes_what_it_made(hub: HubServer, client: Client, tmp_path: Path) -> None:
    done = client.recipe(
        "cifar_resnet20.py", *TRIAL, "--epochs", 3, "--output", tmp_path / "out",
        "--push-to-hub", NAME, "--hub-private", token=ALICE,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err.strip().endswith(f"published: {hub.endpoint}/{NAME}")
    files = hub.repos[NAME].files()
    assert hub.repos[NAME].private and {"ranks.png", "spectra.png"} <= files.keys()
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    metrics = json.loads(files["metrics.json"])
    assert card.data.eval_results[0].metric_value == round(metrics["top1"], 4)
    assert "after penalty training, before decomposition" in card.text
    assert "adaptive rank penalty for 3 epochs, starting from the dense model." in card.text


@pytest.mark.slow
def test_the_accuracy_on_the_card_is_what_anybody_measures(
    hub: HubServer, client: Client, shared: Path, tmp_path: Path
) -> None:
    data, few = shared / "data" / "cifar10", ("--max-images", 500)
    weights = shared / "weights" / "resnet20_cifar10.safetensors"
    settings = ("--keep-params", 0.6, "--schemes", "channel", "--calibration-images", 64, "--output", tmp_path / "out")
    made = client.arp_hub("compress", "--model", "cifar_resnet20", "--checkpoint", weights, "--data", data, *few,
                          *settings, token=None)  # fmt: skip
    assert made.code == 0, made.err
    push(client, tmp_path / "out", NAME)
    again = client.arp_hub("evaluate", "--model", f"hf-hub:{NAME}", "--data", data, *few, "--json", token=None)
    assert again.code == 0, again.err
    card = ModelCard(hub.repos[NAME].files()["README.md"].decode())
    measured = json.loads(again.out)
    assert [result.metric_value for result in card.data.eval_results] == [measured["top1"], measured["top5"]]
    assert f"| {measured['top1']:.2f} |" in card.text


@pytest.mark.parametrize("name", ["quickstart.py", "custom_loop.py"])
@pytest.mark.parametrize(
    ("target", "token", "words"),
    [
        ("alice/model", None, "no token to publish 'alice/model'"),
        ("bob/model", ALICE, "'alice' may not write to 'bob/model'"),
        ("not a name", ALICE, "'not a name' is not a valid name"),
    ],
)
def test_a_recipe_refuses_before_training(
    client: Client, hub: HubServer, tmp_path: Path, name: str, target: str, token: str | None, words: str
) -> None:
    done = client.recipe(name, "--cpu", "--output", tmp_path / "out", "--push-to-hub", target, token=token)
    assert done.code != 0 and words in done.last_line
    assert hub.repos == {} and not list(tmp_path.iterdir())


def test_a_recipe_whose_push_fails_has_its_model(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.fault("POST .*/commit/", 403)
    out = tmp_path / "out"
    done = client.recipe("cifar_resnet20.py", *TRIAL, "--output", out, "--push-to-hub", NAME, token=ALICE)
    assert done.code == 2 and done.last_line.endswith(f"To go on: arp-hub push {out} {NAME}")
    assert hub.repos == {}
    hub.mend()
    push(client, out, NAME)
    assert hub.repos[NAME].files()["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_of_two_processes_one_publishes(hub: HubServer, client: Client, tmp_path: Path) -> None:
    words = ("--cpu", "--max-steps", 4, "--batch-size", 16, "--output", tmp_path / "out", "--push-to-hub", NAME)
    for done in client.recipe_on_two("custom_loop.py", *words, token=ALICE):
        assert done.code == 0, done.err
    assert hub.asked("POST /api/repos/create") == 1 and hub.asked("POST .*/commit/main") == 1


def test_the_readme_is_true(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    """The Hub section, typed into a shell and into Python one after the other, with its outputs."""
    section = (ROOT / "README.md").read_text().split("## Publish on the Hub")[1].split("\n## ")[0]
    (tmp_path / "out").symlink_to(folder)
    command = re.search(r"^arp-hub (push .+)$", section, re.M)
    assert command
    cd = f"import os\nos.chdir({str(tmp_path)!r})\n"
    done = client.arp_hub(*command[1].split(), token=ME, before=cd)
    assert done.code == 0, done.err
    hub.repos = {}
    code = f"{cd}import doctest, sys\nresult = doctest.testfile(page, False)\nprint(result)\nsys.exit(result.failed)"
    page = tmp_path / "page.md"
    page.write_text(section)
    done = client.run(code, token=ME, page=page)
    assert done.code == 0 and re.search(r"attempted=([7-9]|\d\d)", done.out), done.out


def test_transformers_pipeline(hub: HubServer, client: Client, folder: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    push(client, folder, NAME)
    code = """
import arp_hub, numpy
from PIL import Image
from transformers import pipeline
image = Image.fromarray(numpy.zeros((96, 96, 3), "uint8"))
found = pipeline("image-classification", "alice/model")(image, top_k=5)
print(sorted(entry["label"] for entry in found), round(sum(entry["score"] for entry in found), 4))
"""
    done = client.run(code, token=None)
    assert done.code == 0, done.err
    assert "['a', 'b', 'c', 'd', 'e'] 1.0" in done.out


def test_docs_have_no_broken_pictures() -> None:
    cards = list((ROOT / "docs" / "examples").glob("*/README.md"))
    assert len(cards) == 2
    for card in cards:
        ModelCard.load(card)
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card.read_text())
        assert pictures and all((card.parent / picture).is_file() for picture in pictures)
        assert os.sep not in "".join(pictures)
