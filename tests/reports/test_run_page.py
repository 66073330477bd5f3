"""The report of a run: its content, and the escaping of names."""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import timm

import arp_hub
from arp_hub import ArpHubError
from arp_hub.reports.model_figures import decays_figure, ranks_figure
from arp_hub.reports.plots import inline_svg
from arp_hub.reports.run_figures import curves_figure, rank_bars_figure, violations_figure
from arp_hub.reports.run_page import render, write_report
from arp_hub_cli.app import app

pytestmark = pytest.mark.usefixtures("pictures")
EVIL = "\"><script>alert('x')</script><img src=x onerror=y>&"
NAMES = ["layer1.0.conv1", EVIL, "</svg><script>", "</text></svg><img src=x>", "$\\frac{", "$x^2$", "_hidden",
         "[red]x[/red]", "&amp;<!--", "]]>", "a\x00\x1b[31m\n\ufffe", "\ud800", "層🙂\u202eabc", "",
         "x" * 10_000]  # fmt: skip
VALUES = [math.nan, math.inf, -math.inf, None, "x", [], 10**400, 1e308, 3e37, -1.0, 0, 1e-300, True]


class Page(HTMLParser):
    """Collects the tags and the addresses of a page, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes(attrs)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes(attrs)

    def attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")]
        links = {"src", "href", "xlink:href", "srcset", "data", "action"}
        values = [value or "" for name, value in attrs if name in links]
        self.links += [value for value in values if not value.startswith(("#", "data:image/png;base64,"))]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "text":
            self.texts.append(data.strip())

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
    dense = {**scores, "params": 10_000}
    return {**scores, "params": 5_000, "macs": 70_000, "dense": dense, "kept": {"params": 0.5}, "data": name,
            "scores": {name: scores}, "plan": {"layers": layers}, "command": name,
            "spectra": {name: {"full_rank": 9, "values": [1, 0.0]}},
            "config": {"model": name}, "hardware": {"cpu": name}}  # fmt: skip


def test_names_are_escaped_and_nothing_is_fetched(tmp_path):
    log = [entry(1, "dense"), *({**entry(k), "violations": {name: 0.1 for name in NAMES}} for k in (2, 3))]
    found = numbers(EVIL)
    found["plan"]["layers"] |= {name: {"scheme": name, "rank": 3} for name in NAMES if name != EVIL}
    found["spectra"] |= {name: {"full_rank": 9, "values": [1, 0.5]} for name in NAMES}
    found["config"] = dict.fromkeys(NAMES, "value")
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == []
    assert {"script", "img", "link", "iframe", "object", "form", "metadata"} & set(page.tags) == set()
    assert page.tags.count("svg") == 6
    assert len(page.ids) == len(set(page.ids)) > 0
    for name in filter(None, NAMES):
        shown = "…" + name[-25:] if len(name) > 26 else name
        shown = "".join(character if character.isprintable() else "\ufffd" for character in shown)
        assert [words.startswith(shown) for words in page.texts].count(True) >= 2, name  # violations and ranks
    assert "$" not in "".join(page.texts).replace("$\\frac{", "").replace("$x^2$", "")
    for words in ("5,000", "50.0 %", "90.50", "group_in, 8 x 2", "Violations", "<h3>Hardware</h3>"):
        assert words in text


def test_a_run_under_way_has_its_curves(tmp_path, capsys):
    lines = [json.dumps(entry(1)), json.dumps(entry(2)), '{"phase": "compress", "lo']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stop:
        app(["report", str(tmp_path), "--json"])
    assert not stop.value.code
    path = Path(json.loads(capsys.readouterr().out)["report"])
    text = path.read_text(encoding="utf-8")
    assert "The run is not finished." in text
    assert Page(text).tags.count("svg") == 4
    assert text.count("No values yet.") == 2  # ranks and spectra
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["log.jsonl", "report.html"]


def test_a_model_without_a_run_has_no_curves(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=0.6))
    arp_hub.save_pretrained(model, tmp_path / "out")
    page = write_report(tmp_path / "out").read_text()
    assert "A model that was compressed without training." in page
    for word in ("finished", "<h2>Loss", "<h2>Violations", "No values yet"):
        assert word not in page


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


def test_values_that_cannot_be_drawn_do_not_stop_a_report():
    log = []
    for phase in ("dense", "compress"):
        for value in VALUES:
            log.append({**entry(1, phase), "loss": value, "top1": value, "lr": value, "val": {"top1": value}})
            if phase == "compress":
                log[-1]["violations"] = {"layer1": value, "done": 0}
    found = numbers("layer1")
    spectra = [VALUES, [None, math.nan], [], [1.0], [1.0, 0.5]]
    found["plan"]["layers"] = {str(k): {"scheme": "cp", "rank": rank} for k, rank in enumerate([1, 3, 2, 1, math.nan])}
    found["spectra"] = {str(k): {"full_rank": 9, "values": values} for k, values in enumerate(spectra)} | {"old": [1.0]}
    assert Page(render(log, found, "run")).tags.count("svg") == 6


@pytest.mark.parametrize("value", [None, math.nan, 0.0])
def test_figures_of_one_epoch(value):
    for draw, data, labels in (
        (curves_figure, {"dense": {1: value}}, ["loss"]),
        (violations_figure, {"layer1": {1: value}}, []),
        (decays_figure, {"layer1": {"full_rank": 1, "values": [value]}}, [{"layer1": ("cp", 1)}]),
        (rank_bars_figure, {"layer1": (value, "cp")}, []),
    ):
        assert Page(inline_svg("Values", draw, data, *labels)).tags[0] == "svg"


@pytest.mark.parametrize("entries", [[], [{**entry(1), "violations": None, "val": None}]])
def test_a_report_of_few_epochs(entries):
    pictures = 5 if entries else 2  # ranks and spectra need no epoch; violations need one of the penalty
    assert Page(render(entries, numbers("layer1"), "run")).tags.count("svg") == pictures


@pytest.mark.parametrize("held_out", [True, False])
def test_the_caption_names_held_out_images_only_where_there_are(held_out):
    log = [{**entry(k), "val": {"top1": 50.0} if held_out else None} for k in (1, 2)]
    assert ("held-out" in render(log, numbers("layer1"), "run")) == held_out


def test_the_page_of_a_large_run_is_small():
    layers = [f"stages.{k // 30}.blocks.{k % 30}.convolution" for k in range(110)]
    log = [{**entry(k), "violations": {name: 0.9**k / (1 + i) for i, name in enumerate(layers)}} for k in range(1, 41)]
    found = numbers("layer1")
    found["plan"] = {"layers": {name: {"scheme": "spatial", "rank": 8 + k} for k, name in enumerate(layers)}}
    found["spectra"] = {name: {"full_rank": 64, "values": [0.9**k for k in range(33)]} for name in layers}
    assert 250_000 < len(render(log, found, "run").encode()) < 1_000_000


def test_a_picture_is_the_same_whatever_the_settings_of_matplotlib():
    drawn = inline_svg("Loss", curves_figure, {"dense": {1: 2.0, 2: 1.0}}, "loss")
    assert "width" not in drawn[: drawn.index(">")]
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "text.usetex": True}):
        assert inline_svg("Loss", curves_figure, {"dense": {1: 2.0, 2: 1.0}}, "loss") == drawn
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("log", [[], [entry(1)]])
def test_without_matplotlib_a_report_has_its_tables(monkeypatch, log):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = render(log, numbers(EVIL), "run")
    page = Page(text)
    assert "svg" not in page.tags
    assert page.tags.count("table") == 5  # sizes, scores, and three groups of facts
    assert text.count("pip install 'arp-hub[plots]'") == 1


def test_pictures_of_cards_take_any_name():
    rows = [{"name": name, "scheme": "cp", "rank": 2, "groups": 1, "params": 9, "params_after": 4} for name in NAMES]
    page = Page(inline_svg("Ranks", ranks_figure, rows))
    assert {"script", "img"} & set(page.tags) == set()
    assert {"$\\frac{", "$x^2$", "]]>"} <= set(page.texts)


def test_ticks_are_whole_epochs_and_accuracy_starts_at_its_lowest_value():
    for points in ({1: 40.0}, {1: 40.0, 2: 50.0}, {k: 40.0 + k for k in range(30)}):
        axes = curves_figure({"dense": points}, "top-1, %", from_lowest=True).axes[0]
        ticks = [tick for tick in axes.get_xticks() if min(points) - 0.5 <= tick <= max(points) + 0.5]
        assert ticks and all(tick == round(tick) for tick in ticks)
        assert len(points) == 1 or axes.get_ylim()[0] == min(points.values())


def test_bars_have_the_ranks_of_the_table_and_the_size_follows_the_layers():
    rows = [{"name": f"layer{k}", "scheme": "group_out", "rank": 5 + k, "groups": 4, "params": 90, "params_after": 40}
            for k in range(30)]  # fmt: skip
    figure = ranks_figure(rows)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [row["rank"] for row in rows]
    assert {text.get_text() for text in figure.axes[0].texts} == {f"{row['rank']} x 4" for row in rows}
    single = ranks_figure(rows[:1])
    assert single.get_size_inches()[1] < 1.5 < 5 < figure.get_size_inches()[1]
    (bars,) = rank_bars_figure({"layer1": (6, "group_out, 6 x 4"), "b": (3, "cp, 3")}).axes
    assert [bar.get_width() for bar in bars.patches] == [6, 3]


def test_settings_are_grouped():
    config = {"model": "m", "data": "d", "keep_params": 0.5, "epochs": 3, "lr": 0.1, "distill": 0.5, "output": "o"}
    config |= {"dense_epochs": 0, "batch_size": 4, "mixup": None}
    groups = ("Model and data", "Budget", "Phases", "Optimisation", "Regularisation", "Output")
    order = ["model", "data", "keep_params", "dense_epochs", "epochs", "batch_size", "lr", "distill", "mixup", "output"]
    text = render([], {**numbers("layer1"), "config": {name: config[name] for name in order}}, "run")
    places = [text.index(f"<h3>{group}</h3>") for group in groups]
    assert places == sorted(places)
    assert places[1] < text.index("keep params") < places[2] < text.index("<td>epochs</td>") < places[3]
    assert "mixup" not in text
