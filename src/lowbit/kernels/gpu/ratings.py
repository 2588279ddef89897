"""Log-probabilities on the GPU: the chosen tokens' and the best alternatives'; nothing waits for the device.

A row's sum of exponentials comes from its chunks' (``sampling.survey``), float32 each, added in float64 in
their order: what is found is within about 1e-6 of float64's. Alternatives are found without sorting: every
chunk of a row gives its best, one after another, and of these the row's are taken the same way, equals by id.
Two launches; one where no alternatives are asked for. None of it has run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.gpu import runtime, sampling
from lowbit.kernels.gpu.sampling import NOTHING, Survey, id_of, number_of, packed, peak_of

# Candidates of a row that one program holds, 64 registers a thread of 16 warps: 20 alternatives and a million
# tokens, or 200 and 150,000.
_MOST_CANDIDATES = 1 << 14
_USUAL = 20  # alternatives, the most that OpenAI's API has: fewer are not another kernel to compile


@triton.jit(do_not_specialize=["number"])
def _best_of_chunks(  # type: ignore[no-untyped-def]
    logits,
    logits_row,
    rows,
    best,  # int64 (asked, chunks, number) of packed tokens, NOTHING where the chunk has no more
    width,
    chunks,
    number,
    CHUNK: tl.constexpr,
):
    asked, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + asked).to(tl.int64)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * logits_row + column, mask=column < width, other=0.0)
    left = tl.where(column < width, packed(tl.where(x == 0.0, 0.0, x), column), NOTHING)
    best += (asked * chunks + chunk) * number
    for place in range(number):
        top = tl.max(left, 0)
        tl.store(best + place, top)
        left = tl.where(left == top, NOTHING, left)


@triton.jit(do_not_specialize=["number"])
def _rate(  # type: ignore[no-untyped-def]
    logits,
    logits_row,
    rows,
    targets,
    tokens,
    peaks,
    sums,
    best,
    logprobs,  # float64 (asked,)
    top_ids,  # int64 (asked, number)
    top_logprobs,  # float64 (asked, number)
    chunks,
    number,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,  # number * chunks at least; 0: no alternatives
):
    asked = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + asked).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    peak, _ = peak_of(peaks, row, chunks, CHUNKS)
    each = tl.load(peaks + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    share = tl.where(each == peak, 1.0, tl.exp(each - peak)).to(tl.float64)
    held = tl.load(sums + row * chunks + chunk, mask=chunk < chunks, other=0.0).to(tl.float64)
    normalizer = peak.to(tl.float64) + tl.log(tl.sum(share * held, 0))
    token = tl.load(targets + asked).to(tl.int64)
    if token < 0:
        token = tl.load(tokens + row)
    tl.store(logprobs + asked, tl.load(logits + row * logits_row + token).to(tl.float64) - normalizer)
    if CANDIDATES > 0:
        lane = tl.arange(0, CANDIDATES)
        count = chunks * number
        left = tl.load(best + asked * count + lane, mask=lane < count, other=NOTHING)
        for place in range(number):
            top = tl.max(left, 0)
            tl.store(top_ids + asked * number + place, id_of(top))
            tl.store(top_logprobs + asked * number + place, number_of(top).to(tl.float64) - normalizer)
            left = tl.where(left == top, NOTHING, left)


def log_probabilities(
    logits: Tensor, found: Survey, rows: Tensor, targets: Tensor, tokens: Tensor, alternatives: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``rows``, int32 (asked,), of float32 (rows, vocabulary) logits that were surveyed with their sums.

    float64 (asked,) log-probabilities of ``targets``, int32 (asked,), or where that is negative of the row's
    own of ``tokens``, int64 (rows,); int64 (asked, alternatives) likeliest tokens, equals by id, and theirs.
    """
    assert found.sums is not None, "surveyed with sums"
    asked, (width, chunks), device = len(rows), (logits.shape[1], found.peaks.shape[1]), logits.device
    number = min(alternatives, width)
    many = number * chunks > _MOST_CANDIDATES
    logprobs = torch.empty(asked, dtype=torch.float64, device=device)
    ids = torch.empty(asked, number, dtype=torch.int64, device=device)
    values = torch.empty(asked, number, dtype=torch.float64, device=device)
    best, candidates = None, 0
    if number and not many:
        best = torch.empty(asked, chunks, number, dtype=torch.int64, device=device)
        usual = chunks * max(number, _USUAL)
        candidates = triton.next_power_of_2(usual if usual <= _MOST_CANDIDATES else chunks * number)
        runtime.launch(
            _best_of_chunks,
            (asked, chunks),
            *(logits, logits.stride(0), rows, best, width, chunks, number),
            num_warps=8,
            CHUNK=sampling.CHUNK,
        )
    runtime.launch(
        _rate,
        (asked,),
        *(logits, logits.stride(0), rows, targets, tokens, found.peaks, found.sums, best, logprobs),
        *(ids, values, chunks, number),
        num_warps=min(max(candidates // 512, 1), 16),
        CHUNKS=triton.next_power_of_2(chunks),
        CANDIDATES=candidates,
    )
    if many:
        ids, values = _sorted(logits, rows, targets, tokens, logprobs, number)
    return logprobs, ids, values


def _sorted(
    logits: Tensor, rows: Tensor, targets: Tensor, tokens: Tensor, logprobs: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """More alternatives than a program holds, which torch sorts."""
    chosen = logits.index_select(0, rows)
    token = torch.where(targets < 0, tokens.index_select(0, rows), targets)
    normalizer = chosen.gather(1, token[:, None]).double() - logprobs[:, None]
    values, ids = chosen.sort(dim=1, descending=True, stable=True)
    return ids[:, :number], values[:, :number].double() - normalizer
