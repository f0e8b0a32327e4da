"""Files that somebody or something has spoiled: each ends in a right result, or in one sentence.

A kind of file has sound examples and a command that reads them. A mutation changes a value, a type,
a name or the nesting, or tears, flips and re-encodes bytes. Whatever comes out, the command ends
with status 0 and a result that holds, or with status 2 and one sentence; never in a traceback.

To add a kind of file, write its examples, its command and what must hold of a result, and put a
`Kind` into KINDS. A mutation is named by its kind and number, and is the same in every run.
"""

import copy
import csv
import functools
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alpagasus2 import cli
from alpagasus2.cli import main
from alpagasus2.core.files import read_jsonl
from alpagasus2.data import load_examples, load_questions
from alpagasus2.evidence.answers import is_right
from alpagasus2.scale import rows
from alpagasus2.scale.engine import Blocks

IN_ALL = 2000  # mutations over all kinds of files
ROWS = [
    {"id": f"r{n}", "instruction": f"Name colour {n}, please.", "input": "", "output": "Blüe €."}
    for n in range(4)
]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Héllo!"}]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Héllo!"}]


# --- what is done to a value ----------------------------------------------------------------------
def deep(levels: int) -> Any:
    value: Any = "x"
    for n in range(levels):
        value = [value] if n % 2 else {"a": value}
    return value


WILD: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: -1, lambda: 2**70, lambda: 1.5,
    lambda: float("nan"), lambda: float("-inf"), lambda: 10**300, lambda: "", lambda: " \n\t",
    lambda: "\ud83d", lambda: "\x00", lambda: "word " * 30_000, lambda: "=1+1", lambda: "../../up",
    lambda: "/outside", lambda: "$x^{$", lambda: "nan", lambda: "1e999", lambda: "²", lambda: [],
    lambda: {}, lambda: ["a"], lambda: {"a": 1}, lambda: [None], lambda: [[]], lambda: "null",
    lambda: deep(90), lambda: deep(400), lambda: {"text": "a"}, lambda: "<|im_end|>",
    lambda: [{"type": "image", "url": "x"}], lambda: [{"type": "text", "text": "a"}],
]  # fmt: skip
NAMES = (
    "", "ID", "Instruction", "messages", "conversations", "chosen", "rejected", "label", "text",
    "turns", "instances", "prompt", "system", "input", "context", "score", "row", "vote",
    "dimension", "category", "test_set", "answer", "question_id", "\ud83d", "data",
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value within a value."""
    yield path
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(below, (*path, key))


def changed(value: Any, draw: random.Random) -> Any:
    """A copy with one value, name or element changed."""
    value = copy.deepcopy(value)
    path = draw.choice([*places(value)])
    if not path:
        return draw.choice(WILD)()
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    kind = draw.choice(("wild", "wild", "wild", "gone", "twice", "renamed"))
    if kind == "gone":
        del holder[path[-1]]
    elif kind == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[path[-1]]))
    elif kind == "renamed" and isinstance(holder, dict):
        holder[draw.choice(NAMES)] = holder.pop(path[-1])
    else:
        holder[path[-1]] = draw.choice(WILD)()
    return value


# --- how it is written ----------------------------------------------------------------------------
def as_table(value: Any, delimiter: str) -> str:
    """Rows as CSV; what is no row is a row of one cell."""
    rows = value if isinstance(value, list) else [value]
    rows = [r if isinstance(r, dict) else {"instruction": r} for r in rows]
    names = list(dict.fromkeys(str(k) for r in rows for k in r))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, delimiter=delimiter, escapechar="\\")
    writer.writeheader()
    writer.writerows([{str(k): v for k, v in r.items()} for r in rows])
    return out.getvalue()


def as_lines(value: Any) -> str:
    return "\n".join(map(json.dumps, value if isinstance(value, list) else [value]))


WRITERS: dict[str, Callable[[Any], str]] = {
    ".json": json.dumps,
    ".jsonl": as_lines,
    ".NDJSON": as_lines,
    ".csv": lambda value: as_table(value, ","),
    ".tsv": lambda value: as_table(value, "\t"),
}


def readable(text: str) -> str:
    """The same JSON with its letters as they are, so that encodings matter."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except ValueError:
        return text


# --- what is done to bytes ------------------------------------------------------------------------
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "latin1", "cp1251", "utf-7")


def torn(data: bytes, draw: random.Random) -> bytes:
    """The bytes cut, flipped, lengthened or without a piece."""
    at = draw.randrange(len(data) + 1)
    end = min(len(data), at + draw.randint(1, 40))
    noise = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
    return draw.choice(
        (data[:at], data[:at] + noise + data[at:], data[:at] + noise + data[end:],
         data[:at] + data[end:], data + noise, data + data, b"", b"\x00" * 40 + data)
    )  # fmt: skip


def spoiled(value: Any, draw: random.Random, endings: Sequence[str]) -> tuple[str, bytes]:
    """An ending and the bytes of a mutation."""
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        value = changed(value, draw)
    ending = draw.choice(endings)
    text = WRITERS[ending](value)
    text = readable(text) if draw.random() < 0.5 else text
    encoding = draw.choice(("utf-8",) * 8 + ENCODINGS)
    data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf-8") else "replace")
    data = torn(data, draw) if draw.random() < 0.3 else data
    if draw.random() < 0.1:
        packed = gzip.compress(data)
        return f"{ending}.gz", torn(packed, draw) if draw.random() < 0.5 else packed
    return ending, data


# --- kinds of files -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """A kind of file: sound examples, the command that reads it, and what holds of its result."""

    examples: tuple[Any, ...]
    command: Callable[[Path, Path], list[str]]  # of the file, and of a path for the result
    holds: Callable[[Path, int], None]  # asserts of the result (need not be there) and the status
    endings: tuple[str, ...] = tuple(WRITERS)
    in_ci: int = 28  # mutations in CI; fewer of what takes half a second


def strict(path: Path) -> Any:
    """JSON as any other tool would read it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def good_rows(path: Path, status: int) -> None:
    """What was written can be read again, whole and unchanged."""
    if not path.exists():
        assert status == 2
        return
    if written := strict(path):
        rows, problems = load_examples(path)
        assert rows == written and not problems


def one_known_row(path: Path, status: int) -> None:
    """One of the rows was kept, or none."""
    assert path.exists() == (status == 0)
    if path.exists():
        (row,) = strict(path)
        assert row in ROWS


def nothing(path: Path, status: int) -> None:
    """A dry run leaves nothing."""
    assert not path.exists()


def rated_rows(path: Path, status: int) -> None:
    """Every row has a line, whatever stood there before."""
    if status == 0:
        lines = read_jsonl(next(path.parent.glob("file.jsonl*")))
        assert {row["id"] for row in ROWS} <= {line.get("id") for line in lines}


def checkable(path: Path, status: int) -> None:
    """A dry run leaves nothing, and any response can be held to the answers of its questions."""
    nothing(path, status)
    for q in load_questions(next(path.parent.glob("file.*"))) if status == 0 else ():
        for text in ("", "The answer is 2, not é.", "A") if "answer" in q else ():
            assert is_right(q["answer"], text) in (True, False)


def page(folder: Path, status: int) -> None:
    """A page and its figures, or neither."""
    results = folder / "results.json"
    assert results.exists() == (folder / "index.html").exists()
    assert status == 2 or strict(results)["pooled"]


def check(file: Path, out: Path) -> list[str]:
    return ["check", str(file), "--output", str(out)]


def select(file: Path, out: Path) -> list[str]:
    return ["select", "--data", str(file), "--random_k", "1", "--output", str(out)]


def select_by_scores(file: Path, out: Path) -> list[str]:
    rows = out.with_name("rows.json")
    rows.write_text(json.dumps(ROWS))
    words = ["--scores", str(file), "--top_k", "1", "--output", str(out)]
    return ["select", "--data", str(rows), *words]


def ask(file: Path, out: Path) -> list[str]:
    words = ["--base_model", "none", "--output", str(out), "--dry_run"]
    return ["generate", "--questions", str(file), *words]


def judge(file: Path, out: Path) -> list[str]:
    words = ["--model", "none", "--base_url", "http://127.0.0.1:9", "--output", str(out)]
    return ["judge", "--responses", str(file), *words, "--dry_run"]


def plan(file: Path, out: Path) -> list[str]:
    """A recipe in YAML, of which JSON is a part, about rows that are there."""
    rows = file.with_name("rows.json")
    rows.write_text(json.dumps(ROWS))
    file.write_bytes(file.read_bytes().replace(b"ROWS", str(rows).encode()))
    return ["run", str(file), "--output_dir", str(out), "--dry_run"]


def rate_on(file: Path, out: Path) -> list[str]:
    """Ratings go on in the file itself; who answers is `_quick`'s."""
    rows = out.with_name("rows.json")
    rows.write_text(json.dumps(ROWS))
    words = ["--model", "m", "--base_url", "http://127.0.0.1:9", "--engine", "ray"]
    return ["rate", "--data", str(rows), "--output", str(file), *words]


def report(file: Path, out: Path) -> list[str]:
    return ["report", "--judgments", str(file), "--output", str(out)]


def label(file: Path, out: Path) -> list[str]:
    judged = file.with_name("judgments.jsonl")
    judged.write_text(as_lines(JUDGMENTS[0]))
    return [*report(judged, out), "--labels", str(file)]


def show(file: Path, out: Path) -> list[str]:
    judged = file.with_name("judgments.jsonl")
    judged.write_text(as_lines(JUDGMENTS[0]))
    return [*report(judged, out), "--responses", str(file)]


DATA = (
    ROWS,
    [{**r, "category": "maths", "flaw": None, "score": 2.5, "tags": ["a"]} for r in ROWS],
    [{"messages": TALK}, {"messages": None, **ROWS[0]}],
    [{"id": 7, "messages": [{"role": "system", "content": [{"type": "text", "text": "A"}]}, *TALK]},
     ROWS[1]],
    [{"conversations": SAID, "system": "Be kind."}, {"conversations": ["Hi", "Héllo!"]}],
    [{"instruction": "Sum up.", "context": "Facts.", "response": "Few."}],
    [{"prompt": TALK[:1], "completion": TALK[1:]}, {"question": "a", "answer": "b"}],
    [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"label": False, "messages": TALK}],
    {"version": 1, "data": ROWS},
    [{"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi"},
     {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Héllo!", "rank": 0}],
    [{"prompt": {"text": "Hi", "role": "prompter", "replies": [
        {"text": "Héllo!", "role": "assistant", "rank": 0, "replies": []}]}}],
)  # fmt: skip
SCORES = (
    [{"id": r["id"], "score": n} for n, r in enumerate(ROWS)],
    [{"row": n, "score": n / 2} for n in range(4)],
    [{"id": r["id"], "dimension": "accuracy", "vote": v, "score": v, "status": "ok"}
     for r in ROWS for v in (0, 1)],
)  # fmt: skip
QUESTIONS = (
    [{"id": n, "test_set": "my", "category": "maths", "instruction": f"{n}+2?", "reference": "é",
      "answer": {"type": "number", "value": n + 2}} for n in range(3)],
    [{"instruction": "Which?", "answer": {"type": "choice", "value": "b", "options": ["a", "b"]}},
     {"instruction": "Say é.", "answer": {"type": "contains", "value": "é"}}],
    [{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "reference": ["a"]}],
    [{"question_id": "a", "turns": [{"content": "Usé ABC"}], "cluster": "A"}],
    [{"uid": "9", "prompt": "Do.", "category": "hard"}, {"question_id": 1, "text": "Hi"}],
    [{"id": "t", "instruction": "Do.", "instances": [{"input": "This", "output": "OK"}]},
     {"idx": 1, "Skill": "Math", "Instruction": "1+1?"}],
)  # fmt: skip
RESPONSES = (
    [{"id": f"q{n}", "test_set": "my", "category": "maths", "instruction": "1+1?", "input": "",
      "model": model, "replicate": 0, "response": "Zwéi", "finish_reason": "stop",
      "prompt_tokens": 9, "response_tokens": 3} for model in ("a", "b") for n in range(2)],
)  # fmt: skip
JUDGMENTS = (
    [{"id": f"q{n}", "test_set": "my", "category": "maths", "instruction": f"{n}+1?", "input": "",
      "model_a": "a", "model_b": "b", "replicate": 0, "vote": 0, "first": first,
      "response_a": "Zwéi", "response_b": "Drei", "score_a": 8.0, "score_b": 5.0 + n,
      "protocol": "pair", "verdict": "a", "review": "8 5", "status": "ok",
      "judge": {"model": "m", "prompt_version": "pair-1"}, "usage": {"usd": 0.01}}
     for n in range(2) for first in ("a", "b")],
    [{"id": "q0", "test_set": "my", "instruction": "1+1?", "input": "", "model_a": "a",
      "model_b": "b", "first": first, "response_a": "2", "response_b": "3", "verdict": verdict,
      "status": status} for first, verdict, status in (("a", "tie", "ok"), ("b", None, "refused"))],
)  # fmt: skip
RATINGS = (
    [{"id": r["id"], "dimension": "accuracy", "vote": 0, "score": 4.5, "review": "4.5 – è",
      "status": status, "rater": {"kind": "llm", "model": "m", "prompt_version": "accuracy-1"},
      "usage": {"prompt_tokens": 9, "completion_tokens": 2, "usd": 0.01}}
     for r, status in zip(ROWS, ("ok", "ok", "error"), strict=False)],
)  # fmt: skip
LABELS = (
    {"page": "x", "sample": {"seed": 0}, "skipped": [], "labels": [
        {"id": f"q{n}", "test_set": "my", "model_a": "a", "model_b": "b", "replicate": 0,
         "label": label} for n, label in enumerate(("a", "tie"))]},
    {"labels": [{"id": "q0", "test_set": "my", "model_a": "b", "model_b": "a", "label": "b"}],
     "skipped": [{"id": "q1", "test_set": "my", "model_a": "a", "model_b": "b"}]},
)  # fmt: skip
RECIPES = (
    {"base_model": "smollm2-135m", "preset": "quickstart", "data": "ROWS",
     "rater": {"kind": "flaws"}, "replicates": 1, "questions": ["sample_questions"],
     "arms": {"filtered": {"select": "top_k", "rows": 2},
              "random": {"select": "random_k", "rows": 2}},
     "judge": {"backend": "local"}, "margin": 0.05},
    {"base_model": "smollm2-135m", "data": "ROWS", "questions": ["sample_questions"],
     "rater": {"kind": "superfiltering"}, "train": {"num_epochs": 1, "batch_size": 2},
     "arms": {"random": {"select": "random_k", "rows": 2},
              "longest": {"select": "longest_k", "rows": 2}},
     "judge": {"backend": "local"}},
)  # fmt: skip
KINDS = {
    "rows": Kind(DATA, check, good_rows),
    "pool": Kind(DATA, select, good_rows),
    "scores": Kind(SCORES, select_by_scores, one_known_row),
    "questions": Kind(QUESTIONS, ask, checkable),
    "responses": Kind(RESPONSES, judge, nothing, (".jsonl",)),
    "ratings resumed with ray": Kind(RATINGS, rate_on, rated_rows, (".jsonl",)),
    "judgments": Kind(JUDGMENTS, report, page, (".jsonl",), in_ci=8),
    "labels": Kind(LABELS, label, page, (".json",), in_ci=8),
    "shown": Kind(RESPONSES, show, page, (".jsonl",), in_ci=6),
    "recipes": Kind(RECIPES, plan, nothing, (".json",), in_ci=10),
}


# --- words of the command line --------------------------------------------------------------------
WORDS = (
    "", " ", "nan", "inf", "-inf", "1e999", "-5", "0", "-0.5", "1.5", "2", "9" * 30, "²", "true",
    "null", "[]", "{}", "[1", "{a: 1}", "a=b", "=", "../up", "/dev/null/x", "\x00", "\ud83d",
    "=1+1", "word " * 3000, "--", "--limit", "rows.json", ".",
)  # fmt: skip
NUMBERS = ("limit", "seed", "top_k", "low", "high", "temperature", "max_cost", "cutoff_len",
           "learning_rate", "batch_size", "rows", "mean_tokens", "replicate", "prompts", "runs",
           "effect", "spread", "quantile", "max_wait", "columns", "protocol", "select")  # fmt: skip
HERE = ["--base_url", "http://127.0.0.1:9", "--dry_run"]
COMMANDS = (
    ["check", "rows.json", "--output", "out.json"],
    ["select", "--data", "rows.json", "--random_k", "2", "--seed", "1", "--output", "out.json"],
    ["rate", "--data", "rows.json", "--model", "m", "--output", "out.jsonl", "--limit", "2", *HERE],
    ["generate", "--questions", "vicuna", "--base_model", "m", "--output", "out.jsonl", *HERE],
    ["judge", "--responses", "said.jsonl", "--model", "m", "--output", "out.jsonl", *HERE],
    ["estimate", "--base_model", "llama-2-7b", "--rows", "9", "--device", "T4"],
    ["plan", "--effect", "0.05", "--prompts", "80", "--runs", "3"],
)


def misspelt(words: Sequence[str], draw: random.Random) -> list[str]:
    """The words with some of them changed, left out, said twice, or an option more."""
    words = list(words)
    for _ in range(draw.choice((1, 1, 1, 2))):
        at = draw.randrange(1, len(words)) if len(words) > 1 else 0
        words[at : at + 1] = draw.choice(
            ([draw.choice(WORDS)], [], [words[at]] * 2, [words[at][:-1]],
             [words[at], f"--{draw.choice(NUMBERS)}", draw.choice(WORDS)])
        )  # fmt: skip
    return words


# --- the tests ------------------------------------------------------------------------------------
def answered(blocks: Blocks, *given: object, **named: object) -> Iterator[dict]:
    """In the place of `spread_over`: a reply to every question."""
    for number in range(len(blocks)):
        for item in blocks.read(number):
            yield {"line": item["line"], "reply": {"text": "4.5\nGood."}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsers are the same in every call; without Ray, an endpoint answers at once."""
    monkeypatch.setattr(cli, "build_parser", functools.cache(cli.build_parser))
    monkeypatch.setattr(rows, "spread_over", answered)


def ended(words: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Status and last line on standard error; an error that is no sentence goes through."""
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as e:
        status = int(e.code or 0)
    said = capsys.readouterr().err.rstrip("\n")
    return status, said.rsplit("\nalpagasus2: ", 1)[-1]


def met(name: str, number: int, folder: Path, capsys: pytest.CaptureFixture) -> int:
    """Meet one mutation; its status."""
    kind, draw = KINDS[name], random.Random(f"{name} {number}")
    ending, data = spoiled(draw.choice(kind.examples), draw, kind.endings)
    folder.mkdir()
    file, out = folder / f"file{ending}", folder / "result.json"
    file.write_bytes(data)
    status, said = ended(kind.command(file, out), capsys)
    assert status in (0, 2), said
    sentence = said.strip() and "\n" not in said.strip() and len(said) < 3000
    assert status == 0 or sentence, f"not one line: {said}"
    kind.holds(out, status)
    return status


def meet_all(name: str, numbers: range, folder: Path, capsys: pytest.CaptureFixture) -> None:
    failed, statuses = [], set()
    for number in numbers:
        try:
            statuses.add(met(name, number, folder / str(number), capsys))
        except Exception as e:
            failed.append(f"{name} {number}: {type(e).__name__}: {e}"[:300])
    assert not failed, f"{len(failed)} of {len(numbers)}:\n" + "\n".join(failed[:20])
    assert statuses == {0, 2}, "mutations that all end alike test nothing"


@pytest.mark.parametrize("name", KINDS)
def test_a_spoiled_file_ends_in_a_result_or_a_sentence(name, tmp_path, capsys):
    meet_all(name, range(KINDS[name].in_ci), tmp_path, capsys)


def meet_words(numbers: range, capsys: pytest.CaptureFixture) -> None:
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("said.jsonl").write_text(as_lines(RESPONSES[0]))
    failed, statuses = [], set()
    for number in numbers:
        draw = random.Random(f"arguments {number}")
        words = misspelt(draw.choice(COMMANDS), draw)
        try:
            status, said = ended(words, capsys)
            assert status in (0, 2), said
            assert status == 0 or (said.strip() and "\n" not in said.strip()), said
            statuses.add(status)
        except Exception as e:
            failed.append(f"{number}: {words}: {type(e).__name__}: {e}"[:300])
    assert not failed, f"{len(failed)} of {len(numbers)}:\n" + "\n".join(failed[:20])
    assert statuses == {0, 2}, "mutations that all end alike test nothing"


def test_wrong_words_end_in_a_result_or_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    meet_words(range(30, 80), capsys)


@pytest.mark.slow
def test_many_wrong_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    meet_words(range(100, 400), capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_spoiled_files(name, tmp_path, capsys):
    first = KINDS[name].in_ci
    meet_all(name, range(first, first + IN_ALL // len(KINDS)), tmp_path, capsys)


@pytest.mark.parametrize("name", KINDS)
def test_sound_files_are_read(name, tmp_path, capsys):
    kind = KINDS[name]
    for n, example in enumerate(kind.examples):
        (tmp_path / str(n)).mkdir()
        ending, out = kind.endings[0], tmp_path / str(n) / "result.json"
        file = tmp_path / str(n) / f"file{ending}"
        file.write_text(WRITERS[ending](example))
        status, said = ended(kind.command(file, out), capsys)
        assert status == 0 or "preference" in said or "have a problem" in said, said
        kind.holds(out, status)
