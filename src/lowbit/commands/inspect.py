"""``lowbit inspect MODEL``: what a checkpoint is and how it would run here. Reads headers, loads no weight.

Modules that differ only in their layer number, and are stored and run alike, share a row. Below the table
stand the reasons why better kernels were not chosen, what else would run a layer and why it does not, what is
slower than bf16 by the timings kept on disk, and the modules whose results depend on the batch. Nothing is
timed here but under --time, which loads the model for it.
"""

from __future__ import annotations

import argparse
import json
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowbit.commands.arguments import Parser, add_model, settings_from
from lowbit.errors import LowbitError, printable
from lowbit.settings import Settings

if TYPE_CHECKING:
    from lowbit.loading import ModelPlan, ModulePlan

USAGE = "[MODEL]"
GROUPS: tuple[str, ...] = ("model", "engine")

_SLOWER = 0.9  # a ratio nearer to 1 may be the machine's neighbours


def add_arguments(parser: Parser) -> None:
    """MODEL, --json, --tokens and --time."""
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print every module as JSON")
    parser.add_argument(
        "--tokens", metavar="N", help="context to compute the KV cache for; default: the model's longest"
    )
    parser.add_argument(
        "--time", action="store_true", help="load the model and time its kinds of layers first, as serve does"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan of the model."""
    settings = settings_from(arguments)
    tokens = _token_count(arguments.tokens)
    if arguments.time:
        _time(settings)
    with ExitStack() as files:
        plan = _plan(settings, files)
    tokens = tokens or settings.context_length or plan.context_length
    if arguments.json:
        print(json.dumps(as_json(settings, plan, tokens), indent=2))
    else:
        show(settings, plan, tokens)
    return 0


def _plan(settings: Settings, files: ExitStack) -> ModelPlan:
    """From headers; those of a hub model are there until ``files`` is closed."""
    from lowbit.checkpoint.hub_headers import opened_headers
    from lowbit.commands.console import progress_line

    with progress_line() as on_progress:
        header = files.enter_context(
            opened_headers(settings.model, settings.revision, on_progress, load_format=settings.load_format)
        )
    from lowbit.loading import model_options, plan_model
    from lowbit.quantize.recipe import Asked

    return plan_model(
        header,
        **model_options(settings),
        quantization=Asked.by(settings),
        timings="unused" if settings.kernel_timings == "off" else "kept",
        threads=settings.threads,
        tp_size=settings.tp_size,
    )


def _time(settings: Settings) -> None:
    """So that the plan finds timings on disk."""
    from lowbit.checkpoint import open_checkpoint
    from lowbit.commands.console import progress_line
    from lowbit.engine.speed import time_model

    with progress_line() as on_progress:
        header = open_checkpoint(
            settings.model, settings.revision, on_progress, load_format=settings.load_format
        )
        time_model(header, settings)


def _token_count(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise LowbitError("E0103", f"--tokens must be a whole number from 1, got {printable(repr(text))}")
    return int(text)


@dataclass
class Row:
    """Modules of one kind that are stored and run alike."""

    kind: str  # "self_attn.q_proj", the layer number left out
    first: ModulePlan
    count: int = 0
    nbytes: int = 0
    errors: list[float] = field(default_factory=list)  # estimated, where it is quantized at load


def rows_of(plan: ModelPlan) -> list[Row]:
    """The modules grouped by kind, shape, scheme and kernel, in the model's order."""
    rows: dict[tuple[object, ...], Row] = {}
    for module in plan.modules:
        kind = re.sub(r"^(model\.)?(layers\.\d+\.)?", "", module.name)
        key = (
            *(kind, module.shape, module.scheme, module.kernel, module.computes, module.refusals),
            *(module.reason, module.losers, module.by, module.ratios, module.cut),
        )
        row = rows.setdefault(key, Row(kind, module))
        row.count += 1
        row.nbytes += module.nbytes
        if module.error is not None:
            row.errors.append(module.error)
    return list(rows.values())


@dataclass
class Reason:
    """Why a kernel does not run some kinds of modules: it refuses them, or another was chosen."""

    kernel: str
    reason: str
    kinds: list[str] = field(default_factory=list)


def reasons_of(rows: list[Row]) -> list[Reason]:
    """Every reason once, refusals first."""
    reasons: dict[tuple[str, str], Reason] = {}
    refusals = [(row.kind, *refusal) for row in rows for refusal in row.first.refusals]
    losers = [(row.kind, loser.kernel, loser.reason) for row in rows for loser in row.first.losers]
    for kind, kernel, reason in refusals + losers:
        kinds = reasons.setdefault((kernel, reason), Reason(kernel, reason)).kinds
        if kind not in kinds:
            kinds.append(kind)
    return list(reasons.values())


def slower_than_bf16(rows: list[Row]) -> list[str]:
    """A line for each row that takes longer than bf16 did with some number of tokens."""
    lines = []
    for row in rows:
        slow = [f"{ratio:.2g}x with {n}" for n, ratio in row.first.ratios if ratio < _SLOWER]
        if slow:
            lines.append(f"{row.kind} on {row.first.kernel}: {', '.join(slow)}")
    return lines


def cuts_of(rows: list[Row]) -> dict[str, list[str]]:
    """How ranks share the kinds of modules."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.first.cut:
            kinds = found.setdefault(row.first.cut, [])
            kind = re.sub(r"\.\d+(?=\.)", ".*", row.kind)  # experts share theirs alike
            if kind not in kinds:
                kinds.append(kind)
    return found


def dependent_on_batch(rows: list[Row]) -> dict[str, list[str]]:
    """Why a token's result depends on the tokens computed beside it: the kinds of modules it is true of."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        inputs = row.first.scheme.activation
        if inputs is not None and inputs.depends_on_batch:
            kinds = reasons.setdefault(inputs.depends_on_batch, [])
            if row.kind not in kinds:
                kinds.append(row.kind)
    return reasons


def as_json(settings: Settings, plan: ModelPlan, tokens: int) -> dict[str, object]:
    """The plan for programs: sizes in bytes, every module by itself."""
    kv_bytes = plan.kv_bytes_per_token * tokens
    return {
        "model": settings.model,
        "architecture": plan.architecture,
        "format": plan.format,
        "described": plan.described,
        "quantization_choice": plan.choice or None,
        "ignored_layers": ignored_layers(plan),
        "peak_bytes_at_load": plan.peak_bytes,
        "device": plan.device,
        "tp_size": settings.tp_size,
        "layers": plan.config.layers,
        "parameters": plan.parameters,
        "context_length": plan.context_length,
        "weight_bytes": plan.weight_bytes,
        "lm_head_screen_bytes": plan.screen_bytes,
        "no_lm_head_screen_because": plan.no_screen or None,
        "rounds_weights_for_prompts": _rounds_prompts(settings, plan),
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "tokens": tokens,
        "kv_bytes": kv_bytes,
        "state_bytes_per_sequence": plan.state_bytes,
        "total_bytes": plan.weight_bytes + kv_bytes,
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "scheme": str(module.scheme),
                "kernel": module.kernel,
                "computes": module.computes,
                "stored_bytes": module.nbytes,
                "depends_on_batch": (module.scheme.activation and module.scheme.activation.depends_on_batch)
                or None,
                "not_quantized_because": module.reason or None,
                "estimated_error": module.error,
                "refusals": [{"kernel": kernel, "reason": reason} for kernel, reason in module.refusals],
                "chosen": module.by or "by preference",
                "losers": [{"kernel": loser.kernel, "reason": loser.reason} for loser in module.losers],
                "times_as_fast_as_bf16": {str(n): round(ratio, 3) for n, ratio in module.ratios},
                "shared": module.cut or None,
            }
            for module in plan.modules
        ],
    }


def _rounds_prompts(settings: Settings, plan: ModelPlan) -> bool:
    from lowbit.engine.prompts import rounds_prompts

    return rounds_prompts(settings, plan.device)


def ignored_layers(plan: ModelPlan) -> list[str]:
    """Linear layers a quantized checkpoint leaves as plain matrices, layer numbers and experts as ``*``."""
    if plan.format == "dense":
        return []
    plain = [module.name for module in plan.modules if module.scheme.is_dense]
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in plain))


def show(settings: Settings, plan: ModelPlan, tokens: int) -> None:
    """The plan for people."""
    from rich.markup import escape
    from rich.table import Table

    from lowbit.commands.console import binary_size, console
    from lowbit.engine.prompts import rounded_weights

    out, config = console(), plan.config
    out.print(
        f"[bold]{escape(printable(settings.model))}[/]: {escape(printable(plan.architecture))}, "
        f"{escape(printable(plan.described))}, {plan.parameters / 1e6:,.1f} M weights in {config.layers} "
        f"layers (hidden {config.hidden_size}, {config.heads} heads, {config.kv_heads} K/V heads, "
        f"vocabulary {config.vocab_size}), context {plan.context_length}"
    )
    if plan.choice:
        out.print(escape(printable(plan.choice, 400)))
    table = Table()
    rows = rows_of(plan)
    online, timed = any(row.errors for row in rows), any(row.first.ratios for row in rows)
    titles = ["modules", "kind", "shape (out, in)", "scheme", "stored", "kernel", "computes"]
    titles += ["x bf16"] * timed + ["error"] * online
    for title in titles:
        right = title in ("modules", "stored", "error")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in rows:
        module = row.first
        shape = " x ".join(str(size) for size in module.shape)
        cells = [row.kind, shape, str(module.scheme), binary_size(row.nbytes), module.kernel, module.computes]
        if timed:
            cells.append(" ".join(f"{ratio:.2g}" for _, ratio in module.ratios))
        if online:
            cells.append(f"{sum(row.errors) / len(row.errors):.2%}" if row.errors else "")
        table.add_row(str(row.count), *(escape(printable(cell)) for cell in cells))
    out.print(table)
    if timed:
        out.print(
            "x bf16: times as fast as the same layer in bf16 with 1, 32 and 256 tokens, as timed before"
        )
    else:
        out.print("x bf16: no layer was timed here yet; lowbit serve does, and lowbit inspect --time")
    if online:
        out.print("error: |Q(w) - w| / |w|, estimated from a few rows of every layer")
        for row in rows:
            if row.first.reason:
                out.print(escape(printable(f"not quantized: {row.kind} ({row.first.reason})", 400)))
    for why in reasons_of(rows):
        line = f"not {why.kernel}: {why.reason} ({', '.join(why.kinds)})"
        out.print(escape(printable(line, 400)))
    for row in rows:
        if row.first.by:
            out.print(escape(printable(f"{row.first.by}: {row.kind} on {row.first.kernel}", 400)))
    for slow in slower_than_bf16(rows):
        out.print(escape(printable(f"slower than bf16: {slow}", 400)))
    for reason, kinds in dependent_on_batch(rows).items():
        line = f"results depend on the batch: {', '.join(kinds)} ({reason})"
        out.print(escape(printable(line, 400)))
    if settings.tp_size > 1:
        out.print(f"{settings.tp_size} ranks share the model; shapes, bytes and memory are of the first")
        for cut, kinds in cuts_of(rows).items():
            out.print(escape(printable(f"{cut}: {', '.join(kinds)}", 400)))
        if any(row.first.scheme.activation is not None for row in rows):
            out.print(
                "inputs are quantized, from sums that ranks add in another order than one process: a code "
                "may be the next one, and answers differ by its rounding"
            )
    if ignored := ignored_layers(plan):
        out.print(escape(printable(f"not quantized: {', '.join(ignored)}", 400)))
    if plan.screen_bytes:
        out.print(
            f"screen of the output head, for greedy tokens: {binary_size(plan.screen_bytes)} of the weights"
        )
    elif settings.lm_head_screen != "off":
        out.print(escape(printable(f"no screen of the output head: {plan.no_screen}", 400)))
    if _rounds_prompts(settings, plan):
        out.print(f"prompts: {rounded_weights()}, unless --exact-prompts")
    kv_bytes, each = plan.kv_bytes_per_token * tokens, binary_size(plan.kv_bytes_per_token)
    if plan.state_bytes:
        states = plan.state_bytes * (settings.running_limit + 1)
        out.print(
            f"states of recurrent layers: {binary_size(plan.state_bytes)} a sequence, however long; "
            f"{binary_size(states)} for --max-running-requests {settings.running_limit}"
        )
    out.print(
        f"memory on {plan.device}: weights {binary_size(plan.weight_bytes)} "
        f"+ KV cache {binary_size(kv_bytes)} for {tokens} tokens ({each} a token) "
        f"= {binary_size(plan.weight_bytes + kv_bytes)}; "
        f"about {binary_size(plan.peak_bytes)} at the peak of loading"
    )
