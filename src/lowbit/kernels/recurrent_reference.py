"""The gated delta rule in torch, as ``recurrent`` defines it: any device; the oracle of the other kernels.

On a CPU one sequence after another, so that its bits do not depend on the others. On other devices all
sequences at once, padded to the longest of the step, which is a host number: nothing waits for the device. A
prompt is then as many steps of small operations as it has tokens: right, and slow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LENGTH_EPS, DeltaParameters, LayerState, StateSpec


class ReferenceDelta:
    """See the module docstring."""

    name = "reference"

    def refuses(self, spec: StateSpec, device: torch.device) -> str | None:
        """Nothing."""
        return None

    def run(self, mixed: Tensor, state: LayerState, batch: ForwardBatch, weights: DeltaParameters) -> Tensor:
        """mixed (tokens, width) -> (tokens, heads * v_dim) in its dtype."""
        assert batch.state_slots is not None, "the engine hands out slots where a model has states"
        out = mixed.new_empty(len(mixed), state.spec.heads * state.spec.v_dim)
        slots, lengths = batch.state_slots.long(), batch.query_lengths.long()
        begins = batch.context_lengths == batch.query_lengths
        if mixed.device.type != "cpu":
            self._all_at_once(mixed, state, batch, weights, out)
            return out
        first = 0
        for row, count in enumerate(lengths.tolist()):
            slot, here = slots[row : row + 1], slice(first, first + count)
            inputs, matrices = state.inputs[slot], state.matrices[slot]  # copies
            if bool(begins[row]):
                inputs, matrices = torch.zeros_like(inputs), torch.zeros_like(matrices)
            made, inputs, matrices = _run(
                mixed[here].float().unsqueeze(0), inputs, matrices, state.spec, weights
            )
            out[here] = made[0]
            state.inputs[slot], state.matrices[slot] = inputs, matrices
            first += count
        return out

    def _all_at_once(
        self, mixed: Tensor, state: LayerState, batch: ForwardBatch, weights: DeltaParameters, out: Tensor
    ) -> None:
        """The same without reading a length."""
        assert batch.state_slots is not None, "checked above"
        slots, lengths = batch.state_slots.long(), batch.query_lengths.long()
        begins = (batch.context_lengths == batch.query_lengths)[:, None, None]
        starts = lengths.cumsum(0) - lengths
        offset = torch.arange(batch.max_query, device=mixed.device)
        inside = offset < lengths[:, None]  # (sequences, longest)
        rows = (starts[:, None] + offset).clamp(max=len(mixed) - 1)
        inputs = state.inputs[slots].masked_fill(begins, 0.0)
        matrices = state.matrices[slots].masked_fill(begins[..., None], 0.0)
        made, inputs, matrices = _run(mixed[rows].float(), inputs, matrices, state.spec, weights, inside)
        state.inputs[slots], state.matrices[slots] = inputs, matrices
        # Each token's sequence and its place there; output_size spares a wait for the sum of lengths.
        owners = torch.arange(len(lengths), device=mixed.device)
        owner = owners.repeat_interleave(lengths, output_size=len(mixed))
        place = torch.arange(len(mixed), device=mixed.device) - starts[owner]
        out.copy_(made[owner, place])


def _run(
    mixed: Tensor,
    inputs: Tensor,
    matrices: Tensor,
    spec: StateSpec,
    weights: DeltaParameters,
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """mixed (sequences, tokens, width) -> (sequences, tokens, heads * v_dim) and the states that follow.

    ``inside``: bool (sequences, tokens), where a sequence has tokens; None: everywhere.
    """
    tokens = mixed.shape[1]
    values = spec.heads * spec.v_dim
    channels, z, b, a = mixed.split((spec.channels, values, spec.heads, spec.heads), -1)
    seen = torch.cat([inputs, channels], 1)  # (sequences, taps - 1 + tokens, channels)
    convolved = sum_of_taps(seen, weights.taps, tokens)
    keys = spec.k_heads * spec.k_dim
    q, k, v = functional.silu(convolved).split((keys, keys, values), -1)
    each = spec.heads // spec.k_heads
    q, k = (unit(x.unflatten(-1, (spec.k_heads, -1))).repeat_interleave(each, 2) for x in (q, k))
    q = q * spec.k_dim**-0.5
    v = v.unflatten(-1, (spec.heads, -1))  # (sequences, tokens, heads, v_dim)
    beta = torch.sigmoid(b)
    keep = torch.exp(weights.decay * functional.softplus(a + weights.bias))  # (sequences, tokens, heads)
    made = torch.empty_like(v)
    for token in range(tokens):
        moved = matrices * keep[:, token, :, None, None]
        key = k[:, token, :, :, None]
        told = (moved * key).sum(2)  # what the state says of the key: (sequences, heads, v_dim)
        delta = (v[:, token] - told) * beta[:, token, :, None]
        moved = moved + key * delta[:, :, None, :]
        made[:, token] = (moved * q[:, token, :, :, None]).sum(2)
        matrices = (
            moved if inside is None else torch.where(inside[:, token, None, None, None], moved, matrices)
        )
    if inside is None:
        inputs = seen[:, tokens:]
    else:
        last = inside.sum(1)[:, None] + torch.arange(spec.taps - 1, device=seen.device)
        inputs = seen.gather(1, last[..., None].expand(-1, -1, seen.shape[2]))
    normed = made * torch.rsqrt(made.square().mean(-1, keepdim=True) + weights.eps) * weights.norm
    gated = normed.flatten(2) * functional.silu(z)
    return gated, inputs, matrices


def sum_of_taps(seen: Tensor, taps: Tensor, tokens: int) -> Tensor:
    """(sequences, taps - 1 + tokens, channels) -> (sequences, tokens, channels), the oldest tap first."""
    total = seen[:, :tokens] * taps[0]
    for tap in range(1, len(taps)):
        total = total + seen[:, tap : tap + tokens] * taps[tap]
    return total


def unit(x: Tensor) -> Tensor:
    """x over the length of its last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)
