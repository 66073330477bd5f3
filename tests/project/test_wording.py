"""User pages and public docstrings follow the rules of prose: no history, no riddles, no long sentences."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from wording import findings

import arp_hub
import arp_hub.training

ROOT = Path(__file__).parents[2]
USER_PAGES = [
    name
    for pattern in ("*.md", "docs/**/*.md")
    for name in sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
    if not name.startswith(("docs/research/", "docs/examples/"))
]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (arp_hub, arp_hub.training)
    for name in module.__all__
    if name != "models"
}


def docstrings(name: str) -> str:
    """The docstrings of a public name and of its public methods, without examples and with entries of their own."""
    thing = PUBLIC[name]
    own = vars(thing).items() if inspect.isclass(thing) else ()
    things = [thing, *(member for key, member in own if not key.startswith("_") and inspect.isfunction(member))]
    texts = [re.split(r"^Examples?:$", inspect.getdoc(each) or "", flags=re.M)[0] for each in things]
    lines = [line.strip() for text in texts for line in [*text.splitlines(), ""]]
    return "\n".join(re.sub(r"^(\w+|`\w+`): ", r"\n", line) for line in lines)


@pytest.mark.parametrize("page", USER_PAGES)
def test_user_pages_are_plain(page):
    assert findings((ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_are_plain(name):
    assert findings(docstrings(name)) == []


PAGE = """---
head: now
---
# Now
It is **measured
anew**; nobody waits. Snow and knowledge are fine.

```python
now = "no longer"
```
| a | of which |
| --- | --- |
- one two three four five six `now` seven [eight](now.md), nine ten. Ten.
"""


def test_the_check_sees_what_breaks_the_rules():
    found = [line.partition(":")[0] for line in findings(PAGE, longest=9)]
    assert found == ["'now'", "'anew'", "'nobody'", "'of which'", "10 words"]
