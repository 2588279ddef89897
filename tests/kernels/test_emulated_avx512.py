"""The AVX-512 libraries on any x86-64 CPU that has AVX2, their instructions emulated (emulated_avx512.h).

They are built into build/emulated, in some minutes; `make cross-check` runs this too. First on the inputs of
cross_driver.cpp, beside AVX2's library, then by the tests of all native kernels. How fast AVX-512 is they
cannot tell.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from kernels.cross_results import (
    EMULATED,
    EMULATED_SETS,
    Results,
    assert_close,
    assert_same,
    built,
    emulated_avx512,
    results,
)
from kernels.test_instruction_sets import NATIVE, TESTS, run_tests
from lowbit.kernels import native

WIDE = ("attention format 0 ", "attention format 2 ")  # float32 and float16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not native.has("avx2"), reason="emulated by AVX2"),
]


@pytest.fixture(scope="module")
def libraries() -> dict[str, Path]:
    return emulated_avx512()


@pytest.fixture(scope="module")
def of_avx2() -> Results:
    EMULATED.mkdir(parents=True, exist_ok=True)
    return results(EMULATED, built("avx2"))["avx2"]


@pytest.mark.parametrize("isa", EMULATED_SETS)
def test_results_beside_those_of_avx2(isa: str, libraries: dict[str, Path], of_avx2: Results) -> None:
    """Without BF16 they are AVX2's bits; with it linear layers and attention round to bfloat16, the latter
    unless the cache's numbers are wider."""
    found = results(EMULATED, {isa: libraries[isa]})[isa]
    assert set(of_avx2) <= set(found)
    assert all(" input 2 " in name for name in set(found) - set(of_avx2)), "int8 inputs, AVX2 takes fewer"
    rounded = 0
    for name, expected in of_avx2.items():
        attention = name.startswith("attention") and expected.dtype != np.uint8 and not name.startswith(WIDE)
        size = np.abs(expected).max() if attention else of_avx2.get(name + " size")
        if isa == "avx512_emulated" and size is not None:
            assert_close(name, found[name], expected, size, 2.0**-6 if attention else 2.0**-9)
            rounded += not np.array_equal(found[name], expected, equal_nan=True)
        else:
            assert_same(name, found[name], expected)
    assert (rounded > 0) == (isa == "avx512_emulated")


@pytest.mark.skipif(bool(os.environ.get("LOWBIT_ISA")), reason="an instruction set is forced already")
@pytest.mark.parametrize("isa", EMULATED_SETS)
def test_kernels_under(isa: str, libraries: dict[str, Path]) -> None:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {"LOWBIT_ISA": isa, "LOWBIT_NATIVE_DIR": str(libraries[isa].parent), "PYTHONPATH": path}
    run_tests(NATIVE, environment, "-p", "covering")
