"""The ARM libraries, cross-compiled into build/cross and run by an emulator on what AVX2's is run on.

Needs a cross compiler and qemu's user-mode emulator (Debian: g++-aarch64-linux-gnu, qemu-user);
`make cross-check` runs it. On made-up inputs (cross_driver.cpp) the library `neon` gives AVX2's bits in
everything; `neon_bf16` too, but for the products of linear layers with bfloat16 inputs: those are compared
with AVX-512's, which multiplies bfloat16 as well and is emulated where a CPU lacks it
(test_emulated_avx512.py). How fast they are an emulator cannot tell.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernels.cross_results import (
    EMULATED,
    ROOT,
    Results,
    assert_close,
    assert_same,
    build,
    built,
    driver,
    emulated_avx512,
    read,
    results,
    run,
    tool,
)
from lowbit.kernels import native

FOLDER = ROOT / "build" / "cross"
PREFIX = "aarch64-linux-gnu"
ARM_SETS = ("neon", "neon_bf16")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not native.has("avx2"), reason="compares with AVX2"),
]


@pytest.fixture(scope="module")
def libraries() -> dict[str, Path]:
    """Both."""
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    target.append(f"-DCMAKE_CXX_COMPILER={tool(f'{PREFIX}-g++', f'g++-{PREFIX}')}")
    return build(FOLDER, target, ARM_SETS)


@pytest.fixture(scope="module")
def of_x86(libraries: dict[str, Path]) -> dict[str, Results]:
    """What AVX2 makes of the inputs, and AVX-512, emulated where there is none."""
    found = results(FOLDER, built("avx2", "avx512"))
    if "avx512" not in found:
        found["avx512"] = results(EMULATED, emulated_avx512())["avx512_emulated"]
    return found


@pytest.mark.parametrize("isa", ARM_SETS)
def test_arm_results_are_those_of_avx2(
    isa: str, libraries: dict[str, Path], of_x86: dict[str, Results]
) -> None:
    emulator = tool("qemu-aarch64", "qemu-user")
    compiler = tool(f"{PREFIX}-g++", f"g++-{PREFIX}")
    program = driver(compiler, ["-march=armv8.2-a+dotprod"], FOLDER / "driver_arm")
    file = FOLDER / f"{isa}.results"
    run(emulator, "-L", f"/usr/{PREFIX}", program, libraries[isa], file)
    found = read(file)
    wanted = of_x86["avx512"] | of_x86["avx2"]  # int8 inputs that AVX2 does not take
    assert set(wanted) <= set(found)
    assert all(" input 2 " in name for name in set(found) - set(wanted))
    assert len([name for name in found if name.startswith("linear")]) > 1000
    rounded = 0
    for name, expected in wanted.items():
        if isa == "neon_bf16" and name + " size" in wanted:
            assert_close(name, found[name], of_x86["avx512"][name], wanted[name + " size"], 3e-6)
            rounded += not np.array_equal(found[name], expected, equal_nan=True)
        else:
            assert_same(name, found[name], expected)
    assert (rounded > 0) == (isa == "neon_bf16")
