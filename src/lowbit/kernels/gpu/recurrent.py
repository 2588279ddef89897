"""The gated delta rule (Gated DeltaNet: Yang et al., 2024) in Triton, as ``kernels.recurrent`` defines it.

Three launches a layer, four where a step has longer parts of prompts:

1. ``convolve``: 8 tokens of a sequence and one head of q, k or v a program: the causal convolution and silu,
   and q and k over their lengths, into float32 (tokens, channels). Where no sequence has more than 8 tokens,
   which one program sees, it also moves the kept inputs on; else ``keep`` does, when all have read them.
2. ``rule``: a program has a strip of one value head's state of one sequence in registers, all of k_dim and
   some columns of v_dim, and goes through the sequence's tokens one by one: decay, delta rule, q S.
3. ``finish``: RMSNorm over a head's v_dim, weights, and the gate silu(z).

A strip is 1,024 numbers in one warp, 32 a lane: sums over k_dim need no shared memory and no barrier, and
one sequence of 32 heads of 128 x 128 has 512 warps, four for each multiprocessor. What the next token needs
is loaded while this one is computed. The same compiled kernels run steps of one token and prompts, and
nothing is added in an order that depends on the chunks a prompt comes in or on the batch: so a request's
bits do not either. The price is that a prompt goes token by token; the parallel form of the rule (Yang et
al., 2024) would not keep bits.

Grids follow from host numbers alone: tokens, sequences, ``max_query``. A row that pads a batch (slot -1)
begins with zeros and stores no state. **None of it has run on a GPU yet**: it is proven in Triton's
interpreter, and compiled; block sizes are reasoned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.gpu import runtime
from lowbit.kernels.recurrent import DeltaParameters, LayerState, StateSpec

TOKENS = 8  # of a sequence that a program of the convolution has
STRIP = 1024  # numbers of a state that a program has
KEPT_CHANNELS = 256  # of a program that moves the kept inputs on
ROWS = 1024  # numbers of a program that only goes through rows
SEQUENCES = 128  # whose lengths a program looks at together


class GpuDelta:
    """See the module docstring."""

    name = "gpu"

    def refuses(self, spec: StateSpec, device: torch.device) -> str | None:
        """Nothing on an NVIDIA GPU."""
        return runtime.refuses(device)

    def run(self, mixed: Tensor, state: LayerState, batch: ForwardBatch, weights: DeltaParameters) -> Tensor:
        """mixed (tokens, width) -> (tokens, heads * v_dim) in its dtype."""
        spec, slots = state.spec, batch.state_slots
        assert slots is not None, "the engine hands out slots where a model has states"
        assert mixed.shape[1] == spec.width and mixed.stride(1) == 1, (
            f"rows of {mixed.shape} are not {spec}'s"
        )
        out = mixed.new_empty(len(mixed), spec.heads * spec.v_dim)
        if not len(mixed):
            return out
        from triton import cdiv, next_power_of_2

        from lowbit.kernels.gpu.delta_rule import finish, rule

        x = (mixed, mixed.stride(0))
        lengths = (batch.query_lengths, batch.context_lengths, slots)
        convolved = torch.empty(len(mixed), spec.channels, dtype=torch.float32, device=mixed.device)
        _convolve(x, convolved, state, lengths, weights, batch.max_query)
        made = torch.empty(out.shape, dtype=torch.float32, device=mixed.device)
        block = next_power_of_2(spec.k_dim)
        strip = min(max(STRIP // block, 1), next_power_of_2(spec.v_dim))
        runtime.launch(
            rule,
            (cdiv(spec.v_dim, strip), spec.heads, len(slots)),
            *(*x, convolved, state.matrices, weights.decay, weights.bias, made, *lengths),
            *(spec.channels, spec.k_heads, spec.heads, spec.k_dim, spec.v_dim),
            num_warps=1,
            K=block,
            V=strip,
            SEQUENCES=SEQUENCES,
        )
        width = next_power_of_2(spec.v_dim)
        together = max(ROWS // width, 1)
        runtime.launch(
            finish,
            (cdiv(len(mixed) * spec.heads, together),),
            *(made, *x, weights.norm, out, len(mixed) * spec.heads, spec.heads, spec.v_dim),
            *(spec.channels, float(weights.eps)),
            M=together,
            BLOCK=width,
        )
        return out


def _convolve(
    x: tuple[Tensor, int],
    out: Tensor,
    state: LayerState,
    lengths: tuple[Tensor, Tensor, Tensor],
    weights: DeltaParameters,
    longest: int,
) -> None:
    """q, k and v of all heads into ``out``; the kept inputs move on. ``longest``: no part has more tokens."""
    from triton import cdiv, next_power_of_2

    from lowbit.kernels.gpu.delta_rule import convolve, keep

    spec, sequences = state.spec, len(lengths[0])
    kept = {"KEPT": spec.taps - 1, "R": next_power_of_2(max(spec.taps - 1, 1)), "SEQUENCES": SEQUENCES}
    runtime.launch(
        convolve,
        (len(out) // TOKENS + sequences, 2 * spec.k_heads + spec.heads),
        *(*x, weights.taps, state.inputs, out, *lengths, sequences),
        *(spec.channels, spec.k_heads, spec.k_dim, spec.v_dim, spec.k_dim**-0.5),
        TOKENS=TOKENS,
        BLOCK=next_power_of_2(max(spec.k_dim, spec.v_dim)),
        MOVES=longest <= TOKENS,
        **kept,
    )
    if longest > TOKENS and spec.taps > 1:
        runtime.launch(
            keep,
            (cdiv(spec.channels, KEPT_CHANNELS), sequences),
            *(*x, state.inputs, *lengths, spec.channels),
            BLOCK=KEPT_CHANNELS,
            **kept,
        )
