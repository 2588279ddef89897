"""What libraries for other CPUs make of cross_driver.cpp's inputs: compiled and compared by slow tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowbit.kernels import native

Results = dict[str, np.ndarray]

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("cross_driver.cpp")
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
EMULATED = ROOT / "build" / "emulated"
EMULATED_SETS = ("avx512_vnni_emulated", "avx512_emulated")


def tool(name: str, package: str) -> str:
    """A program of this environment or of the system."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} (Debian: {package})")
    return found


def run(*command: str | Path) -> None:
    """To its end, which is no failure."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def build(folder: Path, options: list[str], isas: tuple[str, ...]) -> dict[str, Path]:
    """Their libraries; a warning is an error."""
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("no native sources here")
    cmake = tool("cmake", "cmake")
    run(cmake, "-S", ROOT, "-B", folder, *options, "-DCMAKE_BUILD_TYPE=Release", "-DLOWBIT_WERROR=ON")
    targets = [f"lowbit_{isa}" for isa in isas]
    run(cmake, "--build", folder, "--parallel", str(os.cpu_count()), "--target", *targets)
    return {isa: folder / f"liblowbit_{isa}.so" for isa in isas}


def emulated_avx512() -> dict[str, Path]:
    """The libraries of AVX-512 for a CPU that has AVX2 only."""
    compiler = f"-DCMAKE_CXX_COMPILER={tool('g++', 'g++')}"
    return build(EMULATED, [compiler, "-DLOWBIT_EMULATE_AVX512=ON"], EMULATED_SETS)


def driver(compiler: str, flags: list[str], file: Path) -> Path:
    """The driver, compiled."""
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *flags, "-I", str(ROOT / "src/lowbit/csrc")]
    run(compiler, *flags, DRIVER, "-o", file, "-ldl")
    return file


def results(folder: Path, libraries: dict[str, Path]) -> dict[str, Results]:
    """What libraries that this CPU runs make of the inputs."""
    program = driver(tool("g++", "g++"), AVX2_FLAGS, folder / "driver_x86")
    for isa, library in libraries.items():
        run(program, library, folder / f"{isa}.results")
    return {isa: read(folder / f"{isa}.results") for isa in libraries}


def built(*isas: str) -> dict[str, Path]:
    """The libraries of this installation that this CPU runs; AVX2's is one."""
    files = {isa: native._library_file(isa) for isa in isas if native.has(isa)}
    if files.get("avx2") is None:
        pytest.skip("no AVX2 library to compare with")
    return {isa: file for isa, file in files.items() if file is not None}


def read(file: Path) -> Results:
    """The results that a driver wrote."""
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        end = data.index(b"\n", at)
        count = int.from_bytes(data[end + 2 : end + 10], "little")
        kind = np.dtype({b"f": np.float32, b"b": np.uint8}[data[end + 1 : end + 2]])
        name = data[at:end].decode()
        assert name not in found
        found[name] = np.frombuffer(data, kind, count, end + 10)
        at = end + 10 + count * kind.itemsize
    return found


def assert_same(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    """All bits; a NaN is any NaN."""
    floats = expected.dtype != np.uint8
    assert np.array_equal(found, expected, equal_nan=floats), name


def assert_close(name: str, found: np.ndarray, expected: np.ndarray, size: np.ndarray, limit: float) -> None:
    """``size``: to what the error is relative; for sums of products that is |x| |w|^T."""
    difference = np.abs(found.astype(np.float64) - expected)
    assert np.nanmax(difference / size) < limit, name
    assert np.array_equal(np.isnan(found), np.isnan(expected)), name
