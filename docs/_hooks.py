"""For MkDocs: links to files outside docs/ become the names of those files, since the site does not hold them."""

import re

OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+(?:tests|benchmarks|recipes|arp_hub|README|CONTRIBUTING|Dockerfile)[^)]*\)"
)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by MkDocs with the text of every page."""
    return OUTSIDE.sub(r"`\1`", markdown)
