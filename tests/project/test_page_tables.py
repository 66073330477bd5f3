"""The tables of the speed pages come from the results."""

from __future__ import annotations

import re

import pytest

from benchmarks import page_tables


@pytest.mark.parametrize("page", page_tables.PAGES, ids=lambda page: page.parent.name)
def test_tables_are_what_the_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert text == page_tables.with_tables(text)


def test_every_table_stands_in_a_page_and_no_mark_is_unknown():
    text = "".join(page.read_text(encoding="utf-8") for page in page_tables.PAGES)
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == page_tables.TABLES.keys()
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") == len(page_tables.MARKED.findall(text))


def test_a_number_that_was_changed_by_hand_is_written_over():
    page = page_tables.PAGES[0].read_text(encoding="utf-8")
    changed = page.replace("| 0.79 |", "| 0.50 |", 1)
    assert changed != page and page_tables.with_tables(changed) == page
