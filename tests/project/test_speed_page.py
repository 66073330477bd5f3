"""The tables of the speed pages come from the results."""

from __future__ import annotations

import re

import pytest

from benchmarks import speed_page


@pytest.mark.parametrize("page", speed_page.PAGES, ids=lambda page: page.parent.name)
def test_tables_are_what_the_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert text == speed_page.with_tables(text)


def test_every_table_stands_in_a_page_and_no_mark_is_unknown():
    text = "".join(page.read_text(encoding="utf-8") for page in speed_page.PAGES)
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == speed_page.TABLES.keys()
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") == len(speed_page.MARKED.findall(text))


def test_a_number_that_was_changed_by_hand_is_written_over():
    page = speed_page.PAGES[0].read_text(encoding="utf-8")
    changed = page.replace("| 0.79 | 0.88 |", "| 0.50 | 0.50 |")
    assert changed != page and speed_page.with_tables(changed) == page
