"""The checkpoint doctor, ``lowbit check``: reads all of a checkpoint and says what is wrong with it.

    files          every file by itself, the index against the shards          (files)
    hashes         files against a manifest, where there is one                (hashes)
    config         names, prefixes, quantization config against tensors        (config_rules)
    survey         each module the architecture has, from headers              (survey)
    scan           every byte once, in slices                                  (values, packing)
    tokenizer      against the embedding; then the model's English             (canary)

A rule that knows the certain correction notes it in a ``Correction``, which is applied to the header before
the next step, so that one fault does not hide the others; ``--fix OUT`` writes it as a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.doctor.correction import Correction
from lowbit.doctor.rules import RULES, Finding, Report, Rule, rules_page
from lowbit.errors import LowbitError

__all__ = ["RULES", "Correction", "Examination", "Finding", "Report", "Rule", "examine", "rules_page"]

Progress = Callable[[int, int, str], None]


@dataclass
class Examination:
    """``header``: as stored; None where nothing could be read."""

    report: Report = field(default_factory=Report)
    correction: Correction = field(default_factory=Correction)
    header: CheckpointHeader | None = None

    @property
    def can_fix(self) -> bool:
        """Whether there is something to correct, and all of the checkpoint to copy."""
        return bool(self.correction) and self.report.whole and self.header is not None


def examine(
    path: Path, *, tokenizer: str | None = None, canary: bool = True, on_progress: Progress | None = None
) -> Examination:
    """Try every rule on the folder or GGUF file. ``canary``: whether the model may be loaded at the end."""
    from lowbit.doctor.canary import check_language, check_tokenizer
    from lowbit.doctor.config_rules import check_dtype, check_prefix, check_quantization
    from lowbit.doctor.files import open_leniently
    from lowbit.doctor.hashes import check_hashes
    from lowbit.doctor.heads import Heads
    from lowbit.doctor.packing import packing_of
    from lowbit.doctor.survey import survey
    from lowbit.doctor.values import scan

    found = Examination()
    report, correction = found.report, found.correction
    header = found.header = open_leniently(path, report, correction)
    if header is None:
        return found
    check_hashes(header, report, on_progress)
    check_dtype(header, report)
    try:
        check_prefix(header, report, correction)
        check_quantization(correction.applied(header), report, correction)
    except LowbitError as error:
        report.add_error(error)  # a quantization config of a wrong type
    seen = survey(correction.applied(header), report, correction)
    named = correction.applied(header)
    packing = packing_of(named, seen.form)
    checks = {} if packing is None else packing.checks()
    heads = Heads(named, seen.tied)
    scan(named, checks | heads.checks(), seen.limits, report, on_progress)
    if packing is not None and report.whole:
        packing.judge(report, correction)
    heads.judge(report, correction)
    fits = check_tokenizer(named, tokenizer, report)
    if canary:
        check_language(correction.applied(header), fits, report, on_progress)
    return found
