"""The AMX kernels with emulated tiles: each instruction, then whole linear layers, then attention.

The library is compiled here, from the sources as they are, and kept in pytest's cache until they change. That
the real one consists of tile instructions is read from its machine code; it runs only where a CPU has them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kernels import attention_results, linear_results
from lowbit.kernels import native

TESTS = Path(__file__).parents[1]
SOURCES = Path(native.__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++")
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-DLOWBIT_AMX",
    "-DLOWBIT_EMULATE_AMX",
]
FLAGS += [f"-m{name}" for name in ("avx2", "fma", "f16c", "bmi2")]
FLAGS += [f"-mavx512{name}" for name in ("f", "bw", "vl", "dq", "vnni", "bf16", "vbmi")]

# What the layers of linear_results.py need of the sources; the others, also of layouts that it has none of,
# are most of the compiler's time. References to their functions are made weak: null in this library.
LINEAR = ["activation_quant", "amx_tiles", "linear*", "rotation", "step_plan", "thread_pool"]
OTHER_LAYOUTS = {"linear_row_vectors", "linear_trellis"}
ATTENTION = ["amx_tiles", "attention*", "step_plan", "thread_pool"]  # the same for attention_results.py
WEAK = {"linear", "linear_pack", "linear_words", "step_plan"}
OBJCOPY = shutil.which("objcopy")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(not native.has("amx_emulated"), reason="AMX code needs AVX-512 beside its tiles"),
    pytest.mark.skipif(not SOURCES.is_dir(), reason="an installed package has no sources"),
]


def compile_library(folder: Path, name: str, sources: list[Path], weak: Collection[str] = ()) -> Path:
    """folder/name, made from sources unless it is there; what the sources weak refer to may be missing."""
    file = folder / name
    if file.is_file():
        return file

    def compiled(source: Path) -> str:
        to = folder / f"{source.stem}.o"
        level = (
            "-O3" if source.stem == "amx_tiles" else "-O1"
        )  # emulation is most of the run, the rest little
        command = [str(COMPILER), *FLAGS, level, f"-I{SOURCES}", "-c", str(source), "-o", str(to)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if source.stem in weak:
            subprocess.run([str(OBJCOPY), "--weaken", str(to)], check=True)
        return str(to)

    with ThreadPoolExecutor(native.available_cores()) as threads:
        objects = list(threads.map(compiled, sources))
    made = folder / f"{name}.new"
    subprocess.run([str(COMPILER), "-shared", "-pthread", *objects, "-o", str(made)], check=True)
    made.rename(file)
    return file


def kept(request: pytest.FixtureRequest, sources: list[Path]) -> Path:
    """A folder for what is compiled from these sources, headers and flags."""
    hashed = hashlib.sha256(" ".join([str(COMPILER), *FLAGS]).encode())
    for source in sorted([*sources, *SOURCES.glob("*.h")]):
        hashed.update(source.read_bytes())
    return request.config.cache.mkdir(f"amx-{hashed.hexdigest()[:16]}")


@pytest.fixture(scope="module")
def driver_file(request: pytest.FixtureRequest) -> Path:
    sources = [Path(__file__).with_name("amx_driver.cpp"), SOURCES / "amx_tiles.cpp"]
    return compile_library(kept(request, sources), "driver.so", sources)


@pytest.fixture(scope="module")
def library_folder(request: pytest.FixtureRequest) -> Path:
    """Where liblowbit_amx_emulated.so lies."""
    sources = sorted(SOURCES.glob("*.cpp"))
    return compile_library(kept(request, sources), "liblowbit_amx_emulated.so", sources).parent


@pytest.fixture(scope="module")
def linear_library_folder(request: pytest.FixtureRequest) -> Path:
    """The same of linear layers alone."""
    if OBJCOPY is None:
        return request.getfixturevalue("library_folder")
    sources = sorted(source for name in LINEAR for source in SOURCES.glob(f"{name}.cpp"))
    sources = [source for source in sources if source.stem not in OTHER_LAYOUTS]
    return compile_library(kept(request, sources), "liblowbit_amx_emulated.so", sources, WEAK).parent


@pytest.fixture(scope="module")
def attention_library_folder(request: pytest.FixtureRequest) -> Path:
    """The same of attention alone."""
    if OBJCOPY is None:
        return request.getfixturevalue("library_folder")
    sources = sorted(source for name in ATTENTION for source in SOURCES.glob(f"{name}.cpp"))
    return compile_library(kept(request, sources), "liblowbit_amx_emulated.so", sources, WEAK).parent


def dot(file: Path, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a b by one instruction; bfloat16 as uint16, or int8 times uint8."""
    result = np.ascontiguousarray(c).copy()
    addresses = [array.ctypes.data_as(ctypes.c_void_p) for array in (a, b, result)]
    ctypes.CDLL(str(file)).dot(int(a.dtype == np.int8), len(a), *addresses)
    return result


def bfloats(values: np.ndarray) -> np.ndarray:
    """Cut to bfloat16's bits."""
    return np.ascontiguousarray((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products (rows, 32, 16) of A's columns and B's, which lie in pairs; exact in float64."""
    wide = floats(b).reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
    return floats(a).astype(np.float64)[:, :, None] * wide.astype(np.float64)[None]


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_bfloat_product_has_the_order_of_the_manual(driver_file: Path, rows: int) -> None:
    """Even columns and odd ones in two chains, each sum rounded; then both together, then C."""
    generator = np.random.default_rng(rows)
    a, b = (bfloats(generator.standard_normal((count, 32))) for count in (rows, 16))
    c = generator.standard_normal((rows, 16)).astype(np.float32)
    exact = products(a, b)  # of like size: a float64 sum of two is exact, and rounded once
    chains = np.zeros((2, rows, 16), np.float32)
    for column in range(32):
        chains[column % 2] = (chains[column % 2].astype(np.float64) + exact[:, column]).astype(np.float32)
    expected = c + (chains[0] + chains[1])
    assert np.array_equal(dot(driver_file, a, b, c), expected)
    plain = c.copy()
    for column in range(32):
        plain = (plain.astype(np.float64) + exact[:, column]).astype(np.float32)
    assert not np.array_equal(plain, expected), "these numbers do not tell the orders apart"


def test_subnormal_numbers_are_zeros(driver_file: Path) -> None:
    a, b = np.zeros((1, 32), np.uint16), np.zeros((16, 32), np.uint16)
    c = np.zeros((1, 16), np.float32)
    a[0, 0], a[0, 2], a[0, 4] = 0x0040, bfloats(np.array([2.0**-70]))[0], 0x3F80
    b[0, 0], b[1, 2], b[2, 4] = 0x3F80, bfloats(np.array([2.0**-70]))[0], 0x0080
    c[0, :4] = 2.0**-140
    found = dot(driver_file, a, b, c)
    assert found[0, 2] == np.float32(2.0**-126), "the smallest normal number is one"
    assert not found[0, [0, 1, 3]].any(), "an operand, a product, C itself"


def test_special_numbers_go_through(driver_file: Path) -> None:
    a, b = bfloats(np.ones((2, 32))), bfloats(np.ones((16, 32)))
    a[1, 3] = 0x7F80
    found = dot(driver_file, a, b, np.zeros((2, 16), np.float32))
    assert (found[0] == 32).all() and np.isposinf(found[1]).all()
    b[1, 1] = 0xFF80  # column 3 of output 0
    found = dot(driver_file, a, b, np.zeros((2, 16), np.float32))
    assert np.isneginf(found[:, 0]).all() and np.isposinf(found[1, 1:]).all()


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_byte_product_is_exact(driver_file: Path, rows: int) -> None:
    generator = np.random.default_rng(rows)
    a = generator.integers(-128, 128, (rows, 64)).astype(np.int8)
    b = generator.integers(0, 256, (16, 64)).astype(np.uint8)
    c = generator.integers(-(2**31), 2**31, (rows, 16)).astype(np.int32)
    wide = b.reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16).astype(np.int64)
    expected = (c.astype(np.int64) + a.astype(np.int64) @ wide).astype(np.int32)  # wraps around
    assert np.array_equal(dot(driver_file, a, b, c), expected)


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        ("without_configuration", "tilezero would fault: no configuration is loaded"),
        ("after_release", "tilezero would fault: no configuration is loaded"),
        ("too_many_rows", "ldtilecfg would fault: a tile has more than 16 rows"),
        ("unlike_rows", "tdpbsud would fault: C and A have unlike rows"),
        ("same_tile", "tdpbf16ps would fault: two operands are the same tile"),
    ],
)
def test_misuse_ends_the_program(driver_file: Path, misuse: str, words: str) -> None:
    code = f"import ctypes; ctypes.CDLL({str(driver_file)!r}).{misuse}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode < 0 and words in done.stderr


def run_emulated(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LOWBIT_ISA": "amx_emulated", "LOWBIT_NATIVE_DIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
@pytest.mark.timeout(600)  # the library is compiled first
def test_linear_layers_keep_the_contract(library_folder: Path) -> None:
    contract = [str(TESTS / "contract" / f"test_{name}.py") for name in ("linear_kernels", "int8_inputs")]
    contract.append(str(TESTS / "kernels" / "test_probes.py"))  # they use tiles too
    done = run_emulated(library_folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *contract)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.timeout(600)
def test_results_of_other_libraries(linear_library_folder: Path, tmp_path: Path) -> None:
    """Whole numbers give the bits of AVX-512: sums of bytes are exact, what follows is the same arithmetic.

    On a CPU with AMX every input gives the bits of its tiles.
    """
    if native.isa() not in ("amx", "avx512"):
        pytest.skip("compares with the AMX or the AVX-512 library")
    file = tmp_path / "results.npz"
    done = run_emulated(linear_library_folder, str(Path(__file__).with_name("linear_results.py")), str(file))
    assert done.returncode == 0, done.stderr
    with np.load(file) as emulated:
        for name, expected in linear_results.results().items():
            assert np.isfinite(expected).all() and expected.any(), name
            # Groups of 96 are no whole lines of 64 bytes: AMX scales every 32 columns there.
            exact = name.startswith("groups") or (name.startswith("codes") and "g96" not in name)
            if exact or native.isa() == "amx":
                assert np.array_equal(emulated[name], expected), name
            elif name.startswith("prompts"):  # for them AMX rounds weights
                assert np.allclose(emulated[name], expected, rtol=2**-7, atol=2**-8 * expected.max()), name
            else:
                assert np.allclose(emulated[name], expected, rtol=1e-4, atol=1e-3), name


@pytest.mark.timeout(600)
def test_attention_of_other_libraries(attention_library_folder: Path, tmp_path: Path) -> None:
    """On a CPU with AMX the bits of its tiles; AVX-512 sums in another order."""
    if native.isa() not in ("amx", "avx512"):
        pytest.skip("compares with the AMX or the AVX-512 library")
    file = tmp_path / "results.npz"
    script = Path(attention_results.__file__)
    done = run_emulated(attention_library_folder, str(script), str(file))
    assert done.returncode == 0, done.stderr
    with np.load(file) as emulated:
        for name, expected in attention_results.results().items():
            assert np.isfinite(expected).all() and expected.any(), name
            if native.isa() == "amx":
                assert np.array_equal(emulated[name], expected), name
            else:
                assert np.allclose(emulated[name], expected, rtol=2**-7, atol=2**-7), name


def test_the_real_library_has_tile_instructions() -> None:
    file, objdump = native._library_file("amx"), shutil.which("objdump")
    if file is None or objdump is None:
        pytest.skip("no objdump, or no liblowbit_amx.so")
    code = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", str(file)], capture_output=True, text=True, check=True
    ).stdout
    for instruction in ("ldtilecfg", "tilerelease", "tileloadd", "tilestored", "tdpbf16ps", "tdpbsud"):
        assert instruction in code
