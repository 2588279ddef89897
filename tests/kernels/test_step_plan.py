"""Step plans by themselves: what is recorded, what is refused, whose memory it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import PackedWeight, native
from lowbit.kernels.cpu_dense import CpuDense
from lowbit.kernels.decode_steps import DecodeInputs, decode_steps
from lowbit.kernels.elementwise import (
    RotaryTable,
    affine,
    apply_rotary,
    gated_activation,
    gather_columns,
    gather_rows,
    rms_norm,
    rms_norm_heads,
    softcap,
)
from lowbit.kernels.sampling import Draw
from lowbit.kernels.step_plan import Arena, Recorder, StepPlan
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import dense

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def needs_a_library() -> None:
    if native.library() is None:
        pytest.skip("no native library: nothing to record")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recorder(limit: int = 1 << 22) -> Recorder:
    return Recorder(Arena(limit))


def test_a_plan_computes_what_the_step_did_from_new_inputs() -> None:
    weight, order = random(24, seed=1), torch.randperm(24)
    x, rows = random(5, 24), torch.tensor([4, 0, 0])

    def step() -> Tensor:
        y = rms_norm(x, weight, 1e-5)
        y = affine(gather_columns(y, order), column=weight, number=0.7, divisor=3.0, bias=weight)
        return softcap(gated_activation(gather_rows(y, rows)), 0.3)

    first, plan = recorder().record(step)
    assert plan is not None and len(plan.operations) == 6
    first = first.clone()
    for seed in (7, 8):
        x.copy_(random(5, 24, seed=seed))
        rows.copy_(torch.tensor([seed - 5, 1, 4]))
        expected = step()
        assert torch.equal(plan.run(), expected) and not torch.equal(expected, first)


def test_a_profile_runs_the_plan_and_times_its_operations() -> None:
    weight, x = random(24, seed=1), random(5, 24)

    def step() -> Tensor:
        return softcap(rms_norm(x, weight, 1e-5), 0.3)

    _, plan = recorder().record(step)
    assert plan is not None
    x.copy_(random(5, 24, seed=7))
    found = plan.profile(2)
    assert torch.equal(plan.result, step())
    assert [operation for operation, _, _ in found] == list(plan.operations)
    assert all(len(words) == len(operation.floats) and 0 < s < 1 for operation, words, s in found)


def chain(tokens: Tensor) -> tuple[StepPlan, PackedWeight]:
    """A step whose logits after token t are largest at 5 t + 1, by 0.5; and what it reads."""
    matrix = torch.full((48, 48), -1.0)
    matrix[torch.arange(48), (5 * torch.arange(48) + 1) % 48] = -0.5
    packed = CpuDense().pack(QuantizedTensor(dense("f32"), (48, 48), matrix, origin="test"), CPU)
    _, plan = recorder().record(lambda: packed.kernel.rows(packed, tokens))
    assert plan is not None
    return plan, packed


def test_steps_of_one_call_follow_each_other() -> None:
    """Tokens, positions, slots and lengths go on; a stop ends all, and so does what is no number."""
    tokens = torch.tensor([3, 7], dtype=torch.int32)
    plan, _packed = chain(tokens)
    positions, lengths = torch.tensor([5, 0], dtype=torch.int32), torch.tensor([6, 1], dtype=torch.int32)
    slots, table = torch.zeros(2, dtype=torch.int32), torch.tensor([[9, 4, 2], [6, 1, 0]], dtype=torch.int32)
    inputs = DecodeInputs(*(part.data_ptr() for part in (tokens, positions, slots, lengths, table)), 3)
    draws = [
        Draw(row, seed=1, position=0, top_p=1.0, min_p=0.0, temperature=0.7 * row, top_k=1) for row in (0, 1)
    ]
    made = decode_steps(plan, inputs, 4, draws, [[], []], 4)
    assert made.tokens == [[16, 36], [33, 37], [22, 42], [15, 19]] and made.peaks == [[-0.5, -0.5]] * 4
    # The last step's tokens are the caller's to go on from.
    assert tokens.tolist() == [22, 42] and positions.tolist() == [8, 3] and lengths.tolist() == [9, 4]
    assert slots.tolist() == [2 * 4, 6 * 4 + 3]
    assert decode_steps(plan, inputs, 4, draws, [[], [0]], 4).tokens == [[15, 19], [28, 0]]
    with pytest.raises(AssertionError):
        decode_steps(plan, inputs, 4, draws[:1], [[]], 4)


def test_a_failing_operation_is_its_own_error() -> None:
    table = RotaryTable.build(torch.tensor([1.0, 0.1]), 8, 1.0, torch.device("cpu"))
    q, k, positions = random(2, 2, 4), random(2, 1, 4), torch.tensor([3, 7], dtype=torch.int32)

    def step() -> Tensor:
        apply_rotary(q, k, table, positions)
        return rms_norm(q.view(2, 8), torch.ones(8), 1e-5)

    kept = torch.ones(8)

    def good() -> Tensor:
        apply_rotary(q, k, table, positions)
        return rms_norm(q.view(2, 8), kept, 1e-5)

    assert recorder().record(step)[1] is None, "torch.ones computes"
    _, plan = recorder().record(good)
    assert plan is not None
    positions[1] = 8
    with pytest.raises(LowbitError, match="E0703.*rotary"):
        plan.run()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda x: affine(x, number=2.0) + 1, "aten.add.Tensor in"),
        (lambda x: affine(x[torch.tensor([1, 0])], number=2.0), "aten."),
        (lambda x: affine(x.t().contiguous(), number=2.0), "aten.clone.default in"),
        (lambda x: affine(x, number=float(x.sum())), "aten.sum"),
        (lambda x: affine(x, factor=torch.tensor([0.5])), "aten.lift_fresh"),
        (lambda x: affine(x, bias=torch.from_numpy(np.ones(4, np.float32))), "aten.lift_fresh"),
        (lambda x: x, "outlives"),
    ],
)
def test_what_torch_computes_cannot_be_replayed(step: object, reason: str) -> None:
    x, recording = random(4, 4), recorder()
    expected = step(x)  # type: ignore[operator]
    result, plan = recording.record(lambda: step(x))  # type: ignore[operator]
    assert plan is None and reason in recording.reason
    assert torch.equal(result, expected), "the step itself has run"


def test_a_tensor_that_outlives_the_step_is_seen() -> None:
    x, kept, recording = random(4, 4), [], recorder()

    def step() -> Tensor:
        y = affine(x, number=2.0)
        kept.append(y[1:].view(-1))
        return affine(y, number=3.0)

    assert recording.record(step)[1] is None and "outlives" in recording.reason


def test_memory_is_used_again_within_a_step_and_by_the_next_plan() -> None:
    arena, x = Arena(1 << 22), random(64, 1024)

    def step() -> Tensor:
        y = x
        for _ in range(12):  # 256 KiB each
            y = affine(y, number=0.9)
        return y

    expected = step()
    for _ in range(3):
        _, plan = Recorder(arena).record(step)
        assert plan is not None and torch.equal(plan.run(), expected)
    assert arena.nbytes == 1 << 20
    with_view = Recorder(arena).record(lambda: affine(affine(x, number=2.0)[:, 3:], number=0.5))
    assert torch.equal(with_view[0], x[:, 3:])


def test_an_arena_has_a_limit() -> None:
    x, recording = random(64, 1024), recorder(1 << 20)

    def step() -> Tensor:
        held = [affine(x, number=float(index + 2)) for index in range(5)]
        return affine(held[-1], number=0.5)

    result, plan = recording.record(step)
    assert plan is None and recording.arena.full and torch.equal(result, x * 6 * 0.5)
    assert recording.arena.nbytes <= 1 << 20


def test_odd_sizes_and_strided_views() -> None:
    fused, weight = random(3, 5 * 7), random(7, seed=3)
    heads = fused.view(3, 5, 7)[:, 1:3]
    expected = rms_norm(heads.reshape(-1, 7), weight, 1e-5).view(3, 2, 7)
    before = fused.clone()
    assert torch.equal(rms_norm_heads(heads, weight, 1e-5), expected)
    untouched = fused.view(3, 5, 7)[:, [0, 3, 4]]
    assert torch.equal(untouched, before.view(3, 5, 7)[:, [0, 3, 4]])

    x, column, factor, bias = random(3, 21), random(21, seed=1), random(3, 1, seed=2), random(21, seed=4)
    part = x[:, 2:19]
    wanted = part * column[:17] * factor * 1.7 / 0.3 + bias[:17]
    out = torch.zeros(3, 40)
    affine(part, column=column[:17], factor=factor, number=1.7, divisor=0.3, bias=bias[:17], out=out[:, 5:22])
    assert torch.equal(out[:, 5:22], wanted) and not out[:, :5].any() and not out[:, 22:].any()
    assert torch.equal(affine(x, factor=torch.tensor(0.3)), x * 0.3)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gather_columns(x, order), x[:, order])
    assert torch.equal(gather_rows(x[:, 3:8], torch.tensor([2, 2, 0])), x[[2, 2, 0], 3:8])
    with pytest.raises(LowbitError, match="E0703"):
        gather_rows(x, torch.tensor([3]))
    capped = softcap(x * 50, 30.0)
    torch.testing.assert_close(capped, 30.0 * torch.tanh(x * 50 / 30.0), atol=2e-5, rtol=0)
