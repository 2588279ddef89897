"""What a step's logits come to: whether they are sound, the tokens, log-probabilities.

Two forms with one face. ``HostChoices`` has the logits in memory and samples each row when the engine asks
for it (``sampler``). ``DeviceChoices`` leaves them on the device: everything that any row may be asked for is
computed there when the step is launched (``DeviceSampler``), since the next step overwrites the logits, and
only the answers are copied to the host, which waits for them when it first asks.

On the device rows depend on their own request only, as on the host, and a row's one uniform number is the
same Philox draw, made on the host: equal logits give equal tokens. What rounding may change is a draw that
lies within 1e-7 of the border between two tokens. Where Triton runs its kernels draw
(``kernels.gpu.sampling``), elsewhere torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lowbit.engine.messages import TokenLogprob
from lowbit.engine.sampler import has_penalties, log_probabilities, sample, token_counts, uniform_number
from lowbit.engine.sequence import Sequence
from lowbit.kernels.device_memory import upload
from lowbit.kernels.gpu import runtime
from lowbit.kernels.row_peaks import row_peaks

_POLL_SECONDS = 2e-5
_WATCH_SECONDS = 0.2


class Choices(Protocol):
    """The answers of one step; ``row`` counts the rows of logits that the step was asked for."""

    def finite(self, row: int) -> bool:
        """Whether tokens may be chosen from the row."""

    def broken(self, row: int) -> int:
        """How many of its logits are NaN or infinite."""

    def token(self, row: int, sequence: Sequence) -> int:
        """The sequence's next token, from a finite row."""

    def logprob(self, row: int, token: int, alternatives: int) -> TokenLogprob:
        """The token's log-probability under the raw logits, and so many of the best."""


class HostChoices:
    """From logits on the CPU, row by row, with what the sequence knows when it is asked."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._peaks, self._likeliest = row_peaks(logits)

    def finite(self, row: int) -> bool:
        """By the row's largest number: NaN where it holds one."""
        return math.isfinite(self._peaks[row])

    def broken(self, row: int) -> int:
        """Counted when something is wrong."""
        return int((~torch.isfinite(self._logits[row])).sum())

    def token(self, row: int, sequence: Sequence) -> int:
        """Sampled now."""
        return sample(self._logits[row], sequence, self._likeliest[row])

    def logprob(self, row: int, token: int, alternatives: int) -> TokenLogprob:
        """Computed now."""
        return log_probabilities(self._logits[row], token, alternatives)


@dataclass(frozen=True)
class Ask:
    """A row of logits that a token is to be chosen from, or the ``target`` of a prompt rated under.

    ``position``: tokens before the one chosen, some of which may be known to the device alone.
    """

    row: int
    sequence: Sequence
    position: int
    target: int = -1


class DeviceChoices:
    """Computed when the step was launched; the first question waits for the copies.

    ``tokens``: int64 (rows,) on the device, for the next step to read; rows nobody chooses from hold 0.
    """

    def __init__(
        self,
        tokens: Tensor,
        results: dict[str, Tensor],
        rated: Listing[int],
        watch: Callable[[], None] | None = None,
    ) -> None:
        """``watch``: called now and then while the device is waited for."""
        self.tokens = tokens
        self._copies = _HostCopies({"tokens": tokens, **results}, watch)
        self._rated = {row: place for place, row in enumerate(rated)}

    def finite(self, row: int) -> bool:
        """By the row's largest number: NaN where it holds one."""
        return math.isfinite(self._copies["peaks"][row])

    def broken(self, row: int) -> int:
        """Counted beforehand."""
        return int(self._copies["broken"][row])

    def token(self, row: int, sequence: Sequence) -> int:
        """Chosen beforehand."""
        return int(self._copies["tokens"][row])

    def logprob(self, row: int, token: int, alternatives: int) -> TokenLogprob:
        """Computed beforehand, for the token that was chosen or asked for there."""
        place = self._rated[row]
        ids = self._copies["top_ids"][place][:alternatives]
        values = self._copies["top_logprobs"][place][:alternatives]
        top = tuple(zip(ids, values, strict=True))
        return TokenLogprob(token, self._copies["logprobs"][place], top)


class _HostCopies:
    """Copies of device tensors, under way while the device computes on."""

    def __init__(self, results: dict[str, Tensor], watch: Callable[[], None] | None) -> None:
        self._watch = watch
        self._copies = {name: result.to("cpu", non_blocking=True) for name, result in results.items()}
        self._lists: dict[str, list[Any]] | None = None
        self._done: torch.cuda.Event | None = None
        if any(result.is_cuda for result in results.values()):
            self._done = torch.cuda.Event()
            self._done.record()

    def __getitem__(self, name: str) -> list[Any]:
        if self._lists is None:
            if self._done is not None:
                wait_for(self._done, self._watch)
            self._lists = {key: copy.tolist() for key, copy in self._copies.items()}
        return self._lists[name]


class Happening(Protocol):
    """Of a CUDA event, what is waited by."""

    def query(self) -> bool:
        """Whether the device has come so far."""

    def synchronize(self) -> None:
        """Wait until it has."""


def wait_for(done: Happening, watch: Callable[[], None] | None) -> None:
    """Until the device is done. It may never be, where it sums with a rank that has ended: ``watch`` raises
    then."""
    if watch is None:
        done.synchronize()
        return
    looked = time.monotonic()
    while not done.query():
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - looked > _WATCH_SECONDS:
            watch()
            looked = time.monotonic()


class DeviceSampler:
    """Chooses tokens where the logits are. It counts output tokens on the device for those with penalties."""

    def __init__(
        self, vocabulary: int, device: torch.device, watch: Callable[[], None] | None = None
    ) -> None:
        """``watch``: see ``wait_for``."""
        self._watch = watch
        self._vocabulary = vocabulary
        self._device = device
        self._kernels = _kernels_for(device)
        self._slots: dict[Sequence, int] = {}
        self._free: list[int] = []
        self._counts = torch.zeros(0, vocabulary, dtype=torch.int32, device=device)
        self._prompts = torch.zeros(0, vocabulary, dtype=torch.bool, device=device)

    def choose(self, logits: Tensor, asks: list[Ask]) -> DeviceChoices:
        """Queue all that the step's rows are asked; logits float32 (rows, vocabulary)."""
        peaks, likeliest = self._kernels.row_peaks(logits)
        results = {"peaks": peaks, "broken": (~torch.isfinite(logits)).sum(1)}
        choosing = [ask for ask in asks if ask.target < 0]
        tokens = self._tokens(logits, likeliest, choosing)
        rated = [ask for ask in asks if ask.target >= 0 or ask.sequence.sampling.logprobs is not None]
        if rated:
            results |= self._rate(logits, tokens, rated)
        self._count(tokens, choosing)
        return DeviceChoices(tokens, results, [ask.row for ask in rated], self._watch)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._free.append(slot)

    def _upload(self, values: Listing[float], dtype: torch.dtype) -> Tensor:
        (found,) = upload([np.array(values, dtype=np.float64)], self._device)
        return found.to(dtype)

    def _indices(self, values: Listing[int] | Listing[tuple[int, int]]) -> Tensor:
        (found,) = upload([np.array(values, dtype=np.int64)], self._device)
        return found

    # ---- tokens --------------------------------------------------------------------------------------

    def _tokens(self, logits: Tensor, likeliest: Tensor, asks: list[Ask]) -> Tensor:
        """int64 (rows,): the token of each row that asks for one."""
        changed = self._adjusted(logits, asks)
        drawn = [ask for ask in asks if ask.sequence.sampling.temperature > 0]
        if drawn:
            tokens = self._draw(changed, drawn)
        else:
            tokens = likeliest if changed is logits else self._kernels.row_peaks(changed)[1]
        # A row of NaN gives any number; the next step reads an embedding at it before anybody looks.
        return tokens.clamp(0, self._vocabulary - 1)

    def _draw(self, logits: Tensor, asks: list[Ask]) -> Tensor:
        """Every row's token; those that do not ask get the likeliest."""
        heat, top_k = [0.0] * len(logits), [0] * len(logits)
        top_p, min_p, uniform = [1.0] * len(logits), [0.0] * len(logits), [0.0] * len(logits)
        for ask in asks:
            row, sampling = ask.row, ask.sequence.sampling
            heat[row], top_k[row] = sampling.temperature, sampling.top_k
            top_p[row], min_p[row] = sampling.top_p, sampling.min_p
            uniform[row] = uniform_number(ask.sequence.seed, ask.position)
        arrays = [np.array(values, dtype=np.float64) for values in (heat, top_k, top_p, min_p, uniform)]
        there = upload(arrays, self._device)
        return self._kernels.sample_rows(logits, there[0].float(), there[1].int(), *there[2:])

    def _adjusted(self, logits: Tensor, asks: list[Ask]) -> Tensor:
        """The logits with minimum lengths, biases and penalties, in the host sampler's order."""
        places: list[tuple[int, int]] = []
        amounts: list[float] = []
        for ask in asks:
            sequence, sampling = ask.sequence, ask.sequence.sampling
            if ask.position - sequence.prompt_length < sampling.min_tokens:
                ends = [token for token in sequence.stop_ids if token < self._vocabulary]
                places += [(ask.row, token) for token in ends]
                amounts += [-math.inf] * len(ends)
            places += [(ask.row, token) for token in sampling.logit_bias]
            amounts += sampling.logit_bias.values()
        penalized = [ask for ask in asks if has_penalties(ask.sequence)]
        if not places and not penalized:
            return logits
        logits = logits.clone()
        if places:
            rows, columns = self._indices(places).unbind(1)
            logits.index_put_((rows, columns), self._upload(amounts, torch.float32), accumulate=True)
        if penalized:
            self._penalize(logits, penalized)
        return logits

    def _penalize(self, logits: Tensor, asks: list[Ask]) -> None:
        """As ``sampler`` does, all rows at once."""
        rows = self._indices([ask.row for ask in asks])
        slots = self._indices([self._slot(ask.sequence) for ask in asks])
        params = [ask.sequence.sampling for ask in asks]

        def column(values: list[float]) -> Tensor:
            return self._upload(values, torch.float32)[:, None]

        chosen, counts = logits.index_select(0, rows), self._counts.index_select(0, slots)
        seen = (counts > 0) | self._prompts.index_select(0, slots)
        less = column([1 / p.repetition_penalty for p in params])
        factor = torch.where(chosen > 0, less, column([p.repetition_penalty for p in params]))
        chosen = torch.where(seen, chosen * factor, chosen)
        chosen -= counts * column([p.frequency_penalty for p in params])
        chosen -= (counts > 0) * column([p.presence_penalty for p in params])
        logits.index_copy_(0, rows, chosen)

    def _slot(self, sequence: Sequence) -> int:
        """The sequence's row of the counts; a new one starts with what it has said so far."""
        if sequence in self._slots:
            return self._slots[sequence]
        if not self._free:
            held = len(self._counts)
            self._free = list(range(held, max(2 * held, 4)))
            more = len(self._free)
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more, self._vocabulary)])
            self._prompts = torch.cat([self._prompts, self._prompts.new_zeros(more, self._vocabulary)])
        slot = self._slots[sequence] = self._free.pop()
        counts, prompt = token_counts(sequence, self._vocabulary)
        (self._counts[slot],) = upload([counts], self._device)
        (self._prompts[slot],) = upload([prompt], self._device)
        return slot

    def _count(self, tokens: Tensor, asks: list[Ask]) -> None:
        """Note the chosen tokens of sequences with penalties; last in a step: never done twice."""
        counted = [ask for ask in asks if ask.sequence in self._slots]
        if counted:
            slots = self._indices([self._slots[ask.sequence] for ask in counted])
            chosen = tokens.index_select(0, self._indices([ask.row for ask in counted]))
            self._counts.index_put_((slots, chosen), self._counts.new_ones(len(slots)), accumulate=True)

    # ---- log-probabilities ---------------------------------------------------------------------------

    def _rate(self, logits: Tensor, tokens: Tensor, asks: list[Ask]) -> dict[str, Tensor]:
        """Of the rows that ask for it: the token's log-probability and the best alternatives'."""
        rows = self._indices([ask.row for ask in asks])
        targets = self._indices([ask.target for ask in asks])
        targets = torch.where(targets < 0, tokens.index_select(0, rows), targets)
        wanted = max(_alternatives(ask) for ask in asks)
        rate = self._kernels.log_probabilities
        found, ids, values = rate(logits.index_select(0, rows), targets, wanted)
        return {"logprobs": found, "top_ids": ids, "top_logprobs": values}


def _alternatives(ask: Ask) -> int:
    sampling = ask.sequence.sampling
    return (sampling.logprobs if ask.target < 0 else sampling.prompt_logprobs) or 0


@dataclass(frozen=True)
class _Kernels:
    """What is done with whole rows; ``kernels.gpu.sampling`` says what each is."""

    row_peaks: Callable[[Tensor], tuple[Tensor, Tensor]]
    sample_rows: Callable[..., Tensor]
    log_probabilities: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def _kernels_for(device: torch.device) -> _Kernels:
    if not runtime.runs_on(device):
        return _Kernels(_row_peaks, sample_rows, _log_probabilities)
    from lowbit.kernels.gpu import sampling

    return _Kernels(sampling.row_peaks, sampling.sample_rows, sampling.log_probabilities)


def _row_peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    if not len(logits):
        return logits.new_zeros(0), logits.new_zeros(0, dtype=torch.int64)
    return logits.amax(1), logits.argmax(1)


def sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """int64 (rows,): a token of each row of float32 (rows, vocabulary) logits.

    ``temperature`` 0: the likeliest; ``top_k`` 0, or as many as there are: all; ``uniform``: float64 numbers
    in [0, 1). ``sampler`` of all rows at once, in torch on any device. A row under top-k or top-p draws among
    its tokens in order of their probability, any other row in order of their ids.
    """
    size = logits.shape[1]
    top_k = torch.where(top_k < size, top_k, 0)[:, None]
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    probabilities = torch.softmax((logits / heat).double(), 1)
    largest = probabilities.amax(1, keepdim=True)
    kept = torch.where(probabilities < min_p[:, None] * largest, 0, probabilities)
    probabilities = torch.where(min_p[:, None] > 0, kept / kept.sum(1, keepdim=True), probabilities)
    by_rank, ids = probabilities.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(size, device=logits.device)
    by_rank = torch.where((top_k > 0) & (rank >= top_k), 0, by_rank)
    total = torch.where(top_k > 0, by_rank.sum(1, keepdim=True), 1.0)
    before = by_rank.cumsum(1) - by_rank
    outside = (top_p[:, None] < 1) & (before >= top_p[:, None] * total) & (rank > 0)
    by_rank = torch.where(outside, 0, by_rank)
    ranked = (top_k > 0) | (top_p[:, None] < 1)
    weights = torch.where(ranked, by_rank, probabilities)
    cumulative = weights.cumsum(1)
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    # Rounding at the very end may point behind the last token that is possible.
    last = torch.where(weights > 0, rank, 0).amax(1, keepdim=True)
    place = torch.minimum(place, last)
    drawn = torch.where(ranked, ids.gather(1, place), place)[:, 0]
    return torch.where(temperature > 0, drawn, logits.argmax(1))


def _log_probabilities(logits: Tensor, tokens: Tensor, alternatives: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.double()
    normalizer = torch.logsumexp(wide, 1, keepdim=True)
    values, ids = wide.sort(dim=1, descending=True, stable=True)
    found = wide.gather(1, tokens[:, None]) - normalizer
    return found[:, 0], ids[:, :alternatives], values[:, :alternatives] - normalizer
