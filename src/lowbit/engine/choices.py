"""What a step's logits come to: whether they are sound, the tokens, log-probabilities.

Two forms with one face. ``HostChoices`` has the logits in memory, draws what depends on nothing else at once
(``kernels.sampling``) and samples each other row when the engine asks for it (``sampler``).
``DeviceChoices`` leaves them on the device: everything that any row may be asked for is computed there when
the step is launched (``DeviceSampler``), since the next step overwrites the logits, and only the answers are
copied to the host, which waits for them when it first asks.

On the device rows depend on their own request only, as on the host, and a row's one uniform number is the
same Philox draw, made on the host: equal logits give equal tokens. What rounding may change is a draw that
lies within 1e-7 of the border between two tokens. Where Triton runs its kernels do all of it
(``kernels.gpu.sampling``, ``penalties``, ``ratings``), elsewhere torch.
"""

from __future__ import annotations

import contextlib
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
from lowbit.engine.sampler import (
    has_penalties,
    log_probabilities,
    plan_draw,
    sample,
    takes_peak,
    takes_raw_logits,
    uniform_number,
)
from lowbit.engine.sequence import Sequence
from lowbit.kernels.device_memory import upload
from lowbit.kernels.gpu import runtime
from lowbit.kernels.row_peaks import row_peaks
from lowbit.kernels.sampling import draw_tokens
from lowbit.kernels.token_lists import Changes, TokenLists

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


@dataclass(frozen=True)
class Ask:
    """A row of logits that a token is to be chosen from, or the ``target`` of a prompt rated under.

    ``position``: tokens before the one chosen, some of which may be known to the device alone.
    """

    row: int
    sequence: Sequence
    position: int
    target: int = -1


class HostChoices:
    """From logits on the CPU: what depends on nothing that is not known yet all at once, the rest row by row,
    with what the sequence knows when it is asked. ``asks``: what will be asked, where that is known."""

    def __init__(self, logits: Tensor, asks: Listing[Ask] = ()) -> None:
        self._logits = logits
        self._peaks, self._likeliest = row_peaks(logits)
        self._drawn: dict[int, int] = {}
        drawn = [ask for ask in asks if self._at_once(ask)]
        if drawn:
            # What fails is asked for again, each row by itself, and is then that sequence's alone.
            with contextlib.suppress(Exception):
                self._draw(drawn)

    def _draw(self, asks: list[Ask]) -> None:
        size = self._logits.shape[1]
        draws = [plan_draw(ask.row, ask.sequence, ask.position, size) for ask in asks]
        tokens = draw_tokens(self._logits, self._peaks, draws)
        if tokens is not None:
            self._drawn = {ask.row: token for ask, token in zip(asks, tokens, strict=True)}

    def _at_once(self, ask: Ask) -> bool:
        """Whether a token is wanted that depends on nothing that is not known yet, and is not the peak's."""
        sequence, position = ask.sequence, ask.position
        if ask.target >= 0 or takes_peak(sequence, position) or not self.finite(ask.row):
            return False
        return position == len(sequence.tokens) or takes_raw_logits(sequence, position)

    def finite(self, row: int) -> bool:
        """By the row's largest number: NaN where it holds one."""
        return math.isfinite(self._peaks[row])

    def broken(self, row: int) -> int:
        """Counted when something is wrong."""
        return int((~torch.isfinite(self._logits[row])).sum())

    def token(self, row: int, sequence: Sequence) -> int:
        """Drawn beforehand, or sampled now."""
        drawn = self._drawn.get(row)
        return drawn if drawn is not None else sample(self._logits[row], sequence, self._likeliest[row])

    def logprob(self, row: int, token: int, alternatives: int) -> TokenLogprob:
        """Computed now."""
        return log_probabilities(self._logits[row], token, alternatives)


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


class Survey(Protocol):
    """What is found of all rows before anything else is: see ``kernels.gpu.sampling.Survey``."""

    @property
    def values(self) -> Tensor:
        """float32 (rows,): each row's largest logit, NaN where it holds one."""

    @property
    def ids(self) -> Tensor:
        """int64 (rows,): its first place."""

    @property
    def broken(self) -> Tensor:
        """Whole numbers (rows,): how many logits are NaN or infinite."""


class DeviceSampler:
    """Chooses tokens where the logits are; what sequences with penalties have said is counted there."""

    def __init__(
        self, vocabulary: int, device: torch.device, watch: Callable[[], None] | None = None
    ) -> None:
        """``watch``: see ``wait_for``."""
        self._watch = watch
        self._vocabulary = vocabulary
        self._device = device
        self._kernels = _kernels_for(device)
        self._slots: dict[Sequence, int] = {}
        self._lists = TokenLists(vocabulary, device)

    def choose(self, logits: Tensor, asks: list[Ask]) -> DeviceChoices:
        """Queue all that the step's rows are asked; float32 (rows, vocabulary) stay as they are."""
        choosing = [ask for ask in asks if ask.target < 0]
        rated = [ask for ask in asks if ask.target >= 0 or ask.sequence.sampling.logprobs is not None]
        drawn = [ask for ask in choosing if ask.sequence.sampling.temperature > 0]
        changes = self._changes(choosing)
        survey = self._kernels.survey(logits, sums=bool(rated), draws=bool(drawn and not changes))
        with self._lists.applied(changes, logits) as changed:
            tokens = self._tokens(changed, None if changes else survey, drawn)
        results = {"peaks": survey.values, "broken": survey.broken}
        if rated:
            results |= self._rate(logits, survey, tokens, rated)
        self._note(tokens, choosing)
        return DeviceChoices(tokens, results, [ask.row for ask in rated], self._watch)

    def warm_up(self) -> None:
        """Launch once whatever a step may ask, so that no request waits for a kernel to be compiled."""
        logits = torch.zeros(1, self._vocabulary, device=self._device)
        asked = [np.array([value], dtype=np.float64) for value in (1.0, 2, 0.9, 0.1, 0.5)]
        heat, top_k, *rest = upload(asked, self._device)
        row, target = upload([np.array([value], dtype=np.int32) for value in (0, -1)], self._device)
        slot = self._lists.open((0,), ())
        changes = Changes()
        changes.add(0, {0: 1.0}, slot, (1.1, 0.1, 0.1))
        for sums in (False, True):
            survey = self._kernels.survey(logits, sums=sums, draws=False)
            drawn = self._kernels.survey(logits, sums=sums, draws=True)
            tokens = self._kernels.sample_rows(logits, heat.float(), top_k.int(), *rest, drawn)
        for alternatives in (0, 1):
            self._kernels.log_probabilities(logits, survey, row, target, tokens, alternatives)
        with self._lists.applied(changes, logits):
            pass
        self._lists.note(tokens, [0], [slot])
        self._lists.free(slot)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._lists.free(slot)

    # ---- tokens --------------------------------------------------------------------------------------

    def _tokens(self, logits: Tensor, survey: Survey | None, drawn: list[Ask]) -> Tensor:
        """int64 (rows,): the token of each row that asks for one. ``survey``: None where it is not theirs."""
        if survey is None:
            survey = self._kernels.survey(logits, sums=False, draws=bool(drawn))
        tokens = self._draw(logits, survey, drawn) if drawn else survey.ids
        # A row of NaN gives any number; the next step reads an embedding at it before anybody looks.
        return tokens.clamp(0, self._vocabulary - 1)

    def _draw(self, logits: Tensor, survey: Survey, asks: list[Ask]) -> Tensor:
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
        return self._kernels.sample_rows(logits, there[0].float(), there[1].int(), *there[2:], survey)

    def _changes(self, asks: list[Ask]) -> Changes:
        """Minimum lengths, biases and penalties, in the host sampler's order."""
        changes = Changes()
        for ask in asks:
            sequence, sampling = ask.sequence, ask.sequence.sampling
            biases = dict(sampling.logit_bias)
            if ask.position - sequence.prompt_length < sampling.min_tokens:
                biases |= {token: -math.inf for token in sequence.stop_ids if 0 <= token < self._vocabulary}
            if has_penalties(sequence):
                numbers = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
                changes.add(ask.row, biases, self._slot(sequence), numbers)
            elif biases:
                changes.add(ask.row, biases)
        return changes

    def _slot(self, sequence: Sequence) -> int:
        """The sequence's list; a new one starts with what it has said so far."""
        if sequence not in self._slots:
            output = sequence.tokens[sequence.prompt_length :]
            self._slots[sequence] = self._lists.open(sequence.request.prompt, output)
        return self._slots[sequence]

    def _note(self, tokens: Tensor, asks: list[Ask]) -> None:
        """The chosen tokens of sequences with penalties; last in a step: never done twice."""
        noted = [ask for ask in asks if ask.sequence in self._slots]
        if noted:
            slots = [self._slots[ask.sequence] for ask in noted]
            self._lists.note(tokens, [ask.row for ask in noted], slots)

    # ---- log-probabilities ---------------------------------------------------------------------------

    def _rate(self, logits: Tensor, survey: Survey, tokens: Tensor, asks: list[Ask]) -> dict[str, Tensor]:
        """Of the rows that ask for it: the token's log-probability and the best alternatives'."""
        numbers = ([ask.row for ask in asks], [ask.target for ask in asks])
        rows, targets = upload([np.array(values, dtype=np.int32) for values in numbers], self._device)
        wanted = max(_alternatives(ask) for ask in asks)
        rate = self._kernels.log_probabilities
        found, ids, values = rate(logits, survey, rows, targets, tokens, wanted)
        return {"logprobs": found, "top_ids": ids, "top_logprobs": values}


def _alternatives(ask: Ask) -> int:
    sampling = ask.sequence.sampling
    return (sampling.logprobs if ask.target < 0 else sampling.prompt_logprobs) or 0


@dataclass(frozen=True)
class _Kernels:
    """What is done with whole rows; ``kernels.gpu`` says what each is."""

    survey: Callable[..., Survey]
    sample_rows: Callable[..., Tensor]
    log_probabilities: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _kernels_for(device: torch.device) -> _Kernels:
    if not runtime.runs_on(device):
        return _Kernels(_survey, sample_rows, _log_probabilities)
    from lowbit.kernels.gpu import ratings, sampling

    return _Kernels(sampling.survey, sampling.sample_rows, ratings.log_probabilities)


@dataclass(frozen=True)
class _Survey:
    """``Survey`` of torch."""

    values: Tensor
    ids: Tensor
    broken: Tensor


def _survey(logits: Tensor, *, sums: bool, draws: bool) -> Survey:
    broken = (~torch.isfinite(logits)).sum(1)
    if not len(logits):
        return _Survey(logits.new_zeros(0), broken, broken)
    return _Survey(logits.amax(1), logits.argmax(1), broken)


def sample_rows(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    survey: Survey,
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
    return torch.where(temperature > 0, drawn, survey.ids)


def _log_probabilities(
    logits: Tensor,
    survey: Survey,
    rows: Tensor,
    targets: Tensor,
    tokens: Tensor,
    alternatives: int,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.index_select(0, rows).double()
    tokens = torch.where(targets < 0, tokens.index_select(0, rows), targets)
    normalizer = torch.logsumexp(wide, 1, keepdim=True)
    values, ids = wide.sort(dim=1, descending=True, stable=True)
    found = wide.gather(1, tokens[:, None]) - normalizer
    return found[:, 0], ids[:, :alternatives], values[:, :alternatives] - normalizer
