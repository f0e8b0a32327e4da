"""What the statistics promise: figures against other libraries, intervals against known truths.

Simulated experiments have a short form that always runs and a long one marked slow. In each, both
orders of a prompt are correlated, half of the verdicts are ties, and the judge leans to a slot.
"""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.optimize import brentq, minimize
from scipy.stats import binomtest, bootstrap
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests

from alpagasus2.analysis import analyse, pair_statistics, prompt_table
from alpagasus2.evidence.claim import VERDICTS, decide
from alpagasus2.evidence.intervals import (
    crossed_interval,
    detectable_effect,
    heldout_summary,
    prediction_powered_mean,
)
from alpagasus2.report.formats import in_both_orders, without_orders

SIGNS = np.array([1, 0, -1])
AGREE = 0.5  # share of prompts whose second order repeats the first
LEAN = 0.05  # of a verdict to the slot shown second
EITHER = np.sign(np.add.outer(SIGNS, SIGNS))  # the outcome of two signs
SAID = {1: "a", 0: "tie", -1: "b"}


def joint(shift: float) -> np.ndarray:
    "Probabilities of (d1, d2), each over win, tie, lose; `shift` moves wins against losses."
    win, lose = 0.25 + shift / 2, 0.25 - shift / 2
    one, other = np.array([win - LEAN, 0.5, lose + LEAN]), np.array([win + LEAN, 0.5, lose - LEAN])
    return AGREE * np.diag([win, 0.5, lose]) + (1 - AGREE) * np.outer(one, other)


def win_rate(shift: float) -> float:
    "The truth of an experiment."
    return 0.5 + (joint(shift) * EITHER).sum() / 2


def shift_for(effect: float) -> float:
    "The shift that gives a true win rate of one half and this effect."
    return brentq(lambda s: win_rate(s) - 0.5 - effect, -0.4, 0.4)


def verdicts(rng: np.random.Generator, n: int, shift: float = 0.0) -> np.ndarray:
    "[n, 2] signs of model_a's verdicts, shown first and second."
    drawn = rng.choice(9, size=n, p=joint(shift).ravel())
    return np.stack([SIGNS[drawn // 3], SIGNS[drawn % 3]], axis=1)


def lines(signs: np.ndarray, model_a: str, model_b: str, replicate: int = 0) -> list[dict]:
    "Judgment lines of one pair of models."
    answers = {"response_a": "long", "response_b": "no", "review": "", "status": "ok", "vote": 0}
    return [
        {"id": str(i), "test_set": "t", "model_a": model_a, "model_b": model_b, **answers,
         "replicate": replicate, "first": first, "verdict": SAID[int(sign)]}
        for i, both in enumerate(signs) for first, sign in zip("ab", both, strict=True)
    ]  # fmt: skip


def table(signs: np.ndarray) -> pd.DataFrame:
    "What `prompt_table` makes of such lines, made at once."
    d1, d2 = signs.T.astype(float)
    return pd.DataFrame({
        "test_set": "t", "model_a": "x", "model_b": "y", "id": np.arange(len(d1)).astype(str),
        "category": None, "replicates": 1, "d1": d1, "d2": d2, "first_0": d1, "second_0": d2,
        "outcome": np.sign(d1 + d2), "score": np.nan, "longer": 2.0,
    })  # fmt: skip


def test_the_short_way_makes_the_same_table():
    signs = verdicts(np.random.default_rng(0), 50)
    made = prompt_table(lines(signs, "x", "y"))
    pd.testing.assert_frame_equal(table(signs)[made.columns], made, check_dtype=False)


# ---- against other libraries and closed forms


@pytest.fixture(scope="module")
def random_lines() -> list[dict]:
    "Two test sets of 300 prompts with scores, lengths, categories and some unread verdicts."
    rng = np.random.default_rng(7)
    made = []
    for test_set in ("t", "u"):
        for x in lines(verdicts(rng, 300, 0.1), "x", "y"):
            score = rng.integers(1, 10, size=2).tolist()
            x |= {"test_set": test_set, "category": "code" if int(x["id"]) % 3 else None}
            x |= {"score_a": score[0], "score_b": score[1]}
            made.append(x)
    for x in made[::90]:
        x |= {"verdict": None, "score_a": None, "score_b": None, "status": "unparsed"}
    longer = rng.integers(1, 400, size=1000)
    for x in made:
        x["response_a"] = "x" * longer[int(x["id"])]
        x["response_b"] = "y" * longer[500 + int(x["id"])]
    return made


def by_prompt(random_lines, test_set):
    "The signs of one test set's prompts, read apart from the package's code."
    signs: dict = {}
    for x in random_lines:
        if x["test_set"] == test_set:
            sign = {"a": 1, "tie": 0, "b": -1, None: None}[x["verdict"]]
            signs.setdefault(x["id"], {})[x["first"]] = (sign, x)
    both = [(s["a"][0], s["b"][0], s["a"][1]) for s in signs.values()]
    return [x for x in both if None not in x[:2]], len(both)


def test_every_figure_of_a_pair_against_other_libraries(random_lines):
    results = analyse(random_lines, "x", control="y")
    for p in results["pairs"]:
        kept, asked = by_prompt(random_lines, p["test_set"])
        d1, d2 = (np.array([x[i] for x in kept]) for i in (0, 1))
        outcome = np.sign(d1 + d2)
        win, tie, lose = ((outcome == s).sum() for s in SIGNS)
        assert (p["n"], p["failed"]) == (len(kept), asked - len(kept)) and p["failed"] > 0
        assert (p["win"], p["tie"], p["lose"]) == (win, tie, lose)
        assert p["winning_score"] == pytest.approx((win - lose) / len(kept) + 1)
        assert p["win_rate"] == pytest.approx(((outcome + 1) / 2).mean())
        assert p["sign_test_p"] == pytest.approx(binomtest(win, win + lose).pvalue)
        assert p["consistency"] == pytest.approx((d1 == d2).mean())
        agreed = np.zeros((3, 3))
        np.add.at(agreed, (d1 + 1, d2 + 1), 1)
        assert p["kappa_between_orders"] == pytest.approx(cohens_kappa(agreed).kappa)
        first, second = (d1 > 0).sum() + (d2 < 0).sum(), (d1 < 0).sum() + (d2 > 0).sum()
        assert (p["first_slot_wins"], p["second_slot_wins"]) == (first, second)
        flips = ((d1 > 0) & (d2 < 0)).sum(), ((d1 < 0) & (d2 > 0)).sum()
        assert (p["flips_to_first"], p["flips_to_second"]) == flips
        strict = np.where(d1 == d2, d1, 0)
        assert p["rules"]["strict"] == [(strict == s).sum() for s in SIGNS]
        longer = np.array([len(x[2]["response_a"]) - len(x[2]["response_b"]) for x in kept])
        decided = (outcome != 0) & (longer != 0)
        share = (np.sign(longer) == outcome)[decided].mean()
        assert p["longer_wins"] == pytest.approx(share)
        theirs = bootstrap((outcome,), np.mean, n_resamples=9999, method="percentile", rng=3)
        ends = np.array(theirs.confidence_interval) + 1
        assert p["winning_score_ci95"] == pytest.approx(ends, abs=0.012)
        assert p["length_adjusted_win_rate"] == pytest.approx(penalised(longer, outcome), abs=1e-3)
    corrected = multipletests([p["sign_test_p"] for p in results["pairs"]], method="holm")[1]
    assert [p["holm_p"] for p in results["pairs"]] == pytest.approx(corrected)
    assert results["pooled"][0]["holm_p"] == results["pooled"][0]["sign_test_p"]
    pooled = results["pooled"][0]
    assert {c["category"] for c in pooled["categories"]} == {"no category", "code"}
    assert sum(c["n"] for c in pooled["categories"]) == pooled["n"]
    assert results["claim"]["verdict"] in VERDICTS


def penalised(longer: np.ndarray, outcome: np.ndarray) -> float:
    "DESIGN's length-adjusted win rate by scipy's optimiser."
    x, won = np.tanh(longer / longer.std()), (outcome + 1) / 2

    def loss(parameters):
        z = parameters[0] + parameters[1] * x
        return (np.logaddexp(0, z) - won * z).sum() + parameters[1] ** 2 / 2

    return 1 / (1 + np.exp(-minimize(loss, [0.0, 0.0], tol=1e-10).x[0]))


def test_ranking_against_statsmodels():
    rng = np.random.default_rng(0)
    pairs = {("x", "y"): 0.2, ("x", "z"): 0.3, ("y", "z"): 0.1}
    judged = [x for (a, b), s in pairs.items() for x in lines(verdicts(rng, 200, s), a, b)]
    results = analyse(judged, None, control="z")
    design, won, weight = [], [], []
    for p in results["pooled"]:
        row = [float(p["model_a"] == m) - float(p["model_b"] == m) for m in "yz"]
        design += [row, row]
        won, weight = [*won, 1, 0], [*weight, p["win"] + p["tie"] / 2, p["lose"] + p["tie"] / 2]
    fit = sm.GLM(won, np.array(design), sm.families.Binomial(), freq_weights=np.array(weight)).fit()
    against_x = {r["model"]: r["strength"] for r in results["ranking"]}
    assert [against_x[m] - against_x["x"] for m in "yz"] == pytest.approx(fit.params, abs=1e-4)
    assert [r["rank"] for r in results["ranking"]] == [1, 2, 3]


def test_heldout_against_scipy():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 200)
    nll = {"x": rng.normal(2, 0.4, 200) * tokens}
    nll["y"] = nll["x"] + rng.normal(0.05, 0.1, 200) * tokens
    held = [
        {"id": str(i), "model": m, "replicate": 0, "nll": nll[m][i], "tokens": int(tokens[i])}
        for m in nll for i in range(200)
    ]  # fmt: skip
    found = heldout_summary(held, "x")["y"]

    def difference(x, y, t):
        return y.sum(-1) / t.sum(-1) - x.sum(-1) / t.sum(-1)

    data = (nll["x"], nll["y"], tokens)
    theirs = bootstrap(data, difference, n_resamples=4999, paired=True, method="percentile", rng=0)
    assert found["difference"] == pytest.approx(difference(*data))
    assert found["difference_ci95"] == pytest.approx(list(theirs.confidence_interval), abs=2e-3)


def test_prediction_powered_mean_against_its_authors_package():
    ppi = pytest.importorskip("ppi_py", reason="ppi-python is not installed")
    rng = np.random.default_rng(0)
    said = rng.choice([0, 0.5, 1], 1000)
    judge = np.where(rng.random(1000) < 0.7, said, rng.choice([0.5, 1], 1000))
    parts = said[:200], judge[:200], judge[200:]
    mean, ends = prediction_powered_mean(*parts)
    assert mean == pytest.approx(ppi.ppi_mean_pointestimate(*parts)[0], abs=1e-3)
    theirs = np.ravel(ppi.ppi_mean_ci(*parts, alpha=0.05))
    assert ends == pytest.approx(theirs, abs=2e-3)  # ours has Student's quantile


# ---- experiments whose truth is known


def compared(rng: np.random.Generator, n: int, shift: float = 0.0) -> dict:
    "Win rate and interval of one experiment, as `pair_statistics` takes them."
    d1, d2 = verdicts(rng, n, shift).T.astype(float)
    ends = crossed_interval(d1[:, None], d2[:, None], None, int(rng.integers(2**32)))
    rate = (np.sign(d1 + d2).mean() + 1) / 2
    return {"win_rate": rate, "win_rate_ci95": [x / 2 for x in ends]}


def test_the_short_way_gives_the_same_interval():
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    found = compared(rng, 80, 0.2)
    whole = pair_statistics(table(verdicts(same, 80, 0.2)), int(same.integers(2**32)))
    assert found == {k: whole[k] for k in found}


def coverage(n: int, experiments: int, shift: float, seed: int) -> float:
    "Share of experiments whose 95% interval of the win rate holds the truth."
    rng, truth, held = np.random.default_rng(seed), win_rate(shift), 0
    for _ in range(experiments):
        low, high = compared(rng, n, shift)["win_rate_ci95"]
        held += low <= truth + 1e-12 and truth - 1e-12 <= high
    return held / experiments


@pytest.mark.parametrize(
    ("n", "experiments", "low", "high"),
    [
        (80, 300, 0.91, 0.99),
        pytest.param(80, 1000, 0.93, 0.97, marks=pytest.mark.slow),
        pytest.param(730, 1000, 0.93, 0.97, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_intervals_hold_the_truth(n, experiments, low, high, shift):
    share = coverage(n, experiments, shift, seed=n)
    print(f"n = {n}, true win rate {win_rate(shift):.3f}: {share:.1%} of {experiments}")
    assert low <= share <= high


def test_at_20_prompts_the_results_warn():
    results = analyse(lines(verdicts(np.random.default_rng(0), 20), "x", "random"), "x")
    assert any("Only 20 prompts" in w and "x against random, t" in w for w in results["warnings"])
    several = analyse(lines(verdicts(np.random.default_rng(0), 80), "x", "random"), "x")
    assert several["warnings"] == [] and "Only" not in several["claim"]["reason"]
    good = np.repeat([[1, 1]], 20, axis=0)
    good[:4] = -1
    said = analyse(lines(good, "x", "random"), "x")["claim"]
    assert said["verdict"] == "supported" and "Only 20 prompts" in said["reason"]


@pytest.mark.slow
def test_what_the_warning_at_20_says_is_so():
    shares = [coverage(20, 1000, shift, seed=1) for shift in (0.0, 0.2, 0.35)]
    print("n = 20:", ", ".join(f"{s:.1%}" for s in shares))
    assert 0.90 <= min(shares) and max(shares) <= 0.975


@pytest.mark.parametrize("with_aa", [False, True])
@pytest.mark.parametrize(
    ("experiments", "most"), [(12, 0.17), pytest.param(200, 0.05, marks=pytest.mark.slow)]
)
def test_two_arms_of_one_rule_support_no_claim(experiments, most, with_aa):
    rng, supported = np.random.default_rng(11), 0
    for _ in range(experiments):
        judged = lines(verdicts(rng, 80), "filtered", "random")
        judged += lines(verdicts(rng, 80), "again", "random") if with_aa else []
        twins = ("again", "random") if with_aa else None
        results = analyse(judged, "filtered", seed=int(rng.integers(2**32)), aa=twins)
        supported += results["claim"]["verdict"] == "supported"
    print(f"{supported} of {experiments} A/A experiments say supported")
    assert supported / experiments <= most


@pytest.mark.parametrize("with_aa", [False, True])
@pytest.mark.parametrize(
    ("n", "experiments", "least"),
    [
        (80, 300, 0.75),
        pytest.param(80, 1000, 0.8, marks=pytest.mark.slow),
        pytest.param(730, 1000, 0.8, marks=pytest.mark.slow),
    ],
)
def test_the_effect_that_the_power_statement_names_is_found(n, experiments, least, with_aa):
    ties, shift = joint(0.0)[EITHER == 0].sum(), 0.0
    for _ in range(5):  # the share of ties falls a little as the effect grows
        effect = detectable_effect(n, ties)
        shift = shift_for(effect)
        ties = joint(shift)[EITHER == 0].sum()
    rng, found = np.random.default_rng(n), 0
    for _ in range(experiments):
        twins = compared(rng, n) if with_aa else None
        found += decide(compared(rng, n, shift), None, twins) == "supported"
    share = found / experiments
    print(f"n = {n}, A/A arm {with_aa}: {effect:.1%} is found in {share:.1%} of {experiments}")
    assert share >= least - 0.03 * with_aa  # the noise floor costs up to three points


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "least"), [(0.0, 0.92), (0.1, 0.92), (0.3, 0.9)])
@pytest.mark.parametrize("n", [80, 730])
def test_intervals_crossed_with_three_replicates(n, spread, least):
    "A run moves all of its verdicts; without the correction for few runs the last reads 78%."
    rng, held, experiments = np.random.default_rng(n), 0, 300
    truths = [outcomes(replicated(rng, 2000, spread)).mean() for _ in range(500)]
    truth = np.mean(truths) / 2 + 0.5
    for _ in range(experiments):
        s = replicated(rng, n, spread)
        low, high = crossed_interval(s[..., 0], s[..., 1], None, int(rng.integers(2**32)))
        held += low / 2 <= truth <= high / 2
    print(f"n = {n}, runs' spread {spread}: {held / experiments:.1%}")
    assert held / experiments >= least


def outcomes(s: np.ndarray) -> np.ndarray:
    "The AlpaGasus rule on the signs of sums over replicates."
    return np.sign(np.sign(s[..., 0].sum(1)) + np.sign(s[..., 1].sum(1)))


def replicated(rng: np.random.Generator, n: int, spread: float) -> np.ndarray:
    "[n, 3 replicates, 2 orders] signs of a latent preference of prompt, run and chance."
    latent = 0.4 + rng.normal(size=(n, 1, 1)) + spread * rng.normal(size=(1, 3, 1))
    latent = latent + 0.5 * rng.normal(size=(n, 3, 1)) + 0.5 * rng.normal(size=(n, 3, 2))
    return np.where(abs(latent) > 0.5, np.sign(latent), 0.0)


MANY = """
import resource, sys, time
from pathlib import Path
import numpy as np
from alpagasus2.analysis import analyse

n, rng, text = int(sys.argv[1]), np.random.default_rng(0), "words " * 60
said = rng.choice(["a", "b", "tie", "?"], n, p=[0.4, 0.3, 0.29, 0.01])
lines = [
    {"id": f"q{i // 10}", "test_set": f"t{i // 10 % 4}", "category": f"c{i // 10 % 8}",
     "instruction": text, "input": "", "model_a": "filtered", "model_b": f"m{i // 2 % 5}",
     "replicate": 0, "vote": 0, "first": "ab"[i % 2], "response_a": text[: i % 300],
     "response_b": text[: i * 7 % 300], "score_a": 8, "score_b": 7, "protocol": "pair",
     "verdict": None if v == "?" else str(v), "review": text, "status": "ok", "usage": {}}
    for i, v in enumerate(said)
]
start = time.process_time()
results = analyse(lines, "filtered", control="m1")
assert len(results["pairs"]) == 20 and len(results["ranking"]) == 6
seconds = time.process_time() - start
status = Path("/proc/self/status")
if status.exists():  # Linux keeps in ru_maxrss what the parent had before it became this program
    peak = next(int(x.split()[1]) for x in status.open() if x.startswith("VmHWM")) / 2**20
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
print(seconds, peak)
"""


@pytest.mark.parametrize("n", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_verdicts_are_analysed_in_seconds(n):
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(n)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    seconds, gigabytes = map(float, done.stdout.split())
    print(f"{n:,} verdicts: {seconds:.1f} s, {gigabytes:.2f} GB")
    assert seconds < 10 and gigabytes < 1


def test_a_failed_verdict_of_one_order_is_listed_once():
    "Its copy stands in for the order that nobody asked: no second failure, no second question."
    line = {"id": "q", "test_set": "t", "category": None, "instruction": "?", "input": "",
            "model_a": "x", "model_b": "y", "replicate": 0, "vote": 0, "first": None,
            "response_a": "1", "response_b": "2", "score_a": None, "score_b": None,
            "protocol": "verdict", "review": "hm"}  # fmt: skip
    read = {**line, "id": "p", "verdict": "a", "status": "ok"}
    copies, copied = in_both_orders([{**line, "verdict": None, "status": "unparsed"}, read])
    results = without_orders(analyse(copies))
    assert copied and len(copies) == 4
    assert [(x["id"], x["review"]) for x in results["failures"]] == [("q", "hm")]
    assert results["claim"]["verdict"] in VERDICTS
