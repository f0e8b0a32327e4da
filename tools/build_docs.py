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
pages that are written from code: commands, reference, the rooms' picture, llms.txt.
"""

import argparse
import ast
import difflib
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

import nbdev.processors  # noqa: E402
import nbformat  # noqa: E402
import site_pages  # noqa: E402
import yaml  # noqa: E402
from nbconvert import MarkdownExporter  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.serve_drv import main as process  # noqa: E402
from site_pages import NOTEBOOKS  # noqa: E402

CFG = get_config()
SITE = CFG.doc_host + CFG.doc_baseurl
NOTE = "<!-- Written by tools/build_docs.py from nbs/index.ipynb: edit that notebook. -->\n\n"
TEXTS = {f"{n.upper()}.md": n for n in ("changelog", "contributing", "security")}  # pages too
TEXTS |= {f"nbs/pages/{p.name}": p.stem for p in sorted((ROOT / "nbs/pages").glob("*.md"))}
MADE = ("commands", "reference")  # by site_pages
PICTURES = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"}

ATTRS = re.compile(r"\]\((\S+)\)\{target=.*?\}")  # Quarto's link attributes
NESTED = re.compile(r"(?<!!)\[(`[^`]*`)\]\([^)\s]+\)")  # a symbol that nbdev linked within a link
SYMBOL = re.compile(r"^(#+) (\S+)$", re.M)  # the heading that show_doc writes
HEAD = re.compile(r"---\n\n(\[source\]\(\S+\))\n\n(#+ \S+)$", re.M)  # the link before its heading
LINE = re.compile(r"^\[source\]\(\S+#L(\d+)\)", re.M)
STYLE = re.compile(r"<style scoped>.*?</style>\n?", re.S)  # pandas' own, which GitHub would print
ALT = re.compile(r'alt="([^"]*)"')
LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]*`)"
    r"|(?P<bang>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]"
    r"\((?P<target>[^)\s]+)(?P<title> \"[^\"]*\")?\)"
    r"|(?P<img><img\b[^>]*>)|(?P<attr>\b(?:src|href)=)\"(?P<value>[^\"]+)\"",
    re.S | re.M,
)  # fmt: skip


def runs_at_build(
    cell: object,  # a cell of nbdev's
    nbdev_rule: Callable[[object], bool | None] = nbdev.processors._do_eval,  # what nbdev would do
) -> bool:
    "Whether a cell is executed here: nbdev would run each one with an import in it, training too."
    if cell.cell_type != "code" or not cell.source or not nbdev_rule(cell):
        return False
    for_show_doc = cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}
    trees = [] if for_show_doc or "show_doc" in cell.source else cell.parsed_()
    return all(isinstance(tree, ast.Import | ast.ImportFrom) for tree in trees)


nbdev.processors._do_eval = runs_at_build


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


DOCUMENTED = {
    symbol.lower()
    for file in NOTEBOOKS
    for symbol in re.findall(r"show_doc\(([\w.]+)", (NBS / file).read_text())
}  # on their own: nbdev documents each class unasked, but not its methods


def page_of(
    source: Path,  # a notebook or a text
) -> str:  # its page on the site, such as endpoint/cache
    "Where a source is read."
    if source.suffix == ".ipynb":
        return NOTEBOOKS[source.relative_to(NBS).as_posix()]
    return TEXTS[source.relative_to(ROOT).as_posix()]


def page_named(
    path: str,  # a relative link, without its anchor
    source: Path,  # the file it stands in
) -> str | None:  # the page's name, or None for another kind of file
    "The page that a link means, if it means one."
    name = path.removesuffix(".html").removesuffix(".md")
    if path.endswith(".html") and name in {*NOTEBOOKS.values(), *TEXTS.values(), *MADE}:
        return name
    if name in MADE:
        return name
    if path.endswith((".ipynb", ".md")):
        file = place(path, source)
        known = file.suffix == ".ipynb" or file.relative_to(ROOT).as_posix() in TEXTS
        return page_of(file) if known else None
    return None


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
    if "." in anchor and anchor not in DOCUMENTED:
        anchor = anchor.partition(".")[0]
    if anchor.startswith("_"):  # nbdev links a private name too, which is documented nowhere
        anchor = ""
    anchor = anchor and f"#{anchor}"
    folder = os.path.dirname(page_of(source))
    if page := page_named(path, source):
        inside = os.path.relpath(page, folder or ".")
        return f"{SITE}/{page}.html{anchor}" if readme else f"{inside}.md{anchor}"
    file = place(path, source)
    inside = file.relative_to(ROOT).as_posix()
    if file.suffix not in PICTURES:
        return f"{CFG.git_url}/{'tree' if file.is_dir() else 'blob'}/{CFG.branch}/{inside}{anchor}"
    if readme:
        raw = CFG.git_url.replace("https://github.com", "https://raw.githubusercontent.com")
        return f"{raw}/{CFG.branch}/{inside}"
    (PAGES / inside).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, PAGES / inside)
    return os.path.relpath(inside, folder or ".")


def relink(
    text: str,  # Markdown
    source: Path,  # the file it comes from
    readme: bool,  # for README.md
) -> str:  # the same with its links resolved, code left as it is
    "The site shows no picture from another host, so that a page asks no one else for anything."

    def one(m: re.Match) -> str:
        if m["code"]:
            return m[0]
        if m["img"] and not readme and '="http' in m[0]:
            return (ALT.search(m[0]) or [0, "picture"])[1]
        if m["img"]:
            return re.sub(
                r'src="([^"]+)"', lambda s: f'src="{resolve(s[1], source, readme)}"', m[0]
            )
        if m["attr"]:
            return f'{m["attr"]}"{resolve(m["value"], source, readme)}"'
        to = resolve(m["target"], source, readme)
        if m["bang"] and not readme and "://" in to:
            return m["text"]
        text = LINK.sub(one, NESTED.sub(r"\1", m["text"]))
        return f"{m['bang']}[{text}]({to}{m['title'] or ''})"

    return LINK.sub(one, text)


def options(
    source: str,  # of a code cell
) -> dict[str, str]:  # such as {"echo": "false"}
    "The cell's `#|` options with a value."
    return dict(re.findall(r"^#\|\s*(\w+):\s*(\S+)\s*$", source, re.M))


def shown(
    cell: nbformat.NotebookNode,  # a code cell that stays
) -> nbformat.NotebookNode:  # the same as a reader sees it
    "No option lines, no progress bars, no style sheets in tables."
    wish = options(cell.source)
    if wish.get("output") == "false" or wish.get("include") == "false":
        cell.outputs = []
    bar = [o.output_type == "stream" and "\r" in "".join(o.text) for o in cell.outputs]
    cell.outputs = [o for o, is_bar in zip(cell.outputs, bar, strict=True) if not is_bar]
    for out in cell.outputs:
        if html := out.get("data", {}).get("text/html"):
            out.data["text/html"] = STYLE.sub("", "".join(html))
    hidden = wish.get("echo") == "false" or wish.get("include") == "false"
    lines = [] if hidden else [x for x in cell.source.splitlines() if not x.startswith("#|")]
    cell.source = "\n".join(lines).strip("\n")
    cell.metadata["transient"] = {"remove_source": hidden}
    return cell


def documented(
    cell: nbformat.NotebookNode,  # a show_doc call with its output
) -> tuple[int, str]:  # the symbol's line in the module, and Markdown
    "What show_doc wrote, each symbol with an anchor that links from other pages can use."
    text = "\n\n".join("".join(out.data["text/markdown"]) for out in cell.outputs)
    text = HEAD.sub(r"\2\n\n\1", ATTRS.sub(r"](\1)", text))
    line = LINE.search(text)
    text = SYMBOL.sub(lambda m: f"{m[1]} `{m[2]}` {{#{m[2].lower()}}}", text)
    return int(line[1]) if line else 0, text


def flatten(
    notebook: Path,  # a notebook that nbdev processed
    source: Path,  # the one it was made from
    readme: bool,  # for README.md
) -> nbformat.NotebookNode:  # plain Markdown and code cells
    "Front matter, documentation and directives as plain cells."
    nb, cells, symbols = nbformat.read(notebook, 4), [], []
    md = nbformat.v4.new_markdown_cell
    for cell in [*nb.cells, md("")]:
        if "#| output: asis" in cell.source:
            symbols.append(documented(cell))
            continue
        cells += [md(relink(text, source, readme)) for _, text in sorted(symbols)]
        symbols = []  # nbdev turns the symbols of one cell about, so they are sorted by line
        if cell.cell_type == "raw":  # front matter
            meta = yaml.safe_load(cell.source.strip().strip("-"))
            cells.append(md(f"# {meta['title']}\n\n{meta.get('description', '')}"))
        elif cell.cell_type == "code":
            cells.append(shown(cell))
        elif cell.source and not cell.source.startswith("<!-- WARNING"):
            cells.append(md(relink(cell.source, source, readme)))
    nb.cells, nb.metadata["language_info"] = cells, {"name": "python"}
    return nb


def rendered(
    source: Path,  # a notebook of nbs/
    readme: bool = False,  # for README.md
) -> tuple[str, dict[str, bytes]]:  # Markdown, and its figures by path
    "One page."
    name = page_of(source).rpartition("/")[2]
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / source.name
        process((source, done, nbdev.processors.FilterDefaults))
        nb = flatten(done, source, readme)
    where = IMAGES.relative_to(ROOT).as_posix() if readme else f"{name}_files"
    body, resources = MarkdownExporter().from_notebook_node(
        nb, {"unique_key": name, "output_files_dir": where}
    )
    if readme:  # figures of outputs have only now got a name; what does not exist yet is passed by
        raw = CFG.git_url.replace("https://github.com", "https://raw.githubusercontent.com")
        body = body.replace(f"]({where}/{name}_", f"]({raw}/{CFG.branch}/{where}/{name}_")
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", resources["outputs"]


def readme_files() -> dict[Path, bytes]:  # contents by path
    "README.md and the figures of index.ipynb's outputs, which are committed under nbs/images/."
    body, files = rendered(NBS / "index.ipynb", readme=True)
    files["README.md"] = (NOTE + body).encode()
    return {ROOT / path: data for path, data in files.items()}


def figures() -> list[Path]:
    "The committed figures of index.ipynb's outputs, an earlier version's among them."
    return sorted(IMAGES.glob("index_*"))


def check() -> int:
    "Say what in README.md is not as index.ipynb gives it."
    wanted = readme_files()
    wrong = [p for p, data in wanted.items() if not p.exists() or p.read_bytes() != data]
    wrong += [p for p in figures() if p not in wanted]
    for path in wrong:
        print(f"{path.relative_to(ROOT)} is not what nbs/index.ipynb gives: run `make docs`")
        if path.suffix == ".md" and path.exists():
            old, new = path.read_text().splitlines(), wanted[path].decode().splitlines()
            print("\n".join([*difflib.unified_diff(old, new, "there", "wanted", "", "", 1)][:40]))
    return 1 if wrong else 0


def made_pages() -> dict[str, str]:  # Markdown by name
    "The pages that are written from code."
    return {"commands": site_pages.commands_page(), "reference": site_pages.reference_page()}


def text_page(
    file: Path,  # Markdown of the repository
) -> str:
    "The same with its links resolved, and the modules drawn where it asks for them."
    text = relink(file.read_text(), file, readme=False)
    text = text.replace("<!-- picture of the house -->", site_pages.house_picture())
    return text.replace("<!-- table of the house -->", site_pages.house_table())


def build() -> int:
    "Write the pages, then README.md."
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir()
    for file, page in TEXTS.items():
        (PAGES / f"{page}.md").write_text(text_page(ROOT / file))
    for page, text in made_pages().items():
        (PAGES / f"{page}.md").write_text(text)
    shutil.copy(ROOT / "nbs/pages/extra.css", PAGES)
    for file, page in NOTEBOOKS.items():
        body, files = rendered(NBS / file)
        folder, name = (PAGES / page).parent, (PAGES / page).name
        for path, data in {f"{name}.md": body.encode(), **files}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    nav = yaml.safe_load(re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text()))["nav"]
    (PAGES / "llms.txt").write_text(site_pages.llms_txt(nav, PAGES, SITE))
    for path in figures():
        path.unlink()
    for path, data in readme_files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
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
