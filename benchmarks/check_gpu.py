"""Does lowbit work on this GPU, and how fast is it, in a few minutes: ``make check-gpu``.

Parts run in the order of what they tell, each in a process of its own and for so long at most; those that
find no time any more are named. What a part found is a JSON line in --into as soon as it ends, and all that
it printed stands in log.txt there, so that a machine that goes away has lost one part at most. A part that
fails stops none but the first. Exit code: how many failed.

    python benchmarks/check_gpu.py --seconds 280 --into build/gpu-check
    python benchmarks/check_gpu.py --only kernels linear --seconds 600

Needs torch with CUDA, Triton with a C compiler and Python's headers, what lowbit depends on (without the
server's packages the part "serve" is left out), and pytest with pytest-timeout and pytest-xdist; no network
and no native library.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LEAST = 10  # seconds without which a part is not begun
TAIL = 25  # lines of a part that its JSON line has, where it ended with no JSON; and of failed tests

ENVIRONMENT = """
import json, platform, shutil, subprocess, sys, sysconfig, pathlib
import torch, triton
found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
found["compiler"] = shutil.which("gcc") or shutil.which("clang") or "none"
found["headers"] = pathlib.Path(sysconfig.get_paths()["include"], "Python.h").is_file()
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no GPU"
one = torch.cuda.get_device_properties(0)
found |= {"gpu": one.name, "capability": f"{one.major}.{one.minor}", "processors": one.multi_processor_count}
found["memory"], found["gpus"] = one.total_memory, torch.cuda.device_count()
from lowbit.kernels.gpu import attention, runtime
found["shared_memory"] = attention._device(torch.device("cuda")).shared
runtime.check(torch.device("cuda"))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """A process: its name, Python's words for it, and the most seconds it gets."""

    name: str
    words: tuple[str, ...]
    seconds: int


def tests(*words: str, workers: int) -> tuple[str, ...]:
    """Tests in so many processes: most of their time is that of compiling kernels."""
    options = ("-s", "-p", "no:cacheprovider", "-p", "check_gpu", "--tb=short", "--timeout=300")
    return ("-m", "pytest", *options, "-n", str(workers), "--dist=worksteal", *words)


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of those tests: what fails is said at once, in a line, as the process may not come to its
    end."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = str(crash.message if crash else report.longrepr).partition("\n")[0]
        print(f"\nFAILED {report.nodeid}: {said}", flush=True)


def parts() -> list[Part]:
    """In the order of what they tell."""
    workers = min(os.cpu_count() or 1, 14)
    engine = ("tests/gpu/test_gpu_engine.py", "tests/gpu/test_runtime.py")
    steps = ("--step", "1x128", "32x512", "1x2048p", "--repeats", "10")
    linear = ("--shapes", "8B out", "--tokens", "1", "16", "256", "4096", "--repeats", "3", "--formats")
    return [
        Part("environment", ("-c", ENVIRONMENT), 60),
        Part("engine", tests(*engine, "-m", "", workers=min(workers, 4)), 100),
        Part("graphs", tests("tests/gpu/test_gpu_graphs.py", "-m", "", workers=workers), 80),
        Part("serve", ("benchmarks/gpu_serve.py",), 120),
        Part("step-1b", ("benchmarks/gpu_step.py", "--made", "1b", *steps), 60),
        Part("kernels", tests("tests/gpu", "--ignore=tests/gpu/test_gpu_graphs.py", workers=workers), 240),
        Part("step-8b", ("benchmarks/gpu_step.py", *steps), 120),
        Part(
            "linear",
            ("benchmarks/linear.py", "--device", "cuda", *linear, "int4 g128", "q4_k", "fp8 channel", "w8a8"),
            90,
        ),
        Part("attention", ("benchmarks/attention.py", "--device", "cuda", "--repeats", "5"), 90),
    ]


def run(part: Part, seconds: float, folder: Path) -> dict[str, object]:
    """What came of a part: "ok", "failed" or "out of time", its last JSON line, else its last lines."""
    path, began = folder / "log.txt", time.monotonic()
    folders = (ROOT / "src", ROOT / "benchmarks", os.environ.get("PYTHONPATH"))
    source = os.pathsep.join(str(folder) for folder in folders if folder)
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1"}
    with path.open("a") as log:
        print(f"== {part.name}", file=log, flush=True)
        start = log.tell()
        child = subprocess.Popen(
            [sys.executable, *part.words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
            said = "failed" if status else "ok"
        except subprocess.TimeoutExpired:
            said = "out of time"
            os.killpg(child.pid, signal.SIGKILL)  # and the processes it started
            child.wait()
    lines = path.read_bytes()[start:].decode(errors="replace").splitlines()
    found: dict[str, object] = {"part": part.name, "is": said, "seconds": round(time.monotonic() - began, 1)}
    try:
        found["found"] = json.loads(lines[-1])
    except (IndexError, ValueError):
        failed = [line for line in lines if line.startswith("FAILED")]
        found["said"] = [*failed[:TAIL], *lines[-TAIL:]]
    return found


def main() -> int:
    """How many parts failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    known = [part.name for part in parts()]
    parser.add_argument("--only", nargs="*", choices=known, default=known, metavar="PART", help=str(known))
    parser.add_argument("--seconds", type=float, default=280, help="for all of it (default: 280)")
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "gpu-check", help="a folder")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    (options.into / "log.txt").unlink(missing_ok=True)
    limit, failed = time.monotonic() + options.seconds, 0
    with (options.into / "results.jsonl").open("w") as results:
        for part in parts():
            if part.name not in options.only:
                continue
            left = limit - time.monotonic()
            if left < LEAST:
                found: dict[str, object] = {"part": part.name, "is": "not begun"}
            else:
                found = run(part, min(part.seconds, left), options.into)
            failed += found["is"] == "failed"
            print(f"{part.name:12} {found['is']:12} {found.get('seconds', '')} s", flush=True)
            results.write(json.dumps(found) + "\n")
            results.flush()
            if part.name == "environment" and found["is"] != "ok":
                print(json.dumps(found, indent=1))
                return 1  # nothing else can be
    return failed


if __name__ == "__main__":
    sys.exit(main())
