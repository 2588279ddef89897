"""Every launch of these tests compiles for Ampere and Hopper, some of each kernel for Blackwell.

They spill little and fit in shared memory.

No GPU is needed: Triton compiles for a target by its number. The tests are run, in a process a core, to write
down what they launch; then each core compiles. Triton keeps what it compiled: the next run compiles what is
new.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SPILLS = 256  # bytes a thread may spill


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_launch_compiles_for_real_gpus(tmp_path: Path) -> None:
    launches = tmp_path / "launches.jsonl"
    tests = [str(path) for path in sorted(HERE.glob("test_*.py")) if path.name != Path(__file__).name]
    environment = os.environ | {"LOWBIT_TEST_RECORD_LAUNCHES": str(launches), "CUDA_VISIBLE_DEVICES": ""}
    cores = f"--numprocesses={len(os.sched_getaffinity(0))}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", cores, "--dist=worksteal", *tests]
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True, cwd=HERE.parents[1])
    recorded = time.monotonic()
    environment.pop("TRITON_INTERPRET", None)
    compiled = subprocess.run(
        [sys.executable, str(HERE / "compile_launches.py"), str(launches)],
        env=environment,
        capture_output=True,
        text=True,
    )
    said = [json.loads(line) for line in compiled.stdout.splitlines()]
    assert said, compiled.stderr
    seconds = recorded - began, time.monotonic() - recorded
    print(f"{len(said)} compilations; recorded in {seconds[0]:.0f} s, compiled in {seconds[1]:.0f} s")
    assert not [one for one in said if "error" in one]
    assert not [one for one in said if one["spills"] > SPILLS]
