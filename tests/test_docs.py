"""The generated page is the one that would be generated, and the project's texts say what is so."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from lowbit.cli import COMMANDS
from lowbit.commands.sglang_flags import COMPARED, ONLY, REFUSED, WITHOUT_EFFECT
from lowbit.kernels import native
from lowbit.settings import Settings, flag_of, variable_of
from lowbit.settings_docs import options_page

ROOT = Path(__file__).parents[1]


def test_options_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == options_page(), "run: make docs"


def test_rules_page_is_up_to_date() -> None:
    from lowbit.doctor.rules import rules_page

    assert (ROOT / "docs" / "check.md").read_text() == rules_page(), "run: make docs"


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert found is not None
    return [line.strip().removeprefix("@") for line in found[1].splitlines()]


def test_make_docs_writes_each_page_once_and_as_committed() -> None:
    pages = {}
    for line in recipe("docs"):
        command, _, page = line.partition(" > ")
        assert page not in pages, f"{page} is written twice"
        pages[page] = command.replace("$(BIN)/python", shlex.quote(sys.executable))
    assert sorted(pages) == ["docs/check.md", "docs/formats.md", "docs/options.md"]
    if native.library() is None:
        del pages["docs/formats.md"]  # it names native kernels
    for page, command in pages.items():
        done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == (ROOT / page).read_text(), f"{page}: run make docs"


def test_options_page_lists_every_flag_variable_and_default() -> None:
    own = options_page().partition("## SGLang's flags")[0]
    rows = [line for line in own.splitlines() if line.startswith("| `--")]
    assert len(rows) == len(Settings.options())
    for name, row in zip(Settings.options(), rows, strict=True):
        assert f"`{flag_of(name)}`" in row and f"`{variable_of(name)}`" in row
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, "four cells"


def test_options_page_says_what_becomes_of_each_of_sglangs_flags() -> None:
    table = options_page().partition("## SGLang's flags")[2]
    rows = [line for line in table.splitlines() if line.startswith("| `--")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows), "three cells"
    kinds = {flag: row.split("|")[2].strip() for row in rows for flag in re.findall(r"`(--[^`]+)`", row)}
    for flag in WITHOUT_EFFECT:
        assert kinds[flag] == "without effect"
    assert all(kinds[flag] == "only" for flag in ONLY) and all(kinds[flag] == "refused" for flag in REFUSED)
    for name in COMPARED:
        assert kinds[flag_of(name)] == "accepted"
        for value, _ in Settings.options()[name].refused:
            assert kinds[f"{flag_of(name)} {value}"] == "refused"


def test_readme_names_only_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for command in set(re.findall(r"^ *lowbit ([a-z]+)", readme, re.MULTILINE)):
        assert command in COMMANDS, f"lowbit {command}"
    flags = {flag_of(name) for name in Settings.options()}
    flags |= {alias for rule in Settings.options().values() for alias in rule.aliases}
    for flag in set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", readme)):
        own = ("--prompt", "--temperature", "--fix", "--format", "--out")  # of single commands
        assert flag in flags or flag in (*own, "--index-url"), flag
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_ci_runs_readmes_test_command() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "phase test" in (ROOT / ".ci" / "run").read_text()


def test_every_pinned_version_is_exact_and_every_dependency_pinned() -> None:
    import tomllib

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    untested = ("humming", "flashinfer")  # they need a GPU: nothing here runs with any version of them
    optional = project["optional-dependencies"]
    extras = [name for extra in optional if extra not in untested for name in optional[extra]]
    for requirement in project["dependencies"] + extras:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name is not None
        assert re.sub(r"[-_.]+", "-", name.group()).lower() in pins, requirement
