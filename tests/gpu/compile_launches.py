"""Compile recorded launches for real GPUs, without one: python compile_launches.py LAUNCHES [ARCH …].

Every launch for compute capabilities 8.0 and 9.0; for later ones, which differ from 9.0 in few instructions
that Triton chooses, some of each kernel, if this Triton compiles for them. Run without TRITON_INTERPRET.
Prints a JSON line for each launch and architecture: shared memory, spilled bytes, registers, or the error.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ARCHITECTURES = [80, 90, 100, 120]
# Of 8.0 what 8.6 and 8.9 have, which run the same code.
MOST_SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
EVERY_LAUNCH = 90  # the last architecture that all are compiled for
SOME = 4  # of a kernel's launches, for later ones
FP8_DOTS = 89  # the first architecture with tensor cores for 8-bit floats


def compiled(launch: dict, architecture: int) -> dict:
    """What the compiler says of a launch."""
    function = getattr(importlib.import_module(launch["module"]), launch["function"])
    names = function.arg_names
    types = dict(launch["types"])
    constants = dict(launch["constants"])
    signature = {name: types[name].rstrip("D") if name in types else "constexpr" for name in names}
    aligned = [name for name, type_ in types.items() if type_.endswith("D")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    shared = kernel.metadata.shared
    if shared > MOST_SHARED[architecture]:
        raise ValueError(f"{shared} bytes of shared memory, {MOST_SHARED[architecture]} are there")
    if re.search(r"\b(fma|mul|add|sub)\.(rn\.)?ftz\b", kernel.asm["ptx"]):
        raise ValueError("subnormal numbers become zero, and codes are read as such")
    return {"shared": shared, **_used(kernel.asm["cubin"], kernel.asm["ptx"], architecture)}


def _used(cubin: bytes, ptx: str, architecture: int) -> dict:
    """Registers; and spills, where what was assembled has a stack at all."""
    tool = Path(get_ptxas(architecture).path).with_name("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found and found[2] == "0":
        return {"registers": int(found[1]), "spills": 0}
    return _assembled(ptx, architecture)


def _assembled(ptx: str, architecture: int) -> dict:
    """Registers and spills, as ptxas -v says them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        suffix = "a" if architecture >= 90 else ""
        command = [get_ptxas(architecture).path, "-v", f"-arch=sm_{architecture}{suffix}", str(path)]
        said = subprocess.run([*command, "-o", f"{folder}/kernel.o"], capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores", said)
    return {"registers": int(registers[1]) if registers else -1, "spills": int(spills[1]) if spills else -1}


def distinct(lines: list[str]) -> list[dict]:
    """Launches that differ by more than which addresses and numbers are multiples of 16: of those, the most
    aligned one, as real tensors are."""
    found: dict[str, dict] = {}
    for launch in map(json.loads, sorted(set(lines))):
        types = [(name, type_.rstrip("D")) for name, type_ in launch["types"]]
        key = json.dumps(launch | {"types": types}, sort_keys=True)
        known = found.get(key)
        if known is None or str(known["types"]).count("D'") < str(launch["types"]).count("D'"):
            found[key] = launch
    return list(found.values())


def some(launches: list[dict]) -> list[dict]:
    """Few of each kernel, evenly among all that there are."""
    kernels: dict[tuple[str, str], list[dict]] = {}
    for launch in launches:
        kernels.setdefault((launch["module"], launch["function"]), []).append(launch)
    return [launch for found in kernels.values() for launch in found[:: -(-len(found) // SOME)]]


def knows(architecture: int) -> bool:
    """Whether the assembler that comes with Triton has it."""
    said = subprocess.run([get_ptxas(architecture).path, "--help"], capture_output=True, text=True).stdout
    return f"sm_{architecture}'" in said


def said_of(task: tuple[dict, int]) -> dict:
    """The line of a launch and an architecture."""
    launch, architecture = task
    said: dict = {"kernel": launch["function"], "sm": architecture}
    try:
        return said | compiled(launch, architecture)
    except Exception as error:
        return said | {"error": f"{type(error).__name__}: {error}"[:2000], "launch": launch}


def main(path: str, architectures: list[int]) -> int:
    """How many failed."""
    launches = distinct(Path(path).read_text().splitlines())
    tasks = [
        (launch, architecture)
        for architecture in filter(knows, architectures)
        for launch in (launches if architecture <= EVERY_LAUNCH else some(launches))
        # Where there are no tensor cores for 8-bit floats another launch does without them.
        if architecture >= FP8_DOTS or not dict(launch["constants"]).get("FP8_DOT")
    ]
    failed = 0
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        for said in pool.imap_unordered(said_of, tasks, chunksize=4):
            failed += "error" in said
            print(json.dumps(said), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1], [int(a) for a in sys.argv[2:]] or ARCHITECTURES), 100))
