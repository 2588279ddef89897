"""``lowbit check MODEL``: reads all of a checkpoint and prints a line for each thing that is wrong with it.

    error   D202 model.safetensors: tensor 'model.layers.3.mlp.up_proj.scales' (F16 [32, 4096]) holds 12 NaN …
    warning D301 model.safetensors: … [--fix: checkpoint_format set to 'gptq_v2']

The rules are those of ``lowbit.doctor``. Exit status 3 if there are errors (with ``--fix``: that are left).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.commands.arguments import Parser, add_model, settings_from
from lowbit.errors import EXIT_CHECKPOINT, printable

if TYPE_CHECKING:
    from lowbit.doctor import Examination, Finding

USAGE = "[MODEL]"
GROUPS: tuple[str, ...] = ("model",)

MOST_LINES = 20  # of one rule, for people; --json has all
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}


def add_arguments(parser: Parser) -> None:
    """MODEL, --fix, --no-canary, --json and --rules."""
    add_model(parser)
    parser.add_argument(
        "--fix", metavar="OUT", help="write a copy with the certain corrections to folder OUT"
    )
    parser.add_argument("--no-canary", action="store_true", help="do not load the model to test its English")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--rules", action="store_true", help="list the rules and check nothing")


def run(arguments: argparse.Namespace) -> int:
    """Check the model; 0, or 3 where errors are left."""
    if arguments.rules:
        show_rules(arguments.json)
        return 0
    from lowbit.checkpoint.source import resolve
    from lowbit.commands.console import progress_line
    from lowbit.doctor import examine

    settings = settings_from(arguments)
    out = None if arguments.fix is None else Path(arguments.fix).expanduser()
    with progress_line() as on_progress:
        path, _ = resolve(settings.model, settings.revision, on_progress)
        found = examine(
            path, tokenizer=settings.tokenizer, canary=not arguments.no_canary, on_progress=on_progress
        )
        written = out is not None and found.can_fix
        if written and out is not None and found.header is not None:
            found.correction.write(found.header, out, on_progress)
    if arguments.json:
        print(json.dumps(as_json(settings.model, found, out if written else None), indent=2))
    else:
        show(settings.model, found, out, written)
    return EXIT_CHECKPOINT if found.report.errors(unfixed_only=written) else 0


def show_rules(as_json_text: bool) -> None:
    """The table of rules."""
    from lowbit.doctor import RULES

    if as_json_text:
        print(json.dumps({number: vars(rule) for number, rule in RULES.items()}, indent=2))
        return
    for number, rule in RULES.items():
        fixed = f" --fix: {rule.fixed}." if rule.fixed else ""
        print(f"{number} {rule.severity:<7} {rule.title}: {rule.explanation}{fixed}")


def as_json(model: str, found: Examination, out: Path | None) -> dict[str, object]:
    """Every finding, for programs. ``fix``: the certain correction; ``fixed_copy``: where it was made."""
    from lowbit.doctor import RULES

    counts = found.report.counts()
    return {
        "model": model,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "notes": counts["note"],
        "findings": [
            {
                "rule": finding.rule,
                "severity": finding.severity,
                "title": RULES[finding.rule].title,
                "file": finding.file or None,
                "tensor": finding.tensor or None,
                "message": finding.message,
                "fix": finding.fix or None,
            }
            for finding in found.report.findings
        ],
        "fixed_copy": None if out is None else str(out),
    }


def show(model: str, found: Examination, out: Path | None, written: bool) -> None:
    """A line a finding, errors first, and what became of --fix."""
    from rich.markup import escape

    from lowbit.commands.console import console

    screen, report = console(), found.report
    order = {severity: number for number, severity in enumerate(_COLOURS)}
    printed: dict[str, int] = {}
    for finding in sorted(report.findings, key=lambda finding: (order[finding.severity], finding.rule)):
        printed[finding.rule] = printed.get(finding.rule, 0) + 1
        if printed[finding.rule] <= MOST_LINES:
            head = f"[{_COLOURS[finding.severity]}]{finding.severity:<7} {finding.rule}[/]"
            screen.print(f"{head} {escape(_line(finding, written))}", soft_wrap=True)
    for rule, count in printed.items():
        if count > MOST_LINES:
            screen.print(f"… and {count - MOST_LINES} more by {rule}: see --json")
    counts = report.counts()
    words = [_counted(counts[severity], severity) for severity in _COLOURS if counts[severity]]
    screen.print(escape(f"{printable(model)}: {', '.join(words) or 'nothing found'}"), soft_wrap=True)
    if out is not None:
        told = "corrected copy in" if written else "nothing can be corrected with certainty; not written:"
        screen.print(escape(f"{told} {printable(out, 400)}"), soft_wrap=True)


def _line(finding: Finding, written: bool) -> str:
    if not finding.fix:
        return finding.message
    return f"{finding.message} [{'fixed' if written else '--fix'}: {printable(finding.fix, 300)}]"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
