"""benchmarks/ready.py: what it reads of processes, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark_modules import benchmark_module

ready = benchmark_module("ready")


def test_cpu_seconds_are_those_of_a_process_and_its_children() -> None:
    """A parent that does nothing, and a child that works until it has taken 0.2 s."""
    child = "import sys, time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\nsys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", parent], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        assert 0.19 <= ready.cpu_seconds(process.pid) < 1.5
        process.stdin.close()


@pytest.mark.parametrize(("model", "said"), [("no/such/folder", "E0"), ("", "E0")])
def test_a_server_that_does_not_start_is_said(model: str, said: str) -> None:
    with pytest.raises(SystemExit, match=rf"the server ended with status \d+: .*{said}"):
        ready.ready(model or "/", ["--load-format", "gguf"])


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Medians of differences within a turn, the first one not counted; one folder for all."""
    torch = iter([(9.0, 9.0), (1.0, 0.9), (2.0, 1.9), (1.2, 1.1)])
    plain = iter([(9.0, 9.0), (1.5, 1.6), (2.9, 1.7), (1.7, 1.5)])
    mapped = iter([(9.0, 9.0), (1.3, 1.2), (2.4, 1.3), (1.4, 1.4)])
    seen: list[tuple[str, tuple[str, ...]]] = []

    def start(model: str, flags: list[str]) -> tuple[float, float]:
        seen.append((model, tuple(flags)))
        if flags[-1] == "off":
            return next(plain)
        (Path(flags[-1]) / "x.packed").write_text("")
        return next(mapped)

    monkeypatch.setattr(ready, "import_torch", lambda: next(torch))
    monkeypatch.setattr(ready, "ready", start)
    monkeypatch.setattr(sys, "argv", ["ready.py", "m", "--flags=--quantization fp8", "--repeats", "3"])
    ready.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(set(seen)) == 2 and all(flags[:2] == ("--quantization", "fp8") for _, flags in seen)
    assert result["packed cache off"]["beyond_import_torch"] == 0.5
    assert result["packed cache on"]["beyond_import_torch"] == 0.3
    assert result["import torch"] == {
        "wall_seconds": 1.2, "wall_spread": 1.0, "cpu_seconds": 1.1, "cpu_spread": 1.0,
    }  # fmt: skip
    monkeypatch.setattr(ready, "ready", lambda model, flags: (1.0, 1.0))
    monkeypatch.setattr(ready, "import_torch", lambda: (1.0, 1.0))
    with pytest.raises(SystemExit, match="the packed cache kept nothing"):
        ready.main()
