"""The native library: which one is chosen, and that every instruction set keeps the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.errors import LowbitError
from lowbit.kernels import native

TESTS = Path(__file__).parents[1]
BUILT = [isa for isa in ("avx2", "avx512", "amx") if native.has(isa) and native._library_file(isa)]


def test_this_machine_has_a_library() -> None:
    """A build that silently made nothing would skip half of the tests."""
    if not native.has("avx2"):
        pytest.skip("a CPU without AVX2 runs on torch")
    assert native.isa() != "scalar" or os.environ.get("LOWBIT_ISA") == "scalar"
    assert str(native.threads()) in native.describe() or native.isa() == "scalar"


def in_process(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LOWBIT_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("isa", [*BUILT, "scalar"])
def test_isa_is_chosen_by_name(isa: str) -> None:
    done = in_process("from lowbit.kernels import native; print(native.isa(), native.describe())", isa)
    assert done.stdout.startswith(isa), done.stderr


@pytest.mark.parametrize("isa", ["avx3", "AVX2", "neon"])
def test_unknown_isa_is_an_error(isa: str) -> None:
    done = in_process("from lowbit.kernels import native; native.library()", isa)
    assert done.returncode and f"LOWBIT_ISA={isa} is no instruction set" in done.stderr


def test_missing_isa_is_an_error_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ISA", "amx")
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(LowbitError, match="this CPU has no amx_bf16, amx_int8, amx_tile") as caught:
        native.isa.__wrapped__()
    assert caught.value.code == "E0411"


def test_without_libraries_lowbit_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_directories", lambda: [tmp_path])
    monkeypatch.delenv("LOWBIT_ISA", raising=False)
    monkeypatch.setattr(native, "isa", native.isa.__wrapped__)
    assert native.isa() == "scalar"
    assert "not built" in native.describe() or "no AVX2" in native.describe()


@pytest.mark.parametrize("isa", [isa for isa in BUILT if isa != native.isa()])
@pytest.mark.parametrize("file", ["contract/test_linear_kernels.py", "kernels/test_experts.py"])
def test_contract_under_every_instruction_set(isa: str, file: str) -> None:
    """The other instruction sets of this CPU, in a process of their own."""
    environment = {**os.environ, "LOWBIT_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command.append(str(TESTS / file))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-3000:]


def test_threads_can_change_and_oversubscribe() -> None:
    if native.library() is None:
        pytest.skip("no native library")
    before = native.threads()
    for count in (1, 5, 2):
        native.set_threads(count)
        assert native.threads() == count
    native.set_threads(before)
