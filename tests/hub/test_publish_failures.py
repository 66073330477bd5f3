"""Failures of pushes and loads: where they happen, what the user reads, and which state remains.

The table in docs/hub-failures.md has one line for each row here.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import low_rank_model
from hub_client import QUICK, ROOT, Client
from hub_server import ALICE, BOB, READER, HubServer, Repo

import arp_hub

NAME, OTHER = "alice/model", "alice/other"
PREUPLOAD, PUT, COMMIT, CREATE = "POST .*/preupload/", "PUT /lfs/", "POST .*/commit/", "POST /api/repos/create"
FOREVER = 10**6


@dataclass(frozen=True)
class Row:
    """One failure.

    Attributes:
        says: What the last line must hold, in this order.
        then: What is on the Hub afterwards: ``nothing`` (no repository), ``as before``, ``complete``, or another word
            that `check` knows.
        faults: Route, action and how often, as the server takes them.
        words: Further words of ``arp-hub push``.
        token: Whose token.
        repo: Where to.
        there: Whether the repository holds a model already.
        prepare: Called with the server, a copy of the folder and the client's options, before the push.
        before: Code that runs in the client first.
        code: The exit code.
    """

    says: tuple[str, ...]
    then: str
    faults: tuple[tuple[Any, ...], ...] = ()
    words: tuple[str, ...] = ("--no-dense",)
    token: str | None = ALICE
    repo: str = NAME
    there: bool = False
    prepare: Callable[[HubServer, Path], Any] | None = None
    before: str = ""
    code: int = 2


def break_weights(hub: HubServer, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_weights(hub: HubServer, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["plan"]["layers"]["layer1.0.conv1"]["rank"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def leave_a_token(hub: HubServer, folder: Path) -> None:
    path = folder / "README.md"
    path.write_text(path.read_text().replace("\n\n<!-- /owner", f"\nmy token is {ALICE}\n<!-- /owner"))


def somebody_commits(hub: HubServer, folder: Path) -> None:
    repo = hub.repos[NAME]

    def commit() -> None:
        repo.commit("refs/heads/main", {**repo.files(), "notes.txt": b"mine"}, "by somebody else")

    hub.fault(COMMIT, commit, 1)


def no_config(hub: HubServer, folder: Path) -> None:
    (folder / "config.json").unlink()


NEXT = "To go on: arp-hub push"
UNTOUCHED = ("Nothing changed on the Hub", NEXT)
OFFLINE = "import huggingface_hub.constants as c\nc.HF_HUB_OFFLINE = True\n"
NO_SERVER = """
import huggingface_hub.constants as c
c.ENDPOINT = 'http://127.0.0.1:9'
"""
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""
WITH_XET = "import huggingface_hub.constants as c\nc.HF_HUB_DISABLE_XET = False\n"

ROWS = {
    # refused before anything is sent
    "no token": Row(("no token to publish 'alice/model'", "hf auth login"), "nothing", token=None),
    "unknown token": Row(
        ("cannot log in", "does not know this token", "hf auth login"), "nothing", token="hf_nobodyKnowsThis0000000"
    ),
    "token that may only read": Row(("may only read", "write access"), "nothing", token=READER),
    "name of another user": Row(
        ("'bob' may not write to 'alice/model'", "push to 'bob/model'", "--create-pr"), "nothing", token=BOB
    ),
    "organisation that one may only read": Row(
        ("'bob' may not write to 'acme/model'",), "nothing", token=BOB, repo="acme/model"
    ),
    "invalid name": Row(("'alice/bad--name' is not a valid name",), "nothing", repo="alice/bad--name"),
    "name with two slashes": Row(("'alice/models/m' is not a valid name",), "nothing", repo="alice/models/m"),
    "tag exists": Row(("has the tag 'v1' already", "choose another"), "as before", words=("--tag", "v1"), there=True),
    "tag with a blank": Row(("'v 1' cannot name", "use letters"), "as before", words=("--tag", "v 1"), there=True),
    "tag with two dots": Row(("'v1..2' cannot name",), "as before", words=("--tag", "v1..2"), there=True),
    "branch with a colon": Row(("'a:b' cannot name",), "as before", words=("--revision", "a:b"), there=True),
    "branch that ends in .lock": Row(("'a.lock' cannot name",), "nothing", words=("--revision", "a.lock")),
    "tag given as a branch": Row(
        ("'v1' is a tag", "not a branch"), "as before", words=("--revision", "v1"), there=True
    ),
    "pull request with a tag": Row(
        ("a pull request has no tag",), "as before", words=("--create-pr", "--tag", "v2"), there=True
    ),
    "pull request into nothing": Row(("there is no repository 'alice/model'",), "nothing", words=("--create-pr",)),
    "folder without a model": Row(("is not a folder with a saved model",), "nothing", prepare=no_config),
    "weights cut off": Row(("is not a whole safetensors file",), "as before", prepare=break_weights, there=True),
    "weights of another plan": Row(("do not fit",), "as before", prepare=other_weights, there=True),
    "token in the card": Row(("README.md contains what looks like a token",), "nothing", prepare=leave_a_token),
    "offline mode": Row(("HF_HUB_OFFLINE is set", "unset it"), "nothing", before=OFFLINE),
    "metadata refused": Row(("metadata", "base_model is unheard of", *UNTOUCHED), "nothing",
                            (("validate-yaml", "base_model is unheard of"),)),
    # no network, or a Hub in trouble
    "no network": Row(("cannot log in", "no answer from", "check the network"), "nothing", before=NO_SERVER),
    "Hub says nothing": Row(
        ("cannot commit", "no answer", "Timeout", *UNTOUCHED), "as before", ((COMMIT, "hang"),), there=True,
        before="import arp_hub.hub.client\narp_hub.hub.client.PATIENCE.silence = 0.3\n",
    ),
    "5xx at login, once": Row(("load it with",), "complete", (("whoami", 503, 1),), code=0),
    "5xx on create, once": Row(("load it with",), "complete", ((CREATE, 502, 1),), code=0),
    "5xx on create, for ever": Row(
        ("cannot create", "answered 500", "4 attempts", *UNTOUCHED), "nothing", ((CREATE, 500),)
    ),
    "not allowed to create": Row(("cannot create", "may not write", *UNTOUCHED), "nothing", ((CREATE, 403),)),
    "connection lost on create": Row(("cannot create", "no answer", *UNTOUCHED), "nothing", ((CREATE, "drop"),)),
    "answer lost on create": Row(("load it with",), "complete", ((CREATE, "lose", 1),), code=0),
    "5xx on preupload, twice": Row(("load it with",), "complete", ((PREUPLOAD, 503, 2),), code=0),
    "5xx on preupload, for ever": Row(("cannot upload the weights", "503", *UNTOUCHED), "nothing", ((PREUPLOAD, 503),)),
    "not allowed to upload": Row(("may not write", *UNTOUCHED), "as before", ((PREUPLOAD, 403),), there=True),
    "5xx on upload, once": Row(("load it with",), "complete", ((PUT, 500, 1),), code=0),
    "5xx on upload, for ever": Row(("cannot upload the weights", "500", *UNTOUCHED), "nothing", ((PUT, 500),)),
    "connection lost on upload": Row(
        ("cannot upload the weights", "no answer", *UNTOUCHED), "as before", ((PUT, "drop"),), there=True
    ),
    "too many requests": Row(("too many requests", *UNTOUCHED), "as before", ((PREUPLOAD, 429),), there=True),
    "5xx on commit, once": Row(("load it with",), "complete", ((COMMIT, 500, 1),), code=0),
    "5xx on commit, for ever": Row(("cannot commit", "500", "4 attempts", *UNTOUCHED), "nothing", ((COMMIT, 500),)),
    "5xx on commit over a model": Row(("cannot commit", *UNTOUCHED), "as before", ((COMMIT, 500),), there=True),
    "connection lost on commit": Row(("load it with",), "complete", ((COMMIT, "drop", 2),), code=0),
    "answer lost on commit": Row(("load it with",), "complete", ((COMMIT, "lose", 1),), code=0),
    "answer lost on a pull request": Row(
        ("cannot commit", "no answer", NEXT), "one pull request", ((COMMIT, "lose", 1),), ("--create-pr",), there=True
    ),
    "network gone between the commits": Row(
        ("cannot commit", "Changed on the Hub: branch 'dense'", NEXT),
        "dense only", (("commit/main", "drop"),), (), there=True,
    ),
    "network gone between the commits, new repository": Row(
        ("cannot commit", *UNTOUCHED), "nothing", (("commit/main", 500),), ()
    ),
    "network gone for good after create": Row(
        ("cannot upload", "Nothing changed", NEXT), "empty", ((PREUPLOAD, "drop"), ("DELETE|tree", "drop"))
    ),
    "somebody else commits": Row(
        ("somebody else changed the repository", *UNTOUCHED), "theirs", there=True, prepare=somebody_commits
    ),
    "tag cannot be set": Row(
        ("cannot set the tag 'v9'", "Changed on the Hub: branch 'main'", NEXT, "--tag v9"),
        "complete", (("POST .*/tag/", 500),), ("--no-dense", "--tag", "v9"),
    ),
    "the second of two tags cannot be set": Row(
        ("cannot set the tag 'v9-dense'", "Changed on the Hub: branch 'dense', branch 'main'", NEXT, "--tag v9$"),
        "no tag", (("POST .*/tag/", lambda: None, 1), ("POST .*/tag/", 500)), ("--tag", "v9"),
    ),
    "commit refused, with options for the card": Row(
        ("cannot commit", NEXT, "--no-dense --message 'my model' --dataset ann/pets --license mit$"), "nothing",
        ((COMMIT, 403),),
        ("--no-dense", "--message", "my model", "--license", "mit", "--dataset", "ann/pets"),
    ),
    "branch cannot be made": Row(("cannot create the branch 'dense'", *UNTOUCHED), "nothing", (("/branch/", 500),), ()),
    "no Xet on this Hub": Row(("load it with",), "complete", before=WITH_XET, code=0),
    "Hub repeats the token": Row(("401",), "nothing", token="hf_nobodyKnowsThis0000000"),
    "disk full while the merged model is made": Row(
        ("cannot prepare the upload", "too large", "make room", *UNTOUCHED),
        "as before", words=(), there=True, before=FULL_DISK,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = low_rank_model("cifar_resnet20", {"layer1.0.conv1": "cp", "layer3.1.conv2": "channel"})
    return arp_hub.save_pretrained(model, tmp_path_factory.mktemp("saved") / "model", metrics={"top1": 50.0})


@pytest.fixture(scope="module")
def earlier(hub: HubServer, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Repo:
    """The repository with another version of the model, merged model and tag included."""
    model = low_rank_model("cifar_resnet20", {"layer1.0.conv1": "channel"})
    place = arp_hub.save_pretrained(model, tmp_path_factory.mktemp("earlier") / "model", metrics={"top1": 40.0})
    done = client.arp_hub("push", place, NAME, "--tag", "v1", token=ALICE)
    assert done.code == 0, done.err
    return hub.repos.pop(NAME)


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_in_order(text: str, parts: tuple[str, ...]) -> bool:
    place = 0
    for part in parts:
        found = re.search(part, text[place:])
        if not found:
            return False
        place += found.end()
    return True


@pytest.mark.parametrize("name", ROWS)
def test_push(name: str, hub: HubServer, client: Client, earlier: Repo, mine: Path) -> None:
    row = ROWS[name]
    hub.mend()
    hub.repos = {NAME: copy.deepcopy(earlier)} if row.there else {}
    hub.objects.clear()
    if row.prepare:
        row.prepare(hub, mine)
    for fault in row.faults:
        hub.fault(*fault)
    here = content(mine)
    done = client.arp_hub("push", mine, row.repo, *row.words, token=row.token, before=QUICK + row.before)
    assert done.code == row.code, done.err
    assert read_in_order(done.last_line, row.says), done.last_line
    assert ("published: " in done.out) is (row.code == 0)
    assert not re.search(r"Traceback|hf_[A-Za-z0-9]{8}", done.out + done.err), done.err
    assert all(fault.seen for fault in hub.faults), "a fault was never triggered"
    assert content(mine) == here
    check_state(row, hub, earlier, here)


def check_state(row: Row, hub: HubServer, earlier: Repo, here: dict[str, bytes]) -> None:
    repo = hub.repos.get(NAME)
    if row.then == "nothing":
        assert hub.repos == {}
        return
    assert repo is not None
    if row.then == "as before":
        assert repo == earlier
    elif row.then == "empty":
        assert list(repo.files()) == [".gitattributes"]
    elif row.then == "theirs":
        assert repo.files() == {**earlier.files(), "notes.txt": b"mine"}
    elif row.then == "no tag":
        assert not [ref for ref in repo.refs if ref.startswith("refs/tags/")] and "refs/heads/dense" in repo.refs
    elif row.then == "dense only":
        assert repo.files() == earlier.files()
        assert repo.files("dense")["model.safetensors"] != earlier.files("dense")["model.safetensors"]
    elif row.then == "one pull request":
        assert repo.files() == earlier.files() and "refs/pr/1" in repo.refs and "refs/pr/2" not in repo.refs
    else:
        assert row.then == "complete"
        assert repo.files().keys() == {".gitattributes", *here}
        assert all(repo.files()[file] == here[file] for file in ("config.json", "model.safetensors"))
        assert len(repo.commits) == 2  # the first, empty commit, and ours


def test_what_is_transient_is_tried_a_limited_number_of_times(hub: HubServer, client: Client, mine: Path) -> None:
    hub.mend()
    hub.repos = {}
    hub.fault(CREATE, 500)
    done = client.arp_hub("push", mine, NAME, token=ALICE)
    assert hub.asked(CREATE) == 4
    assert done.err.count("cannot create 'alice/model' yet: the Hub answered 500: try again later; attempt") == 3


def test_ctrl_c_takes_back_what_was_made(hub: HubServer, client: Client, mine: Path) -> None:
    hub.mend()
    hub.repos = {}
    hub.objects.clear()
    fault, here = hub.fault(PUT, "hang"), content(mine)

    def during_the_upload() -> None:
        limit = time.monotonic() + 60
        while not fault.seen:
            assert time.monotonic() < limit
            time.sleep(0.01)

    done = client.arp_hub("push", mine, NAME, token=ALICE, interrupt=during_the_upload)
    assert done.code == 130
    assert read_in_order(done.last_line, ("interrupted", *UNTOUCHED))
    assert hub.repos == {} and content(mine) == here and "Traceback" not in done.err


def test_a_model_whose_push_fails_is_kept(hub: HubServer, client: Client, mine: Path, tmp_path: Path) -> None:
    hub.mend()
    hub.repos = {}
    hub.fault(COMMIT, 500)
    code = """
import timm, arp_hub
arp_hub.push_to_hub(timm.create_model(f"local-dir:{mine}", pretrained=True), "alice/model")
"""
    done = client.run(QUICK + code, token=ALICE, mine=mine)
    kept = re.search(r"whole in '(.+)'\. To go on: arp-hub push \1 alice/model$", done.last_line)
    assert done.code == 1 and kept
    hub.mend()
    again = client.arp_hub("push", kept[1], NAME, token=ALICE)
    assert again.code == 0 and hub.repos[NAME].files()["model.safetensors"] == content(mine)["model.safetensors"]
    shutil.rmtree(Path(kept[1]).parent)


def test_disk_full_while_saving(client: Client, mine: Path, tmp_path: Path) -> None:
    code = f"import timm, arp_hub\nmodel = timm.create_model(f'local-dir:{{mine}}', pretrained=True)\n{FULL_DISK}"
    done = client.run(code + "arp_hub.save_pretrained(model, mine)", token=None, mine=mine)
    assert done.code == 1 and read_in_order(done.last_line, ("cannot save in", "the earlier content is unchanged"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (
        client.run("import timm\ntimm.create_model(f'local-dir:{mine}', pretrained=True)", token=None, mine=mine).code
        == 0
    )


# --- and back -------------------------------------------------------------------------------------------------------


def newer_format(config: dict[str, Any]) -> None:
    config["model_args"]["plan"]["format_version"] = 99


def unknown_backbone(config: dict[str, Any]) -> None:
    config["model_args"]["backbone"] = "resnet_of_2031"


def wrong_rank(config: dict[str, Any]) -> None:
    config["model_args"]["plan"]["layers"]["layer1.0.conv1"]["rank"] = 3


def rank_beyond(config: dict[str, Any]) -> None:
    config["model_args"]["plan"]["layers"]["layer1.0.conv1"]["rank"] = 3000


BACK: dict[str, tuple[Any, ...]] = {
    # source, config, loader (timm's create_model or ours), message
    "no such repository": ("alice/nothing", None, "download", ("no such repository", "check the name")),
    "private, no token": ("alice/private", None, "download", ("no such repository, or it is private", "hf auth login")),
    "no such revision": ("alice/there@v7", None, "download", ("no such revision", "choose one")),
    "plan of a newer format": ("alice/newer", newer_format, "both", ("format_version 99", "pip install --upgrade")),
    "backbone unknown to timm": (
        "alice/backbone", unknown_backbone, "both", ("unknown backbone 'resnet_of_2031'", "upgrade timm")
    ),
    "weights that do not fit the plan": ("alice/misfit", wrong_rank, "timm", ("do not fit",)),
    "plan that does not fit the backbone": ("alice/beyond", rank_beyond, "both", ("layer1.0.conv1", "3000")),
    "only a pickle": ("alice/pickle", None, "download", ("holds no model.safetensors",)),
    "Hub gone, nothing in the cache": ("alice/gone", None, "download", ("no answer from", "check the network")),
    "5xx on download, once": ("alice/flaky", None, "download", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", BACK)
def test_loading(name: str, hub: HubServer, client: Client, folder: Path) -> None:
    source, change, way, says = BACK[name]
    hub.mend()
    repo = Repo(private=source == "alice/private")
    files = content(folder)
    if change:
        config = json.loads(files["config.json"])
        change(config)
        files["config.json"] = json.dumps(config).encode()
    if source == "alice/pickle":
        files["pytorch_model.bin"] = files.pop("model.safetensors")
    repo.commit("refs/heads/main", files, "a model")
    hub.repos = {source.partition("@")[0]: repo} if "nothing" not in source else {}
    if name == "Hub gone, nothing in the cache":
        hub.fault("", "drop")
    if "once" in name:
        hub.fault("GET .*/resolve/main/config.json|GET .*/resolve/.*/config.json", 503, 1)
    for one in ("download", "timm") if way == "both" else (way,):
        call = (
            "arp_hub.download(source)"
            if one == "download"
            else "timm.create_model('hf-hub:' + source, pretrained=True)"
        )
        done = client.run(f"{QUICK}\nimport timm, arp_hub\n{call}", token=None, source=source)
        assert done.code == (1 if says else 0), done.err
        if says:
            assert read_in_order(done.last_line, ("ArpHubError|HubFailure", *says)), done.err


def test_every_row_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "hub-failures.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([^|]+?) \|", page, re.M)
    assert [name for name in [*ROWS, *BACK] if name not in listed] == []
    assert len(ROWS) + len(BACK) >= 25
