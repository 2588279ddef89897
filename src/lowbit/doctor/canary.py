"""The language canary: does the model speak English better than a guess? And its tokenizer's rules.

A transposed matrix, a wrong zero point or a permutation left out passes every rule of numbers and shapes, and
shows here: exp of the mean negative log-probability of a fixed paragraph, on the CPU. A guess among V tokens
has perplexity V.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.doctor.rules import Report
from lowbit.errors import LowbitError, printable
from lowbit.kernels.device_memory import free_memory
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import allocate_layer
from lowbit.loading import load_model, plan_model
from lowbit.models.model import Model
from lowbit.tokenization import Tokenizer, check_vocabulary, embedding_rows, load_tokenizer

Progress = Callable[[int, int, str], None]

PARAGRAPH = (
    "Water boils at one hundred degrees at the level of the sea. The higher you climb, the lower the "
    "pressure of the air becomes, and the sooner the water boils. That is why it takes longer to cook an egg "
    "on the top of a mountain than it does on the beach."
)
_FEWEST = 8  # tokens that say anything
_PAGE = 16
_SHARE = 0.8  # of the free memory
_BESIDES = 256 << 20  # activations and buffers


def check_tokenizer(header: CheckpointHeader, override: str | None, report: Report) -> Tokenizer | None:
    """D117, D120, D121; the tokenizer if it can be used with the model."""
    try:
        tokenizer = load_tokenizer(header, override)
    except LowbitError as error:
        report.add_error(error, "D120" if error.code == "E0250" else "D121")
        return None
    rows = embedding_rows(header)
    try:
        if rows is not None:
            check_vocabulary(tokenizer, rows)
    except LowbitError as error:
        report.add_error(error, "D117")
        return None
    return tokenizer


def check_language(
    header: CheckpointHeader, tokenizer: Tokenizer | None, report: Report, on_progress: Progress | None = None
) -> None:
    """D401 to D405: load the model and measure."""
    reason = None
    if tokenizer is None:
        reason = "there is no tokenizer to use"
    elif report.errors(unfixed_only=True) or not report.whole:
        reason = "there are errors"
    if reason is not None or tokenizer is None:
        report.add("D403", f"{header.root.name}: not loaded: {reason}")
        return
    with _log_as_findings(report):
        try:
            needed = plan_model(header, device="cpu").peak_bytes + _BESIDES
            free = free_memory(torch.device("cpu"))
            if needed > _SHARE * free:
                sizes = f"it needs about {needed >> 20} MiB and {free >> 20} MiB are free"
                report.add("D403", f"{header.root.name}: not loaded: {sizes}")
                return
            model = load_model(header, device="cpu", on_progress=on_progress)
        except LowbitError as error:
            mild = error.code.startswith(("E04", "E05"))
            report.add_error(error, "D403" if mild else "D405")
            return
    _measure(header, model, tokenizer, report)


def _measure(header: CheckpointHeader, model: Model, tokenizer: Tokenizer, report: Report) -> None:
    tokens = tokenizer.encode(PARAGRAPH)[: model.context_length]
    if len(tokens) < _FEWEST:
        report.add(
            "D403",
            f"{header.root.name}: its tokenizer makes {len(tokens)} tokens of {len(PARAGRAPH)} letters",
        )
        return
    logits = _logits(model, tokens)
    if not bool(logits.isfinite().all()):
        row = int((~logits.isfinite()).any(1).nonzero()[0])
        report.add(
            "D404",
            f"{header.root.name}: the logits after {row + 1} tokens of an English paragraph are not finite; "
            "weights are too large or misread",
        )
        return
    chosen = logits[:-1].double().log_softmax(-1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1))
    mean = float(chosen.mean())
    perplexity = math.exp(min(-mean, 700.0))
    worse = perplexity > model.vocab_size
    report.add(
        "D402" if worse else "D401",
        f"{header.root.name}: perplexity {perplexity:,.4g} over {len(tokens) - 1} tokens of English (a guess "
        f"among {model.vocab_size} tokens: {model.vocab_size})"
        + ("; the weights are misread or damaged, or the model is not trained" if worse else ""),
    )


def _logits(model: Model, tokens: list[int]) -> torch.Tensor:
    """float32 (tokens, vocabulary)."""
    count = len(tokens)
    pages = -(-count // _PAGE)
    caches = [allocate_layer(spec, pages, 1, _PAGE, model.device) for spec in model.cache_specs()]
    places = torch.arange(count, dtype=torch.int32)
    length = torch.tensor([count], dtype=torch.int32)
    batch = ForwardBatch(
        tokens=torch.tensor(tokens, dtype=torch.int32),
        positions=places,
        write_slots=places,
        query_lengths=length,
        context_lengths=length,
        page_table=torch.arange(pages, dtype=torch.int32).unsqueeze(0),
        sample_rows=torch.arange(count),
        page_size=_PAGE,
        max_query=count,
        max_context=count,
        state_slots=torch.zeros(1, dtype=torch.int32),
    )
    with torch.no_grad():
        return model.forward(batch, caches)


class _Findings(logging.Handler):
    """Contradictions that the readers settled (E0214), unless a rule of the doctor's has said them."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "warning[E0214]" in text and not any(f.rule.startswith("D3") for f in self.report.findings):
            self.report.add("D109", printable(text.partition("]: ")[2], 400))


@contextmanager
def _log_as_findings(report: Report) -> Iterator[None]:
    log, handler = logging.getLogger("lowbit"), _Findings(report)
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.propagate = before
        log.removeHandler(handler)
