"""The pages that are made from code: commands, reference, the picture of the rooms, llms.txt.

build_docs.py calls these; each is a pure function from the repository to text, so that a page
cannot say something else than the parser, the modules or the table of rooms.
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
PACKAGE = ROOT / "alpagasus2"


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
    if action.required or not action.option_strings:
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


def option_rows(
    parser: Any,  # of one sub-command
) -> Iterator[str]:
    "One line of the table for each option."
    for action in parser._actions:
        if action.dest in ("help", "config", "print_config"):
            continue
        name = next(iter(action.option_strings), action.dest)
        kind = type_text(getattr(action, "_typehint", None) or action.type or str)
        kind = f"list of {kind}" if action.nargs == "+" else kind
        yield f"| `{name}` | {cell(action.help)} | {cell(kind)} | {cell(default_text(action))} |"


def commands_page() -> str:
    "The command reference, from the parsers themselves."
    from alpagasus2.cli import COMMANDS, POSITIONAL, build_parser

    page = [
        "# Commands\n\nEvery option of every command, written from the parsers when this site was "
        "built. `--config FILE.yaml` reads options from a file and `--print_config` prints them "
        "all, everywhere. A user's mistake is one sentence and exit status 2; Ctrl-C is 130.\n"
    ]
    for name, (function, _) in COMMANDS.items():
        first = f" {POSITIONAL[name].upper()}" if name in POSITIONAL else ""
        rows = list(option_rows(build_parser(name)))
        table = ["| option | what it is | type | default |", "|---|---|---|---|", *rows]
        page.append(f"## alpagasus2 {name} {{#{name}}}\n\n{function.__doc__}\n")
        page.append(f"```\nalpagasus2 {name}{first} [options]\n```\n")
        page.append("\n".join(table) + "\n" if rows else "It has no options.\n")
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


def room_title(
    module: Path,  # a module of the package
) -> str:
    "The module's docstring, which is its notebook's subtitle."
    return ast.get_docstring(ast.parse(module.read_text())) or ""


def reference_page(
    rooms: list[str],  # names of the modules, in the order of the notebooks
) -> str:
    "Every public function and class, each linked to its signature, types and source."
    page = [
        "# API reference\n\nEvery public function and class. Its name leads to its signature, with "
        "types, a comment for each parameter, and a link to the source; the cells around it show "
        "it at work.\n"
    ]
    for room in rooms:
        if symbols := public_symbols(PACKAGE / f"{room}.py"):
            page.append(f"## alpagasus2.{room}\n\n{room_title(PACKAGE / f'{room}.py')}\n")
            page.append("| name | what it does |\n|---|---|")
            page += [f"| [`{n}`]({room}.md#{n.lower()}) | {cell(d)} |" for n, d in symbols]
            page.append("")
    return "\n".join(page)


# --- the rooms ---------------------------------------------------------------------------------
def rooms_table() -> tuple[dict[str, set[str]], set[str]]:
    "Which room may import which, and those that load no torch: what tests/test_imports.py holds."
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tests" / "test_imports.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = {room: set(above.split()) for room, above in module.MAY_IMPORT.items()}
    built = {room for room in table if (PACKAGE / f"{room}.py").exists()}
    return {r: table[r] & built for r in table if r in built}, set(module.LIGHT) & built


def direct(
    table: Mapping[str, set[str]],  # room -> what it may import
) -> dict[str, set[str]]:  # the same without what follows
    "Only the arrows that no chain of other arrows implies; the others would hide the order."
    reach: dict[str, set[str]] = {}
    for room, above in table.items():
        reach[room] = above.union(*(reach[a] for a in above))
    return {r: above - set().union(*(reach[a] for a in above)) for r, above in table.items()}


def levels(
    table: Mapping[str, set[str]],  # room -> what it may import
) -> dict[str, int]:  # room -> row, 0 on top
    "Each room stands as low as those that import it allow, so near to them."
    below: dict[str, int] = {}
    for room in reversed(table):
        users = [below[u] for u in table if room in table[u]]
        below[room] = 1 + max(users, default=-1)
    return {room: max(below.values()) - n for room, n in below.items()}


WIDTH, BOX, HIGH, STEP = 880, 88, 30, 84  # of the picture, a room's box, and from row to row


def places(
    table: Mapping[str, set[str]],  # room -> what it may import
) -> dict[str, tuple[float, float]]:  # the middle of each box
    "Rows by level; within a row, each room as near as may be to what it imports."
    depth, found = levels(table), dict[str, tuple[float, float]]()
    for level in range(max(depth.values()) + 1):
        row = [r for r in table if depth[r] == level]

        def wish(room: str) -> float:
            xs = [found[a][0] for a in direct(table)[room]]
            return sum(xs) / len(xs) if xs else 0

        row.sort(key=wish)
        gap = WIDTH / len(row)
        for i, room in enumerate(row):
            found[room] = (gap * (i + 0.5), 24 + level * STEP)
    return found


def rooms_picture() -> str:
    "The rooms as SVG in the colours of the page, light or dark."
    table, light = rooms_table()
    table = {room: above for room, above in table.items() if room != "runs"}
    at = places(table)
    shapes = []
    for room, above in direct(table).items():
        x, y = at[room]
        for a in sorted(above):
            ax, ay = at[a]
            y1, y2 = ay + HIGH / 2, y - HIGH / 2
            bend = (y2 - y1) / 2
            path = f"M{ax:.0f},{y1:.0f} C{ax:.0f},{y1 + bend:.0f} {x:.0f},{y2 - bend:.0f}"
            shapes.append(f'<path class="arrow" d="{path} {x:.0f},{y2:.0f}"/>')
    for room, (x, y) in at.items():
        kind = "light" if room in light else "heavy"
        shapes.append(
            f'<a href="{room}.html"><rect class="{kind}" x="{x - BOX / 2:.0f}" '
            f'y="{y - HIGH / 2:.0f}" width="{BOX}" height="{HIGH}" rx="6"/>'
            f'<text x="{x:.0f}" y="{y + 4:.0f}">{room}</text></a>'
        )
    height = max(y for _, y in at.values()) + HIGH
    style = (
        ".rooms text{font:13px sans-serif;text-anchor:middle;fill:currentColor}"
        ".rooms rect{stroke:#0072b2;fill:color-mix(in srgb,#0072b2 15%,var(--md-default-bg-color))}"
        ".rooms rect.heavy{stroke:#d55e00;"
        "fill:color-mix(in srgb,#d55e00 15%,var(--md-default-bg-color))}"
        ".rooms .arrow{fill:none;stroke:currentColor;opacity:.35}"
    )
    return (
        f'<div class="scroll"><svg class="rooms" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="The rooms and what each imports"><style>{style}</style>'
        + "".join(shapes)
        + "</svg></div>"
    )


def rooms_list() -> str:
    "The whole table: every room, what it does, and all that it may import."
    table, light = rooms_table()
    lines = ["| room | what happens in it | may import | torch |", "|---|---|---|---|"]
    for room, above in table.items():
        names = ", ".join(a for a in table if a in above and a != "runs") or "–"
        title, torch = cell(room_title(PACKAGE / f"{room}.py")), "no" if room in light else "yes"
        lines.append(f"| [{room}]({room}.md) | {title} | {names} | {torch} |")
    return "\n".join(lines)


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


def llms_txt(
    nav: list,  # of mkdocs.yml
    pages: Path,  # the folder with the Markdown pages
    site: str,  # the site's address
) -> str:
    "The site in one text file for a language model, in the form of llmstxt.org."
    lines = ["# alpagasus2\n\n> Train a better model with fewer data on one GPU, and prove it.\n"]
    loose = [x for x in nav if isinstance(x, str)]
    for heading, files in [("Pages", loose)] + [
        (k, v) for x in nav if isinstance(x, Mapping) for k, v in x.items()
    ]:
        lines.append(f"## {heading}\n")
        for file in files:
            title, text = first_words((pages / file).read_text())
            lines.append(f"- [{title}]({site}/{file.removesuffix('.md')}.html): {text}")
        lines.append("")
    return "\n".join(lines)
