"""What stands around a command: pipes, signals, streams, a full disk, proxies, lost files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_endpoint import answering, asked, command, completion, lines, rate, read, run, serving
from test_endpoint import write_rows as write_many

from alpagasus2.core.files import UserError
from alpagasus2.endpoint import cache


def ends(*words: object, folder: Path, **environ: str) -> tuple[int, str]:
    """Status and standard error of a command whose standard output nobody reads."""
    process = subprocess.Popen(
        [sys.executable, "-m", "alpagasus2", *map(str, words)], cwd=folder,
        env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    return process.wait(timeout=300), process.stderr.read()


@pytest.mark.parametrize("words", [["--help"], ["check", "rows.json"], ["plan", "--json"]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_leaves_ends_a_command_without_a_word(words, buffered, tmp_path):
    write_many(tmp_path, 3)
    status, told = ends(*words, folder=tmp_path, PYTHONUNBUFFERED=buffered)
    assert status == 141 and "alpagasus2:" not in told and "Error" not in told


def test_a_stream_that_cannot_show_a_character_ends_no_work(tmp_path):
    rows = write_many(tmp_path, 3).rename(tmp_path / "zeilen_größe.json")
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    status, said = run("check", rows.name, cwd=tmp_path, **ascii_only)
    assert status == 0 and "zeilen_gr\\xf6\\xdfe.json: 3 of 3 rows are good" in said
    status, said = run("check", rows.name, "--json", cwd=tmp_path, **ascii_only)
    assert json.loads(said.splitlines()[-1])["printed"][0].startswith(rows.name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_asked_to_stop_loses_no_reply(number, tmp_path):
    write_many(tmp_path, 24)
    with serving(latency=0.4) as address:
        rating = [*rate(address, tmp_path, "--workers", 4)]
        before = signal.signal(number, signal.SIG_DFL)  # inherited: these tests may be under nohup
        process = command(*rating, cwd=tmp_path)
        signal.signal(number, before)
        while not (tmp_path / "ratings.jsonl").exists() or not lines(tmp_path / "ratings.jsonl"):
            time.sleep(0.02)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "alpagasus2: stopped; run the same command again to go on" in said
        assert 0 < read(address)["requests"] < 24
        assert run(*rating, cwd=tmp_path)[0] == 0
        assert read(address)["requests"] == 24


def test_nohup_stays(tmp_path):
    write_many(tmp_path, 8)
    with serving(latency=0.4) as address:
        usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child process inherits it
        try:
            process = command(*rate(address, tmp_path, "--workers", 1), cwd=tmp_path)
        finally:
            signal.signal(signal.SIGHUP, usual)
        while not (tmp_path / "ratings.jsonl").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=120)
        assert process.returncode == 0 and len(lines(tmp_path / "ratings.jsonl")) == 8


def test_what_a_full_disk_could_not_keep_is_not_asked_for(tmp_path, monkeypatch):
    disk = shutil.disk_usage(tmp_path)
    with answering(lambda body, n: (200, completion())) as (url, calls):
        asked(url, tmp_path, ["one"])
        full = disk._replace(free=1_000_000)
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: full if calls[2:] else disk)
        with pytest.raises(UserError, match=r"the disk has 1\.0 MB left.* make room"):
            asked(url, tmp_path, ["one", "two", "three", "four", "five"])
        assert len(calls) == 3
        monkeypatch.undo()
        asked(url, tmp_path, ["one", "two", "three", "four", "five"])
        assert len(calls) == 5


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_a_sentence(proxy, tmp_path):
    write_many(tmp_path, 2)
    env = {"ALL_PROXY": proxy, "OPENAI_API_KEY": "secret"}
    status, said = run(*rate("http://example.invalid", tmp_path), cwd=tmp_path, **env)
    assert status == 2 and "Traceback" not in said and "a proxy" in said.splitlines()[-1]
    with serving() as address:  # none leads to this machine
        assert run(*rate(address, tmp_path), cwd=tmp_path, **env)[0] == 0
