"""The report of a run: what it shows, and that nothing in it is taken for HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arp_hub import ArpHubError
from arp_hub.reports.run_page import render, write_report
from arp_hub.reports.svg import bars, heatmap, line_chart
from arp_hub_cli.app import app

EVIL = "\"><script>alert('x')</script><img src=x onerror=y>&"


class Page(HTMLParser):
    """Collects the tags and the addresses of a page, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def entry(epoch: int, phase: str = "compress", name: str = "layer1") -> dict:
    found = {"phase": phase, "epoch": epoch, "epochs": 3, "step": 9 * epoch, "loss": 2 / epoch, "top1": 30.0 * epoch,
             "lr": 0.1 / epoch, "seconds": 1.0}  # fmt: skip
    if phase == "compress":
        found |= {"stage": "ramp", "violation": 0.1**epoch, "violations": {name: 0.1**epoch, "done": 0.0}}
    return found


def numbers(name: str) -> dict:
    scores = {"top1": 90.5, "top5": 99.0, "loss": 0.3, "images": 100}
    layers = {name: {"scheme": "group_in", "rank": 8, "groups": 2}, "b": {"scheme": "cp", "rank": 4}}
    dense = {**scores, "params": 10_000, "spectra": {name: [1, 0.5]}}
    return {**scores, "params": 5_000, "macs": 70_000, "dense": dense, "kept": {"params": 0.5}, "data": name,
            "scores": {name: scores}, "plan": {"layers": layers}, "command": name, "spectra": {name: [1, 0.0]},
            "config": {"model": name}, "hardware": {"cpu": name}}  # fmt: skip


@pytest.mark.parametrize("name", ["layer1.0.conv1", EVIL])
def test_names_are_escaped_and_nothing_is_fetched(name):
    text = render([entry(1, "dense"), entry(2, name=name), entry(3, name=name)], numbers(name), name)
    page = Page(text)
    assert page.links == []
    assert {"script", "img", "link", "iframe", "object", "form"} & set(page.tags) == set()
    assert page.tags.count("svg") == 7
    for words in ("5,000", "50.0 %", "90.50", "group_in, 8 x 2", "Violations"):
        assert words in text


def test_a_run_under_way_has_its_curves(tmp_path, capsys):
    lines = [json.dumps(entry(1)), json.dumps(entry(2)), '{"phase": "compress", "lo']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stop:
        app(["report", str(tmp_path), "--json"])
    assert not stop.value.code
    path = Path(json.loads(capsys.readouterr().out)["report"])
    text = path.read_text(encoding="utf-8")
    assert "A run under way" in text
    assert Page(text).tags.count("polyline") == 3
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["log.jsonl", "report.html"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no log.jsonl and no metrics.json"),
        ({"metrics.json": "[" * 100_000}, "cannot read"),
        ({"metrics.json": "[1]"}, "not a JSON object"),
        ({"metrics.json": '{"scores": {"dense": 3}}'}, "not those of a run"),
    ],
)
def test_folders_that_hold_no_run(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ArpHubError, match=words):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


floats = st.floats(width=32)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), st.lists(st.tuples(floats, floats), max_size=5), max_size=8), st.booleans())
def test_any_line_chart_is_whole(series, log):
    page = Page(str(line_chart(series, "x", "y", log)))
    assert page.tags[0] in ("svg", "p")


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), st.floats(0, 1), max_size=8), st.integers(1, 4))
def test_any_heatmap_and_bars_are_whole(values, moments):
    rows = {name: [value] * moments for name, value in values.items()}
    Page(str(heatmap(rows, [f"epoch {k}" for k in range(moments)])))
    Page(str(bars({name: (value, name) for name, value in values.items()}, "rank")))
