"""The ARM libraries, cross-compiled into build/cross and run by an emulator on what AVX2's is run on.

Needs a cross compiler and qemu's user-mode emulator (Debian: g++-aarch64-linux-gnu, qemu-user);
`make cross-check` runs it. On made-up inputs (cross_driver.cpp) the library `neon` gives AVX2's bits in
everything; `neon_bf16` too, but for the products of linear layers with bfloat16 inputs: those are compared
with AVX-512's, which multiplies bfloat16 as well, or, where a CPU lacks it, with AVX2's 16-bit whole numbers
to within what bfloat16 rounds. How fast they are an emulator cannot tell.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowbit.kernels import native

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "cross"
DRIVER = Path(__file__).with_name("cross_driver.cpp")
PREFIX = "aarch64-linux-gnu"
ARM_SETS = ("neon", "neon_bf16")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not native.has("avx2"), reason="compares with AVX2"),
]


def tool(name: str, package: str) -> str:
    """A program of this environment or of the system."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} (Debian: {package})")
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def driver(compiler: str, flags: list[str], name: str) -> Path:
    file = FOLDER / name
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *flags, "-I", str(ROOT / "src/lowbit/csrc")]
    run(compiler, *flags, DRIVER, "-o", file, "-ldl")
    return file


@pytest.fixture(scope="module")
def libraries() -> dict[str, Path]:
    """Both libraries; a warning is an error."""
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("no native sources here")
    compiler, cmake = tool(f"{PREFIX}-g++", f"g++-{PREFIX}"), tool("cmake", "cmake")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    target.append(f"-DCMAKE_CXX_COMPILER={compiler}")
    run(cmake, "-S", ROOT, "-B", FOLDER, *target, "-DCMAKE_BUILD_TYPE=Release", "-DLOWBIT_WERROR=ON")
    run(cmake, "--build", FOLDER, "--parallel", str(os.cpu_count()))
    return {isa: FOLDER / f"liblowbit_{isa}.so" for isa in ARM_SETS}


def read(file: Path) -> dict[str, np.ndarray]:
    data, at, results = file.read_bytes(), 0, {}
    while at < len(data):
        end = data.index(b"\n", at)
        count = int.from_bytes(data[end + 2 : end + 10], "little")
        kind = np.dtype({b"f": np.float32, b"b": np.uint8}[data[end + 1 : end + 2]])
        name = data[at:end].decode()
        assert name not in results
        results[name] = np.frombuffer(data, kind, count, end + 10)
        at = end + 10 + count * kind.itemsize
    return results


@pytest.fixture(scope="module")
def of_x86(libraries: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    """What AVX2 makes of the inputs, and AVX-512 where there is one."""
    program = driver(tool("g++", "g++"), ["-mavx2", "-mfma", "-mf16c", "-mbmi2"], "driver_x86")
    results: dict[str, dict[str, np.ndarray]] = {}
    for isa in ("avx2", "avx512"):
        library = native._library_file(isa)
        if native.has(isa) and library is not None:
            run(program, library, FOLDER / f"{isa}.results")
            results[isa] = read(FOLDER / f"{isa}.results")
        elif isa == "avx2":
            pytest.skip("no AVX2 library to compare with")
    return results


@pytest.mark.parametrize("isa", ARM_SETS)
def test_arm_results_are_those_of_avx2(
    isa: str, libraries: dict[str, Path], of_x86: dict[str, dict[str, np.ndarray]]
) -> None:
    emulator = tool("qemu-aarch64", "qemu-user")
    program = driver(tool(f"{PREFIX}-g++", f"g++-{PREFIX}"), ["-march=armv8.2-a+dotprod"], "driver_arm")
    results = FOLDER / f"{isa}.results"
    run(emulator, "-L", f"/usr/{PREFIX}", program, libraries[isa], results)
    found = read(results)
    wanted = of_x86.get("avx512", {}) | of_x86["avx2"]  # int8 inputs that AVX2 does not take
    products, limit = (of_x86["avx512"], 3e-6) if "avx512" in of_x86 else (wanted, 2.0**-9)
    assert set(wanted) <= set(found)
    assert all(" input 2 " in name for name in set(found) - set(wanted))
    assert len([name for name in found if name.startswith("linear")]) > 1000
    rounded = 0
    for name, expected in wanted.items():
        if expected.dtype == np.uint8:
            assert np.array_equal(found[name], expected), name
        elif isa == "neon_bf16" and name + " size" in wanted:
            # The sums of products, by what |x| |w|^T is, to which the error of a sum is relative.
            difference = np.abs(found[name].astype(np.float64) - products[name])
            assert np.nanmax(difference / wanted[name + " size"]) < limit, name
            assert np.array_equal(np.isnan(found[name]), np.isnan(expected)), name
            rounded += not np.array_equal(found[name], expected, equal_nan=True)
        else:
            assert np.array_equal(found[name], expected, equal_nan=True), name
    assert (rounded > 0) == (isa == "neon_bf16")
