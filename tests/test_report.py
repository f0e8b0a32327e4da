"""The report in the hands of hostile answers, of thousands of pairs, and of a real browser."""

import json
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from alpagasus2.analysis import analyse
from alpagasus2.commands.pages import report
from alpagasus2.evidence.labels import load_labels
from alpagasus2.evidence.sampling import is_random_sample
from alpagasus2.report.page import write_report
from alpagasus2.report.pairs import pair_name

CHROMIUM = Path("/usr/bin/chromium")
OWNED = "</script><script>document.title='owned'</script>"
IMAGE = "<img src=x onerror=\"document.title='owned'\">"
COMMENT = "<!-- <script> -->"
ANSWERS = [OWNED, IMAGE, COMMENT, "🦙🏽 &amp; \u2028 <b>", "שלום, <עולם>", "long " * 20_000]


def verdict(number, first, says, answer="Blue.", test_set="koala", **fields):
    return {
        "id": f"q_{number}", "test_set": test_set, "category": ["writing", "maths"][number % 2],
        "instruction": f"Question number {number}?", "input": "", "model_a": "filtered",
        "model_b": "random", "replicate": 0, "vote": 0, "first": first, "response_a": answer,
        "response_b": "An answer.", "score_a": 9.0, "score_b": 7.0, "verdict": says,
        "review": f"9 7\nReview of {number} with {first} first.", "status": "ok" if says else
        "unparsed", "judge": {"model": "stand-in"}, **fields,
    }  # fmt: skip


def pair_lines(number, says="aa", answer="Blue.", **fields):
    names = {"a": "a", "b": "b", "t": "tie", "-": None}
    return [verdict(number, f, names[s], answer, **fields) for f, s in zip("ab", says, strict=True)]


def statistics(test_set, n, **fields):
    return {
        "test_set": test_set, "model_a": "filtered", "model_b": "random", "n": n, "win": n // 2,
        "tie": 0, "lose": n - n // 2, "failed": 1, "winning_score": 1.0312,
        "winning_score_ci95": [0.981, 1.088], "win_rate": 0.5156, "win_rate_ci95": [0.49, 0.544],
        "sign_test_p": 0.0312, "consistency": 0.8, "kappa_between_orders": 0.61,
        "first_slot_wins": 70, "second_slot_wins": 50, "longer_wins": 0.55,
        "length_adjusted_win_rate": 0.507, **fields,
    }  # fmt: skip


def example(nulls=False):
    empty = dict.fromkeys(
        ("winning_score", "winning_score_ci95", "win_rate", "win_rate_ci95", "sign_test_p",
         "consistency", "kappa_between_orders", "longer_wins", "length_adjusted_win_rate")
    )  # fmt: skip
    rows = [statistics("koala", 180), statistics("vicuna", 80), statistics("wizardlm", 0, **empty)]
    checks = [
        {"name": "kappa between orders", "value": 0.61, "limit": "at least 0.2", "status": "pass"},
        {"name": "null answer wins", "value": 0.15, "limit": "at most 0.1", "status": "fail"},
        {"name": "gold pairs right", "value": None, "limit": "at least 0.8", "status": "not run"},
    ]
    return {
        "claim": {"verdict": "within noise", "reason": f"50.0% [48%, 52%] {IMAGE}"},
        "pairs": rows[2:] if nulls else rows,
        "pooled": [statistics(None, 260)],
        "ranking": [
            {"model": OWNED, "strength": 0.2, "ci95": [0.1, 0.3], "rank": 1, "n": 520},
            {"model": "$x_{$", "strength": None, "ci95": None, "rank": 2, "n": 0},
        ],
        "judge_health": {"summary": "This judge shows no clear preference.", "checks": checks},
        "heldout": {"filtered": {"loss": 1.93, "ci95": [1.9, 2.0]}, "base": {"loss": None}},
        "checkable": {"filtered": [41, 60], "longest": [0, 0], "random": None},
        "filter": {"selector": "flaws", "model": "small", "auc": None, "kept": {"filtered": 90},
                   "auc_by_kind": {"cut": {"auc": 0.97, "ci95": [0.9, 1], "n": 12}},
                   "flawed_kept": {"filtered": 0.02}},
        "failures": [verdict(3, "b", None, review=OWNED)],
        "cost": {"rating": {"calls": 9229, "usd": 4.25}},
        "manifest": {"libraries": {"jinja2": "3.1"}, "note": OWNED},
    }  # fmt: skip


def figure():
    drawn = Figure(figsize=(7, 3))
    axes = drawn.subplots()
    axes.barh(["lose", "tie", "win"], [20, 10, 30])
    axes.set(xlabel="prompts", title="filtered vs random, n = 60")
    return drawn


def lines():
    says = ["aa", "bb", "ab", "tt", "a-", "at"]
    pairs = [
        pair_lines(n, says[n % 6], "\nBlue.\n", test_set=["koala", "vicuna"][n % 2])
        for n in range(54)
    ]
    pairs += [pair_lines(54 + n, answer=a) for n, a in enumerate(ANSWERS)]
    return [line for pair in pairs for line in pair]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    figures = {"Wins, ties and losses": figure()}
    return write_report(example(), tmp_path_factory.mktemp("r"), lines(), figures=figures)


class Tags(HTMLParser):
    "Tags, references and the pair data of a page."

    def __init__(self, text):
        super().__init__()
        self.tags, self.refs, self.script, self.inside = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        "No element has a handler of its own."
        self.tags.append(tag)
        self.refs += [v for k, v in attrs if k in ("src", "href", "action", "srcset", "data")]
        assert not [k for k, _ in attrs if k.startswith("on")], attrs
        self.inside = ("type", "application/json") in attrs

    def handle_endtag(self, tag):
        "Data ends with its element."
        self.inside = False

    def handle_data(self, data):
        "Keep what the pair viewer reads."
        self.script += data if self.inside else ""


def test_nothing_is_loaded_and_nothing_escapes(page):
    text = page.read_text(encoding="utf-8")
    tags = Tags(text)
    assert not [r for r in tags.refs if not r.startswith("#")]
    assert not re.findall(r"url\((?!#)|@import|http-equiv=.refresh", text)
    assert [tags.tags.count(t) for t in ("script", "img", "b", "svg")] == [2, 0, 0, 3]
    pairs = json.loads(tags.script)["pairs"]
    assert [p["answers"][0]["text"] for p in pairs[54:]] == ANSWERS
    assert "default-src 'none'" in text and "unsafe-eval" not in text


def test_null_is_a_dash(tmp_path):
    text = write_report(example(nulls=True), tmp_path).read_text(encoding="utf-8")
    row = re.search(r'title="Show these pairs">wizardlm.*?</tr>', text, re.S)
    assert row is None  # without pairs there is nothing to show
    rows = re.findall(r'<th scope="row">\s*wizardlm.*?</tr>', text, re.S)
    found = [
        re.sub(r"<[^>]+>|\s+", " ", c).strip() for c in re.findall(r"<td.*?</td>", rows[0], re.S)
    ]
    assert found == ["filtered vs random", "0", "0 / 0 / 0", *"––––", "1"]
    assert "None" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


def test_results_of_an_older_version_render(tmp_path):
    old = example()
    for part in (old, *old["pairs"], *old["pooled"]):
        for key in ("ranking", "flips_to_first", "rules", "holm_p", "categories"):
            part.pop(key, None)
    text = write_report(old, tmp_path, lines()).read_text(encoding="utf-8")
    assert "p (Holm)" not in text and 'id="ranking"' not in text and 'id="pairs"' in text


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "Two thousand pairs with answers and reviews of about a thousand characters."
    answer = "A sentence of an answer, <b>and</b> more. " * 25
    many = [
        x for n in range(2000) for x in pair_lines(n, answer=answer, response_b=answer[:900],
                                                   review="word " * 150)
    ]  # fmt: skip
    return write_report({}, tmp_path_factory.mktemp("large"), many)


def test_thousands_of_pairs_stay_small(large):
    assert large.stat().st_size < 15e6


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with sync.sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def tab(browser, page):
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    complaints, requests = [], []
    tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: complaints.append(str(e)))
    tab.on("request", lambda r: requests.append(r.url))
    tab.goto(page.as_uri())
    yield tab
    assert not complaints
    assert not [u for u in requests if not u.startswith(("file:", "blob:"))]
    assert tab.title() == "AlpaGasus 2 report"
    tab.close()


def count(tab):
    return tab.text_content("#count")


def link(number):
    "The fragment that leads to the nth pair of `lines`, counted from 1."
    return f"#pair/{pair_name(lines()[2 * number - 2])}"


def open_link(tab, number, of=60):
    tab.evaluate("hash => { location.hash = hash }", link(number))
    tab.wait_for_function(f"document.querySelector('#count').textContent === '{number} of {of}'")


def unfold(tab):
    "Open everything that is folded, as a reader would one by one."
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")


def test_the_keyboard_turns_pages(tab):
    unfold(tab)
    assert count(tab) == "1 of 60"
    for key, at in (("j", 2), ("ArrowRight", 3), ("k", 2), ("ArrowLeft", 1), ("k", 1)):
        tab.keyboard.press(key)
        assert count(tab) == f"{at} of 60"
    tab.focus("#search")
    tab.keyboard.type("jj")  # typing in the search is no command
    assert count(tab) == "no pair matches"
    tab.keyboard.press("Escape")
    tab.click("#clear")
    tab.focus("#next")
    tab.keyboard.press("Enter")
    assert count(tab) == "2 of 60"


def test_hostile_answers_are_text(tab):
    for number, answer in enumerate(ANSWERS, 55):
        open_link(tab, number)
        shown = tab.locator("#pair .columns .prose").first
        assert shown.text_content() == answer
        assert tab.locator("#pair img, #pair script, #pair b").count() == 0
        if answer.startswith("ש"):
            assert shown.evaluate("x => getComputedStyle(x).direction") == "rtl"
    assert shown.evaluate("x => x.clientHeight < x.scrollHeight && x.clientHeight < 500")


def test_search_and_filters(tab):
    press(tab, "/")  # unfolds the search and goes there
    tab.fill("#search", "NUMBER 41")
    assert count(tab) == "1 of 1" and "Question number 41?" in tab.text_content("#pair")
    marked = "[...CSS.highlights.get('found')].map(r => r.toString())"
    assert tab.evaluate(marked) == ["number 41"]
    tab.click("#clear")
    assert tab.evaluate(marked) == []
    unfold(tab)
    tab.click("#pairs tbody >> text=vicuna")  # from a comparison to its pairs
    assert count(tab) == "1 of 27"
    tab.click("#clear")
    for outcome, n in (("win", 9 + 9 + 6), ("lose", 9), ("tie", 18), ("failed", 9)):
        tab.select_option("#by-outcome", outcome)
        assert count(tab) == f"1 of {n}"
    tab.click("#clear")
    tab.check("#flips")
    assert count(tab) == "1 of 18" and "verdicts disagree" in tab.text_content("#pair")
    tab.select_option("#by-test-set", "vicuna")
    assert count(tab) == "1 of 9"
    tab.select_option("#by-category", "writing")
    assert count(tab) == "no pair matches"


def test_a_link_finds_its_pair_again(tab):
    for _ in range(11):
        tab.keyboard.press("j")
    assert tab.url.endswith(link(12))
    tab.reload()
    assert count(tab) == "12 of 60" and "Question number 11?" in tab.text_content("#pair")
    unfold(tab)
    tab.select_option("#by-outcome", "win")
    open_link(tab, 2)  # a link to a pair that the filter hides
    assert tab.input_value("#by-outcome") == ""


def test_tables_sort_by_keyboard(tab):
    def column():
        return tab.eval_on_selector_all(
            "#pairs tbody tr", "rows => rows.map(r => r.cells[2].textContent)"
        )

    unfold(tab)
    head = tab.locator("#pairs").get_by_role("button", name="n", exact=True)
    head.focus()
    tab.keyboard.press("Enter")
    assert column() == ["0", "80", "180", "260"]  # pooled stays in its own body
    tab.keyboard.press("Space")
    assert column() == ["180", "80", "0", "260"]
    assert tab.get_attribute("#pairs th:nth-child(3)", "aria-sort") == "descending"
    for _ in range(2):  # what is undefined stays last in both directions
        tab.get_by_role("button", name="winning score").click()
        assert column()[2] == "0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(tab, scheme):
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": 390, "height": 844})
    for number in (1, *range(55, 61)):
        open_link(tab, number)
        unfold(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_votes_replicates_and_answers_without_a_judge(browser, tmp_path):
    voted = [x for v, says in enumerate(("ab", "aa")) for x in pair_lines(1, says, vote=v)]
    again = pair_lines(1, "bb", replicate=1, model_b="longest")
    asked = {"id": "q_9", "test_set": "koala", "instruction": "Name a prime.", "response": "7"}
    responses = [{**asked, "model": m} for m in ("filtered", "random", "longest")]
    page = write_report({}, tmp_path, [*voted[::-1], *again], responses)
    tab = browser.new_page()
    tab.goto(page.as_uri())
    titles = tab.locator("#pair h4").all_text_contents()[3:]
    shown = ["filtered shown first, vote 1", "filtered shown first, vote 2"]
    assert titles == [*shown, *(x.replace("filtered", "random") for x in shown)]
    assert tab.locator("#pair .tags").text_content().count("filtered wins") == 1
    press(tab, "j")
    assert "longest wins" in tab.text_content("#pair .tags")
    assert "replicate 1" in tab.text_content("#pair .tags")
    press(tab, "j")
    assert tab.locator("#pair .columns .prose").all_text_contents() == ["7"] * 3
    press(tab, "l")  # one prompt of the first two models; what no judge compared is not labelled
    assert tab.text_content("#progress-text") == "0 of 1 labelled"
    tab.close()


def stored(tab):
    return tab.evaluate("JSON.parse(localStorage.getItem(STORE) ?? '{}').entries ?? []")


def answers_shown(tab):
    return tab.locator("#pair .columns .prose").all_text_contents()


def saved(tab, path):
    with tab.expect_download() as download:
        tab.click("#save")
    assert download.value.suggested_filename == "labels.json"
    download.value.save_as(path)
    return json.loads(path.read_text(encoding="utf-8"))


def press(tab, keys):
    for key in keys:
        tab.keyboard.press(key)


def test_labelling_is_blind(tab):
    press(tab, "l")
    seen, left = 0, 0
    for _ in range(12):
        said = tab.text_content("#viewer #pair")
        assert not re.search("filtered|random|stand-in|wins|Review|shown first|q_|characters", said)
        assert not tab.locator("#claim, #pairs, .filters").filter(visible=True).count()
        assert all(text == text.strip() for text in answers_shown(tab))
        left += answers_shown(tab)[0] != "An answer."
        seen += 1
        press(tab, "3")
    assert 0 < left < seen, "the arm stands always on one side"
    assert tab.text_content("#progress-text") == "12 of 60 labelled"


def test_labels_say_which_model(tab, tmp_path):
    press(tab, "l")
    given = {}
    for key in random.Random(0).choices("123", k=20):
        one, two = answers_shown(tab)
        chosen = {"1": one, "2": two, "3": None}[key]
        given[tab.evaluate("current().name")] = (
            "tie" if chosen is None else "b" if chosen == "An answer." else "a"
        )
        press(tab, key)
    tab.fill("#labeller", "Ada")
    file = saved(tab, tmp_path / "labels.json")
    assert file["labeller"] == "Ada" and len(file["labels"]) == 20
    assert {pair_name(x): x["label"] for x in file["labels"]} == given
    keys = {"id", "test_set", "model_a", "model_b", "replicate", "label"}
    assert {tuple(sorted(x)) for x in file["labels"]} == {tuple(sorted(keys))}
    press(tab, ["Escape"])
    unfold(tab)
    tab.select_option("#by-label", "not labelled")
    assert count(tab) == "1 of 40"


def test_a_label_survives_a_reload_and_can_be_taken_back(tab):
    press(tab, "l12s")
    name = tab.evaluate("current().name")
    tab.reload()
    assert [x[1] for x in stored(tab)][2] is None
    press(tab, "l")
    assert tab.text_content("#progress-text") == "2 of 60 labelled, 1 skipped"
    assert tab.evaluate("current().name") == name
    press(tab, "uu")
    assert tab.text_content("#progress-text") == "1 of 60 labelled"
    tab.click("#undo")
    assert stored(tab) == []


def test_the_end_of_labelling_offers_the_skipped_again(tab):
    press(tab, "l" + "s" * 2 + "1" * 58)
    assert tab.text_content("#progress-text") == "58 of 60 labelled, 2 skipped"
    assert "turn" in tab.text_content("#pair") and tab.is_disabled("[data-label='1']")
    press(tab, "2")  # nothing is left to label
    assert len(stored(tab)) == 60
    tab.click("#again")
    press(tab, "33")
    assert tab.text_content("#progress-text") == "60 of 60 labelled"
    press(tab, "l")
    assert count(tab) == "1 of 60"


def prompts_of(said):
    return {(x["test_set"], x["id"]) for x in said}


def test_labels_are_a_random_sample_of_distinct_prompts(browser, tmp_path):
    "Three runs, five arms: each label is of another prompt, of the arms that decide, and a sample."
    judged = [
        x for arm in ("random", "longest") for r in range(3) for n in range(40)
        for x in pair_lines(n, "ab", model_b=arm, replicate=r, test_set="koala")
    ]  # fmt: skip
    page = write_report({}, tmp_path, judged)
    tab = browser.new_page(accept_downloads=True)
    tab.goto(page.as_uri())
    tab.get_by_role("button", name="Label answers").click()
    assert "40 prompts in a random order" in tab.text_content("#label-note")
    press(tab, "s" + "1" * 21)
    file = saved(tab, tmp_path / "labels.json")
    assert len(prompts_of(file["labels"])) == 21 and len(file["skipped"]) == 1
    assert {x["model_b"] for x in file["labels"]} == {"random"}
    assert {x["replicate"] for x in file["labels"]} == {0, 1, 2}
    frame = [("koala", f"q_{n}") for n in range(40)]
    assert is_random_sample(frame, prompts_of(file["labels"]), prompts_of(file["skipped"]))
    read = load_labels(tmp_path / "labels.json")
    (found,) = analyse(judged, "filtered", labels=read)["labels"]
    assert found["random"] and found["prompts"] == 21 and found["ppi_win_rate"] is not None
    chosen = file | {"labels": file["labels"][1:]}  # one label left out, and it is no sample
    (tmp_path / "chosen.json").write_text(json.dumps(chosen))
    text = "".join(json.dumps(x) + "\n" for x in judged)
    (tmp_path / "judgments.jsonl").write_text(text)
    for name, sampled in (("labels", True), ("chosen", False)):
        again = tmp_path / name
        report(str(again), str(tmp_path / "judgments.jsonl"), labels=[f"{again}.json"])
        results = json.loads((again / "results.json").read_text())
        assert results["labels"][0]["random"] is sampled
        assert any("random sample" in w for w in results["warnings"]) is not sampled
        shown = "random" if sampled else "chosen by hand"
        assert f"<td>{shown}</td>" in (again / "index.html").read_text(encoding="utf-8")
    tab.close()


def test_labelling_without_verdicts(browser, tmp_path):
    asked = {"test_set": "koala", "instruction": "Name a colour."}
    responses = [
        {**asked, "id": f"q_{n}", "model": m, "response": f"{m}'s answer"}
        for n in range(30) for m in ("filtered", "longest", "random")
    ]  # fmt: skip
    page = write_report({}, tmp_path, (), responses)
    tab = browser.new_page(accept_downloads=True)
    tab.goto(page.as_uri())
    tab.click("#label")
    given = {}
    for key in "12" * 10:
        answers = answers_shown(tab)
        assert sorted(answers) == ["filtered's answer", "random's answer"]
        name, arm = tab.evaluate("current().name"), answers[int(key) - 1].split("'")[0]
        given[name] = "a" if arm == "filtered" else "b"
        press(tab, key)
    tab.reload()
    tab.click("#label")
    assert tab.text_content("#progress-text").startswith("20 of")
    file = saved(tab, tmp_path / "labels.json")
    assert {pair_name(x): x["label"] for x in file["labels"]} == given
    press(tab, "l")
    unfold(tab)
    tab.select_option("#by-label", "not labelled")
    assert count(tab) == "1 of 10"
    later = [x for n in range(30) for x in pair_lines(n, "ab", test_set="koala")]
    (found,) = analyse(later, "filtered", labels=load_labels(tmp_path / "labels.json"))["labels"]
    assert (found["n"], found["random"]) == (20, True)
    tab.close()


def test_an_earlier_file_goes_on(tab, tmp_path):
    press(tab, "l1")
    mine = tab.evaluate("entries[0]")
    first = dict(zip(("test_set", "id", "model_a", "model_b"), mine[0].split("/"), strict=False))
    other = {"test_set": "koala", "id": "q_0", "replicate": 0}
    if first["id"] == "q_0":
        other |= {"test_set": "vicuna", "id": "q_1"}
    turned = {**other, "model_a": "random", "model_b": "filtered", "label": "a"}
    rows = [turned, {**first, "label": "tie"}, {**other, "id": "gone", "model_a": "x",
            "model_b": "y", "label": "a"}]  # fmt: skip

    def load(value):
        path = tmp_path / "labels.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        before = tab.text_content("#label-message")
        tab.set_input_files("#label-file", path)
        tab.wait_for_function("x => $('label-message').textContent !== x", arg=before)
        return tab.text_content("#label-message")

    assert load({"labeller": "Ada", "labels": rows}).startswith("1 label loaded; 1 pair had one")
    assert stored(tab)[1] == mine  # what was said here stays
    name = pair_name({**turned, "model_a": "filtered", "model_b": "random"})
    assert stored(tab)[0] == [name, "b"]  # the same model, whichever way round the file has it
    assert tab.input_value("#labeller") == "Ada"
    assert "not loaded" in load("{")
    assert "no list of labels" in load({"labels": [{"label": "left"}]})
    assert "keep two files" in load({"labeller": "Bob", "labels": rows})
    assert len(stored(tab)) == 2


def test_a_browser_that_keeps_nothing_says_so(browser, page):
    tab = browser.new_page()
    refuse = (
        "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError') }"
    )
    tab.add_init_script(refuse)
    tab.goto(page.as_uri())
    press(tab, "l1")
    assert "save before you leave" in tab.text_content("#label-message")
    tab.close()


def test_thousands_of_pairs_open_fast(browser, large):
    tab = browser.new_page()
    seconds = []
    for _ in range(3):  # the machine may be busy
        start = time.perf_counter()
        tab.goto(large.as_uri())
        assert count(tab) == "1 of 2000"
        seconds.append(time.perf_counter() - start)
    opened = min(seconds)
    press(tab, "/")
    tab.fill("#search", "question number 1999?")
    assert count(tab) == "1 of 1"
    tab.click("#clear")
    start = time.perf_counter()
    press(tab, "l123")
    labelled = time.perf_counter() - start
    assert tab.text_content("#progress-text").startswith("3 of ")
    tab.close()
    assert opened < 2 and labelled < 2, f"opened in {opened:.2f} s, labelled in {labelled:.2f} s"


# --- the first screen ----------------------------------------------------------------------------
def measured():
    "A run's results with all that the first screen has, and rows of each side of the filter."
    lost = {"loss": 2.9, "difference": 0.389, "difference_ci95": [0.33, 0.44]}
    held = {"loss": 2.52, "difference": 0.02, "difference_ci95": [-0.006, 0.047]}
    rows = [{"id": str(n), "score": n / 2, "asked": f"Question {n}? " * 9, "answer": "Word. " * 50,
             "flaw": None} for n in range(3)]  # fmt: skip
    arms = [{"arm": a, "rows": 120.0} for a in ("filtered", "random")]
    return example() | {
        "claim": {"verdict": "judge unfit: no claim", "question": "Is filtered better than random?",
                  "reason": "The judge takes what it sees first. " * 8},
        "warnings": ["Only 24 prompts: below 40 only large effects are found. " + "Which: " * 20],
        "judge_health": example()["judge_health"] | {"fit": False, "summary": ""},
        "heldout": {"base": lost, "filtered": {"loss": 2.5, "ci95": [-0.1, 5.1]}, "random": held},
        "aa": {"model_a": "random", "model_b": "random_again", "win_rate": 0.5,
               "win_rate_ci95": [0.4, 0.6], "heldout_difference": 0.005,
               "heldout_ci95": [-0.024, 0.035]},
        "setting": {"base_model": "smollm2-135m", "data": "sample", "pool": 400, "replicates": 1},
        "arms": arms,
        "filter": {"selector": "flaws", "rows": 400, "kept": {"filtered": 120},
                   "examples": {"arm": "filtered", "kept": rows, "dropped": rows}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A page with long answers."
    answer = "A sentence of an answer. " * 60
    verdicts = [x for n in range(30) for x in pair_lines(n, "ab", answer, response_b=answer)]
    figures = {"Wins, ties and losses": figure()}
    return write_report(measured(), tmp_path_factory.mktemp("run"), verdicts, figures=figures)


@pytest.fixture(params=["desktop, light", "desktop, dark", "phone, light", "phone, dark"])
def opened(browser, run, request):
    size, scheme = request.param.split(", ")
    size = {"width": 1280, "height": 900} if size == "desktop" else {"width": 390, "height": 844}
    tab = browser.new_page(viewport=size, color_scheme=scheme)
    tab.goto(run.as_uri())
    yield tab
    tab.close()


def test_the_first_screen_says_what_was_compared_and_what_came_out(opened):
    first = opened.locator("#answer")
    assert first.locator(".compared").inner_text() == (
        "Compared: filtered and random, each 120 of the 400 rows of sample, in one training run of "
        "smollm2-135m each; 30 questions of koala."
    )
    assert first.locator(".headline").inner_text() == (
        "Tuning helped; by the loss filtered rows cannot be told from random rows; the judge is "
        "unfit, so nothing is claimed of the answers."
    )
    cards = first.locator(".cards .card")
    assert [cards.nth(n).locator("dt").inner_text() for n in range(cards.count())] == [
        "What tuning brought",
        "What selecting brought: filtered against random",
        "What the judge is worth",
    ]
    said = cards.all_inner_texts()
    assert "Loss lower by 0.389" in said[0] and "noise: random and random_again" in said[1]
    assert "decide nothing" in said[2] and "judge unfit: no claim" in first.inner_text()
    assert first.locator("svg").count() == 1
    told = first.locator("svg").get_attribute("aria-label")
    assert "tuning: filtered against base: 0.389, from 0.33 to 0.44" in told
    if opened.viewport_size["width"] > 1000:
        assert first.locator("svg").bounding_box()["y"] < 600  # it begins on the screen


def test_the_page_is_short_as_opened_and_in_its_order(opened):
    assert opened.evaluate("document.documentElement.scrollHeight") < 4000
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    parts = opened.eval_on_selector_all("main > section", "all => all.map(x => x.id)")
    assert parts[:3] == ["answer", "viewer", "rows"]
    assert {"claim", "pairs", "health", "no-judge", "filter", "figures", "cost"} <= set(parts[3:])
    assert opened.locator(".fold details[open]").count() == 0
    assert opened.locator("#rows .row-card").count() == 6


def test_a_link_into_a_folded_part_unfolds_it(opened):
    assert not opened.locator("#claim strong").is_visible()
    opened.click("text=Why, in full")
    opened.locator("#claim strong").wait_for()  # visible: the page hears of its new hash later


def test_every_figure_can_be_read(opened):
    unfold(opened)
    small = """svgs => svgs.flatMap(svg => [...svg.querySelectorAll('text')].map(t => [
      parseFloat(getComputedStyle(t).fontSize) * svg.getScreenCTM().a, t.textContent]))
      .filter(([size]) => size < 10)"""
    assert opened.eval_on_selector_all("figure svg", small) == []
    wide = "x => x.parentElement.scrollWidth - x.parentElement.clientWidth"
    assert opened.eval_on_selector("#answer svg", wide) <= 0


def test_text_stands_out_from_what_is_behind_it(opened):
    luminance = """(() => {
      const part = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
      const lum = text => text.match(/[\\d.]+/g).slice(0, 3).map(x => part(x / 255))
        .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
      const behind = n => { while (getComputedStyle(n).backgroundColor.endsWith(', 0)'))
        n = n.parentElement; return lum(getComputedStyle(n).backgroundColor); };
      return [...document.querySelectorAll('.compared, .headline, .cards dt, .cards dd, .mark,'
        + '.note, .prose, .row-card p, summary, nav a, button:not(:disabled)')].map(n => {
        const [a, b] = [lum(getComputedStyle(n).color), behind(n)];
        return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), n.className + n.textContent];
      }).filter(([ratio]) => ratio < 4.5);
    })()"""
    assert opened.evaluate(luminance) == []


def test_keys_are_explained_and_wait_while_they_are(opened):
    press(opened, "?")
    keys = opened.locator("#keys")
    assert keys.is_visible() and "label a random sample" in keys.inner_text()
    press(opened, "jl")
    press(opened, ["Escape"])
    assert not keys.is_visible() and count(opened) == "1 of 30"
    if opened.viewport_size["width"] > 1000:
        opened.get_by_role("button", name="Keys").click()
        assert keys.is_visible()
        opened.click("#keys-close")
        assert not keys.is_visible()


def test_labelling_has_a_button_on_the_first_screen(opened):
    button = opened.get_by_role("button", name="Label answers")
    assert button.bounding_box()["y"] < 200
    button.click()
    assert opened.locator("#labelling").is_visible()
    assert not opened.locator("#answer, #rows, #more, .fold").filter(visible=True).count()


def test_no_interval_is_outside_what_is_possible(tmp_path):
    wild = measured()
    p = wild["pooled"][0]
    p |= {"win_rate_ci95": [-0.1, 1.2], "winning_score_ci95": [-0.2, 2.4], "detectable_effect": 0.7,
          "holm_p": 1.0}  # fmt: skip
    wild["pairs"] = [{**x, "holm_p": 1.0, "detectable_effect": 0.7} for x in wild["pairs"]]
    text = write_report(wild, tmp_path).read_text(encoding="utf-8")
    shown = re.sub(r"<svg.*?</svg>|<style.*?</style>|<script.*?</script>", "", text, flags=re.S)
    for impossible in ("[-10.0%", "120.0%]", "[-0.200", "2.400]", "[-0.100", "± 70.0%"):
        assert impossible not in shown, impossible
    for possible in ("[0.0%, 100.0%]", "[0.000, 2.000]", "[0.000, 5.100]", "none up to ± 50.0%"):
        assert possible in shown, possible
