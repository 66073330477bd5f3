"""Names that would break a terminal are shown as text."""

import pytest
from rich.console import Console

from arp_hub.reports.tables import comparison_table


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
