"""The native library: which one is chosen, and what happens where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.errors import LowbitError
from lowbit.kernels import native

BUILT = [isa for isa in native.INSTRUCTION_SETS if native.has(isa) and native._library_file(isa)]


def test_this_machine_has_a_library() -> None:
    """A build that silently made nothing would skip half of the tests."""
    if not (native.has("avx2") or native.has("neon")):
        pytest.skip("a CPU without AVX2 or NEON's dot products runs on torch")
    assert native.isa() != "scalar" or os.environ.get("LOWBIT_ISA") == "scalar"
    assert str(native.threads()) in native.describe() or native.isa() == "scalar"


CHOICES = """
import os, sys
from lowbit.kernels import native
for os.environ["LOWBIT_ISA"] in sys.argv[1:]:
    native.isa.cache_clear()
    native.library.cache_clear()
    print(native.isa(), native.describe())
"""


def test_isa_is_chosen_by_name() -> None:
    """In a process of its own, as each is loaded."""
    names = [*BUILT, "scalar"]
    done = subprocess.run(
        [sys.executable, "-c", CHOICES, *names], capture_output=True, text=True, timeout=60, check=True
    )
    found = done.stdout.splitlines()
    assert [line.split()[0] for line in found] == names
    assert all(f"native kernels: {isa}" in line for isa, line in zip(BUILT, found, strict=False)), found


@pytest.mark.parametrize("isa", ["avx3", "AVX2", "neon2"])
def test_unknown_isa_is_an_error(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ISA", isa)
    with pytest.raises(LowbitError, match=f"LOWBIT_ISA={isa} is no instruction set"):
        native.isa.__wrapped__()


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
    assert "not built" in native.describe() or "none for this CPU (no " in native.describe()


@pytest.fixture
def every_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A library was built for each set, also for emulated ones, and which one is in use is asked anew."""
    for isa in native._NEEDED_FLAGS:
        (tmp_path / f"liblowbit_{isa}.so").touch()
    monkeypatch.setattr(native, "_directories", lambda: [tmp_path])
    monkeypatch.setattr(native, "isa", native.isa.__wrapped__)
    monkeypatch.delenv("LOWBIT_ISA", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [
        ({"amx_int8"}, "avx512"),
        ({"amx_tile", "avx512_bf16"}, "avx512_vnni"),  # Intel's Ice Lake, or a machine that hides the rest
        ({"amx_tile", "avx512_bf16", "avx512vbmi"}, "avx2"),  # Cascade Lake
        ({"avx512f"}, "avx2"),
        ({"f16c", "avx512f"}, "scalar"),
    ],
)
def test_x86_takes_what_its_features_allow(
    missing: set[str], wanted: str, every_library: pytest.MonkeyPatch
) -> None:
    every_library.setattr(native, "cpu_flags", lambda: native._NEEDED_FLAGS["amx"] - missing)
    assert native.isa() == wanted


def test_an_emulated_set_has_the_kernels_of_the_real_one(every_library: pytest.MonkeyPatch) -> None:
    every_library.setattr(native, "cpu_flags", lambda: native._NEEDED_FLAGS["avx2"])
    assert native.isa() == native.base_isa() == "avx2", "none is chosen by itself"
    for isa in ("avx512", "avx512_vnni"):
        every_library.setenv("LOWBIT_ISA", f"{isa}_emulated")
        assert native.isa() == f"{isa}_emulated" and native.base_isa() == isa


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        ({"asimddp", "asimdrdm", "atomics", "bf16"}, "neon_bf16"),
        ({"asimddp", "asimdrdm", "atomics"}, "neon"),
        ({"bf16"}, "scalar"),
    ],
)
def test_arm_takes_what_its_features_allow(
    features: set[str], wanted: str, every_library: pytest.MonkeyPatch
) -> None:
    every_library.setattr(native, "_on_arm", lambda: True)
    every_library.setattr(native, "_arm_has", features.__contains__)
    every_library.setattr(native, "cpu_flags", native.cpu_flags.__wrapped__)
    assert native.isa() == wanted
    if wanted == "scalar":
        assert "no ARMv8.2 dot products" in native.describe()
        every_library.setenv("LOWBIT_ISA", "neon")
        with pytest.raises(LowbitError, match="this CPU has no asimddp, asimdrdm, atomics"):
            native.isa()


@pytest.mark.skipif(sys.platform != "linux", reason="asks as Linux answers")
def test_arm_features_are_bits_of_the_auxiliary_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor: whatever its bits mean there, they are read where Linux keeps them."""
    bits = {entry: native.ctypes.CDLL(None).getauxval(entry) & 0xFFFFFFFF for entry in (16, 26)}
    for name, (entry, bit, _) in native._ARM_FEATURES.items():
        assert native._arm_has(name) == bool(bits[entry] >> bit & 1)


def test_threads_can_change_and_oversubscribe() -> None:
    if native.library() is None:
        pytest.skip("no native library")
    before = native.threads()
    for count in (1, 5, 2):
        native.set_threads(count)
        assert native.threads() == count
    native.set_threads(before)


@pytest.mark.parametrize(
    ("groups", "quotas", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        # systemd's CPUQuota=, or a container that sees the host's cgroups: in its own folder, or around it
        ("0::/system.slice/lowbit.service\n", {"system.slice/lowbit.service/cpu.max": "300000 100000"}, 3),
        (
            "0::/pod/inner\n",
            {"pod/inner/cpu.max": "max 100000", "pod/cpu.max": "100000 50000", "cpu.max": "600000 100000"},
            2,
        ),
        ("0::/gone/../..\n", {"cpu.max": "20000 100000"}, 1),
        ("0::/docker/host/path\n", {"cpu.max": "400000 100000"}, 4),
        # version 1
        (
            "5:cpu,cpuacct:/docker/0a:b\n4:memory:/docker/0a:b\n",
            {"cpu/docker/0a:b/cpu.cfs_quota_us": "150000", "cpu/docker/0a:b/cpu.cfs_period_us": "50000"},
            3,
        ),
        ("5:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("", {"cpu/cpu.cfs_quota_us": "500000", "cpu/cpu.cfs_period_us": "100000"}, 5),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_a_quota_of_any_cgroup_around_bounds_threads(
    groups: str, quotas: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, mount = tmp_path / "self", tmp_path / "cgroup"
    process.mkdir()
    (process / "cgroup").write_text(groups)
    for name, text in quotas.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(f"{text}\n")
    monkeypatch.setattr(native, "_PROCESS", process)
    monkeypatch.setattr(native, "_CGROUPS", mount)
    monkeypatch.setattr(native.sys, "platform", "linux")
    monkeypatch.setattr(native.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert native.available_cores() == cores
