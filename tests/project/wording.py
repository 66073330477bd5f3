"""Checks of prose: banned words, history, and long sentences.

    python tests/project/wording.py README.md docs/tutorial.md

It prints one line for each finding. `test_wording.py` runs it over all user pages and public docstrings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LONGEST_SENTENCE = 30
HISTORY = (
    "now", "no longer", "anew", "formerly", "previously", "originally", "used to", "at present", "until now",
    "was once", "was tried", "was measured", "was changed", "was added", "was removed", "had been", "has been changed",
    "the version before", "an earlier version", "the present version", "in the past", "measured again",
)  # fmt: skip
RIDDLES = (
    "in vain", "be had", "is had", "let go", "make do", "makes do", "of which", "so many", "as it is", "as they are",
    "nobody", "anybody", "oftener", "at hand", "put right", "on its way", "something to give", "done without",
    "waits for", "behind its back",
)  # fmt: skip
BANNED = re.compile(rf"\b({'|'.join((*HISTORY, *RIDDLES))})\b", re.I)
PARTS = (
    re.compile(r"^---\n.*?^---\n", re.M | re.S),  # the head of a page
    re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.M | re.S),
    re.compile(r"<!--.*?-->", re.S),
    re.compile(r"^ {4,}.*$", re.M),
)
"""Parts of a page that are no prose."""
END = re.compile(r"(?<=[.!?:;])\s+(?=[\"'(`*]*[A-Z0-9`])|\n\s*\n")
WORD = re.compile(r"[A-Za-z][\w'-]*")


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown text. Headings, list items and table cells count as sentences of their own."""
    for part in PARTS:
        text = part.sub("\n\n", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^\s*(#+|[-*+]|\d+\.)\s+", "\n\n", text, flags=re.M)
    text = re.sub(r"^\|.*$", lambda row: "\n\n" + row[0].strip("|").replace("|", "\n\n") + "\n\n", text, flags=re.M)
    text = re.sub(r"``?[^`]*``?", "``", text)
    return [" ".join(found.split()) for found in END.split(text) if found and found.strip()]


def findings(text: str, longest: int = LONGEST_SENTENCE) -> list[str]:
    """What to change in a text: one line for each banned word and each long sentence."""
    found = []
    for sentence in sentences(text):
        found += [f"'{word.lower()}': {sentence[:100]}" for word in BANNED.findall(sentence)]
        count = len(WORD.findall(sentence))
        if count > longest:
            found.append(f"{count} words: {sentence[:100]}")
    return found


def main() -> int:
    """Check the files that the command names."""
    found = [f"{path}: {line}" for path in sys.argv[1:] for line in findings(Path(path).read_text(encoding="utf-8"))]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
