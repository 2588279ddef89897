"""The gated delta rule (Gated DeltaNet: Yang et al., 2024) in Triton, as ``kernels.recurrent`` defines it.

Three launches a layer, up to six where a step has longer parts of prompts:

1. ``convolve``: 8 tokens of a sequence and one head of q, k or v a program: the causal convolution and silu,
   and q and k over their lengths, into float32 (tokens, channels). Where no sequence has more than 8 tokens,
   which one program sees, it also moves the kept inputs on; else ``keep`` does, when all have read them.
2. Whole chunks of 64 tokens of a sequence's part, where there may be any, in the parallel form (below).
3. ``rule``: what is left of each sequence, so all of a step that decodes. A program has a strip of one value
   head's state of one sequence in registers, all of k_dim and some columns of v_dim, and goes through the
   tokens one by one: decay, delta rule, q S. A strip is 1,024 numbers in one warp, 32 a lane: sums over k_dim
   need no shared memory and no barrier, and one sequence of 32 heads of 128 x 128 has 512 warps, four for
   each multiprocessor. What the next token needs is loaded while this one is computed.
4. ``finish``: RMSNorm over a head's v_dim, weights, and the gate silu(z).

*Chunks.* With S the state before a chunk, g(t, s) the decay from token s to t, g(t) that of all up to t:

    A[t, s] = beta_t g(t, s) (k_t k_s)       for s < t
    P[t, s] = g(t, s) (q_t k_s)              for s <= t
    D = (1 + A)^-1 beta (v - g k S)          what each token writes
    out = g q S + P D
    S' = g(last) S + (g(last, .) k)^T D

``chunk_systems`` makes (1 + A)^-1 and P, a program for each chunk and key head; ``chunk_states`` goes from
chunk to chunk with a strip of a state, a program for each strip, value head and sequence. (The paper
multiplies the inverse by beta v and by beta g k, its W and U, beforehand. Multiplied by the difference it is
half the memory, and rounding stays as small as what the state has yet to learn.) The inverse is found by
forward substitution in float32, in blocks of 16, which products merge twice. Products are the tensor cores',
bfloat16 with float32 sums, three for each, of operands that are split in two: some 2^-17 of a factor is lost,
at a third of bfloat16's rate, five times that of float32 on CUDA cores. A strip here has 32 columns: 32 heads
of 128 x 128 are 128 programs, about one for each multiprocessor. Eight warps, since a product of q and k with
a state has 128 rows, and two halves of all operands fill the registers of fewer.

*Bits.* A token's way depends on its sequence alone: chunks begin with the sequence's part of the step, and
what does not fill one goes by ``rule``. So a request's bits depend neither on the batch nor on where its
prompt is cut, if cuts are at multiples of 64, which the scheduler sees to (``unit``). They may change where
tokens that were decoded are computed anew, after a sequence was retracted.

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
CHUNK = 64  # tokens of the parallel form
CHUNK_STRIP = 32  # columns of a state that a program of it has
CHUNK_KEYS = 128  # the longest keys it is for: a program has those of a chunk, twice


class GpuDelta:
    """See the module docstring."""

    name = "gpu"
    unit = CHUNK

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
        chunk = CHUNK if spec.k_dim <= CHUNK_KEYS else 0
        if chunk and batch.max_query >= chunk:
            _chunks(x, convolved, made, state, lengths, weights)
        runtime.launch(
            rule,
            (cdiv(spec.v_dim, strip), spec.heads, len(slots)),
            *(*x, convolved, state.matrices, weights.decay, weights.bias, made, *lengths),
            *(spec.channels, spec.k_heads, spec.heads, spec.k_dim, spec.v_dim),
            num_warps=1,
            K=block,
            V=strip,
            CHUNK=chunk,
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


def _chunks(
    x: tuple[Tensor, int],
    convolved: Tensor,
    made: Tensor,
    state: LayerState,
    lengths: tuple[Tensor, Tensor, Tensor],
    weights: DeltaParameters,
) -> None:
    """Whole chunks of all sequences into ``made``; the states move on."""
    from triton import cdiv, next_power_of_2

    from lowbit.kernels.gpu.delta_rule import chunk_states, chunk_systems

    spec, sequences = state.spec, len(lengths[0])
    most = len(convolved) // CHUNK  # chunks there may be
    block = max(next_power_of_2(spec.k_dim), 16)
    inverses = convolved.new_empty(most, spec.heads, CHUNK, CHUNK)
    halves = inverses.view(torch.bfloat16)  # what becomes of them
    scores = torch.empty_like(halves)
    vectors = halves.new_empty(most, spec.k_heads, 4, CHUNK, block)
    factors = convolved.new_empty(most, spec.heads, 3, CHUNK)
    sizes = {"CHUNK": CHUNK, "K": block, "SEQUENCES": SEQUENCES}
    runtime.launch(
        chunk_systems,
        (most, spec.k_heads),
        *(*x, convolved, weights.decay, weights.bias, vectors, scores, halves, inverses, factors),
        *(lengths[0], sequences, spec.channels, spec.k_heads, spec.heads // spec.k_heads),
        *(spec.k_dim, spec.v_dim),
        num_warps=8,
        num_stages=1,
        PIECE=min(block, 32),
        **sizes,
    )
    strip = min(CHUNK_STRIP, max(next_power_of_2(spec.v_dim), 16))
    runtime.launch(
        chunk_states,
        (cdiv(spec.v_dim, strip), spec.heads, sequences),
        *(convolved, state.matrices, vectors, scores, halves, factors, made, *lengths),
        *(spec.channels, spec.k_heads, spec.heads, spec.k_dim, spec.v_dim),
        num_warps=8,
        num_stages=1,
        V=strip,
        **sizes,
    )
