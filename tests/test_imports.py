"""Who may import whom, what stays out of the light processes, and what no file may contain.

The table is the architecture: a package may import what its row names and nothing else of lowbit, imports
inside functions included. A new package needs a row.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "lowbit"

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "error_catalogue": set(),
    "settings": {"errors"},
    "numerics": {"errors"},
    "checkpoint": {"errors"},
    "tokenization": {"errors", "checkpoint"},
    "formats": {"errors", "numerics", "checkpoint"},
    "kernels": {"errors", "numerics"},
    "layers": {"errors", "numerics", "kernels"},
    "models": {"errors", "numerics", "kernels", "layers", "checkpoint"},
    "quantize": {"errors", "numerics", "kernels", "layers"},
    "loading": {
        *("errors", "settings", "numerics", "checkpoint", "tokenization", "quantize"),
        *("formats", "kernels", "layers", "models"),
    },
    "engine": {
        *("errors", "settings", "numerics", "checkpoint", "tokenization"),
        *("kernels", "layers", "models", "quantize", "loading"),
    },
    "llm": {"errors", "settings", "checkpoint", "tokenization", "engine"},
    "server": {"errors", "settings", "checkpoint", "tokenization", "engine"},
    "doctor": {
        *("errors", "numerics", "checkpoint", "formats", "kernels", "layers", "models"),
        *("loading", "engine", "tokenization"),
    },
    "commands": {
        *("errors", "error_catalogue", "settings", "checkpoint", "tokenization"),
        *("formats", "quantize", "models", "loading", "engine", "llm", "server", "doctor"),
    },
    "settings_docs": {"settings", "commands", "quantize"},
    "cli": {"errors", "settings", "commands"},
    "launch_server": {"cli"},
    "__main__": {"cli"},
    "__init__": {"llm", "engine", "settings", "errors", "loading"},
}
# What the HTTP process may use of the engine: the messages and its own end of the connection.
ENGINE_FOR_SERVER = {"messages", "wire", "process"}
WITHOUT_TORCH = (
    *("errors", "error_catalogue", "settings", "settings_docs", "checkpoint", "tokenization", "server"),
    *("cli", "commands", "launch_server", "__init__", "__main__"),
)
TORCH_ALLOWED = {"checkpoint.tensor_data"}  # maps the payload; only formats and loading import it
HEAVY = ("torch", "triton", "transformers")

MODULES = {
    ".".join(path.relative_to(SOURCES).with_suffix("").parts): path for path in sorted(SOURCES.rglob("*.py"))
}


@cache
def imports_of(module: str, *, at_import_only: bool = False) -> list[tuple[str, int]]:
    """Full dotted names that a module imports, and the line."""
    return list(_imports_of(module, at_import_only))


def _imports_of(module: str, at_import_only: bool) -> Iterator[tuple[str, int]]:
    tree = ast.parse(MODULES[module].read_text())
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if at_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        pending += ast.iter_child_nodes(node)


def own_module(name: str) -> str | None:
    """``lowbit.kernels.choose`` -> the module of lowbit that it names or stands in, ``kernels.__init__``."""
    parts = name.split(".")
    if parts[0] != "lowbit":
        return None
    for end in range(len(parts), 0, -1):
        for candidate in (".".join(parts[1:end]), ".".join([*parts[1:end], "__init__"])):
            if candidate in MODULES:
                return candidate
    return None


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_every_package_has_a_row_and_the_rows_have_no_cycle() -> None:
    assert {package_of(module) for module in MODULES} <= set(MAY_IMPORT)
    list(TopologicalSorter(MAY_IMPORT).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_row_allows(module: str) -> None:
    package = package_of(module)
    for name, line in imports_of(module):
        if not name.startswith("lowbit"):
            continue
        other = own_module(name)
        assert other is not None, f"{module}:{line}: {name} does not exist"
        target = package_of(other)
        if target in (package, "__init__"):
            continue
        assert target in MAY_IMPORT[package], f"{module}:{line}: {package} may not import {target}"
        if package == "server" and target == "engine":
            assert other.split(".")[1] in ENGINE_FOR_SERVER, f"{module}:{line}: {name}"


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        others = {own_module(name) for name, _ in imports_of(module, at_import_only=True)}
        graph[module] = {other for other in others if other is not None and other != module}
    list(TopologicalSorter(graph).static_order())  # raises CycleError and names the cycle


def test_formats_and_kernels_never_meet_and_only_loading_imports_formats() -> None:
    for module in MODULES:
        targets = {package_of(other) for name, _ in imports_of(module) if (other := own_module(name))}
        assert not {"formats", "kernels"} <= targets or package_of(module) == "loading", module
        # `lowbit models` lists the formats, it reads nothing with them; the doctor asks them what is wrong.
        allowed = package_of(module) in ("loading", "formats", "doctor") or module == "commands.models"
        assert "formats" not in targets or allowed, module


def test_torch_is_imported_only_where_weights_are() -> None:
    for module in MODULES:
        light = package_of(module) in WITHOUT_TORCH or module == "engine.messages"
        if not light or module in TORCH_ALLOWED:
            continue
        for name, line in imports_of(module):
            assert name.split(".")[0] not in HEAVY, f"{module}:{line}: {name}"
            assert own_module(name) not in TORCH_ALLOWED, f"{module}:{line}: {name}"


LIGHT_MODULES = [
    name
    for name in ("", ".settings", ".tokenization", ".checkpoint", ".engine.messages", ".cli", ".server.app")
    if {name[1:], f"{name[1:]}.__init__".removeprefix(".")} & set(MODULES)
]


@pytest.mark.parametrize("name", [f"lowbit{name}" for name in LIGHT_MODULES])
def test_light_modules_load_nothing_heavy(name: str) -> None:
    """In a fresh interpreter, with everything that is imported on the way."""
    code = f"import sys, {name}; print(sorted({set(HEAVY)!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    *(("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("jit", "load")),
    *(("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load")),
}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_code_that_came_as_data(module: str) -> None:
    for name, line in imports_of(module):
        assert not set(name.split(".")) & FORBIDDEN_MODULES, f"{module}:{line}: {name}"
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.Call):
            continue
        place = f"{module}:{node.lineno}"
        if isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{place}: {node.func.id}()"
        elif isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", getattr(node.func.value, "attr", ""))
            assert (owner, node.func.attr) not in FORBIDDEN_METHODS, f"{place}: {owner}.{node.func.attr}()"
        for keyword in node.keywords:
            switched_on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            assert keyword.arg not in ("shell", "trust_remote_code", "allow_pickle") or not switched_on, place


def project_files() -> list[Path]:
    """Every text file of the project: what git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_file_names_a_place_of_one_machine() -> None:
    places = (
        "work/",
        "root/",
        "home/[a-z]",
        "tmp/[a-z]",
    )  # the slash comes below, or this file would match
    registries = ("pypi" + r"\.org", "python" + "hosted")
    machine = re.compile("|".join([*("/" + place for place in places), *registries]))
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in project_files()
        if (match := machine.search(path.read_text(errors="replace")))
    ]
    assert not found
