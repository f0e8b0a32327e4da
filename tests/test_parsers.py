"""Real replies, canonical forms, forms to refuse, and generated replies with a known answer."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alpagasus2.endpoint.replies import parse_pair, parse_rating, parse_verdict

SHARED = Path(__file__).resolve().parents[2] / "shared"
DATA, SHORT = SHARED / "data" / "judgments", SHARED / "cases" / "endpoint" / "replies.jsonl"
KINDS = {"single": parse_rating, "pair": parse_pair, "threeclass": parse_verdict}
READ = {"rating": parse_rating, "pair": parse_pair, "verdict": parse_verdict}
CASES = [json.loads(line) for line in Path(__file__).with_name("replies.jsonl").open("rb")]
SAMPLE, VICUNA = [], []
if DATA.is_dir():
    lines = (DATA / "reviews_sample.jsonl").read_text(encoding="utf-8").split("\n")
    SAMPLE = [json.loads(line) for line in lines if line]
    VICUNA = [x for p in sorted(DATA.glob("*-vicuna.json")) for x in json.loads(p.read_text())]
real = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data/judgments is not there")


@real
@pytest.mark.parametrize("x", SAMPLE, ids=lambda x: x["cls"])
def test_sample(x):
    gold = tuple(x["gold"]) if isinstance(x["gold"], list) else x["gold"]
    assert KINDS[x["kind"]](x["text"]) == gold


def as_read(x):
    scale = [x[k] for k in ("low", "high") if k in x]
    got = READ[x["kind"]](x["text"], *scale)
    return list(got) if isinstance(got, tuple) else got


@pytest.mark.skipif(not SHORT.exists(), reason="../shared/cases is not there")
def test_short_replies():
    lines = [json.loads(line) for line in SHORT.open("rb")]
    assert [x for x in lines if as_read(x) != x["gold"]] == []


@pytest.mark.parametrize("kind", READ)
def test_cases(kind):
    "Replies written for this project: `may` names those that a person reads and we refuse."
    lines = [x for x in CASES if x["kind"] == kind]
    assert len(lines) > 150
    wrong = [x for x in lines if as_read(x) != (None if "may" in x else x["gold"])]
    assert wrong == []


@real
def test_vicuna():
    assert len(VICUNA) == 160
    assert [parse_pair(x["review"]) for x in VICUNA] == [tuple(x["score"]) for x in VICUNA]


# fmt: off
RATINGS = [
    ("4.5", 4.5), ("4.5\nbecause it is", 4.5), ("Score: 4.5", 4.5), ("Score:4.5", 4.5), ("0", 0),
    ("5", 5), ("4.5/5", 4.5), ("4.5 out of 5", 4.5), ("**4.5**", 4.5), ("Rating: **4**", 4),
    ("**Rating:** 4", 4), ("2.0. The response is bad.", 2), ("Accuracy: 4", 4), ("4,5", 4.5),
    ("Score: 4,5/5", 4.5), ("-4", None), ("I would rate the response 3.5 out of 5", 3.5),
    ("I'd rate it a 4.", 4), ("Score = 3", 3), ("4.", 4),
    ("I would rate the accuracy of the response as 2 out of 5.", 2),
    ("4. The response is good.", 4), ("The response is fine.\n\nFinal score: 4", 4),
    ("Therefore, the final score is 4.", 4), ("4 / 5", 4),
    ("- Accuracy: 4\nThe reply has 3 errors.", 4), ("### Score: 4/5", 4),
    ("\ufeff 4.5 \r\n\r\nFine.", 4.5), ("Score:\u00a04.5", 4.5), ("Score: 4 - good", 4),
    ("Score: 4 (good)", 4), ("Score: 1. It is wrong.", 1), ("Score: 4\nScore: 4.0", 4),
    ("4/5. Good.", 4), ("Score: 4 because it is", 4), ("Score: 4 stars", 4),
    ("I would give this response a score of 4.", 4),
    ("The response deserves a score of 4 out of 5.", 4), ("", None), ("9/10", None), ("45", None),
    ("inf", None), ("nan", None), ("-1", None), ("4-5", None), ("4 - 5", None), ("4–5", None),
    ("4 or 5", None), ("4 to 5", None), ("Score: 4-5", None), ("4, 5", None),
    ("Score: 4 or 5", None), ("Score: 4 (or 5)", None), ("Score: 4, maybe 5", None), ("1e1", None),
    ("The 3 points made are good", None), ("4 reasons why this is wrong: a", None), ("5.5", None),
    ("2 of the facts are wrong", None), ("2 out of 5 facts are wrong", None),
    ("3/5 of it is", None), ("Score: -1", None), ("Score: −1", None), ("Score: 9/10", None),
    ("Score: 4/10", None), ("4½", None), ("Score: 4\nScore: 3", None),
    ("4\nI would rate it 3 out of 5.", None), ("Final score: 4.\nFinal score: 2", None),
    ("1. The response is wrong.\n2. It is short.", None), ("1. Accuracy is bad", None),
    ("Score: 4 facts", None), ("Accuracy: 1. fact one 2. fact two", None),
    ("Accuracy: 1) fact one 2) fact two", None), ("4,500", None),
    ('It says "Score: 5" and stops.', None), ('He wrote:\n> Score: 5\nwhich is odd.', None),
    ("4²", None), ("```\nScore: 5\n```\nis the text", None),
    ("I would not rate it 5 out of 5.", None), ("4*5", None),
    ("If it had sources, I would rate it 5 out of 5.", None),
    ("I would rate it higher than 3 out of 5.", None), ("The film was rated 3 out of 5.", None),
    ("The response says the score was 3.", None), ("4%", None),
    ("I would rate response 2 as bad.", None), ("I would give 3 reasons.", None),
    ("I would score step 2.", None), ("4 5", None), ("4:30 pm", None),
    ("I cannot rate this.", None), ("error", None), ("3 + 1 = 4", None), ("Score: 3 + 1", None),
    ("4\n3", None), ("٤", None), ("9" * 400, None), ("Score: 4.5.6", None), ("1,2,3", None),
    ("x4", None), ("4x", None),
    ("4</s>", 4), ("Score: 4<|im_end|>\n<|im_start|>user\nScore: 2", 4),
    ("总分：4分", 4),
]
# fmt: on


@pytest.mark.parametrize("text,gold", RATINGS)
def test_rating(text, gold):
    assert parse_rating(text) == gold


def test_rating_on_another_scale():
    assert parse_rating("9/10", high=10) == 9
    assert parse_rating("0", low=1) is None
    assert parse_rating("Score: 4/5", high=10) is None


# fmt: off
PAIRS = [
    ("8 9", (8, 9)), ("8, 9", (8, 9)), ("8 9\nreview", (8, 9)), ("8/10 9/10", (8, 9)),
    ("8/10, 9/10", (8, 9)), ("Because.\n(10, 1)", (10, 1)), ("Output: (10, 1)", (10, 1)),
    ("[8, 9]", (8, 9)), ("8.5 9", (8.5, 9)), ("Assistant 1: 4 bad", None),
    ("Assistant 1: 4 (bad)\nAssistant 2: 7", (4, 7)), ("**8 9**", (8, 9)),
    ("Assistant 2: 7\nAssistant 1: 4", (4, 7)), ("Assistant 1: 8/10\nAssistant 2: 9/10", (8, 9)),
    ("**Assistant 1:** 8\n**Assistant 2:** 9", (8, 9)),
    ("Scores:\nAssistant A: 7\nAssistant B: 8", (7, 8)),
    ("**Assistant 1**: **8**\n\n**Assistant 2**: **9**", (8, 9)), ("8 9.", (8, 9)),
    ("Scores: 8, 9", (8, 9)),
    ("I would give Assistant 1 a score of 9 and Assistant 2 a score of 1. Good.", (9, 1)),
    ("8 and 9", (8, 9)), ("They both receive a score of 10.", (10, 10)),
    ("So I give both of them a score of 10", (10, 10)),
    ("I give a score of 9 to Assistant 1 and a score of 1 to Assistant 2.", (9, 1)),
    ("(8,9)", (8, 9)),
    ("Assistant 2 receives a higher score of 9 compared to Assistant 1's score of 8.", (8, 9)),
    ("Assistant 1's score is 8.\nAssistant 2's score is 9.", (8, 9)),
    ("8 9\nScores: 8 and 9", (8, 9)), ("The endpoints are (2, -2) and (10, 4).\n8 9", (8, 9)),
    ("Assistant 1 got 8, Assistant 2 got 9.", None),
    ("Score for Assistant 1: 8\nScore for Assistant 2: 9", (8, 9)),
    ("\u20098\u2009 9\r\n\r\nok", (8, 9)),
    ("Both Assistant 1 and Assistant 2 receive a score of 8.", (8, 8)),
    ("The output tuple is (2, 10).", (2, 10)),
    ("Assistant 1's answer is 4. Assistant 2's answer is 10.", None),
    ("Assistant 1 deserves an 8/10.\nAssistant 2 receives 9/10.", (8, 9)),
    ("Assistant 1: Answer: 4\nAssistant 2: Answer: 10", None), ("x is both = 4", None),
    ("8 9\r\n\r\nFine.", (8, 9)), ("Assistant 1: Score: 8\nAssistant 2: Score: 9", (8, 9)),
    ("Assistant 1: 4 units\nAssistant 2: 10 units", None),
    ("Assistant 1: 8\nAssistant 2: 9\n\nAssistant 1 made 2 errors, Assistant 2 only 1.", (8, 9)),
    ("8.5 / 9", None), ("8/9", None), ("8-9", (8, 9)), ("8 - 9", (8, 9)), ("8", None),
    ("8 9 7", None),
    ("", None), ("8 9\nwell\n(3, 2)", None), ("0 9", None), ("8 11", None), ("inf inf", None),
    ("-8 9", None), ("8/5 9/5", None), ("The points (2, 5) and (10, 4) lie on a line.", None),
    ("Assistant 1 and Assistant 2", None), ("8 or 9", None),
    ("Assistant 1:\n4\nAssistant 2:\n7\nneither works", None),
    ("Assistant 1: 8\nAssistant 2: 8-9", None),
    ("Assistant 1: 1. foo 2. bar\nAssistant 2: 1. foo 2. bar", None), ("8:9", None),
    ("Assistant 1: 8", None), ("Assistant 1: 2 errors\nAssistant 2: 3 errors", None),
    ("Assistant 1: 8 or 9\nAssistant 2: 7", None),
    ("Assistant 1: 10\nAssistant 2: 3\nFinal:\nAssistant 1: 9\nAssistant 2: 3", (9, 3)),
    ("8 9 cats", None), ('It says "Assistant 1: 10, Assistant 2: 3" and stops.', None),
    ("Assistant 1: -4\nAssistant 2: 3", None),
    ("I would not give Assistant 1 a score of 9 and Assistant 2 a score of 1.", None),
    ("(8, 9", None), ("Assistant 1 gets a lower score than Assistant 2, with scores of 8.", None),
    ("10/10", None), ("Assistant 1 and Assistant 2 receive scores of 8 and 9 respectively.", None),
    ("x = 8\ny = 9", None),
    ("Assistant 1: 8 for accuracy and 9 for detail\n"
     "Assistant 2: 8 for accuracy and 7 for detail", None),
]
# fmt: on


@pytest.mark.parametrize("text,gold", PAIRS)
def test_pair(text, gold):
    assert parse_pair(text) == gold


# fmt: off
VERDICTS = [
    ("1", 1), ("2", 2), ("3", 3), ("Good.\n\n2", 2), ("2\nbecause it is", 2), ("Best answer: 2", 2),
    ("**2**", 2), ("[[A]]", 1), ("My final verdict is [[B]].", 2), ("[[C]]", 3),
    ("Verdict: tie", 3), ("Verdict: **Tie**", 3),
    ("The best answer is provided by Assistant 2.", 2), ("I choose option 3", 3),
    ("I choose 3, as both are.", 3), ("Выбираю ответ 2.", 2), ("Тому, найкраща відповідь - 1.", 1),
    ("Best answer: Assistant 1", 1), ("2.", 2), ("Winner: Assistant A", 1),
    ("The better answer is Assistant B's", None), ("It is a tie.", 3), ("Tie", 3),
    ("Therefore, the better-performing assistant is Assistant 2.", 2),
    ("So I would choose option 1.", 1),
    ("Neither is right, so I choose option 3, as they are equivalent.", 3), ('"[[A]]"', 1),
    ("Лучший ответ: 2", 2), ("**Best answer:** 2", 2), ("Best answer: **2**", 2),
    ("Final verdict: 1\r\n", 1), ("I choose Assistant 1.", 1), ("error", None), ("", None),
    ("4", None), ("0", None), ("1.5", None), ("1/2", None), ("1 or 2", None),
    ("I cannot rate the answers.", None), ("Neither Assistant 1 nor Assistant 2.", None),
    ("1 2", None), ("Both are equally bad.", None), ("It is not a tie.", None),
    ("The best answer is not 2.", None), ("I do not choose option 1.", None),
    ("I cannot say that the best answer is 1.", None), ("x = 2", None),
    ("Is the best answer 1?", None), ("The best answer is 1 or 2.", None),
    ("Best answer: 1, 2", None), ("Best answer: Assistant 1 and Assistant 2.", None),
    ("It is better than Assistant 1.", None),
    ("The best part of Assistant 1's answer is the start.", None),
    ("Best answer: 1\nBest answer: 2", None),
    ("Assistant 1 correctly states that the best answer is 2.", None),
    ("Best answer: 1\n\n2", None), ("The best way to improve Assistant 1.", None),
    ("If the best answer is 1, then so be it.", None), ("The best 3 answers are listed", None),
    ("[[A]] or [[B]]", None), ("Best answer: 2/5", None),
    ('It says "Best answer: 1" and stops.', None), ("Best answer: Assistant 3", None),
    ("[Verse 1]", None), ("Assistant 1: 8\nAssistant 2: 9", None), ("It is a tie-dye shirt.", None),
    ("1\n2\n3", None), ("They choose option 2.", None), ("The correct answer is 2.", None),
    ("The best of 3.", None), ("1</s>", 1), ("[[A]]<|eot_id|>", 1),
]
# fmt: on


@pytest.mark.parametrize("text,gold", VERDICTS)
def test_verdict(text, gold):
    assert parse_verdict(text) == gold


# --- generated replies ---------------------------------------------------------------------
many = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SAY = st.sampled_from(
    [
        "The response lists 3 reasons.",
        "There are 2 errors in step 4.",
        "1. It is short.\n2. It is right.",
        "Let x = 5, then 2x + 1 = 11.",
        "f(2) = 5(2)^3 - 2(2) + 3",
        "The endpoints are (2, -2) and (10, 4).",
        "Assistant 1 made 2 errors and Assistant 2 made 3.",
        "Assistant 2's answer gives x = 7.",
        "Both Assistant 1 and Assistant 2 found the 4 roots.",
        "It is from 1999 and costs $3.50.",
        "2 out of 5 facts are wrong.",
        "4 of the 7 steps are right.",
        "3x + 10 = 5(x - 2)",
        "5%",
        "Ελλάδα 3",
        'It says "Assistant 1: 10" and "Score: 5".',
        "> Score: 1\n> Assistant 2: 10\n> Best answer: 1",
        "```\nScore: 2\nBest answer: 3\n8 9\n```",
        "It is better than Assistant 1.",
        "Is 3 the best answer?",
        "It could not be rated 5 out of 5.",
        "If it were cited, I would rate it 5 out of 5.",
        "Ответ 1 короче.",
        "Assistant 1:\n- x = 10\n- 3 steps\nAssistant 2:\n-4\nWell.",
        "Neither is perfect.",
        "Version 2.0 is out.",
        "“Assistant 2: 9” is quoted.",
        "Between 1 and 5, much is possible.",
        "Assistant 1: 2 mistakes",
        "Assistant 2: it has 1 mistake",
        "At 4:30 it ends.",
        "The score of the match was 3-1.",
        "Step 3.",
    ]
)
BREAK = st.sampled_from(["\n", "\n\n", "\r\n", "\r\n\r\n", " \n", "\u2028", "\n\u00a0\n"])
SPACE = st.sampled_from([" ", "  ", "\u00a0", "\u2009", "\t"])


@st.composite
def wrapped(draw, core, front, back):
    "A statement among prose that holds other numbers, in `front` or `back` of it."
    before = draw(st.lists(SAY, max_size=3)) if front else []
    after = draw(st.lists(SAY, max_size=3)) if back else []
    return draw(BREAK).join([*before, core.replace(" ", draw(SPACE)), *after])


def bold(draw, s):
    return draw(st.sampled_from(["{}", "**{}**", "*{}*", "`{}`", "__{}__"])).format(s)


def check(got, gold, must):
    assert got == gold if must else got in (gold, None)


@st.composite
def ratings(draw):
    half = draw(st.integers(0, 10))
    n = draw(st.sampled_from([f"{half / 2:g}", f"{half / 2:.1f}"]))
    n += draw(st.sampled_from(["", "/5", " / 5", " out of 5", "/5.0"]))
    forms = {
        "{}": "edge",
        "Score: {}": 1,
        "score:{}": 1,
        "Final rating: {}": 1,
        "- Accuracy: {}": 1,
        "## Overall score: {}": 1,
        "**Score:** {}": 1,
        "The final score is {}.": 1,
        "Score: {} (fair)": 1,
        "Therefore, my rating is {}.": 1,
        "I would rate it {}.": 1,
        "I'd give this response a score of {}.": 1,
        "The response deserves a score of {}": 1,
        "{} - fair": "first",
        "{}: fair": "first",
    }
    form = draw(st.sampled_from(list(forms)))
    core, place = form.format(bold(draw, n)), forms[form]
    end = draw(st.booleans())
    text = draw(
        wrapped(
            core, place == 1 or (place == "edge" and end), place == 1 or place == "first" or not end
        )
    )
    return half / 2, text, n


@many
@given(ratings())
def test_generated_rating(case):
    gold, text, n = case
    listed = (
        n.startswith("1") and "." not in n and "/" not in n and "out" not in n
    )  # "1 - fair" is refused
    check(parse_rating(text), gold, not listed)


@st.composite
def pairs(draw, kinds=("bare", "tuple", "lines", "inline", "prose")):
    a, b = (draw(st.integers(2, 20)) / 2 for _ in "ab")
    scale = draw(st.sampled_from(["", "/10", " / 10"]))
    x, y = (f"{v:g}{scale}" for v in (a, b))
    kind = draw(st.sampled_from(kinds))
    if kind == "bare":
        core = bold(draw, x + draw(st.sampled_from([" ", ", ", "; ", " and "])) + y)
        return (a, b), draw(wrapped(core, False, True))
    if kind == "tuple":
        core = draw(
            st.sampled_from(
                ["({}, {})", "Output: ({}, {})", "The output tuple is: ({}, {})", "[{}, {}]"]
            )
        )
        return (a, b), draw(wrapped(core.format(x, y), True, False))
    names = draw(st.sampled_from([("1", "2"), ("A", "B")]))
    item = draw(
        st.sampled_from(
            {
                "lines": [
                    "Assistant {}: {}",
                    "- Assistant {}: {}",
                    "**Assistant {}**: {}",
                    "**Assistant {}: {}**",
                    "Assistant {}'s score: {}",
                    "Score for Assistant {}: {}",
                    "Assistant {}: {} (fair)",
                    "Assistant {}: {} - x is right",
                    "* **Assistant {}:** {}",
                    "Assistant {} - {}",
                ],
                "inline": [
                    "Assistant {}: {}",
                    "Assistant {} scores {}",
                    "Assistant {}'s score is {}",
                ],
                "prose": [
                    "Assistant {} a score of {}",
                    "Assistant {} receives a score of {}",
                    "a score of {1} to Assistant {0}",
                    "Assistant {}'s answer an overall score of {}",
                ],
            }[kind]
        )
    )
    both = [item.format(names[0], x), item.format(names[1], y)]
    both = both[::-1] if draw(st.booleans()) else both
    core = {
        "lines": draw(BREAK).join(both),
        "inline": f"Scores: {both[0]}, {both[1]}",
        "prose": f"I would give {both[0]} and {both[1]}.",
    }[kind]
    return (a, b), draw(wrapped(core, True, True))


@many
@given(pairs())
def test_generated_pair(case):
    check(parse_pair(case[1]), case[0], True)


@st.composite
def verdicts(draw):
    n = draw(st.integers(1, 3))
    forms = [
        "Best answer: {}",
        "**Best answer:** {}",
        "Verdict: {}",
        "I choose option {}",
        "So I choose {}.",
        "Therefore, the best answer is {}.",
        "My choice is {}",
        "All in all, I would choose answer {}.",
        "Выбираю ответ {}.",
        "Найкраща відповідь - {}",
        "Лучший ответ: {}.",
        "I pick {} because it is clear",
    ]
    forms += {
        1: ["[[A]]"],
        2: ["[[B]]"],
        3: ["[[C]]", "It is a tie.", "Verdict: tie", "I choose a tie."],
    }[n]
    forms += ["The best answer is provided by Assistant {}.", "Winner: Assistant {}"] * (n < 3)
    edge = draw(st.booleans())
    core = bold(draw, str(n)) if edge else draw(st.sampled_from(forms)).format(n)
    return n, draw(wrapped(core, True, not edge))


@many
@given(verdicts())
def test_generated_verdict(case):
    check(parse_verdict(case[1]), case[0], True)


@many
@given(
    pairs(("bare", "lines", "inline", "prose")), pairs(("tuple", "lines", "inline", "prose")), BREAK
)
def test_two_pairs_conflict(p, q, br):
    assert parse_pair(p[1] + br + q[1]) in (None, p[0] if p[0] == q[0] else None)


@many
@given(ratings(), ratings(), BREAK)
def test_two_ratings_never_a_third(p, q, br):
    assert parse_rating(p[1] + br + q[1]) in (None, p[0], q[0])


@many
@given(st.lists(SAY, max_size=8), BREAK)
def test_prose_alone_is_refused(says, br):
    text = br.join(["Well.", *says, "Done."])
    assert parse_rating(text) is parse_pair(text) is parse_verdict(text) is None


# --- every form in every surrounding -------------------------------------------------------
# fmt: off
RATES = [
    "{}", "{}/5", "Score: {}", "Score: {}/5", "**Rating:** {}", "Accuracy: {}", "[[{}]]",
    "Rating: [[{}]]", "<score>{}</score>", '{{"score": {}}}', '{{"accuracy": {}, "clarity": 1}}',
    '```json\n{{"score": {}, "why": "It lists 3 facts."}}\n```', "Score: \\boxed{{{}}}",
    "| Criterion | Score |\n|---|---|\n| Accuracy | {} |", "I would rate it {} out of 5.",
    "The response deserves a score of {}.", "评分：{}分", "評価：{}点", "점수: {}", "Bewertung: {}",
    "Bewertung: {} von 5 Punkten", "Оценка: {}", "Puntuación: {}/5", "Overall: {}/5",
    "Accuracy: {}\nHelpfulness: 1\nClarity: 2", "Score (0-5): {}", "Here is my score:\n{}",
]
CHOICES = [
    "{n}", "**{n}**", "[[{a}]]", "[[{a}>{b}]]", "[[{a}>>{b}]]", "Verdict: {n}", "Verdict: [[{a}]]",
    "Winner: Assistant {n}", "I choose {n}.", "The better answer is {n}.", "选择：{n}", "選択: {n}",
    "Answer {n} is better.", "Answer {n} is better than Answer {m}.", "Antwort {n} ist besser.",
    '{{"winner": "{a}"}}', '{{"verdict": {n}}}', "<verdict>{a}</verdict>", "<answer>{n}</answer>",
    "Лучший ответ: {n}", "回答{n}更好。", '```json\n{{"better": "assistant_{n}"}}\n```',
]
SCORES = [
    "{x} {y}", "{x}, {y}", "{x} vs {y}", "({x}, {y})", "{x}/10 {y}/10", "# {x} {y}", "[{x}, {y}]",
    "Assistant 1: {x}\nAssistant 2: {y}", "Assistant 2: {y}\nAssistant 1: {x}",
    "Assistant A: {x}/10, Assistant B: {y}/10", "Answer 1: {x}\nAnswer 2: {y}", "A: {x}\nB: {y}",
    "First answer: {x}\nSecond answer: {y}", "助手1：{x}分\n助手2：{y}分", "[[{x}]] [[{y}]]",
    "Assistant 1 scores {x}, Assistant 2 scores {y}.", '{{"assistant_1": {x}, "assistant_2": {y}}}',
    '{{"scores": [{x}, {y}]}}', '```json\n{{"score_a": {x}, "score_b": {y}}}\n```',
    "<assistant_1>{x}</assistant_1>\n<assistant_2>{y}</assistant_2>", "Scores: {x} {y}",
    "| Assistant 1 | {x} |\n| Assistant 2 | {y} |", "Assistent 1: {x}\nAssistent 2: {y}",
    "| Criterion | Assistant 1 | Assistant 2 |\n|---|---|---|\n| Accuracy | 1 | 1 |\n"
    "| Overall | {x} | {y} |",
]
THOUGHTS = [
    "", "", "<think>\nScore: 1? Assistant 1: 3, Assistant 2: 9. The better is 1.\n</think>\n",
    "<think>1</think>", "[[B]]\n2 8\n</think>\n\n", "<reasoning>[[1]] Verdict: 2</reasoning>\n",
]
REMARKS = [
    "It lists 3 facts.", "2 + 2 = 4", "It is not a 5.", 'It says "Score: 1".', "> Best answer: 1",
    "If it were longer, the score would be 5.", "Relevance: 2", "In step 4, x = 7.", "~~Score: 1~~",
    "On 2024-05-04, 3 of 5 agreed.", "Clarity: 3/5", "Both lists have 4 items.", "Well.",
]
# fmt: on
WIDE = str.maketrans("0123456789:", "０１２３４５６７８９：")


@st.composite
def variations(draw):
    "A kind of reply, two statements of it, the value of each, and what may stand around them."
    kind = draw(st.sampled_from(list(READ)))
    values, texts = [], []
    for _ in "12":
        if kind == "rating":
            value = draw(st.integers(0, 10)) / 2
            text = draw(st.sampled_from(RATES)).format(f"{value:g}")
        elif kind == "verdict":
            value = draw(st.integers(1, 2))
            letters = dict(zip("ab", "AB" if value == 1 else "BA", strict=True))
            text = draw(st.sampled_from(CHOICES)).format(n=value, m=3 - value, **letters)
        else:
            value = [draw(st.integers(2, 20)) / 2 for _ in "xy"]
            x, y = (f"{v:g}" for v in value)
            text = draw(st.sampled_from(SCORES)).format(x=x, y=y)
        if draw(st.booleans()) and not re.search("[{<|>\\\\]", text):
            text = text.translate(WIDE)
        values.append(value)
        texts.append(text)
    around = draw(st.lists(st.sampled_from(REMARKS), max_size=3))
    return kind, values, texts, draw(st.sampled_from(THOUGHTS)), around


def check_variation(case):
    kind, (one, two), (first, second), thought, around = case

    def read(*parts):
        return as_read({"kind": kind, "text": thought + "\n".join(parts)})

    assert read(first) == one, "alone it is read"
    assert read(first, "", *around) in (one, None)
    assert read(*around, "", first) in (one, None)
    twice = read(first, "", *around, "", second)
    assert (
        twice == one
        if one == two and not around
        else twice in ((one, None) if one == two else (None,))
    )
    final = read(first, *around, "", "Final verdict:", second)
    assert final in (two, None)


@settings(many, max_examples=600)
@given(variations())
def test_no_variation_is_read_wrongly(case):
    "Five readings each."
    check_variation(case)


@pytest.mark.slow
@settings(many, max_examples=20_000)
@given(variations())
def test_no_variation_of_many_is_read_wrongly(case):
    check_variation(case)


# fmt: off
BITS = st.sampled_from([
    *"*_`\"'()[]-–.,:;/!?\n\r 0123459>#|", "Assistant 1", "Assistant 2", "both", "score",
    "score of ", "Score: ", "out of 5", "/10", "best", "answer ", "I choose ", "I would rate it ",
    "not ", "if ", "tie", "[[A]]", "or ", "\u00a0", "½", "٣", "\x00", "Accuracy",
])
# fmt: on


@many
@given(st.one_of(st.text(), st.lists(BITS, max_size=40).map("".join)))
def test_garbage_never_raises(text):
    r, p, v = parse_rating(text), parse_pair(text), parse_verdict(text)
    assert r is None or 0 <= r <= 5
    assert p is None or all(1 <= x <= 10 for x in p)
    assert v in (1, 2, 3, None)


def seconds(parse, text):
    "Processor time, since the machine is shared."
    start = time.process_time()
    parse(text)
    return time.process_time() - start


# fmt: off
LONG = [
    "a", "1", " ", "\n", "*", "_", "`", '"', "'", "“", "«", "(", "[", "-", "- ", "8 9 ", "8 9\n",
    "1, ", "not ", "if ", "Assistant 1: ", "Assistant 1 score ", "both ", "both: ", "score of ",
    "Score: 4 ", "I would rate ", "I would rate it a ", "best answer ", "I choose ", "so ", "so, ",
    "the ", "final ", "[[A]] ", "```", "> ", " '", "'a", '"a ', "*a ", "**a", "4,5", "4/5 ",
    "4 out of ", "tie ", ". so ", ", the ", "overall ", "# ", "isn't ", "tn't", "n't", "xn't ",
    "Accuracy: 1. ", "\u00a0", "4 to ", "4 and ", "лучший ", "a'b", "2 . ", "scores: (",
    "score of 8 to ", "overall accuracy ", "Assistant 1 a ", "Assistant 1 of ", ": ", "= ",
]
# fmt: on


@pytest.mark.parametrize("unit", LONG)
@pytest.mark.parametrize("parse", KINDS.values())
def test_long_replies_are_fast(parse, unit):
    text = (unit * 100_000)[:100_000]
    assert seconds(parse, text) < 0.5  # usually under 0.1; a quadratic rule takes many seconds


@real
@pytest.mark.parametrize("parse", KINDS.values())
def test_long_real_reply_is_fast(parse):
    text = "\n\n".join(x["text"] for x in SAMPLE * 99)[:100_000]
    assert len(text) == 100_000
    assert seconds(parse, text) < 0.5  # usually under 0.1; a quadratic rule takes many seconds
