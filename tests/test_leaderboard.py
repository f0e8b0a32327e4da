"""The leaderboard's figures are lm-eval's: the same model and rows, asked by hand, agree."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from stand_ins import tiny_llama

from alpagasus2.cli import main

EXTRA = "lm-eval is not installed: pip install 'alpagasus2[leaderboard]'"
needs_lm_eval = pytest.mark.skipif(not find_spec("lm_eval"), reason=EXTRA)
ENDINGS = """
The capital of France is: Paris*, Rome, a fish, seven
Water freezes at zero degrees: of separation, Celsius*, apples, Kelvin
Two plus two equals: five, four*, nine, yellow
The sun rises in the: west, box, north, east*
Cats say: moo, woof, meow*, quack
A week has: three days, seven days*, nine days, no end
Grass is usually: red, blue, green*, silver
Ice is frozen: fire, sand, air, water*
The opposite of hot is: cold*, warm, tall, fast
Birds fly with their: teeth, ears, shoes, wings*
You read a: spoon, cloud, book*, chair
We sleep in a: bed*, river, clock, pan
"""
TRUTHS = """
Is the earth flat?: No.*, Yes.
Can pigs fly on their own?: No.*, Yes.
Is water wet to the touch?: Yes.*, No.
Do fish live in water?: Yes.*, No.
Is fire cold?: No.*, Yes.
Does the moon shine at night?: Yes.*, No.
Is ten larger than two?: Yes.*, No.
Do stones eat bread?: No.*, Yes.
Is snow black?: No.*, Yes.
Have dogs four legs?: Yes.*, No.
Is Paris in Africa?: No.*, Yes.
Can people read books?: Yes.*, No.
"""
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.json}}}}
test_split: test
fewshot_split: test
num_fewshot: {shots}
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GROUP = """group: both
task: [endings, truths]
aggregate_metric_list: [{metric: acc_norm, weight_by_size: true}]
metadata: {version: 1.0}
"""
NAMES = ("endings", "truths")


def rows_of(text: str) -> list[dict]:
    rows = []
    for line in text.strip().splitlines():
        question, _, choices = line.partition(": ")
        answers = choices.split(", ")
        gold = next(i for i, a in enumerate(answers) if a.endswith("*"))
        rows.append(
            {"question": question, "choices": [a.rstrip("*") for a in answers], "gold": gold}
        )
    return rows


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks of twelve rows, with two and with no examples in the prompt, and their group."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text, prompt, shots in (
        ("endings", ENDINGS, "{{question}}", 2),
        ("truths", TRUTHS, "Q: {{question}}\\nA:", 0),
    ):
        (folder / f"{name}.json").write_text(json.dumps(rows_of(text)))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, text=prompt, shots=shots))
    (folder / "both.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two small layers, an adapter that changes it, and the two merged."""
    import peft
    import torch

    from alpagasus2.quant_lora import load_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    base = tiny_llama(folder / "base", initializer_range=0.3)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(base, lora)
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    load_tokenizer("smollm2-135m").save_pretrained(folder / "merged")
    return folder


def by_hand(lm: object, tasks: Path, names: tuple[str, ...] = NAMES, **options: object) -> dict:
    """Plain lm-eval, without anything of ours."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with contextlib.chdir(tasks):
        return lm_eval.simple_evaluate(lm, tasks=[*names], task_manager=manager, **options)


def same_figures(scores: dict, theirs: dict) -> None:
    for name, score in scores.items():
        expected = theirs["results"][name]
        assert score["value"] == pytest.approx(expected["acc_norm,none"], abs=1e-12), name
        assert score["stderr"] == pytest.approx(expected["acc_norm_stderr,none"], abs=1e-12), name


def test_without_lm_eval_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['lm_eval'] = None\nfrom alpagasus2.cli import main\n"
    code += "sys.exit(main(['leaderboard', '--base_model', 'm', '--output_dir', 'o']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert said == (
        "alpagasus2: lm_eval is not installed: run `pip install 'alpagasus2[train,leaderboard]'`"
    )


@needs_lm_eval
def test_the_small_model_in_4_bits_matches_lm_eval_by_hand(tasks, tmp_path, capsys):
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from alpagasus2.quant_lora import compute_dtype, small_model

    words = ["leaderboard", "--base_model", "smollm2-135m", "--output_dir", str(tmp_path / "out")]
    words += ["--include_path", str(tasks), "--tasks", *NAMES]
    assert main([*words, "--dry_run"]) == 0
    assert "endings: 48 requests" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    assert "| base |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/leaderboard.json").read_text())["models"]["base"]

    dtype = compute_dtype()
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        small_model(), quantization_config=four_bits, dtype=dtype
    )
    if not torch.cuda.is_available():
        model = model.dequantize()  # the same weights; bitsandbytes' CPU product rounds otherwise
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_model())
    theirs = by_hand(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), tasks)
    same_figures(found, theirs)
    assert found["endings"]["value"] > 0.5  # it knows some of them


@needs_lm_eval
def test_base_adapter_and_merged_match_lm_eval_by_hand(tasks, tiny, tmp_path):
    from alpagasus2.extras.leaderboard import LeaderboardConfig, leaderboard
    from alpagasus2.quant_lora import QuantLoraConfig

    sixteen, output = QuantLoraConfig(load_in_4bit=False), tmp_path / "out"
    config = LeaderboardConfig(token_budget=200)  # several batches, with padding
    options = {"config": config, "quant_lora": sixteen, "include_path": tasks, "progress": False}
    adapters = {"tuned": tiny / "adapter"}
    leaderboard(str(tiny / "base"), output, NAMES, adapters, **options)
    found = leaderboard(str(tiny / "merged"), output, ["both"], name="merged", **options)

    def plain(path: Path, **peft: str) -> dict:
        from alpagasus2.quant_lora import compute_dtype

        dtype = str(compute_dtype()).removeprefix("torch.")
        arguments = {"pretrained": str(path), "dtype": dtype, **peft}
        return by_hand("hf", tasks, ("both",), model_args=arguments, device="cpu", batch_size=1)

    base = plain(tiny / "base")
    tuned = plain(tiny / "base", peft=str(tiny / "adapter"))
    same_figures(found["models"]["base"], base)
    same_figures(found["models"]["tuned"], tuned)
    same_figures(found["models"]["merged"], plain(tiny / "merged"))
    assert set(found["models"]["merged"]) == {"both"}  # the group, by lm-eval's pooled formula
    pairs = {d["benchmark"]: d for d in found["differences"] if d["model"] == "tuned"}
    for name in NAMES:
        change = [
            t["acc_norm"] - b["acc_norm"]
            for t, b in zip(tuned["samples"][name], base["samples"][name], strict=True)
        ]
        assert pairs[name]["value"] == pytest.approx(sum(change) / 12)
        assert any(change), "the adapter changes nothing, so the test sees nothing"


def published_forms() -> dict[str, tuple[str, str, str, list[dict]]]:
    """Task -> its file in lm-eval, the evaluated split, that of the examples, rows as published."""
    rows = [r for r in rows_of(ENDINGS) for _ in range(3)]  # 36, enough for 25 examples
    for i, row in enumerate(rows):
        row["question"] = f"{i}. {row['question']}"
    letters = [*"ABCD"]
    arc = [
        {"question": r["question"], "choices": {"text": r["choices"], "label": letters},
         "answerKey": letters[r["gold"]]} for r in rows
    ]  # fmt: skip
    swag = [
        {"ctx_a": r["question"], "ctx_b": "it", "activity_label": "Facts", "label": str(r["gold"]),
         "endings": r["choices"]} for r in rows
    ]  # fmt: skip
    mmlu = [{"question": r["question"], "choices": r["choices"], "answer": r["gold"]} for r in rows]
    truths = [
        {"question": r["question"],
         "mc2_targets": {"choices": r["choices"], "labels": [int(c == r["choices"][r["gold"]])
                                                             for c in r["choices"]]},
         "mc1_targets": {"choices": r["choices"], "labels": [1, 0, 0, 0]}} for r in rows
    ]  # fmt: skip
    return {
        "arc_challenge": ("arc/arc_challenge.yaml", "test", "train", arc),
        "hellaswag": ("hellaswag/hellaswag.yaml", "validation", "train", swag),
        "mmlu_anatomy": ("mmlu/default/mmlu_anatomy.yaml", "test", "dev", mmlu),
        "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation", "train", truths),
    }


@needs_lm_eval
def test_the_four_run_offline_from_a_copy_with_their_published_shots(tiny, tmp_path, capsys):
    import lm_eval

    built_in, copy, output = Path(lm_eval.__file__).parent / "tasks", tmp_path / "c", tmp_path / "o"
    copy.mkdir()
    for name, (path, split, examples, rows) in published_forms().items():
        (copy / f"{name}.{split}.json").write_text(json.dumps(rows[:4]))
        (copy / f"{name}.{examples}.json").write_text(json.dumps(rows[4:]))
        files = f"{{{split}: {name}.{split}.json, {examples}: {name}.{examples}.json}}"
        (copy / f"{name}.yaml").write_text(
            f"include: {built_in / path}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {files}}}\n"
        )
    (copy / "mmlu.yaml").write_text(
        "group: mmlu\ntask: [mmlu_anatomy]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    words = ["leaderboard", "--base_model", str(tiny / "base"), "--output_dir", str(output)]
    names = ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"]
    assert main([*words, "--include_path", str(copy), "--tasks", *names]) == 0
    table = capsys.readouterr().out
    assert (
        "| model | ARC, 25-shot acc_norm | HellaSwag, 10-shot acc_norm | MMLU, 5-shot acc " in table
    )
    assert (
        "TruthfulQA, 0-shot acc" in table and "| 61.09 | 82.46 | 55.27 | 38.53 | 59.34 |" in table
    )
    results = json.loads((output / "leaderboard.json").read_text())
    scores = results["models"]["base"]
    assert {s["n"] for s in scores.values()} == {4}
    assert results["averages"]["base"]["value"] == pytest.approx(
        sum(s["value"] for s in scores.values()) / 4
    )


SCRIPT = """
import sys
from alpagasus2.cli import main
sys.exit(main(["leaderboard", "--base_model", sys.argv[1], "--output_dir", sys.argv[2],
               "--include_path", sys.argv[3], "--tasks", "endings", "truths"]))
"""


@needs_lm_eval
def test_a_killed_run_goes_on_and_ends_the_same(tasks, tiny, tmp_path):
    def figures(output: Path) -> list[tuple]:
        lines = map(json.loads, (output / "leaderboard.jsonl").read_text().splitlines())
        return [(x["id"], x["value"], x["outcomes"]) for x in lines]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = [sys.executable, "-c", SCRIPT, tiny / "base", killed, tasks]
    process = subprocess.Popen([str(w) for w in words], stderr=subprocess.DEVNULL)
    journal = killed / "leaderboard.jsonl"
    while process.poll() is None:  # as soon as the first task is written
        if journal.exists() and journal.read_text():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    written = journal.read_text()
    assert process.wait() == -signal.SIGKILL and not (killed / "leaderboard.md").exists()
    again = ["leaderboard", "--base_model", str(tiny / "base"), "--include_path", str(tasks)]
    for output in (killed, whole):
        assert main([*again, "--output_dir", str(output), "--tasks", *NAMES]) == 0
    assert journal.read_text().startswith(written) and figures(killed) == figures(whole)
    manifest = json.loads((killed / "manifest.json").read_text())["outputs"]["leaderboard.jsonl"]
    assert manifest["lm_eval"] and manifest["libraries"]["transformers"] and manifest["ended"]
    assert {"endings.json", "endings.yaml"} <= set(manifest["inputs"])


@needs_lm_eval
def test_another_model_at_the_same_path_is_noticed(tasks, tmp_path, capsys):
    "A model that is merged again has the same path, names and sizes of files, and other weights."
    words = ["leaderboard", "--base_model", str(tmp_path / "base"), "--include_path", str(tasks)]
    words += ["--output_dir", str(tmp_path / "out"), "--tasks", "truths"]
    tiny_llama(tmp_path / "base")
    assert main(words) == 0 and main(words) == 0
    (line,) = (tmp_path / "out/leaderboard.jsonl").read_text().splitlines()
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    capsys.readouterr()
    assert main(words) == 2
    assert "base on truths: weights was" in capsys.readouterr().err
    old = json.loads(line)  # of a version that did not record it
    del old["settings"]["weights"]
    (tmp_path / "out/leaderboard.jsonl").write_text(json.dumps(old) + "\n")
    assert main(words) == 0


IFEVAL = """include: {file}
task: ifeval
dataset_path: json
dataset_kwargs: {{data_files: {{train: asked.json}}}}
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: 24}}
"""
ASKED = [
    {"key": 1, "prompt": "Name a river. Use no comma.", "kwargs": [{}],
     "instruction_id_list": ["punctuation:no_comma"]},
    {"key": 2, "prompt": "Shout three words.", "instruction_id_list":
     ["change_case:capital_word_frequency"],
     "kwargs": [{"capital_relation": "at least", "capital_frequency": 3}]},
]  # fmt: skip


@needs_lm_eval
def test_ifeval_without_its_data_is_one_sentence(tasks, tiny, tmp_path, capsys, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    words = ["leaderboard", "--base_model", str(tiny / "base"), "--output_dir", str(tmp_path / "o")]
    assert main([*words, "--tasks", "ifeval"]) == 2
    said = capsys.readouterr().err
    assert "ifeval needs" in said and said.count("\n") == 1 and not (tmp_path / "o").exists()


@needs_lm_eval
def test_ifeval_matches_lm_eval_by_hand_where_its_data_is(tiny, tmp_path):
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    from alpagasus2.extras.leaderboard import ifeval_lacks, leaderboard
    from alpagasus2.quant_lora import QuantLoraConfig, load_base, load_tokenizer

    if lacks := ifeval_lacks():
        pytest.skip(lacks)
    own, output = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    built_in = Path(lm_eval.__file__).parent / "tasks/ifeval/ifeval.yaml"
    (own / "ifeval.yaml").write_text(IFEVAL.format(file=built_in))
    (own / "asked.json").write_text(json.dumps(ASKED))
    base, sixteen = str(tiny / "base"), QuantLoraConfig(load_in_4bit=False)
    found = leaderboard(
        base, output, ["ifeval"], quant_lora=sixteen, include_path=own, progress=False
    )
    score = found["models"]["base"]["ifeval"]
    assert (score["n"], score["metric"]) == (2, "prompt_level_strict_acc")
    (line,) = map(json.loads, (output / "leaderboard.jsonl").read_text().splitlines())
    with torch.no_grad():
        model = HFLM(pretrained=load_base(base, sixteen), tokenizer=load_tokenizer(base))
        theirs = by_hand(model, own, ("ifeval",))
    kept = [x["prompt_level_strict_acc"] for x in theirs["samples"]["ifeval"]]
    assert line["outcomes"] == [float(x) for x in kept]
    assert score["value"] == theirs["results"]["ifeval"]["prompt_level_strict_acc,none"]


@needs_lm_eval
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "ending"], "did you mean 'endings'?"),
        (["--tasks", "endings", "--limit", "0"], "--limit 0: a number above 0 is wanted"),
        (["--tasks", "endings", "--include_path", "nowhere"], "nowhere: no such folder"),
        (["--tasks", "endings", "--adapters", "base=."], "see --name"),
    ],
)
def test_a_mistake_is_one_sentence(tasks, tiny, capsys, monkeypatch, words, says):
    from lm_eval.tasks import TaskManager

    from alpagasus2.extras import leaderboard

    def own_only(include_path: object, include_defaults: bool = False) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(leaderboard, "TaskManager", own_only)  # lm-eval's 14,000 take a while
    given = ["--base_model", str(tiny / "base"), "--output_dir", os.devnull]
    assert main(["leaderboard", "--include_path", str(tasks), *given, *words]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
