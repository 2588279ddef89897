"""Sampler: logits -> tokens. Each row depends on its own request only, never on its neighbours.

Order, as vLLM has it: minimum length and logit bias, penalties, temperature, min-p, top-k, top-p. The draw is
one uniform number from a counter-based generator (Philox: Salmon et al., 2011) keyed by the request's seed
and the token's position: the same request draws the same numbers in any batch and after any retraction.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import torch
from torch import Tensor

from lowbit.engine.messages import SamplingParams, TokenLogprob
from lowbit.engine.said_tokens import SaidTokens
from lowbit.engine.sequence import Sequence
from lowbit.errors import LowbitError
from lowbit.kernels.sampling import Draw, LogitChanges, draw_tokens, rate_row

_CANDIDATES = 1024  # top-p rarely needs more; then no whole vocabulary is sorted
_NO_TOKENS, _NO_COUNTS = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
_MOST_CANDIDATES = 1 << 30  # no vocabulary is larger
_LEAST_TEMPERATURE = 1e-6  # with less a float32 quotient may overflow, and nothing but the likeliest is drawn
_MOST_BIAS = 1e9  # far above any logit; over the least temperature no float32 overflows
_BOUNDS = {
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-math.inf, math.inf),
    "frequency_penalty": (-math.inf, math.inf),
    "max_tokens": (0, math.inf),
    "min_tokens": (0, math.inf),
    "logprobs": (0, math.inf),
    "prompt_logprobs": (0, math.inf),
}


def checked(sampling: SamplingParams, vocabulary: int) -> SamplingParams:
    """As it is followed: a temperature next to 0 is 0, a single stop string is one, not its letters. What no
    sampler can follow is a LowbitError."""
    for name, (low, high) in _BOUNDS.items():
        value = getattr(sampling, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            range_ = f"{low} or more" if high == math.inf else f"between {low} and {high}"
            raise LowbitError("invalid_number", f"{name} must be finite and {range_}, got {value}")
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocabulary:
            raise LowbitError(
                "invalid_token", f"logit_bias: token id {token} is outside the vocabulary of {vocabulary}"
            )
        if not abs(bias) <= _MOST_BIAS:
            raise LowbitError(
                "invalid_number",
                f"logit_bias of token {token} must be between -{_MOST_BIAS:g} and {_MOST_BIAS:g}, got {bias}",
            )
    changes: dict[str, object] = {}
    if isinstance(sampling.stop, str):
        changes["stop"] = (sampling.stop,)
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
        changes["temperature"] = 0.0
    return msgspec.structs.replace(sampling, **changes) if changes else sampling


def sample(logits: Tensor, sequence: Sequence, likeliest: int) -> int:
    """The next token. logits float32 (vocabulary,), finite; ``likeliest``: the first of the largest."""
    position = len(sequence.tokens)
    if takes_peak(sequence, position):
        return likeliest
    plan = plan_draw(0, sequence, position, len(logits))
    drawn = draw_tokens(logits[None], [float(logits[likeliest])], [plan])
    if drawn is not None:
        return drawn[0]
    if plan.changes is not None:
        logits = _changed(logits, plan.changes)
    return int(logits.argmax()) if sequence.sampling.temperature == 0 else _draw(logits, sequence)


def plan_draw(row: int, sequence: Sequence, position: int, vocabulary: int) -> Draw:
    """How the token at ``position`` is chosen from a row of logits."""
    sampling = sequence.sampling
    top_k = min(sampling.top_k, _MOST_CANDIDATES)
    return Draw(
        row,
        sequence.seed,
        position,
        sampling.top_p,
        sampling.min_p,
        sampling.temperature,
        max(top_k, 0),
        None if takes_raw_logits(sequence, position) else _changes(sequence, position, vocabulary),
    )


def takes_raw_logits(sequence: Sequence, position: int) -> bool:
    """Whether the token at ``position`` is chosen from the logits as they are, whatever is said before it."""
    sampling = sequence.sampling
    early = position - sequence.prompt_length < sampling.min_tokens
    return not sampling.logit_bias and not early and not has_penalties(sequence)


def takes_peak(sequence: Sequence, position: int) -> bool:
    """Whether the largest raw logit is the answer."""
    return sequence.sampling.temperature == 0 and takes_raw_logits(sequence, position)


def wants_peak_only(sequence: Sequence) -> bool:
    """Whether nothing is asked of its logits but the largest, this time and after it has said more."""
    rated = sequence.sampling.logprobs is not None or sequence.wants_prompt_logprobs
    return not rated and takes_peak(sequence, len(sequence.tokens))


def has_penalties(sequence: Sequence) -> bool:
    """Whether its logits depend on what it has said."""
    sampling = sequence.sampling
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)


def _changes(sequence: Sequence, position: int, vocabulary: int) -> LogitChanges:
    """Minimum length and biases, then penalties: of repetition over prompt and output (Keskar et al., 2019),
    of presence and frequency over the output."""
    sampling = sequence.sampling
    biases = dict(sampling.logit_bias)
    if position - sequence.prompt_length < sampling.min_tokens:
        biases |= {token: -math.inf for token in sequence.stop_ids if 0 <= token < vocabulary}
    said, counts = _NO_TOKENS, _NO_COUNTS
    if has_penalties(sequence):
        if sequence.said is None:
            # The engine keeps it up to date from then on.
            prompt = sequence.request.prompt
            sequence.said = SaidTokens(prompt, sequence.tokens[len(prompt) :])
        said, counts = sequence.said.arrays()
    return LogitChanges(
        np.array(list(biases), dtype=np.int64),
        np.array(list(biases.values()), dtype=np.float32),
        said,
        counts,
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )


def _changed(row: Tensor, changes: LogitChanges) -> Tensor:
    """A copy of the logits under the changes."""
    logits = row.cpu().clone()
    logits[torch.from_numpy(changes.biased)] += torch.from_numpy(changes.bias)
    ids, counts = torch.from_numpy(changes.said), torch.from_numpy(changes.counts)
    said = logits[ids]
    if changes.repetition != 1.0:
        said *= torch.where(said > 0, 1 / changes.repetition, changes.repetition)
    said -= counts * changes.frequency
    said -= (counts > 0) * changes.presence
    logits[ids] = said
    return logits


def uniform_number(seed: int, position: int) -> float:
    """The draw in [0, 1) for the token at ``position``."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _draw(logits: Tensor, sequence: Sequence) -> int:
    """One token from the distribution that temperature, min-p, top-k and top-p leave."""
    sampling = sequence.sampling
    probabilities = torch.softmax((logits / sampling.temperature).double(), 0)
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    uniform = uniform_number(sequence.seed, len(sequence.tokens))
    keep = sampling.top_k if 0 < sampling.top_k < len(logits) else 0
    if not keep and sampling.top_p >= 1:
        cumulative = probabilities.cumsum(0)
        place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        return _last_possible(probabilities, place)
    values, ids = _largest(probabilities, keep, sampling.top_p)
    cumulative = values.cumsum(0)
    place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return int(ids[_last_possible(values, place)])


def _last_possible(probabilities: Tensor, place: int) -> int:
    """``place``, or the last token before it that has any probability (rounding at the very end)."""
    place = min(place, len(probabilities) - 1)
    while place > 0 and probabilities[place] == 0:
        place -= 1
    return place


def _largest(probabilities: Tensor, keep: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(probabilities, ids), largest first, that top-k and top-p leave."""
    count = keep or min(_CANDIDATES, len(probabilities))
    values, ids = _sorted_top(probabilities, count)
    if top_p >= 1:
        return values, ids
    total = float(values.sum()) if keep else 1.0
    if not keep and float(values.sum()) < top_p:  # the tail is needed too
        values, ids = _sorted_top(probabilities, len(probabilities))
    before = values.cumsum(0) - values
    kept = max(int((before < top_p * total).sum()), 1)
    return values[:kept], ids[:kept]


def _sorted_top(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest, equal ones by id: topk alone leaves open which it takes, and their order."""
    values, ids = torch.topk(probabilities, min(count + 1, len(probabilities)))
    if len(values) > count and values[count] == values[count - 1]:
        equal = (probabilities == values[count]).nonzero()[:, 0]
        above = ids[values > values[count]]
        ids = torch.cat((above, equal[: count - len(above)]))
    ids = ids[:count]
    values = probabilities[ids]
    ids, by_id = ids.sort()
    values, order = values[by_id].sort(descending=True, stable=True)
    return values, ids[order]


def log_probabilities(row: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """The token's log-probability under the raw logits ``row``, and the ``alternatives`` best."""
    count = min(alternatives, len(row))
    normalizer, ids = rate_row(row, float(row.max()), count) or _rated(row, count)
    best = zip(ids, row[ids].tolist(), strict=True)
    top = tuple((id_, logit - normalizer) for id_, logit in best)
    return TokenLogprob(token, float(row[token]) - normalizer, top)


def _rated(row: Tensor, count: int) -> tuple[float, list[int]]:
    """As ``rate_row``."""
    wide = row.double()
    ids = _sorted_top(wide, count)[1].tolist() if count else []
    return float(torch.logsumexp(wide, 0)), ids
