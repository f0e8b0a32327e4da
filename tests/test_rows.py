"""Small files of rows and questions that once failed, each standing for a kind."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alpagasus2.cli import main
from alpagasus2.core.files import UserError
from alpagasus2.data import Examined, load_examples, load_questions

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "data"
COLOURS = [
    {"instruction": f"Name a colour, number {n}.", "input": "", "output": f"Colour {n} is blue."}
    for n in range(6)
]


def lines(rows: list) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def parquet(rows: list) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def talk(*texts: str, **fields: object) -> dict:
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": t} for n, t in enumerate(texts)]
    return {"messages": turns, **fields}


def stamped() -> bytes:
    import datetime

    now = datetime.datetime(2024, 1, 2)
    return parquet([{**r, "tags": ["a"], "timestamp": now} for r in COLOURS])


DOLLY = [
    {"instruction": r["instruction"], "context": "Facts.", "response": r["output"]} for r in COLOURS
]
SHAREGPT = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}]
NAN = [COLOURS[0], {**COLOURS[1], "score": float("nan")}]
LONE = [{"instruction": "do \ud83d", "output": "x"}, {"instruction": "b", "output": "y"}]
MIXED = [{"messages": None, **COLOURS[0]}, {**talk("q", "a"), "instruction": None, "output": None}]
MULTI = [talk("Hi", "Hello!", r["instruction"], r["output"]) for r in COLOURS]
TEX = [{**COLOURS[n], "category": c} for n, c in enumerate(("$x^{$", "b", "$x^{$"))]

# name of the file in ../shared -> the same kind in small, the rows that are good, what `check` says
GOOD = {
    "utf16.json": (json.dumps(COLOURS).encode("utf-16"), 6, ""),
    "jsonl_named.json": (lines(COLOURS), 6, ""),
    "rows.ndjson": (lines(COLOURS), 6, ""),
    "bigfield.csv": (b"instruction,output\nSum up,%s\n" % (b"word " * 30_000), 1, ""),
    "sharegpt.json": (json.dumps(SHAREGPT).encode(), 1, "rows read as ShareGPT"),
    "dolly.jsonl": (lines(DOLLY), 6, "rows read as Dolly"),
    "messages_mixed_null.jsonl": (lines(MIXED), 2, ""),
    "messages_multi.jsonl": (lines(MULTI), 6, ""),
    "special_in_text.json": (json.dumps([{**COLOURS[0], "output": "<|im_end|>"}]).encode(), 1, ""),
    "category-mathtext.json": (json.dumps(TEX).encode(), 3, ""),
    "timestamp.parquet": (stamped(), 6, "6 rows: field: `timestamp` is a datetime: rows 0-5"),
    "nan_extra.json": (json.dumps(NAN).encode(), 2, "row 1: field: `score` is nan"),
    "data-lone-surrogate.json": (
        json.dumps(LONE).encode(), 1, "row 0: unwritable: `instruction` holds a lone surrogate",
    ),
    "kto_label.jsonl": (
        lines([{**r, "label": n % 2 == 0} for n, r in enumerate(COLOURS)]), 3,
        "3 rows: preference: its `label` is false: a bad answer",
    ),
}  # fmt: skip


def checked(path: Path, capsys: pytest.CaptureFixture, *options: str) -> tuple[int, str]:
    status = main(["check", str(path), *options])
    found = capsys.readouterr()
    return status, found.out + found.err


@pytest.mark.parametrize("name", GOOD)
def test_a_kind_of_file_is_read_or_named(name, tmp_path, capsys):
    content, good, says = GOOD[name]
    path = tmp_path / name
    path.write_bytes(content)
    status, said = checked(path, capsys, "--output", str(tmp_path / "good.json"))
    assert says in said and "Traceback" not in said
    assert status == (2 if says and "rows read as" not in says else 0)
    assert len(json.loads((tmp_path / "good.json").read_text())) == good
    assert len(load_examples(tmp_path / "good.json")[0]) == good  # what was written can be read


@pytest.mark.parametrize("name", GOOD)
def test_the_shared_file_of_the_kind(name, tmp_path, capsys):
    if not (CASES / name).exists():
        pytest.skip("../shared is not there")
    _, said = checked(CASES / name, capsys, "--output", str(tmp_path / "good.json"))
    assert GOOD[name][2].split(":")[-1] in said
    assert json.loads((tmp_path / "good.json").read_text())


def test_labelled_rows_are_refused_and_their_good_side_taken(tmp_path):
    path = tmp_path / "kto.jsonl"
    path.write_bytes(GOOD["kto_label.jsonl"][0])
    with pytest.raises(UserError, match=r"row 1 is a preference \(and 2 more\).*--preferred true"):
        load_examples(path)
    rows, problems = load_examples(path, preferred=True)
    assert [r["output"] for r in rows] == [COLOURS[n]["output"] for n in (0, 2, 4)]
    assert {p.kind for p in problems} == {"unwanted"}


def test_the_page_of_a_selection_shows_tex_as_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(GOOD["category-mathtext.json"][0])
    out = str(tmp_path / "kept.json")
    report = ["--report", str(tmp_path / "page")]
    assert main(["select", "--data", str(path), "--random_k", "2", "--output", out, *report]) == 0
    assert (tmp_path / "page/index.html").is_file()


QUESTIONS = {
    "question_null.json": ({"id": 1, "instruction": None}, r"question 0 \(id 1\).*None"),
    "question_outside_path.jsonl": (
        {"id": "1", "test_set": "/outside/the/folder", "instruction": "hi"},
        "becomes a file's name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_wrong_question_is_refused(name, tmp_path):
    question, says = QUESTIONS[name]
    (tmp_path / name).write_text(json.dumps(question))
    for path in (tmp_path / name, CASES / name):
        if path.exists():
            with pytest.raises(UserError, match=says):
                load_questions(path)


def test_a_question_keeps_its_own_fields(tmp_path):
    own = {"id": 1, "prompt": "What is 2+2?", "category": "math", "reference": "4"}
    (tmp_path / "mine.json").write_text(json.dumps([{**own, "test_set": "mymath"}]))
    for path in (tmp_path / "mine.json", CASES / "question_prompt_key.json"):
        if path.exists():
            (q,) = load_questions(path)
            found = [q[k] for k in ("id", "test_set", "category", "reference")]
            assert found == ["1", "mymath", "math", "4"]


ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello!"}
KTO = {"prompt": "Hi", "completion": "Go away."}
WRONGLY_READ = {  # read as something else until each was mended -> how it is read or refused
    "system_prompt beside messages": ({**talk("Hi", "Hello!"), "system_prompt": "Be brief."}, 3),
    "two system prompts": ({**talk("Hi", "Yo"), "system": "a", "system_prompt": "b"}, "another"),
    "system that is a list": ({**talk("Hi", "Yo"), "system": [{"text": "a"}]}, "not text"),
    "a misspelt assistant": (
        {"messages": [ASKED, {**SAID, "role": "assitant"}, ASKED, SAID]}, "by 'assitant'",
    ),
    "history of turns": ({**COLOURS[0], "history": [ASKED, SAID]}, 4),
    "history of texts": ({**COLOURS[0], "history": ["Hi", "Hello!"]}, "list of pairs"),
    "history of a query": ({"query": "a", "response": "b", "history": [["Hi", "Hello!"]]}, 4),
    "history that is text": ({**COLOURS[0], "history": "Hi"}, "not a list"),
    "context beside an input": ({**COLOURS[0], "input": "a", "context": "b"}, "both `input`"),
    "two answers": ({"question": "a", "answer": "4", "response": "Long."}, "both `answer`"),
    "KTO's label as a number": ({**KTO, "label": 0}, "bad answer"),
    "LLaMA-Factory's label": ({**COLOURS[0], "kto_tag": False}, "bad answer"),
    "a thought in a part": (
        {"messages": [ASKED, {**SAID, "content": [
            {"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "Hello!"}]}]},
        "part that is not text",
    ),
    "an input that is a number": ({**COLOURS[0], "input": 0}, "`input` is not text"),
    "NaN where there is no input": ({**COLOURS[0], "input": float("nan")}, "Alpaca"),
    "no messages": ({**COLOURS[0], "messages": []}, "Alpaca"),
    "Capybara": ({"conversation": [{"input": "Hi", "output": "Hello!"}] * 2}, 4),
    "UltraChat": ({"id": "0", "data": ["Hi", "Hello!"]}, 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONGLY_READ)
def test_a_row_is_read_as_it_is_meant_or_refused(kind):
    row, wanted = WRONGLY_READ[kind]
    found = Examined()
    found.add(row)
    if isinstance(wanted, int):  # so many turns
        assert [len(r["messages"]) for r in found.rows] == [wanted]
    elif wanted == "Alpaca":
        assert list(found.formats) == ["Alpaca"] and found.rows[0]["input"] == ""
    else:
        assert not found.rows and wanted in found.problems[0].detail


SEMICOLONS = b"instruction;output\nName it, please;It is blue\n"
FILES = {  # name -> bytes, the instruction of its last row (None: it is refused, and with what)
    "a null before it.json": (json.dumps([None, COLOURS[1]]).encode(), "row 0"),
    "packed.jsonl": (gzip.compress(lines(COLOURS[:2])), COLOURS[1]["instruction"]),
    "unpacked.jsonl.gz": (lines(COLOURS[:2]), COLOURS[1]["instruction"]),
    "tabs.csv": (SEMICOLONS.replace(b";", b"\t"), "Name it, please"),
    "bars.csv": (SEMICOLONS.replace(b";", b"|"), "Name it, please"),
    "commas.tsv": (b"instruction,output\nName it,It is blue\n", "Name it"),
    "sheet.csv": (b"PK\x03\x04\x14\x00\x06\x00\x08\x00\xff\xfe", "a zip archive or an Excel file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_what_is_in_it(name, tmp_path):
    content, wanted = FILES[name]
    (tmp_path / name).write_bytes(content)
    try:
        assert load_examples(tmp_path / name)[0][-1]["instruction"] == wanted
    except UserError as e:
        assert wanted in str(e)


def test_the_test_split_beside_a_train_split_is_not_trained_on(tmp_path):
    for split, rows in (("train", COLOURS[:2]), ("test", COLOURS[2:])):
        (tmp_path / f"{split}-00000-of-00001.parquet").write_bytes(parquet(rows))
    assert [r["instruction"] for r in load_examples(tmp_path)[0]] == [
        r["instruction"] for r in COLOURS[:2]
    ]
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "dev-00000-of-00001.parquet")
    with pytest.raises(UserError, match="has no split 'train', but dev, test"):
        load_examples(tmp_path)
