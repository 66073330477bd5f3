"""Processes that end together: one of them says why, and none exits with code 0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from hub_client import Client


@pytest.fixture
def launcher() -> Iterator[dict[str, str]]:
    """The environment that ``torch.distributed.run`` gives its processes: it holds their store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "nowhere"), "unknown data 'nowhere'"),
        (("--keep-parms", "0.5"), "unknown option '--keep-parms'"),
    ],
    ids=["data", "option"],
)
def test_recipe_prints_its_error_once(
    client: Client, launcher: dict[str, str], tmp_path, words: tuple[str, ...], said: str
) -> None:
    words = (*words, "--cpu", "--tracker", "none", "--output", str(tmp_path / "out"))
    ended = client.recipe_on_two("quickstart.py", *words, environment=launcher)
    assert [done.code for done in ended] == [2, 2]
    lines = "".join(done.err for done in ended).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {said}"), lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "nowhere", "--device", "cpu"), "unknown data 'nowhere'"),
        (("--keep-parms", "0.5"), "No such option: --keep-parms"),
    ],
    ids=["data", "option"],
)
def test_command_prints_its_error_once(
    client: Client, launcher: dict[str, str], tmp_path, words: tuple[str, ...], said: str
) -> None:
    options = ("--model", "test_vit", "--no-pretrained", "--keep-params", "0.5", "--output", str(tmp_path / "out"))
    ended = client.arp_hub_on_two("compress", *options, *words, environment=launcher)
    assert [done.code for done in ended] == [2, 2]
    errors = [line for done in ended for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], [done.err for done in ended]


def test_the_one_process_that_fails_says_why(client: Client, launcher: dict[str, str]) -> None:
    words = "words = ['--keep-parms', '0.5'] if os.environ['RANK'] == '1' else ['--print-config']"
    ended = client.recipe_on_two("quickstart.py", environment=launcher, before=words)
    assert [done.code for done in ended] == [0, 2]
    assert ended[1].err.startswith("error: unknown option '--keep-parms'")


def test_without_a_store_every_process_says_why(client: Client, tmp_path) -> None:
    for done in client.recipe_on_two("quickstart.py", "--data", "nowhere", "--cpu", "--output", tmp_path / "out"):
        assert done.code == 2
        assert done.last_line.startswith("error: unknown data 'nowhere'")
