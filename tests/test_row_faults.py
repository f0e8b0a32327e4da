"""One row is one row: two rows of forty meet a fault, and the others are rated all the same."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import row_faults

from alpagasus2.core.files import UserError
from alpagasus2.core.run_folder import latest
from alpagasus2.endpoint import client
from alpagasus2.endpoint.client import Endpoint, EndpointConfig
from alpagasus2.judge import JudgeConfig, carry_out, rating_plan

SERVER = Path(__file__).with_name("faulty_server.py")
BOUND = 15.0  # seconds that a run of forty rows may take, whatever two of them meet
KINDS = [k for k in row_faults.kinds() if k not in row_faults.FATAL]
SOME = ("status-403", "a-day", "page", "null-content", "surrogate", "usage-nan", "limit-tiny")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = subprocess.Popen([sys.executable, SERVER], stdout=subprocess.PIPE, text=True)
    yield server.stdout.readline().strip()
    server.kill()
    server.wait()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that double from a hundredth of a second."""
    pause = client.backoff
    monkeypatch.setattr(client, "backoff", lambda n, wait=None: wait or min(0.05, pause(n) / 50))


def rows(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Two rows of each kind, each of them between other rows."""
    texts = [f"Row {i} of {'-'.join(kinds[:2])}." for i in range(40)]
    for kind in kinds:
        texts[5:5], texts[-9:-9] = [f"[fault {kind}] first."], [f"[fault {kind}] second."]
    return [
        {"id": text, "instruction": text, "input": "", "output": "One."} for text in texts
    ]  # fmt: skip


def rate(address: str, folder: Path, *kinds: str) -> dict[str, dict[str, Any]]:
    """The lines by id, once they are rated."""
    config = EndpointConfig(
        workers=8, timeout=1.0, max_retries=1, max_wait=2.0, price_in=1, price_out=1
    )
    endpoint = Endpoint("judge", f"{address}/v1", folder / "cache.sqlite", config, max_tokens=256)
    plan = rating_plan(rows(kinds), JudgeConfig(), "judge")
    carry_out(plan, endpoint.complete, folder / "ratings.jsonl", progress=False)
    return {x["id"]: x for x in latest(folder / "ratings.jsonl")}


def asked(address: str) -> dict[str, list[int]]:
    with urlopen(f"{address}/hashes") as answer:
        return json.load(answer)


def check(address: str, folder: Path, *kinds: str) -> None:
    """Rate twice: the other rows get their rating, and what has an answer is asked once."""
    rated = rate(address, folder, *kinds)
    assert len(rated) == 40 + 2 * len(kinds)
    others = {x["status"] for key, x in rated.items() if "fault" not in key}
    assert others == {"ok"}
    lost = [x for x in rated.values() if x["status"] == "error"]
    assert all(x["review"] for x in lost), "the server's words are missing"
    before = asked(address)
    rate(address, folder, *kinds)
    calls = [k for k, n in asked(address).items() if n != before.get(k)]
    assert len(calls) == len(lost), "a row that has an answer was asked again"


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in SOME else pytest.mark.slow) for k in KINDS]
)
def test_two_faulty_rows_do_not_stop_the_others(address, tmp_path, kind):
    began = time.monotonic()
    check(address, tmp_path, kind)
    assert time.monotonic() - began < BOUND


def test_all_kinds_at_once(address, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_LOST", 1000)  # there are more of them than of other rows
    waiting = ("limit-", "wait-", "before-", "status-429", "hangs", "drips", "endless")
    check(address, tmp_path, *(k for k in KINDS if not k.startswith(waiting)))


@pytest.mark.parametrize("kind", row_faults.FATAL)
def test_what_concerns_every_row_stops_the_run(address, tmp_path, kind):
    with pytest.raises(UserError):
        rate(address, tmp_path, kind)
    kept = latest(tmp_path / "ratings.jsonl")
    assert 0 < len(kept) < 40 and {x["status"] for x in kept} == {"ok"}


def test_there_are_enough_kinds():
    assert len(set(KINDS)) >= 60
