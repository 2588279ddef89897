"""The gated delta rule in torch, as ``recurrent`` defines it: any device; the oracle of the other kernels.

On a CPU one sequence after another and token by token. On other devices, where there is no Triton, sequences
with one token each go together, in operations whose sizes are host numbers, so that a step can be captured; a
longer part of a prompt goes by itself, in chunks of tokens at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LENGTH_EPS, DeltaParameters, LayerState, StateSpec

CHUNK = 64  # tokens computed at once on a device: a system of as many equations for each head


class ReferenceDelta:
    """See the module docstring."""

    name = "reference"
    unit = 1  # on a CPU; elsewhere a request's last bits depend on its chunks

    def refuses(self, spec: StateSpec, device: torch.device) -> str | None:
        """Nothing."""
        return None

    def run(self, mixed: Tensor, state: LayerState, batch: ForwardBatch, weights: DeltaParameters) -> Tensor:
        """mixed (tokens, width) -> (tokens, heads * v_dim) in its dtype."""
        return self.by_rule(mixed, state, batch, weights, mixed.device.type != "cpu")

    def by_rule(
        self, mixed: Tensor, state: LayerState, batch: ForwardBatch, weights: DeltaParameters, together: bool
    ) -> Tensor:
        """``together``: as on a device that is not the CPU."""
        assert batch.state_slots is not None, "the engine hands out slots where a model has states"
        out = mixed.new_empty(len(mixed), state.spec.heads * state.spec.v_dim)
        slots, begins = batch.state_slots.long(), batch.context_lengths <= batch.query_lengths
        if together and batch.max_query == 1:
            _advance(mixed, state, slots, begins, weights, out.unsqueeze(1), 1)
            return out
        lengths = (batch.query_lengths if batch.host_lengths is None else batch.host_lengths[0]).tolist()
        first = 0
        alone: list[tuple[int, int]] = []  # (sequence, its row), of those with one token
        for sequence, count in enumerate(lengths):
            if together and count == 1:
                alone.append((sequence, first))
            else:
                here, own = slice(first, first + count), slice(sequence, sequence + 1)
                made = out[here].unsqueeze(0)
                _advance(mixed[here], state, slots[own], begins[own], weights, made, CHUNK if together else 1)
            first += count
        if alone:
            sequences, rows = torch.tensor(alone, device=mixed.device).unbind(1)
            made = out.new_empty(len(alone), 1, out.shape[1])
            _advance(mixed[rows], state, slots[sequences], begins[sequences], weights, made, 1)
            out[rows] = made.squeeze(1)
        return out


def _advance(
    mixed: Tensor,
    state: LayerState,
    slots: Tensor,
    begins: Tensor,
    weights: DeltaParameters,
    out: Tensor,
    chunk: int,
) -> None:
    """Sequences with as many tokens each: mixed (sequences * tokens, width), out (sequences, tokens, ...)."""
    spec = state.spec
    rows = mixed.float().view(len(slots), -1, mixed.shape[1])
    inputs = state.inputs[slots].masked_fill(begins[:, None, None], 0.0)
    matrices = state.matrices[slots].masked_fill(begins[:, None, None, None], 0.0)
    values = spec.heads * spec.v_dim
    channels, z, b, a = rows.split((spec.channels, values, spec.heads, spec.heads), -1)
    seen = torch.cat([inputs, channels], 1)  # (sequences, taps - 1 + tokens, channels)
    state.inputs[slots] = seen[:, rows.shape[1] :]
    q, k, v = _queries_keys_values(seen, spec, weights)
    beta = torch.sigmoid(b).transpose(1, 2)  # (sequences, heads, tokens)
    decay = (weights.decay * functional.softplus(a + weights.bias)).transpose(1, 2)
    rule = one_by_one if chunk == 1 else in_chunks
    made, state.matrices[slots] = rule(q, k, v, decay, beta, matrices)
    made = made.transpose(1, 2)  # (sequences, tokens, heads, v_dim)
    normed = made * torch.rsqrt(made.square().mean(-1, keepdim=True) + weights.eps) * weights.norm
    out.copy_(normed.flatten(2) * functional.silu(z))


def _queries_keys_values(
    seen: Tensor, spec: StateSpec, weights: DeltaParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """(sequences, taps - 1 + tokens, channels) -> each (sequences, heads, tokens, k_dim or v_dim)."""
    tokens = seen.shape[1] - spec.taps + 1
    total = seen[:, :tokens] * weights.taps[0]
    for tap in range(1, spec.taps):
        total = total + seen[:, tap : tap + tokens] * weights.taps[tap]
    keys = spec.k_heads * spec.k_dim
    q, k, v = functional.silu(total).split((keys, keys, spec.heads * spec.v_dim), -1)
    each = spec.heads // spec.k_heads
    q, k = (_unit(x.unflatten(-1, (spec.k_heads, -1))).repeat_interleave(each, 2) for x in (q, k))
    v = v.unflatten(-1, (spec.heads, -1))
    return (q * spec.k_dim**-0.5).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    """x over the length of its last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule as it is written: (..., tokens, v_dim) and the state that follows. ``decay``: logarithms."""
    made = torch.empty_like(v)
    for token in range(v.shape[-2]):
        key, query = k[..., token, :, None], q[..., token, :, None]
        state = state * decay[..., token, None, None].exp()
        told = (state * key).sum(-2)  # what the state says of the key: (..., v_dim)
        delta = (v[..., token, :] - told) * beta[..., token, None]
        state = state + key * delta[..., None, :]
        made[..., token, :] = (state * query).sum(-2)
    return made, state


def in_chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for ``CHUNK`` tokens at once (Yang et al., 2024).

    With G the sums of ``decay`` in a chunk and S the state before it, what tokens write is D of
    (I + A) D = beta (v - exp(G) k S), where A holds beta_t exp(G_t - G_s) (k_t k_s) for s < t.
    """
    made = torch.empty_like(v)
    for start in range(0, v.shape[-2], CHUNK):
        here = slice(start, start + CHUNK)
        queries, keys, values = q[..., here, :], k[..., here, :], v[..., here, :]
        rates, sums = beta[..., here, None], decay[..., here].cumsum(-1)
        apart = (sums[..., :, None] - sums[..., None, :]).tril()  # before exp: what lies behind may overflow
        between = apart.exp().tril()
        grown = sums[..., None].exp()
        system = rates * between * (keys @ keys.mT)
        wanted = rates * (values - grown * (keys @ state))
        written = torch.linalg.solve_triangular(system.tril(-1), wanted, upper=False, unitriangular=True)
        made[..., here, :] = grown * (queries @ state) + (between * (queries @ keys.mT)) @ written
        left = (sums[..., -1:] - sums).exp()[..., None]
        state = sums[..., -1, None, None].exp() * state + (left * keys).mT @ written
    return made, state
