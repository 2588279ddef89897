"""The tests of all native kernels once more, under every other instruction set that this CPU has.

And, marked slow, in a build with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.kernels import native

TESTS = Path(__file__).parents[1]
CMAKE = TESTS.parent / "CMakeLists.txt"
NATIVE = [
    *("contract/test_linear_kernels.py", "kernels/test_attention.py", "kernels/test_cache_formats.py"),
    *("kernels/test_elementwise.py", "kernels/test_head_products.py", "kernels/test_activation_native.py"),
    *("kernels/test_encode.py", "kernels/test_step_plan.py", "quantize/test_gguf_blocks.py"),
    *("contract/test_int8_inputs.py", "contract/test_scaled_inputs.py", "kernels/test_experts.py"),
    *("kernels/test_row_peaks.py", "kernels/test_native_layer.py", "kernels/test_cpu_columns.py"),
    *("kernels/test_cpu_dense.py", "kernels/test_rotator.py", "kernels/test_recurrent.py"),
    *("kernels/test_activation_state.py", "kernels/test_probes.py", "kernels/test_screened_head.py"),
    "kernels/test_sampling.py",
]
# What runs on torch where there is no library.
SCALAR = [
    *("contract/test_linear_kernels.py", "kernels/test_elementwise.py", "kernels/test_head_products.py"),
    *("kernels/test_encode.py", "kernels/test_activation_quant.py", "models/test_llama.py"),
]
OTHERS = [
    isa
    for isa in (*native.INSTRUCTION_SETS, "amx_emulated")
    if native.has(isa) and native._library_file(isa) and isa != native.isa()
]


@pytest.mark.skipif(bool(os.environ.get("LOWBIT_ISA")), reason="an instruction set is forced already")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options", [("-p", "covering"), pytest.param((), marks=pytest.mark.slow)], ids=["each value", "all"]
)
@pytest.mark.parametrize("isa", [*OTHERS, "scalar"])
def test_kernels_under(isa: str, options: tuple[str, ...]) -> None:
    """In a process of their own, which fails where it cannot load that library. With the slow tests all that
    the set in use runs, else each value of each parameter of a test."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    run_tests(SCALAR if isa == "scalar" else NATIVE, {"LOWBIT_ISA": isa, "PYTHONPATH": path}, *options)


def run_tests(files: list[str], environment: dict[str, str], *options: str) -> None:
    """Without the kernels of torch, which no library changes; torch on one thread, more would only wait."""
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "-k", "not reference"]
    command += [*options, *(str(TESTS / file) for file in files)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def tool(name: str) -> str:
    """A program of this environment, or of the system."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}")
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_for_the_sanitizers_to_report(tmp_path: Path) -> None:
    """The instruction set in use, built anew; a report ends the process and so fails the test.

    And so does a function of the library that none of the files calls.
    """
    isa, source = native.isa(), TESTS.parent
    if isa == "scalar" or not (source / "CMakeLists.txt").is_file():
        pytest.skip("no native code here")
    cmake, compiler = tool("cmake"), tool("g++")
    runtime = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    if not all(os.path.isabs(name) for name in runtime):
        pytest.skip("the compiler has no sanitizers")
    configure = [cmake, "-S", str(source), "-B", str(tmp_path), f"-DCMAKE_CXX_COMPILER={compiler}"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DLOWBIT_SANITIZE=ON"]
    configure += [f"-DLOWBIT_EMULATE_{what}=ON" for what in ("AMX", "AVX512")]  # built where it is in use
    build = [cmake, "--build", str(tmp_path), "--target", f"lowbit_{isa}", "--parallel", str(os.cpu_count())]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    looked_up = tmp_path / "functions"
    run_tests(
        NATIVE,
        {
            "LOWBIT_ISA": isa,
            "LOWBIT_NATIVE_DIR": str(tmp_path),
            "LD_PRELOAD": " ".join(runtime),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "NATIVE_FUNCTIONS": str(looked_up),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
        },
        *("-p", "native_functions"),
    )
    exported = exported_functions(source / "src/lowbit/csrc")
    assert len(exported) > 40 and exported - set(looked_up.read_text().split()) == set()


def exported_functions(folder: Path) -> set[str]:
    """Of the C ABI."""
    sources = "".join(file.read_text() for file in folder.glob("*.cpp"))
    return set(re.findall(r"LOWBIT_EXPORT[\w:\s*]*?\b(lowbit_\w+)\(", sources))


@pytest.mark.slow
@pytest.mark.skipif(
    native.isa() == "scalar" or native.base_isa().startswith("neon"), reason="x86's libraries"
)
def test_what_avx512_takes_of_avx512_vnni_is_what_it_would_be_with_bf16(tmp_path: Path) -> None:
    """What CMakeLists.txt cannot see from headers. Not optimized: what differs does so then, too."""
    compiler, sources = shutil.which("g++"), Path(native.__file__).parents[1] / "csrc"
    if compiler is None or not sources.is_dir():
        pytest.skip("needs g++ and the sources")
    known = re.search(r"set\(flags_avx512_vnni \$\{flags_avx2\} (.*)\)", CMAKE.read_text())
    avx2 = re.search(r"set\(flags_avx2 (.*?)\)", CMAKE.read_text())
    assert known is not None and avx2 is not None, "the flags of CMakeLists.txt"
    code = []
    for more in ([], ["-mavx512bf16"]):
        made = tmp_path / "object.o"
        flags = ["-std=c++17", "-O0", "-fPIC", "-Wno-psabi", *avx2[1].split(), *known[1].split(), *more]
        command = [compiler, *flags, "-c", str(sources / "linear_bytes.cpp"), "-o", str(made)]
        subprocess.run(command, check=True, timeout=600)
        shown = subprocess.run(["objdump", "-dr", str(made)], check=True, capture_output=True)
        code.append(shown.stdout)
    assert len(code[0]) > 100_000 and code[0] == code[1]
