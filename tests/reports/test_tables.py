"""Names that would break a terminal are shown as text."""

import pytest
from rich.console import Console

from arp_hub.reports.tables import _number, comparison_table


@pytest.mark.parametrize(
    ("name", "shown"),
    [("[red]x[/red]", "[red]x[/red]"), ("[/nix]", "[/nix]"), ("a\x1b[31mb", "a\\x1b[31mb"), ("a\x9b2Jb", "a\\x9b2Jb")],
    ids=repr,
)
def test_names_are_neither_markup_nor_escapes(name, shown):
    console = Console(width=140)
    with console.capture() as captured:
        console.print(comparison_table({name: {name: 1}}, title=name))
    assert captured.get().count(shown) == 3
    assert not {"\x1b", "\x9b"} & set(captured.get())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (9_999, "9999"), (10_000, "10k"), (12_345, "12.3k"), (999_499, "999k"), (999_500, "1M"),
        (999_999, "1M"), (4_560_000, "4.56M"), (999_500_000, "1G"), (7_890_000_000, "7.89G"), (None, "not called"),
    ],
)  # fmt: skip
def test_counts_have_three_digits(value, shown):
    assert _number(value) == shown
