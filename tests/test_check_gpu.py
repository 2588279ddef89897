"""``make check-gpu``: parts that fail, hang or find no time lose no other part's result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmark_modules import FOLDER, benchmark_module

check_gpu = benchmark_module("check_gpu")
HANGS = "import subprocess, sys, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"


def test_every_part_leaves_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [
        check_gpu.Part("environment", ("-c", "print('x'); print('{\"gpu\": 1}')"), 20),
        check_gpu.Part("fails", ("-c", "print('FAILED one: why'); raise SystemExit(3)"), 20),
        check_gpu.Part("hangs", ("-c", HANGS), 1),
        check_gpu.Part("last", ("-c", ""), 20),
    ]
    monkeypatch.setattr(check_gpu, "parts", lambda: planned)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--into", str(tmp_path), "--seconds", "40"])
    began = time.monotonic()
    assert check_gpu.main() == 1
    assert time.monotonic() - began < 20, "what a part started is ended with it"
    said = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(one["part"], one["is"]) for one in said] == [
        ("environment", "ok"),
        ("fails", "failed"),
        ("hangs", "out of time"),
        ("last", "ok"),
    ]
    assert said[0]["found"] == {"gpu": 1} and said[1]["said"][0] == "FAILED one: why"
    assert said[2]["said"] == ["begun"]


def test_without_a_gpu_nothing_else_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [check_gpu.Part("environment", ("-c", "raise SystemExit('no GPU')"), 20)]
    monkeypatch.setattr(check_gpu, "parts", lambda: [*planned, check_gpu.Part("engine", ("-c", ""), 20)])
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--into", str(tmp_path), "--seconds", "40"])
    assert check_gpu.main() == 1
    assert "no GPU" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_parts_that_find_no_time_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "parts", lambda: [check_gpu.Part("engine", ("-c", ""), 20)])
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--into", str(tmp_path), "--seconds", "1"])
    assert check_gpu.main() == 0
    assert json.loads((tmp_path / "results.jsonl").read_text()) == {"part": "engine", "is": "not begun"}


def test_the_real_server_is_among_the_first_parts() -> None:
    names = [part.name for part in check_gpu.parts()]
    assert names.index("serve") < names.index("step-1b")


@pytest.mark.slow
def test_a_server_is_asked_and_compared(tmp_path: Path) -> None:
    """On a CPU both are one, and agree to the last bit; a random model where none is cached.

    Where a prompt's tokens meet weights as generated ones do: the second server reads them as a prompt.
    """
    folders = (FOLDER.parent / "src", FOLDER, *sys.path)
    environment = {
        **os.environ,
        "LOWBIT_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    words = [str(FOLDER / "gpu_serve.py"), "--device", "cpu", "--tokens", "4", "--flags=--exact-prompts"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == 48 and found["largest_difference"] == 0 and found["captured_steps"] > 0
