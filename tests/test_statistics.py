"""What the statistics promise: figures against other libraries, intervals against known truths.

Simulated experiments have a short form that always runs and a long one marked slow. In each, both
orders of a prompt are correlated, half of the verdicts are ties, and the judge leans to a slot.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.optimize import brentq, minimize
from scipy.stats import binom, binomtest, bootstrap, norm
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from alpagasus2.analysis import analyse
from alpagasus2.evidence.claim import (
    NO_CLAIM,
    UNEQUAL,
    UNTESTED,
    VERDICTS,
    all_must_hold,
    claim,
    decide,
)
from alpagasus2.evidence.filtering import auc_with_interval
from alpagasus2.evidence.intervals import (
    heldout_summary,
    holds_run_noise,
    kappa_with_interval,
    mean_interval,
    pooled_noise,
    prediction_powered_mean,
    share_interval,
    variance_parts,
)
from alpagasus2.evidence.labels import label_statistics
from alpagasus2.evidence.length import length_statistics
from alpagasus2.evidence.power import Design, power
from alpagasus2.evidence.sampling import in_turn, lot
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
        assert p["winning_score_ci95"] == pytest.approx(ends, abs=0.015)
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
    mean, ends = prediction_powered_mean(*parts)  # theirs has no added labels and no t
    assert mean == pytest.approx(ppi.ppi_mean_pointestimate(*parts)[0], abs=3e-3)
    assert ends == pytest.approx(np.ravel(ppi.ppi_mean_ci(*parts, alpha=0.05)), abs=6e-3)


# ---- experiments whose truth is known

RUNS = [(n, runs, spread) for n in (80, 250, 730) for runs in (3, 5) for spread in (0.0, 0.1, 0.3)]


def experiment(
    rng: np.random.Generator,
    n: int,
    runs: int,
    spread: float,
    shift: Any = 0.0,
    slot: float = 0.0,
) -> np.ndarray:
    """[n, runs] outcomes of a latent preference of prompt, run and chance, in both orders.

    `slot` moves every verdict to the answer shown second; `spread` is in standard deviations
    between prompts.
    """
    latent = shift + rng.normal(size=(n, 1)) + spread * rng.normal(size=(1, runs))
    latent = latent + 0.5 * rng.normal(size=(n, runs))
    signs = []
    for side in (-1, 1):
        seen = latent + side * slot + 0.5 * rng.normal(size=latent.shape)
        signs.append(np.where(abs(seen) > 0.3, np.sign(seen), 0.0))
    return (np.sign(signs[0] + signs[1]) + 1) / 2


def mean_outcome(shift: float, slot: float = 0.0, spread: float = 0.0, n: int = 200_000) -> float:
    "The win rate that such experiments have on average, over prompts and runs."
    rng = np.random.default_rng(99)
    moved = shift + spread * rng.normal(size=(n, 1))  # a run of its own for every prompt
    return float(experiment(rng, n, 1, 0.0, moved, slot).mean())


def in_length(
    rng: np.random.Generator, n: int, runs: int, rate: float, shift: float, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """[n, runs] outcomes of a judge that leans to length, and how much longer the answers are.

    `rate`: the win rate at equal length; `shift`: mean difference of length in standard deviations.
    """
    shared, own = rng.normal(size=(n, 1)), rng.normal(size=(n, runs))
    longer = shift + np.sqrt(0.7) * shared + np.sqrt(0.3) * own
    odds = np.log(rate / (1 - rate)) + 2 * np.tanh(longer) + spread * rng.normal(size=(1, runs))
    luck = np.where(rng.random((n, runs)) < 0.6, rng.random((n, 1)), rng.random((n, runs)))
    return (luck < 1 / (1 + np.exp(-odds))).astype(float), 100 * longer


@pytest.mark.parametrize(
    ("experiments", "least"), [(40, 0.85), pytest.param(2000, 0.93, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("n", "runs"), [(20, 1), (80, 3), (250, 3), (730, 5)])
def test_the_win_rate_at_equal_length(n, runs, experiments, least):
    "Arms that differ in length alone: the plain interval is fooled, the adjusted one is not."
    rng, error = np.random.default_rng(n), np.sqrt(0.93 * 0.07 / experiments)
    for shift in (0.0, 0.7, 1.3):
        made = [in_length(rng, n, runs, 0.5, shift, 0.1) for _ in range(experiments)]
        found = [length_statistics(*x)["length_adjusted_win_rate_ci95"] for x in made]
        low, high = np.array([x for x in found if x]).T
        share, false = ((low <= 0.5) & (0.5 <= high)).mean(), (low > 0.5).mean()
        print(f"n {n}, {runs} runs, shift {shift}: {share:.3f}, false {false:.3f}")
        assert share >= least - 2 * error and false <= 0.03 + 3 * error
        if shift and n >= 80:
            ends = [share_interval(variance_parts(x, share=True))[0] for x, _ in made]
            assert np.mean([x > 0.5 for x in ends]) > 0.5


def test_what_length_alone_wins_is_no_claim():
    rng = np.random.default_rng(5)
    for shift, verdict in ((0.7, UNEQUAL), (9.0, UNEQUAL), (None, "supported")):
        won, longer = in_length(rng, 250, 3, 0.5, shift or 0.0, 0.0)
        if shift is None:
            won[:] = rng.random(won.shape) < 0.8
        judged = []
        for r in range(3):
            signs = np.repeat(2 * won[:, [r]] - 1, 2, axis=1)
            for x in lines(signs, "x", "random", r):
                more = int(longer[int(x["id"]), r])
                judged.append(
                    {**x, "response_a": "a" * max(more, 1), "response_b": "b" * max(-more, 1)}
                )
        claim = analyse(judged, "x")["claim"]
        assert claim["verdict"] == verdict
        assert (verdict == UNEQUAL) == ("length" in claim["reason"])


@pytest.mark.parametrize(
    ("experiments", "most"), [(40, 0.1), pytest.param(6000, 0.03, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("n", "runs", "spread"), [(80, 3, 0.1), (250, 3, 0.1), (250, 3, 0.3), (250, 5, 0.3)]
)
def test_arms_that_differ_in_length_alone_support_nothing(n, runs, spread, experiments, most):
    "The whole decision, by a judge that leans to length; spread in log-odds of a win."
    rng, said, fooled = np.random.default_rng(n + runs), [], 0
    fit, error = {"checks": [], "summary": ""}, np.sqrt(most * (1 - most) / experiments)
    for _ in range(experiments):
        won, longer = in_length(rng, n, runs, 0.5, 0.7, spread)
        parts = variance_parts(won, share=True)
        ends = share_interval(parts)
        pair = {
            "model_a": "x",
            "model_b": "random",
            "n": n,
            "failed": 0,
            "replicates": runs,
            "win_rate": won.mean(),
            "win_rate_ci95": ends,
            "win_rate_bounds": ends,
            "holds_run_noise": holds_run_noise(parts),
            **length_statistics(won, longer),
        }
        fooled += decide(pair) == "supported"
        said.append(claim([pair], fit)["verdict"])
    share = said.count("supported") / experiments
    print(
        f"n {n}, {runs} runs, spread {spread}: supported {share:.3f}, fooled {fooled / experiments}"
    )
    assert share <= most + 2 * error
    assert fooled > experiments / 2


def intervals_of(rng, experiments: int, *world) -> np.ndarray:
    "[experiments, 2] intervals of the win rate."
    return np.array([
        share_interval(variance_parts(experiment(rng, *world), share=True))
        for _ in range(experiments)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("experiments", "covered", "most"),
    [(250, 0.90, 0.04), pytest.param(6000, 0.93, 0.03, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("n", "runs", "spread"), RUNS)
def test_intervals_over_prompts_and_runs(n, runs, spread, experiments, covered, most):
    "Coverage, and how often nothing comes out as an effect; a slot that wins 70% changes nothing."
    rng, error = np.random.default_rng(n * runs), np.sqrt(most * (1 - most) / experiments)
    for slot in (0.0, 0.5):
        low, high = intervals_of(rng, experiments, n, runs, spread, 0.0, slot).T
        share, false = ((low <= 0.5) & (0.5 <= high)).mean(), (low > 0.5).mean()
        print(f"n {n}, {runs} runs, spread {spread}, slot {slot}: {share:.3f}, false {false:.3f}")
        assert share >= covered and false <= most + 2 * error  # of counting so many experiments


@pytest.mark.slow
@pytest.mark.parametrize(("n", "runs", "spread"), RUNS)
def test_intervals_hold_a_large_effect(n, runs, spread):
    rng, shift = np.random.default_rng(n + runs), 0.9
    truth = mean_outcome(shift, spread=spread, n=4_000_000)
    low, high = intervals_of(rng, 6000, n, runs, spread, shift).T
    share = ((low <= truth) & (truth <= high)).mean()
    print(f"n {n}, {runs} runs, spread {spread}, true win rate {truth:.3f}: {share:.3f}")
    assert share >= 0.93


def test_one_run_or_two_are_never_supported():
    rng, won = np.random.default_rng(0), np.ones((60, 2))
    won[:10] = -1
    for runs in (1, 2):
        parts = variance_parts(experiment(rng, 250, runs, 0.1, 2.0), share=True)
        assert not holds_run_noise(parts)
        judged = [x for r in range(runs) for x in lines(won, "x", "random", r)]
        judged += [x for r in range(runs) for x in lines(-np.ones((20, 2)), "x", "base", r)]
        claim = analyse(judged, "x")["claim"]
        assert claim["verdict"] == UNTESTED and "replicates: 3" in claim["reason"]


def test_two_runs_with_a_pooled_variance_hold_the_truth():
    rng, held = np.random.default_rng(2), []
    for _ in range(400):
        tables = [experiment(rng, 250, 2, 0.1) for _ in range(3)]
        parts = [variance_parts(x, share=True) for x in tables]
        pooled = pooled_noise(parts)
        low, high = share_interval(parts[0], pooled)
        held.append(low <= 0.5 <= high)
    assert holds_run_noise(parts[0], pooled) and np.mean(held) >= 0.93


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [10, 20, 40, 80])
def test_small_samples_by_enumeration(n, rate):
    covered = 0.0
    for wins in range(n + 1):
        won = np.r_[np.ones(wins), np.zeros(n - wins)][:, None]
        low, high = share_interval(variance_parts(won, share=True))
        covered += binom.pmf(wins, n, rate) * (low <= rate <= high)
    assert covered >= 0.93


@pytest.mark.parametrize(
    ("experiments", "least"), [(400, 0.915), pytest.param(6000, 0.93, marks=pytest.mark.slow)]
)
def test_kappa_and_auc_of_few_cases(experiments, least):
    rng, mix = np.random.default_rng(3), np.array([0.4, 0.3, 0.3])
    for kappa, n in [(k, n) for k in (0.0, 0.2, 0.9) for n in (10, 20, 40, 80)]:
        p = kappa * np.diag(mix) + (1 - kappa) * np.outer(mix, mix)
        held = useless = 0
        for drawn in rng.choice(9, (experiments, n), p=p.ravel()):
            _, ends = kappa_with_interval(drawn // 3 - 1, drawn % 3 - 1)
            held += ends is None or ends[0] <= kappa <= ends[1]
            useless += ends is not None and ends[0] >= 0.2
        print(f"kappa {kappa}, n {n}: {held / experiments:.3f}, passes {useless / experiments:.3f}")
        assert held / experiments >= least
        assert kappa or useless / experiments <= 0.01
    for auc, m, n in [(a, *s) for a in (0.5, 0.8, 0.95) for s in ((5, 5), (5, 20), (20, 80))]:
        shift, held = norm.ppf(auc) * np.sqrt(2), 0
        for _ in range(experiments):
            low, high = auc_with_interval(rng.normal(size=m) + shift, rng.normal(size=n))["ci95"]
            held += low <= auc <= high
        print(f"AUC {auc}, {m} and {n} rows: {held / experiments:.3f}")
        assert held / experiments >= least


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_twenty_labels_of_650(rate):
    rng, held = np.random.default_rng(4), []
    for _ in range(600):
        truth = (rng.random(650) < rate).astype(float)
        judge = np.where(rng.random(650) < 0.8, truth, rng.random(650) < 0.7)
        _, (low, high) = prediction_powered_mean(truth[:20], judge[:20], judge[20:])
        held.append(low <= rate <= high)
    assert np.mean(held) >= 0.93


@pytest.mark.parametrize(
    ("experiments", "least"), [(30, 0.83), pytest.param(2000, 0.93, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_twenty_labels_of_three_runs(spread, experiments, least):
    "The page's sample of 20 of 250 prompts, one run of each; the judge is biased by .15."
    rng, held, judged_so = np.random.default_rng(6), [], []
    order = in_turn([("t", str(i)) for i in range(250)])[:20]
    index = [(i, r) for i in range(250) for r in range(3)]
    table = pd.DataFrame({"test_set": "t", "model_a": "x", "model_b": "y",
                          "id": [str(i) for i, _ in index], "unit": [str(i) for i, _ in index],
                          "replicate": [r for _, r in index]})  # fmt: skip
    truth = mean_outcome(0.2, spread=spread)
    for _ in range(experiments):
        person = experiment(rng, 250, 3, spread, 0.2)
        judge = np.where(rng.random(person.shape) < 0.3, 1.0, person)
        labels = [
            {"id": i, "test_set": s, "model_a": "x", "model_b": "y", "replicate": r, "seed": 0,
             "label": SAID[int(2 * person[int(i), r] - 1)]}
            for s, i in order for r in [lot("run", s, i) % 3]
        ]  # fmt: skip
        (found,) = label_statistics(table.assign(outcome=2 * judge.ravel() - 1), labels)
        low, high = found["ppi_win_rate_ci95"]
        held.append(low <= truth <= high)
        judged_so.append(abs(found["judge_win_rate"] - truth))
    print(f"spread {spread}: {np.mean(held):.3f}")
    assert np.mean(held) >= least and np.mean(judged_so) > 0.08


@pytest.mark.parametrize(
    ("experiments", "least"), [(300, 0.7), pytest.param(3000, 0.78, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("n", "runs", "spread"), [(250, 3, 0.0), (250, 5, 0.1), (730, 5, 0.3)])
def test_a_plan_keeps_its_promise(n, runs, spread, experiments, least):
    "What `power` promises as .80 at the true spread is found at least so often."
    sd = experiment(np.random.default_rng(1), 100_000, 1, 0.0).std()
    per_shift = (mean_outcome(0.2) - mean_outcome(-0.2)) / 0.4  # win rate for a unit of the latent
    design = Design(n, runs, sd, spread * per_shift)
    effect = brentq(lambda e: power(design, e) - 0.8, 0.01, 0.49, xtol=1e-4)
    shift = brentq(lambda s: mean_outcome(s) - 0.5 - effect, 0.0, 3.0, xtol=1e-3)
    low, _ = intervals_of(np.random.default_rng(n), experiments, n, runs, spread, shift).T
    found = (low > 0.5).mean()
    print(f"n {n}, {runs} runs, spread {spread}: an effect of {effect:.3f} is found in {found:.3f}")
    assert found >= least


def test_at_20_prompts_the_results_warn():
    results = analyse(lines(verdicts(np.random.default_rng(0), 20), "x", "random"), "x")
    assert any("Only 20 prompts" in w and "x against random, t" in w for w in results["warnings"])
    several = analyse(lines(verdicts(np.random.default_rng(0), 80), "x", "random"), "x")
    assert several["warnings"] == [] and "Only" not in several["claim"]["reason"]


def test_two_arms_of_one_rule_support_no_claim():
    rng, said = np.random.default_rng(11), []
    for _ in range(6):
        signs = [verdicts(rng, 80) for _ in range(6)]
        judged = [x for r in range(3) for x in lines(signs[r], "filtered", "random", r)]
        judged += [x for r in range(3) for x in lines(signs[3 + r], "again", "random", r)]
        results = analyse(judged, "filtered", aa=("again", "random"))
        said.append(results["claim"]["verdict"])
    assert said.count("supported") <= 1 and set(said) <= {*VERDICTS} - {UNTESTED, NO_CLAIM}


def test_missing_verdicts_can_take_the_claim_away():
    "Forty of 120 prompts are unread: had the arm lost them, it would not be better."
    won = np.ones((80, 2))
    won[:20] = -1
    read = [x for r in range(3) for x in lines(won, "x", "random", r)]
    lost = [{**x, "id": f"u{x['id']}", "verdict": None, "status": "unparsed"}
            for r in range(3) for x in lines(np.ones((9, 2)), "x", "random", r)]  # fmt: skip
    assert analyse(read, "x")["claim"]["verdict"] == "supported"
    few, many = (analyse(read + lost[:k], "x") for k in (12, 54))
    assert few["pooled"][0]["win_rate_bounds"][0] < few["pooled"][0]["win_rate_ci95"][0]
    assert "could not be judged" in few["claim"]["reason"]
    assert many["pooled"][0]["win_rate_bounds"][0] < few["pooled"][0]["win_rate_bounds"][0]


# ---- what is missing, and questions that belong together


def passages(
    rng: np.random.Generator, clusters: int, runs: int, spread: float, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    "[questions, runs] outcomes of one to six questions on each passage, and their passages."
    of = np.repeat(np.arange(clusters), rng.integers(1, 7, clusters))
    latent = shift + rng.normal(size=clusters)[of, None] + 0.7 * rng.normal(size=(len(of), 1))
    latent = latent + spread * rng.normal(size=(1, runs)) + 0.5 * rng.normal(size=(len(of), runs))
    seen = (latent + 0.5 * rng.normal(size=latent.shape) for _ in "ab")
    one, other = (np.where(abs(x) > 0.3, np.sign(x), 0.0) for x in seen)
    return (np.sign(one + other) + 1) / 2, of


@pytest.mark.parametrize(
    ("experiments", "covered", "most"),
    [(250, 0.90, 0.04), pytest.param(6000, 0.93, 0.03, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("clusters", "runs"), [(20, 1), (20, 3), (120, 1), (120, 3)])
def test_intervals_over_clusters(clusters, runs, experiments, covered, most):
    "Questions on one passage are no more evidence than the passage; by prompts it would be wrong."
    rng, error = np.random.default_rng(clusters + runs), np.sqrt(most * (1 - most) / experiments)
    made = [passages(rng, clusters, runs, 0.1 * (runs > 1)) for _ in range(experiments)]
    by_cluster, by_prompt = (
        np.array([share_interval(variance_parts(x, share=True, clusters=of if use else None))
                  for x, of in made]) for use in (True, False)
    )  # fmt: skip
    held, naive = (((e[:, 0] <= 0.5) & (0.5 <= e[:, 1])).mean() for e in (by_cluster, by_prompt))
    false = (by_cluster[:, 0] > 0.5).mean()
    print(
        f"{clusters} clusters, {runs} runs: {held:.3f}, false {false:.3f}; by prompts {naive:.3f}"
    )
    assert held >= covered and false <= most + 2 * error
    assert naive < held


def test_a_control_that_fails_to_answer_gives_no_claim():
    "Where nothing is there, a server that loses a fifth of random's answers must not win for x."
    rng, said, supported = np.random.default_rng(6), [], 0
    failed = {"status": "unanswered", "response_b": None, "verdict": "a"}
    for _ in range(12):
        judged = [x for r in range(3) for x in lines(verdicts(rng, 100), "x", "random", r)]
        judged = [{**x, **failed} if int(x["id"]) % 5 == 0 else x for x in judged]
        results = analyse(judged, "x")
        supported += decide({**results["pooled"][0], "win_rate_bounds": [1.0, 1.0]}) == "supported"
        said.append(results["claim"]["verdict"])
    assert supported > 6, "counted as losses alone they would win"
    assert "supported" not in said


def test_verdicts_that_are_missing_on_one_side_give_no_claim():
    "Half of what x lost is not in the file; the claim knows how many pairs there must be."
    rng, said, kept = np.random.default_rng(7), [], []
    planned = {"questions": {"t": 120}, "runs": 3}
    for _ in range(8):
        judged = [x for r in range(3) for x in lines(verdicts(rng, 120), "x", "random", r)]
        lost = {(x["id"], x["replicate"]) for x in judged if x["verdict"] == "b"}
        gone = {x for x in lost if int(x[0]) % 2}
        left = [x for x in judged if (x["id"], x["replicate"]) not in gone]
        said.append(analyse(left, "x", planned=planned)["claim"]["verdict"])
        pair = analyse(left, "x")["pooled"][0]
        kept.append(pair["win_rate_ci95"][0] > 0.5)
    assert np.mean(kept) > 0.5, "what is left looks like an effect"
    assert "supported" not in said


MANY = """
import resource, sys, time
from pathlib import Path
import numpy as np
from alpagasus2.analysis import analyse

n, rng, text = int(sys.argv[1]), np.random.default_rng(0), "words " * 60
said = np.repeat(rng.choice(["a", "b", "tie", "?"], n // 2, p=[0.4, 0.3, 0.29, 0.01]), 2)
lines = [
    {"id": f"q{i // 10}", "test_set": f"t{i // 10 % 4}", "category": f"c{i // 10 % 8}",
     "instruction": f"{text} {i // 10}", "input": "",
     "model_a": "filtered", "model_b": f"m{i // 2 % 5}",
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


# ---- several comparisons, one question


def test_equivalence_is_two_one_sided_tests():
    "The verdict of the interval is that of statsmodels' test at 2.5% on each side."
    rng, seen = np.random.default_rng(5), set()
    for _ in range(200):
        values = rng.normal(0.5 + rng.uniform(-0.06, 0.06), 0.2, size=150)
        ends = mean_interval(variance_parts(values[:, None]))
        pair = {"win_rate_ci95": ends, "win_rate_bounds": ends, "holds_run_noise": True}
        p, *_ = DescrStatsW(values).ttost_mean(0.45, 0.55)
        verdict = decide(pair, 0.05, equivalence=True)
        assert (verdict == "supported") == (p < 0.025)
        seen.add(verdict)
    assert seen >= {"supported", "within noise"}


@pytest.mark.parametrize(
    ("experiments", "most"), [(300, 0.03), pytest.param(6000, 0.025, marks=pytest.mark.slow)]
)
def test_beating_two_arms_at_once_needs_no_correction(experiments, most):
    "An arm that surpasses one control by far, and the other not at all, is seldom supported."
    rng, false, (n, runs, spread) = np.random.default_rng(8), 0, (80, 3, 0.1)
    for _ in range(experiments):
        mine, far, equal = (
            shift + rng.normal(size=(n, 1)) + spread * rng.normal(size=(1, runs))
            + 0.5 * rng.normal(size=(n, runs))
            for shift in (0.0, -3.0, 0.0)
        )  # fmt: skip
        verdicts = {}
        for name, other in (("far", far), ("equal", equal)):
            ends = share_interval(variance_parts((np.sign(mine - other) + 1) / 2, share=True))
            pair = {"win_rate_ci95": ends, "win_rate_bounds": ends, "holds_run_noise": True}
            verdicts[name] = {"verdict": decide(pair), "reason": name}
        assert verdicts["far"]["verdict"] == "supported"
        false += all_must_hold(verdicts)["verdict"] == "supported"
    print(f"{false} of {experiments} supported")
    assert false / experiments <= most + 2 * np.sqrt(most * (1 - most) / experiments)
