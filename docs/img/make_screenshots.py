"""Take the screenshots of this folder: README, pages of the site, a card and a report, at 1280 and 400 px.

    pip install -e ".[docs,plots]" playwright
    mkdocs build --strict --site-dir /tmp/site
    python recipes/quickstart.py
    python docs/img/make_screenshots.py /tmp/site runs/quickstart-run/report.html --browser /usr/bin/chromium

README and card are drawn in the style of GitHub and the Hub, without their menus. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

import markdown
from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WIDTHS = {"desktop": 1280, "phone": 400}
LARGEST = 300 * 1024
"""Size of a picture in bytes, so that all of them add less than 3 MiB to a clone."""
STYLE = """
body { margin: 0 auto; max-width: 1012px; padding: 24px; font: 16px/1.5 sans-serif; color: #1f2328;
  overflow-wrap: break-word; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em; line-height: 1.25; }
a { color: #0969da; text-decoration: none; }
img { max-width: 100%; }
code { background: #818b981f; border-radius: 6px; font-size: 85%; padding: .2em .4em; }
pre { background: #f6f8fa; border-radius: 6px; line-height: 1.45; overflow: auto; padding: 16px; }
pre code { background: none; padding: 0; }
table { border-collapse: collapse; display: block; overflow: auto; width: max-content; max-width: 100%; }
th, td { border: 1px solid #d1d9e0; padding: 6px 13px; }
tr:nth-child(2n) { background: #f6f8fa; }
"""


def page_of(source: Path) -> str:
    """A Markdown file as a page, with its links and pictures relative to its folder; its head is left out."""
    text = re.sub(r"\A---\n.*?^---\n", "", source.read_text(encoding="utf-8"), flags=re.M | re.S)
    body = markdown.markdown(text, extensions=["tables", "md_in_html", "sane_lists", "pymdownx.superfences"])
    head = f'<base href="{source.parent.resolve().as_uri()}/"><style>{STYLE}</style>'
    return f'<!doctype html><meta charset="utf-8">{head}<body>{body}</body>'


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the built site")
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("--browser", help="path of Chromium; by default the one that Playwright installed")
    parser.add_argument("--only", nargs="+", help="names of pictures to take")
    args = parser.parse_args()
    pages: dict[str, tuple[Path | str, int]] = {  # what is shown, and the height in px that is enough to judge it
        "readme": (page_of(ROOT / "README.md"), 2400),
        "site": (args.site / "index.html", 1000),
        "tutorial": (args.site / "tutorial.html", 1000),
        "results": (args.site / "research" / "results.html", 1000),
        "models": (args.site / "supported-models.html", 1000),
        "card": (page_of(ROOT / "docs" / "examples" / "resnet20-cifar10" / "README.md"), 2400),
        "report": (args.report, 4000),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser)
        for form, width in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": 800})
            for name in args.only or pages:
                shown, height = pages[name]
                target = HERE / f"{name}-{form}.png"
                # A file, not set_content: a page without an address may not load pictures from files.
                file = shown if isinstance(shown, Path) else args.site / f"{name}-{form}.html"
                if isinstance(shown, str):
                    file.write_text(shown, encoding="utf-8")
                page.goto(file.resolve().as_uri())
                whole = page.evaluate("document.documentElement.scrollHeight")
                page.set_viewport_size({"width": width, "height": min(whole, height)})
                store(page.screenshot(), target)
                page.set_viewport_size({"width": width, "height": 800})
            page.close()
        browser.close()


def store(picture: bytes, target: Path) -> None:
    """Write a screenshot as PNG with a palette, which divides its size by three."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(target, optimize=True)
    size = target.stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{target.name} has {size} bytes, more than {LARGEST}: lower its height")
    print(target.name, image.size, f"{size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
