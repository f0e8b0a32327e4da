"""Check the built site in _docs/ without a browser: links, anchors, pictures, other hosts.

Status 1 and a line for each that is wrong. `make docs` runs it after the build.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import site_pages

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_docs"
LOADS = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src"}
URL = re.compile(r"url\(\s*['\"]?(?!data:)([^)'\"]+)")


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, html: str):
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        have = dict(attrs)
        self.anchors |= {v for k in ("id", "name") if (v := have.get(k))}
        if tag == "a" and have.get("href"):
            self.links.append(have["href"] or "")
        if tag in LOADS and have.get(LOADS[tag]):
            self.loads.append(have[LOADS[tag]] or "")
        if tag == "link" and have.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(have.get("href") or "")


def pages() -> dict[str, Page]:  # by path below _docs
    "Every page of the site but the one for what is not found, whose links start at the root."
    found = sorted(SITE.rglob("*.html"))
    return {
        p.relative_to(SITE).as_posix(): Page(p.read_text()) for p in found if p.name != "404.html"
    }


def target(
    page: str,  # where the link stands
    link: str,  # what it says
) -> tuple[Path, str] | None:  # the file it means and the anchor; None: another host's
    "What a link of the site leads to."
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    here = SITE / page
    path = (here.parent / unquote(parts.path)) if parts.path else here
    return path.resolve(), unquote(parts.fragment)


def broken(
    found: dict[str, Page],  # from `pages`
) -> list[str]:  # one line each
    "Links to a page or an anchor that is not there, and whatever is loaded but not there."
    wrong = []
    for name, page in found.items():
        for link in [*page.links, *page.loads]:
            where = target(name, link)
            if where is None:
                continue
            path, anchor = where
            inside = path.relative_to(SITE).as_posix() if path.is_relative_to(SITE) else ""
            if not path.exists():
                wrong.append(f"{name}: {link} leads nowhere")
            elif inside in found and anchor not in found[inside].anchors:
                wrong.append(f"{name}: {link}: there is no such anchor")
    return wrong


def other_hosts(
    found: dict[str, Page],  # from `pages`
) -> list[str]:  # one line each
    "Whatever a page or a style sheet would load from another host."
    wrong = [
        f"{name}: loads {load}"
        for name, page in found.items()
        for load in page.loads
        if urlsplit(load).netloc
    ]
    for css in SITE.rglob("*.css"):
        for load in URL.findall(css.read_text()):
            if urlsplit(load).netloc:
                wrong.append(f"{css.relative_to(SITE)}: loads {load}")
    return wrong


def pictures_of(
    notebook: Path,  # a notebook
) -> int:
    "Figures among the outputs that are shown."
    return sum(
        "image/png" in output.get("data", {})
        for cell in nbformat.read(notebook, 4).cells
        if cell.cell_type == "code" and "output: false" not in cell.source
        if "include: false" not in cell.source
        for output in cell.outputs
    )


def lost_pictures(
    found: dict[str, Page],  # from `pages`
) -> list[str]:  # one line each
    "Notebooks whose page does not show as many figures as the notebook has."
    wrong = []
    for notebook, page in site_pages.NOTEBOOKS.items():
        folder = f"{page.rpartition('/')[2]}_files/"
        shown = sum(folder in x for x in found[f"{page}.html"].loads)
        if shown != pictures_of(ROOT / "nbs" / notebook):
            wrong.append(f"{page}.html shows {shown} figures, {notebook} has another number")
    return wrong


def main() -> int:
    "Say what is wrong."
    found = pages()
    if not found:
        print("no site in _docs: run `make docs`")
        return 1
    wrong = [*broken(found), *other_hosts(found), *lost_pictures(found)]
    print("\n".join(wrong) if wrong else f"{len(found)} pages, every link and figure is there")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
