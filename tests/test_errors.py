"""Errors are code: every code raised has an entry, every entry is raised, every message is one good line."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lowbit.error_catalogue import CATALOGUE, KINDS
from lowbit.errors import EXIT_BUG, LowbitError, printable, thousands

SOURCES = Path(__file__).parents[1] / "src" / "lowbit"


@cache
def raised_codes() -> dict[str, str]:
    """Every code that stands in the sources (catalogue and exit table left out) and where."""
    places: dict[str, str] = {}
    for path in sorted(SOURCES.rglob("*.py")):
        if path.name in ("error_catalogue.py", "errors.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and re.fullmatch(r"E\d{4}", str(node.value)):
                places[str(node.value)] = f"{path.relative_to(SOURCES)}:{node.lineno}"
    return places


def test_every_code_raised_is_explained() -> None:
    missing = {code: place for code, place in raised_codes().items() if code not in CATALOGUE}
    assert not missing, f"add these to error_catalogue.py: {missing}"


def test_every_code_explained_is_raised() -> None:
    unused = sorted(set(CATALOGUE) - set(raised_codes()))
    assert not unused, f"no line of src raises {unused}"


def test_lowbit_error_is_always_given_a_code_and_one_line() -> None:
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "LowbitError":
                place = f"{path.relative_to(SOURCES)}:{node.lineno}"
                assert len(node.args) == 2, f"{place}: LowbitError(code, message)"
                pieces = [n.value for n in ast.walk(node.args[1]) if isinstance(n, ast.Constant)]
                assert not any("\n" in piece for piece in pieces if isinstance(piece, str)), place


@pytest.mark.parametrize("code", CATALOGUE)
def test_entries_are_complete(code: str) -> None:
    entry = CATALOGUE[code]
    assert re.fullmatch(r"E\d{4}", code) and code[:3] in KINDS
    assert 5 < len(entry.title) < 70 and not entry.title.endswith(".")
    assert len(entry.meaning) > 40 and entry.meaning.endswith(".")
    assert len(entry.way_out) > 20 and entry.way_out.endswith(".")
    assert LowbitError(code, "x").exit_code != EXIT_BUG or code.startswith("E07")


def test_the_catalogue_is_in_order() -> None:
    assert list(CATALOGUE) == sorted(CATALOGUE)


def test_the_line() -> None:
    assert str(LowbitError("E0203", "x is short")) == "error[E0203]: x is short"
    assert LowbitError("E9999", "x").exit_code == EXIT_BUG


def test_printable_escapes_and_cuts() -> None:
    assert printable("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    assert printable("é 漢") == "é 漢"
    assert printable("x" * 200) == "x" * 119 + "…"
    assert printable("x" * 120) == "x" * 120


def test_thousands() -> None:
    assert [thousands(n) for n in (0, 999, 1000, 12345678)] == ["0", "999", "1 000", "12 345 678"]
