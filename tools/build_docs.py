"""Render nbs/ and the texts into Markdown pages, and index.ipynb into README.md.

    python tools/build_docs.py           _pages/ for MkDocs; README.md and the figures it shows
    python tools/build_docs.py --check   writes nothing; status 1 if README.md is out of date

Works offline and without Quarto: nbdev fills in `show_doc`, nbconvert writes the Markdown. Export
cells and cells that do nothing but import are executed, so that `show_doc` has something to show;
no other cell is, and outputs are those that the notebooks carry.

A relative link in a notebook may name a notebook, a page (`commands.html`), a picture below `nbs/`
or any file of the repository. On the site it leads to the page; in README.md, which is also read on
GitHub and PyPI, it becomes a full address. A link that leads nowhere stops the build.

The texts are nbs/pages/ and some files of the repository's root; tools/site_pages.py makes the
pages that are written from code: the front, commands, reference, the rooms' picture, llms.txt.

The report that one can open on the site is made here from nbs/pages/example/: results.json and
judgments.jsonl of a real `alpagasus2 quickstart` on the rows of dataset/. To renew it, run the
quickstart and copy both files there.
"""

import argparse
import ast
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES, NBS, IMAGES = ROOT / "_pages", ROOT / "nbs", ROOT / "nbs" / "images"
os.chdir(ROOT)  # nbdev looks for settings.ini from here upwards
os.environ |= {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import nbdev.doclinks  # noqa: E402
import nbdev.processors  # noqa: E402
import nbdev.showdoc  # noqa: E402
import nbformat  # noqa: E402
import site_pages  # noqa: E402
import yaml  # noqa: E402
from execnb.nbio import nb2str, read_nb  # noqa: E402
from fastcore.docments import MarkdownRenderer  # noqa: E402
from nbconvert import MarkdownExporter  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from site_pages import NOTEBOOKS  # noqa: E402

CFG = get_config()
SITE = CFG.doc_host + CFG.doc_baseurl
RAW = CFG.git_url.replace("https://github.com", "https://raw.githubusercontent.com")
NOTE = "<!-- Written by tools/build_docs.py from nbs/index.ipynb: edit that notebook. -->\n\n"
TEXTS = {ROOT / f"{n.upper()}.md": n for n in ("changelog", "contributing", "security")}
TEXTS |= {path: path.stem for path in sorted((NBS / "pages").glob("*.md"))}
MADE = {"commands": site_pages.commands_page, "reference": site_pages.reference_page}
PAGE_OF = {NBS / file: page for file, page in NOTEBOOKS.items()} | TEXTS  # endpoint/cache, say
NAMED = {f"{page}.html": page for page in (*PAGE_OF.values(), *MADE)}  # as a link may name them
EXAMPLE = "example/index.html"  # a report, as a link may name it
PICTURES = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"}

STYLE = re.compile(r"<style scoped>.*?</style>\n?", re.S)  # pandas' own, which GitHub would print
LINE = re.compile(r"#L(\d+)\)")  # of a symbol in its module
LINK = re.compile(  # code, which is left as it is; or what stands before a target, and the target
    r"^```.*?^```|`[^`\n]*`|(?P<before>\]\(|<img [^>]*?src=\")(?P<target>[^)\s\"]+)", re.S | re.M
)
# nbdev links every name in backticks; not within a link, and not in the heading of its own symbol
nbdev.doclinks._re_backticks = re.compile(r"`([^`\s]+?)(?:\(\))?`(?! \{#|[^\[\]]*\]\()")


def runs_at_build(
    cell: object,  # a cell of nbdev's
    nbdev_rule: Callable[[object], bool | None] = nbdev.processors._do_eval,  # what nbdev would do
) -> bool:
    "Whether a cell is executed here: nbdev would run each one with an import in it, training too."
    if cell.cell_type != "code" or not cell.source or not nbdev_rule(cell):
        return False
    for_show_doc = "export" in cell.directives_ or "show_doc" in cell.source
    trees = [] if for_show_doc else cell.parsed_()
    return all(isinstance(tree, ast.Import | ast.ImportFrom) for tree in trees)


class Documented(MarkdownRenderer):
    "What show_doc writes of a symbol, with an anchor that links from other pages can use."

    def _repr_markdown_(self) -> str:
        source = nbdev.doclinks.NbdevLookup().code(self.fn)
        heading = f"### `{self.nm}` {{#{self.nm.lower()}}}"
        return f"{heading}\n\n[source]({source})\n\n{super()._repr_markdown_()}"


nbdev.processors._do_eval = runs_at_build
nbdev.showdoc.BasicMarkdownRenderer = Documented


def place(
    target: str,  # a relative link, without its anchor
    source: Path,  # the file it stands in
) -> Path:  # the file it names
    "A link counts from its own folder or from the repository's root; anything else is a mistake."
    for base in (source.parent, NBS, ROOT):
        path = (base / target).resolve()
        if path.exists() and path.is_relative_to(ROOT):
            return path
    sys.exit(f"{source.relative_to(ROOT)}: the link to {target} leads nowhere in this repository")


def resolve(
    target: str,  # what a link says
    source: Path,  # the file it stands in
    readme: bool,  # for README.md, so as a full address
) -> str:  # what it is to say
    "A link that works where the text is read."
    target = target.removeprefix(f"{SITE}/")
    if "://" in target or target.startswith(("#", "mailto:")):
        return target
    path, _, anchor = target.partition("#")
    # nbdev links a method, which its class documents, and a private name, which nothing does
    anchor = re.sub(r"^_.*|\..*", "", anchor)
    anchor = anchor and f"#{anchor}"
    folder = os.path.dirname(PAGE_OF[source]) or "."
    if path == EXAMPLE:
        return f"{SITE}/{path}" if readme else os.path.relpath(path, folder)
    file = None if path in NAMED else place(path, source)
    if page := NAMED.get(path) or PAGE_OF.get(file):
        return (
            f"{SITE}/{page}.html{anchor}"
            if readme
            else f"{os.path.relpath(page, folder)}.md{anchor}"
        )
    inside = file.relative_to(ROOT).as_posix()
    if file.suffix not in PICTURES:
        return f"{CFG.git_url}/{'tree' if file.is_dir() else 'blob'}/{CFG.branch}/{inside}{anchor}"
    if readme:
        return f"{RAW}/{CFG.branch}/{inside}"
    (PAGES / inside).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, PAGES / inside)
    return os.path.relpath(inside, folder)


def relink(
    text: str,  # Markdown
    source: Path,  # the file it comes from
    readme: bool = False,  # for README.md
) -> str:
    "The same with its links resolved."

    def one(m: re.Match) -> str:
        return m["before"] + resolve(m["target"], source, readme) if m["before"] else m[0]

    return LINK.sub(one, text)


def shown(
    cell: nbformat.NotebookNode,  # a code cell that stays
) -> nbformat.NotebookNode:  # the same as a reader sees it
    "No option lines, no progress bars, no style sheets in tables."
    cell.outputs = [o for o in cell.outputs if "\r" not in o.get("text", "")]
    for out in cell.outputs:
        if html := out.get("data", {}).get("text/html"):
            out.data["text/html"] = STYLE.sub("", html)
    cell.metadata["transient"] = {"remove_source": "#| echo: false" in cell.source}
    lines = [x for x in cell.source.splitlines() if not x.startswith("#|")]
    cell.source = "\n".join(lines).strip("\n")
    return cell


def flatten(
    source: Path,  # a notebook of nbs/
    readme: bool,  # for README.md
) -> nbformat.NotebookNode:  # plain Markdown and code cells
    "Front matter, documentation and directives as plain cells."
    filled = read_nb(source)
    nbdev.processors.FilterDefaults()(filled)
    nb, cells, symbols = nbformat.reads(nb2str(filled), 4), [], []

    def add(text: str) -> None:
        cells.append(nbformat.v4.new_markdown_cell(relink(text, source, readme)))

    for cell in nb.cells:
        if "#| output: asis" in cell.source:  # show_doc
            symbols += [out.data["text/markdown"] for out in cell.outputs]
            continue
        for text in sorted(symbols, key=lambda text: int(LINE.search(text)[1])):
            add(text)
        symbols = []  # nbdev turns the symbols of one cell about, so they are sorted by line
        if cell.cell_type == "raw":  # front matter
            meta = yaml.safe_load(cell.source.strip().strip("-"))
            add(f"# {meta['title']}\n\n{meta.get('description', '')}")
        elif cell.cell_type == "code":
            cells.append(shown(cell))
        elif not cell.source.startswith("<!-- WARNING"):
            add(cell.source)
    nb.cells, nb.metadata["language_info"] = cells, {"name": "python"}
    return nb


def described(
    body: str,  # Markdown in which a figure is called png
) -> str:
    "The same; what a screen reader says of a figure is the paragraph above it."
    said, code, blocks = "", False, []
    for block in body.split("\n\n"):
        if not code and re.match(r"(?!```)[A-Z`*\[]", block):
            said = re.sub(r"\]\([^)]*\)|[\[\]`*]", "", " ".join(block.split()))
        blocks.append(block.replace("![png](", f"![{said}]("))
        code ^= block.count("```") % 2 == 1
    return "\n\n".join(blocks)


def rendered(
    source: Path,  # a notebook of nbs/
    readme: bool = False,  # for README.md
) -> tuple[str, dict[str, bytes]]:  # Markdown, and its figures by path
    "One page."
    name = PAGE_OF[source].rpartition("/")[2]
    where = IMAGES.relative_to(ROOT).as_posix() if readme else f"{name}_files"
    body, resources = MarkdownExporter().from_notebook_node(
        flatten(source, readme), {"unique_key": name, "output_files_dir": where}
    )
    if readme:  # figures of outputs have only now got a name; what does not exist yet is passed by
        body = body.replace(f"]({where}/{name}_", f"]({RAW}/{CFG.branch}/{where}/{name}_")
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return body if readme else described(body), resources["outputs"]


def readme_files() -> dict[Path, bytes]:  # contents by path
    "README.md and the figures of index.ipynb's outputs, which are committed under nbs/images/."
    body, files = rendered(NBS / "index.ipynb", readme=True)
    files["README.md"] = (NOTE + body).encode()
    return {ROOT / path: data for path, data in files.items()}


def figures() -> set[Path]:
    "The committed figures of index.ipynb's outputs, an earlier version's among them."
    return set(IMAGES.glob("index_*"))


def check() -> int:
    "Say what in README.md is not as index.ipynb gives it."
    wanted = readme_files()
    wrong = figures() - wanted.keys()
    wrong |= {p for p, data in wanted.items() if not p.exists() or p.read_bytes() != data}
    for path in sorted(wrong):
        print(f"{path.relative_to(ROOT)} is not what nbs/index.ipynb gives: run `make docs`")
    return 1 if wrong else 0


def text_page(
    file: Path,  # Markdown of the repository
) -> str:
    "The same with its links resolved, and the modules drawn where it asks for them."
    text = relink(file.read_text(), file)
    text = text.replace("<!-- picture of the house -->", site_pages.house_picture())
    return text.replace("<!-- table of the house -->", site_pages.house_table())


def example_report() -> None:
    "The report of the example, as the package writes it."
    from alpagasus2.analysis import load_judgments
    from alpagasus2.core.files import read_json
    from alpagasus2.report.page import write_report
    from alpagasus2.report.plots import plot_outcomes, plot_slots

    data = NBS / "pages" / "example"
    results = read_json(data / "results.json")
    figures = {
        "Verdicts in both orders": plot_outcomes(results["pairs"]),
        "Slot preference of the judge": plot_slots(results["judge_health"]),
    }
    judgments, _ = load_judgments(data / "judgments.jsonl")
    output = PAGES / os.path.dirname(EXAMPLE)
    write_report(results, output, judgments, figures=figures, title="The quickstart’s report")


def write(
    files: dict[Path, bytes],  # contents by path
) -> None:
    "Write them, with their folders."
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def build() -> int:
    "Write the pages, then README.md."
    shutil.rmtree(PAGES, ignore_errors=True)
    write({PAGES / f"{page}.md": text_page(file).encode() for file, page in TEXTS.items()})
    write({PAGES / f"{page}.md": make().encode() for page, make in MADE.items()})
    shutil.copy(NBS / "pages/extra.css", PAGES)
    shutil.copy(IMAGES / "mark.svg", PAGES)
    example_report()
    for file, page in NOTEBOOKS.items():
        body, files = rendered(NBS / file)
        folder = (PAGES / page).parent
        body = site_pages.front_page(body) if page == "index" else body
        write({PAGES / f"{page}.md": body.encode()} | {folder / p: d for p, d in files.items()})
    nav = yaml.safe_load(re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text()))["nav"]
    (PAGES / "llms.txt").write_text(site_pages.llms_txt(nav, PAGES, SITE))
    for path in figures():
        path.unlink()
    write(readme_files())
    return 0


def main() -> int:
    "Run from the command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare README.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:  # an empty one: a docs build converts no model
        os.environ["ALPAGASUS2_CACHE"] = cache
        status = check() if args.check else build()
        if found := os.listdir(cache):
            sys.exit(f"a notebook cell made {found} while the docs were built: docs run no model")
    return status


if __name__ == "__main__":
    sys.exit(main())
