"""Experts on the device against their own layers one by one; sorting and summing against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import (
    canonical,
    dense_weight,
    lattice,
    row_vectors,
    trellis,
    vectors,
    with_outliers,
)
from gguf_blocks import random_blocks, tensor_of
from lowbit.kernels import choose
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.gpu.expert_rows import mix, most_blocks, sort_pairs
from lowbit.kernels.gpu.experts import GpuGroupedExperts, _unlike
from lowbit.kernels.gpu.linear import GpuBlocks
from lowbit.kernels.reference import Reference
from lowbit.kernels.rotation import Rotator
from lowbit.layers.experts import Experts
from lowbit.layers.linear import Linear
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(tokens: int, experts: int, k: int, seed: int = 0) -> Tensor:
    return random(tokens, experts, seed=seed + tokens).argsort(-1)[:, :k].contiguous()


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(1, 7, 3), (3, 7, 3), (40, 7, 3), (700, 7, 3), (1, 1, 1), (40, 1, 1), (1, 64, 8), (40, 64, 8)],
)
def test_pairs_lie_expert_by_expert_in_whole_blocks(
    tokens: int, experts: int, k: int, device: torch.device
) -> None:
    chosen = choices(tokens, experts, k)
    if experts == 7:
        chosen[:, 0] = 5  # one with many; with one token most have none
    sorted_ = sort_pairs(chosen.to(device), experts, 16)
    wanted_rows, wanted_experts = [], []
    for expert in range(experts):
        own = (chosen.flatten() == expert).nonzero().flatten().tolist()
        own += [tokens * k] * (-len(own) % 16)
        wanted_rows += own
        wanted_experts += [expert] * (len(own) // 16)
    used = len(wanted_experts)
    assert used <= sorted_.blocks == most_blocks(tokens * k, experts, 16)
    assert sorted_.experts.tolist() == wanted_experts + [-1] * (sorted_.blocks - used)
    assert sorted_.rows[: used * 16].tolist() == wanted_rows


FOREIGN = [-7, 7, 1 << 31, (1 << 32) + 2, 1 << 40]  # of 7 experts; in 32 bits some would be experts


@pytest.mark.parametrize("number", FOREIGN)
def test_pairs_of_no_expert_are_placed_nowhere(
    number: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = torch.tensor([[0, 3], [number, 3], [number, number]], device=device)
    monkeypatch.setattr(torch, "empty", lambda *size, **of: torch.full(size, -99, **of))
    sorted_ = sort_pairs(chosen, 7, 16)
    assert sorted_.experts.tolist() == [0, 3] + [-1] * (sorted_.blocks - 2)
    assert sorted_.rows[:32].tolist() == [0] + [6] * 15 + [1, 3] + [6] * 14


@pytest.mark.parametrize("number", FOREIGN)
def test_a_token_of_no_expert_takes_its_own_pairs(number: int, device: torch.device) -> None:
    y = torch.arange(8.0, device=device).view(4, 2)
    chosen, weights = torch.tensor([[number, 1], [number, number]], device=device), torch.ones(2, 2)
    out = torch.full((2, 2), 99.0, device=device)
    mix(y, chosen, weights.to(device), None, out)
    assert out.tolist() == [[0 + 2, 1 + 3], [4 + 6, 5 + 7]]


def test_the_bound_on_blocks_is_reached_and_holds() -> None:
    assert most_blocks(8, 128, 16) == 8
    for pairs in range(1, 70):
        for experts in range(1, 9):
            # the worst: single pairs for all experts but one
            alone = min(pairs, experts) - 1
            assert alone + -(-(pairs - alone) // 16) <= most_blocks(pairs, experts, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_more", [False, True])
def test_a_tokens_experts_are_added_in_ascending_order(
    dtype: torch.dtype, with_more: bool, device: torch.device
) -> None:
    tokens, experts, k, hidden = 5, 9, 5, 1100
    chosen, weights = choices(tokens, experts, k), random(tokens, k, seed=1)
    y = (random(tokens * k, hidden, seed=2) * 1000).to(dtype)
    added = random(tokens, hidden + 4, seed=3).to(dtype)[:, 2 : hidden + 2] if with_more else None
    out = torch.full((tokens, hidden), torch.nan, dtype=dtype, device=device)
    mix(y.to(device), chosen.to(device), weights.to(device), None if added is None else added.to(device), out)
    wanted = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for slot in chosen[token].argsort().tolist():
            wanted[token] += y[token * k + slot].float() * weights[token, slot]
    if added is not None:
        wanted += added.float()
    torch.testing.assert_close(out.cpu().float(), wanted.to(dtype).float(), rtol=1e-6, atol=1e-4)


HIDDEN, INNER, EXPERTS, K = 96, 32, 4, 2
Shape = tuple[int, int]
WEIGHTS: dict[str, Callable[[Shape], QuantizedTensor]] = {
    "bf16": lambda shape: dense_weight("bf16", shape),
    "f32": lambda shape: dense_weight("f32", shape),
    "int4 g32": lambda shape: canonical("int4", 32, shape=shape),
    "uint4 g32 zero act-order": lambda shape: canonical("uint4", 32, zero=True, order=True, shape=shape),
    "uint3 g32 float zero": lambda shape: float_zero("uint3", 32, shape),
    "uint2 g16 offset": lambda shape: canonical("uint2", 16, offset=True, shape=shape),
    "e4m3 32x32": lambda shape: canonical("e4m3", 32, "f32", shape=shape, block_rows=32),
    "e4m3 tensor": lambda shape: canonical("e4m3", 0, "f32", shape=shape, block_rows=0),
    "int8 channel": lambda shape: canonical("int8", 0, "f32", shape=shape),
    "e2m1 g32 e8m0 (MXFP4)": lambda shape: canonical("e2m1", 32, "e8m0", shape=shape),
    "nf4": lambda shape: canonical("nf4", 32, "f32", shape=shape),
}
BLOCK = 128
CODED: dict[str, Callable[[Shape], QuantizedTensor]] = {
    "trellis of 4 bits": lambda shape: trellis(4, "mcg", shape),
    "trellis of 3 bits": lambda shape: trellis(3, "mul1", shape),
    "vectors": lambda shape: vectors(1, 12, 8, shape=shape),
    "vectors of two books, one scale": lambda shape: vectors(2, 8, 8, "bf16", shape, rows=0),
    "vectors of two rows": lambda shape: vectors(1, 8, 4, shape=shape, height=2),
    "vectors down columns": lambda shape: row_vectors(6, 256, shape=shape),
    "vectors down columns, act-order": lambda shape: row_vectors(
        8, 300, 20, "bf16", shape, books=2, scale="f16", order=True
    ),
    "vectors down columns, outliers": lambda shape: row_vectors(6, 256, shape=shape, outliers=8),
    "vectors down columns, outliers, act-order": lambda shape: row_vectors(
        5, 256, 16, "bf16", shape, books=2, outliers=12, scale="f16", order=True
    ),
    "lattice": lambda shape: lattice(shape=shape),
    "lattice, two codes": lambda shape: lattice(2.04, shape, second=8),
    "halves": lambda shape: with_outliers(shape),
    "halves, act-order": lambda shape: with_outliers(shape, order=True),
    "halves without outliers": lambda shape: with_outliers(shape, 0.0),
}
INT8, E4M3, E2M1 = (number_format(name) for name in ("int8", "e4m3", "e2m1"))
Input = Callable[[int, int], InputTransform | None]


def static(expert: int, scheme: ActivationScheme, zero: float | None = None) -> InputTransform:
    zeros = None if zero is None else torch.tensor([zero + expert])
    return InputTransform(scheme, static_scale=torch.tensor([0.03 + 0.01 * expert]), static_zero=zeros)


INPUTS: dict[str, Input] = {
    "as they are": lambda expert, columns: None,
    "int8 per token": lambda expert, columns: InputTransform(ActivationScheme(INT8, (1, 0), limit=127.0)),
    "int8 with a zero point": lambda expert, columns: InputTransform(
        ActivationScheme(INT8, (1, 0), symmetric=False)
    ),
    "fp8 in groups": lambda expert, columns: InputTransform(ActivationScheme(E4M3, (1, 32), limit=448.0)),
    "mx": lambda expert, columns: InputTransform(
        ActivationScheme(E4M3, (1, 32), scale=number_format("e8m0"))
    ),
    "one static scale": lambda expert, columns: static(0, ActivationScheme(E4M3, (0, 0), "static")),
    "static scales": lambda expert, columns: static(expert, ActivationScheme(E4M3, (0, 0), "static")),
    "static zeros": lambda expert, columns: static(
        expert, ActivationScheme(INT8, (0, 0), "static", symmetric=False), 3.0
    ),
    "nvfp4, outer scales": lambda expert, columns: static(
        expert, ActivationScheme(E2M1, (1, 16), scale=number_format("e4m3"))
    ),
    "rotated": lambda expert, columns: InputTransform(rotation=Rotator(Rotation.hadamard(32))),
    "rotated, int8 per token": lambda expert, columns: InputTransform(
        ActivationScheme(INT8, (1, 0), limit=127.0), rotation=Rotator(Rotation.hadamard(16))
    ),
    "rotated, static scales": lambda expert, columns: replace(
        static(expert, ActivationScheme(E4M3, (0, 0), "static")), rotation=Rotator(Rotation.hadamard(8))
    ),
    "multipliers": lambda expert, columns: InputTransform(
        multiplier=random(columns, seed=expert).abs() + 0.1
    ),
}


def float_zero(name: str, group: int, shape: Shape) -> QuantizedTensor:
    weight = canonical(name, group, shape=shape)
    zeros = (weight.scales[0].float() * 100).to(weight.scales[0].dtype)
    return replace(weight, scheme=replace(weight.scheme, zero="float"), zeros=zeros)


def turned(weight: QuantizedTensor, expert: int) -> QuantizedTensor:
    """Other rows first, so that experts differ."""

    def roll(tensor: Tensor) -> Tensor:
        plain = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
        return plain.roll(expert, 0 if len(plain) > 1 else -1).view(tensor.dtype)

    order, books, outliers = weight.column_order, weight.codebooks, weight.outliers
    if outliers is not None:  # of one expert none, of others unlike many
        outliers = outliers.picked(torch.arange(weight.shape[0]).roll(expert))
        outliers = outliers.cut(0, (weight.shape[1] + expert) * (expert % 4 != 1) >> expert % 4 // 2)
    return replace(
        weight,
        codes=roll(weight.codes),
        scales=tuple(roll(scale) for scale in weight.scales),
        zeros=None if weight.zeros is None else roll(weight.zeros),
        offsets=tuple(roll(offset) for offset in weight.offsets),
        column_order=None if order is None else order.roll(expert),
        codebooks=None if books is None else books.roll(expert, 1),
        outliers=outliers,
    )


def moved(transform: InputTransform | None, device: torch.device) -> InputTransform | None:
    if transform is None:
        return None
    names = ("multiplier", "static_scale", "static_zero")
    tensors = {name: getattr(transform, name) for name in names}
    return replace(transform, **{n: None if t is None else t.to(device) for n, t in tensors.items()})


@dataclass
class Pair:
    """The same experts packed for the device, and for the reference on the CPU."""

    grouped: Experts
    oracle: Experts


def linear(
    name: str,
    weights: list[QuantizedTensor],
    inputs: list[InputTransform | None],
    bias: Tensor | None,
    device: torch.device | None,
) -> Linear:
    """device None: for the oracle."""
    if device is None:
        return Linear(
            name, [Reference().pack(weight, torch.device("cpu")) for weight in weights], bias, inputs
        )
    packed = [choose(w.scheme, w.shape, device).kernel.pack(w, device) for w in weights]
    bias = None if bias is None else bias.to(device)
    known = {id(transform): moved(transform, device) for transform in inputs}
    return Linear(name, packed, bias, [known[id(transform)] for transform in inputs])


def make(
    device: torch.device,
    weight: Callable[[Shape], QuantizedTensor] | list[Callable[[Shape], QuantizedTensor]],
    given: Input = INPUTS["as they are"],
    bias: bool = False,
    hidden: int = HIDDEN,
    inner: int = INNER,
) -> Pair:
    """A list of weights: gate and up are parts of their own; the last is down's too."""
    parts = weight if isinstance(weight, list) else [weight]
    made: list[Experts] = []
    for place in (device, None):
        gate_up, down = [], []
        for expert in range(EXPERTS):
            halves = [
                turned(part((2 * inner // len(parts), hidden)), expert + EXPERTS * number)
                for number, part in enumerate(parts)
            ]
            biases = (random(2 * inner, seed=expert), random(hidden, seed=90 + expert))
            first, last = biases if bias else (None, None)
            gate_up.append(
                linear(f"{expert}.gate_up", halves, [given(expert, hidden)] * len(parts), first, place)
            )
            own = turned(parts[-1]((hidden, inner)), expert)
            down.append(linear(f"{expert}.down", [own], [given(expert, inner)], last, place))
        made.append(Experts("experts", gate_up, down))
    assert isinstance(made[0].grouped, GpuGroupedExperts), made[0].grouped
    return Pair(*made)


def check(
    pair: Pair,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
    within: float = 1e-4,
    chosen: Tensor | None = None,
    again: bool = False,
    scale: float = 1.0,
) -> None:
    """Within so much of the largest number, from x of random numbers that bfloat16 holds, times ``scale``."""
    hidden = pair.oracle.down[0].weights[0].shape[0]
    x = random(tokens, hidden, seed=tokens).bfloat16() * scale
    added = random(tokens, hidden, seed=tokens + 1).bfloat16()
    weights = random(tokens, K, seed=2).softmax(-1)
    chosen = choices(tokens, EXPERTS, K) if chosen is None else chosen
    wanted = pair.oracle.one_by_one(x.float(), chosen, weights, activation) + added.float()
    given = x.to(device, dtype), chosen.to(device), weights.to(device), activation, added.to(device, dtype)
    found = pair.grouped(*given)
    assert found.dtype is dtype and wanted.isfinite().all() and wanted.abs().max() > 0.1
    assert (found.cpu().float() - wanted).abs().max() <= within * wanted.abs().max()
    if again:
        assert torch.equal(found, pair.grouped(*given))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_scheme(name: str, device: torch.device) -> None:
    check(make(device, WEIGHTS[name]), 3, device, torch.bfloat16, within=0.015)


@pytest.mark.parametrize("name", CODED)
def test_codes_stay_packed(name: str, device: torch.device) -> None:
    """Gate and up are weights of their own, as codebooks and scales of columns are; x becomes float16."""
    pair = make(device, [CODED[name]] * 2, hidden=2 * BLOCK, inner=BLOCK)
    repeats = device.type == "cuda" and "," not in name  # interpreted, programs run one after another
    check(pair, 3, device, within=1e-3, again=repeats)
    chosen = torch.tensor([[0, 3]] * 9 + [[3, 1]])  # several blocks of one expert's, and one that none chose
    check(pair, 10, device, torch.bfloat16, within=0.02, chosen=chosen)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("tokens", [1, 40, 150])
@pytest.mark.parametrize("name", CODED)
def test_codes_of_any_number_of_tokens(name: str, tokens: int, device: torch.device) -> None:
    pair = make(device, [CODED[name]] * 2, bias=True, hidden=2 * BLOCK, inner=BLOCK)
    check(pair, tokens, device, within=1e-3)
    check(pair, tokens, device, torch.bfloat16, within=0.02)


@pytest.mark.parametrize("name", ["vectors down columns", "lattice", "halves"])
def test_a_rank_has_whole_experts(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four: what others have adds nothing, whatever lies where their results would be."""
    pair = make(device, [CODED[name]] * 2, hidden=2 * BLOCK, inner=BLOCK)
    here = range(1, 3)
    some = Experts("some", pair.grouped.gate_up[1:3], pair.grouped.down[1:3], here=here)
    x, added = random(5, 2 * BLOCK, seed=1), random(5, 2 * BLOCK, seed=2)
    weights, chosen = random(5, K, seed=3).softmax(-1), torch.tensor([[1, 3], [0, 3], [2, 1], [2, 0], [3, 1]])
    own = (chosen >= 1) & (chosen < 3)
    wanted = pair.oracle.one_by_one(x, chosen, weights * own, "silu") + added
    empty = torch.empty

    def poisoned(*size: Any, **of: Any) -> Tensor:
        made = empty(*size, **of)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    given = (each.to(device) for each in (x, chosen, weights))
    found = some(*given, "silu", added.to(device)).cpu()
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize(
    "name", ["trellis of 4 bits", "halves, act-order", "vectors down columns, outliers, act-order"]
)
def test_experts_that_are_none_touch_no_memory(name: str, device: torch.device) -> None:
    """A router gone wrong (NaN) may name any: their pairs are nobody's, and what others get stays."""
    pair = make(device, [CODED[name]] * 2, bias=True, hidden=BLOCK, inner=BLOCK)
    x, weights = random(2, BLOCK).to(device), torch.ones(2, K, device=device)
    chosen = torch.tensor([[1, 2], [-7, 1 << 40]], device=device)
    found = pair.grouped(x, chosen, weights, "silu")
    alone = pair.grouped(x[:1], chosen[:1], weights[:1], "silu")
    torch.testing.assert_close(found[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_scheme_in_float32(name: str, tokens: int, device: torch.device) -> None:
    check(make(device, WEIGHTS[name]), tokens, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_scheme_with_many_tokens(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """float16 ends at 65,504, which some weights exceed for x around 1: results grow as its square."""
    pair = make(device, WEIGHTS[name], hidden=160, inner=96)
    for tokens in (40, 200):
        check(pair, tokens, device, dtype, within=0.03, scale=0.125 if dtype is torch.float16 else 1.0)


def test_results_beyond_float16_are_infinite(device: torch.device) -> None:
    """As products of float16 are in cuBLAS and torch: not saturated, and never NaN of one expert alone."""
    pair = make(device, WEIGHTS["e2m1 g32 e8m0 (MXFP4)"], hidden=160, inner=96)
    x, chosen = random(40, 160, seed=40).bfloat16(), torch.tensor([[2, 2]]).repeat(40, 1)
    weights = torch.full((40, K), 0.5)
    wanted = pair.oracle.one_by_one(x.float(), chosen, weights, "silu")
    given = x.to(device, torch.float16), chosen.to(device), weights.to(device), "silu", None
    found = pair.grouped(*given).cpu().float()
    beyond, within = wanted.abs() > 67_000, wanted.abs() < 64_000
    assert 0 < int(beyond.sum()) < wanted.numel() / 10
    assert torch.equal(found[beyond], torch.inf * wanted[beyond].sign())
    assert (found - wanted)[within].abs().max() <= 0.03 * 65_504


RARE = ("one static scale", "multipliers", "int8 with a zero point")


@pytest.mark.parametrize(
    "given", [pytest.param(name, marks=[pytest.mark.slow] * (name in RARE)) for name in INPUTS]
)
def test_every_way_to_quantize_inputs(given: str, device: torch.device) -> None:
    """Rounded sums may take another code: what is compared is not bits."""
    pair = make(
        device, WEIGHTS["int8 channel" if "int8" in given else "e4m3 32x32"], INPUTS[given], bias=True
    )
    check(pair, 3, device, within=0.02)
    x = torch.empty(2, HIDDEN)
    shared = pair.grouped.grouped.gate_up.parts[0].input
    assert (shared is None or shared.shared) == (given not in PER_EXPERT)
    if shared is not None and "groups" in given:
        rows = shared(x.to(device).fill_(1.0), K, torch.zeros(2 * K, dtype=torch.int64, device=device), 32)
        assert rows.divisor == K and rows.group == 32 and rows.x.dtype is torch.bfloat16


PER_EXPERT = (
    *("static scales", "static zeros", "nvfp4, outer scales", "multipliers"),
    "rotated, static scales",
)


def test_rotations_of_their_own_keep_experts_apart() -> None:
    one, other = (InputTransform(rotation=Rotator(Rotation.hadamard(size))) for size in (8, 16))
    again = InputTransform(rotation=Rotator(Rotation.hadamard(8)))
    assert _unlike([one, again]) == ""
    assert _unlike([one, other]) == "experts rotate theirs in different ways"


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_gpt_oss(tokens: int, device: torch.device) -> None:
    """MXFP4 with biases and its own activation; twice the same bits."""
    pair = make(device, WEIGHTS["e2m1 g32 e8m0 (MXFP4)"], bias=True)
    check(pair, tokens, device, activation="swiglu_clamped", again=tokens == 1)


@pytest.mark.parametrize("tokens", [1, 17])
def test_experts_without_tokens(tokens: int, device: torch.device) -> None:
    pair = make(device, WEIGHTS["int8 channel"])
    check(pair, tokens, device, chosen=torch.tensor([[3, 1]]).repeat(tokens, 1))


def test_no_tokens(device: torch.device) -> None:
    experts = make(device, WEIGHTS["int4 g32"]).grouped
    nothing = torch.empty(0, K, device=device)
    assert experts(torch.empty(0, HIDDEN, device=device), nothing.long(), nothing, "silu").shape == (
        0,
        HIDDEN,
    )


@pytest.mark.parametrize("given", ["as they are", pytest.param("static scales", marks=pytest.mark.slow)])
def test_parts_of_unlike_schemes(given: str, device: torch.device) -> None:
    pair = make(device, [WEIGHTS["e4m3 32x32"], WEIGHTS["int8 channel"]], INPUTS[given], bias=True)
    check(pair, 3, device, within=1e-4 if given == "as they are" else 0.02)


@pytest.mark.parametrize("name", ["q4_k", pytest.param("q6_k", marks=pytest.mark.slow)])
def test_gguf_blocks(name: str, device: torch.device) -> None:
    def blocks(shape: Shape) -> QuantizedTensor:
        return tensor_of(name, random_blocks(name, shape[0], shape[1] // 256))

    check(make(device, blocks, hidden=256, inner=256), 1, device)


@pytest.mark.slow
def test_many_tokens_go_in_turns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.experts.MOST_BETWEEN", 4 * K * HIDDEN)
    check(make(device, WEIGHTS["e4m3 tensor"]), 9, device)


def test_every_linear_is_a_view_of_the_stack(device: torch.device) -> None:
    """Nothing is there twice, and a Linear still is its own expert."""
    pair = make(device, WEIGHTS["uint4 g32 zero act-order"])
    mixture = pair.grouped.grouped
    assert isinstance(mixture, GpuGroupedExperts)
    stack = mixture.down.parts[0].stack
    for name, buffer in stack.buffers.items():
        for expert, layer in enumerate(pair.grouped.down):
            assert layer.weights[0].buffers[name].data_ptr() == buffer[expert].data_ptr()
    x = random(1, INNER).bfloat16().float()
    for mine, other in zip(pair.grouped.down[:2], pair.oracle.down[:2], strict=True):
        torch.testing.assert_close(mine(x.to(device)).cpu(), other(x), rtol=1e-4, atol=1e-3)


def test_what_runs_one_by_one_says_why(device: torch.device) -> None:
    def reason(change: Callable[[list[Linear], list[Linear]], object]) -> object:
        pair = make(device, WEIGHTS["int8 channel"], INPUTS["int8 per token"]).grouped
        change(pair.gate_up, pair.down)
        return GpuGroupedExperts.of(pair.gate_up, pair.down)

    def reference(_: list[Linear], down: list[Linear]) -> None:
        down[2].weights[0] = Reference().pack(WEIGHTS["int8 channel"]((HIDDEN, INNER)), device)

    def other(_: list[Linear], down: list[Linear]) -> None:
        down[2].weights[0] = GpuBlocks().pack(WEIGHTS["int4 g32"]((HIDDEN, INNER)), device)

    def tensor(gate_up: list[Linear], _: list[Linear]) -> None:
        for layer in gate_up:
            layer.inputs = [InputTransform(ActivationScheme(E4M3, (0, 0), limit=448.0))]

    def some(_: list[Linear], down: list[Linear]) -> None:
        down[0].inputs = None

    def unlike(_: list[Linear], down: list[Linear]) -> None:
        down[1].inputs = [INPUTS["mx"](0, INNER)]

    assert reason(reference) == "2.down runs on the kernel reference"
    assert "2.down is int4 1x32 f16 of" in str(reason(other))
    whole = "the inputs of 0.gate_up: one dynamic scale for all tokens of a step"
    assert reason(tensor) == whole
    assert "some experts quantize theirs" in str(reason(some))
    assert "in different ways" in str(reason(unlike))
    assert reason(lambda gate_up, down: (gate_up.clear(), down.clear())) == "there are no experts"
