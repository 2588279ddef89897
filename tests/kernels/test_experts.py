"""Experts in one native call against their own layers one by one: equal bits, whoever is in the batch.

Run again under every instruction set this CPU has (LOWBIT_ISA) by test_native.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import (
    by_columns,
    canonical,
    dense_weight,
    lattice,
    rank_of_lattice,
    row_vectors,
    trellis,
    vectors,
)
from lowbit.errors import LowbitError
from lowbit.kernels import choose, native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationState
from lowbit.kernels.cpu_columns import ColumnsWeight
from lowbit.kernels.cpu_lattice import CpuLattice
from lowbit.kernels.experts import GroupedExperts
from lowbit.kernels.packed_linear import NativeWeight
from lowbit.kernels.prompt_rows import prompt_rows, rounding
from lowbit.kernels.reference import Reference
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.step_plan import Arena, Recorder
from lowbit.kernels.transformed_kernel import TransformedWeight
from lowbit.layers.experts import Experts
from lowbit.layers.linear import Linear
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme, Delay

CPU = torch.device("cpu")
EXPERTS, K, HIDDEN, INNER = 7, 3, 64, 96
TOKENS = (1, 2, 3, 7, 16, 33, 70)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    if native.library() is None:
        pytest.skip("no native library")
    native.set_threads(2)
    yield
    native.set_threads(2)


Shape = tuple[int, int]
Weight = Callable[[Shape], QuantizedTensor]
WEIGHTS: dict[str, Weight] = {
    "int4 g32": lambda shape: canonical("int4", 32, shape=shape),
    "uint4 g32 zero": lambda shape: canonical("uint4", 32, zero=True, shape=shape),
    "uint4 g32 act-order": lambda shape: canonical("uint4", 32, zero=True, order=True, shape=shape),
    "e4m3 channel": lambda shape: canonical("e4m3", 0, "f32", shape=shape),
    "e2m1 g32 e8m0 (MXFP4)": lambda shape: canonical("e2m1", 32, "e8m0", shape=shape),
    "int8 channel": lambda shape: canonical("int8", 0, "f32", shape=shape),
    "codebooks": lambda shape: vectors(2, 8, 8, shape=shape),
    "codebooks of 12 rows": lambda shape: row_vectors(12, 256, 16, shape=shape, scale="f16", order=True),
    "bf16": lambda shape: dense_weight("bf16", shape),
    "f32": lambda shape: dense_weight("f32", shape),
}
# Between two transforms, of sizes that fill their blocks and of others, whose results lie apart before.
TRANSFORMED: dict[str, tuple[Weight, int, int]] = {  # hidden, inner
    "trellis": (lambda shape: trellis(4, "mcg", shape), 128, 256),
    "trellis, padded": (lambda shape: trellis(3, "3inst", shape), HIDDEN, INNER),
    "trellis, some rows": (lambda shape: trellis(2, "mul1", shape, skip=72), HIDDEN, INNER),
    "lattice": (lambda shape: lattice(shape=shape), 128, 192),
    "lattice, two codes": (lambda shape: lattice(3.45, shape), 128, 192),
    "lattice, x twice": (lambda shape: lattice(3.14159, shape), 192, 64),
}
INT8, E4M3, E2M1 = (number_format(name) for name in ("int8", "e4m3", "e2m1"))
DELAYED = ActivationScheme(E4M3, (0, 0), "delayed", limit=448.0, delay=Delay(4, 1))
# What an expert's matrix of some columns wants done to its rows; experts are told apart by their number.
Input = Callable[[int, int], InputTransform | None]


def static(expert: int, scheme: ActivationScheme) -> InputTransform:
    return InputTransform(scheme, static_scale=torch.tensor([0.01 + 0.003 * expert]))


INPUTS: dict[str, Input] = {
    "as they are": lambda expert, columns: None,
    "int8 per token": lambda expert, columns: InputTransform(ActivationScheme(INT8, (1, 0), limit=127.0)),
    "int8 with a zero point": lambda expert, columns: InputTransform(
        ActivationScheme(INT8, (1, 0), symmetric=False)
    ),
    "fp8 per token": lambda expert, columns: InputTransform(ActivationScheme(E4M3, (1, 0), limit=448.0)),
    "fp8 in groups": lambda expert, columns: InputTransform(ActivationScheme(E4M3, (1, 32), limit=448.0)),
    "one static scale": lambda expert, columns: static(0, ActivationScheme(E4M3, (0, 0), "static")),
    "static scales": lambda expert, columns: static(expert, ActivationScheme(E4M3, (0, 0), "static")),
    "fp8 per tensor": lambda expert, columns: InputTransform(ActivationScheme(E4M3, (0, 0), limit=448.0)),
    "outliers of an expert's own rows": lambda expert, columns: InputTransform(
        ActivationScheme(INT8, (1, 0), outliers=2.5)
    ),
    "multipliers": lambda expert, columns: InputTransform(multiplier=random(columns, seed=expert).abs()),
    "rotated": lambda expert, columns: InputTransform(rotation=Rotator(Rotation.hadamard(32))),
    "rotated, int8 per token": lambda expert, columns: InputTransform(
        ActivationScheme(INT8, (1, 0), limit=127.0),
        rotation=Rotator(Rotation.of(random(16, 16, seed=expert))),
    ),
    "delayed": lambda expert, columns: InputTransform(
        DELAYED, state=ActivationState.fresh(DELAYED.delay, 448.0)
    ),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(weight: QuantizedTensor, expert: int) -> QuantizedTensor:
    """Other rows first, so that experts differ."""

    def roll(tensor: Tensor) -> Tensor:
        return (
            tensor.roll(expert, 0)
            if tensor.itemsize > 1
            else tensor.view(torch.uint8).roll(expert, 0).view(tensor.dtype)
        )

    order = weight.column_order
    return replace(
        weight,
        codes=roll(weight.codes),
        scales=tuple(
            roll(scale) if len(scale) == weight.shape[0] else scale.roll(expert, -1)
            for scale in weight.scales
        ),
        column_order=None if order is None else order.roll(expert),
    )


def linear(
    name: str, weights: list[QuantizedTensor], inputs: list[InputTransform | None], bias: Tensor | None
) -> Linear:
    packed = [choose(weight.scheme, weight.shape, CPU).kernel.pack(weight, CPU) for weight in weights]
    assert all(isinstance(weight, (NativeWeight, ColumnsWeight, TransformedWeight)) for weight in packed)
    return Linear(name, packed, bias, inputs)


def make(
    weight: Weight,
    given: Input = INPUTS["as they are"],
    bias: bool = False,
    parts: int = 1,
    hidden: int = HIDDEN,
    inner: int = INNER,
) -> Experts:
    """``parts``: 2 leaves gate and up apart."""
    gate_up, down = [], []
    for expert in range(EXPERTS):
        halves = [
            turned(weight((2 * inner // parts, hidden)), expert + EXPERTS * part) for part in range(parts)
        ]
        first = [given(expert, hidden)] * parts
        biases = (random(2 * inner, seed=expert), random(hidden, seed=90 + expert)) if bias else (None, None)
        gate_up.append(linear(f"{expert}.gate_up", halves, first, biases[0]))
        last = turned(weight((hidden, inner)), expert)
        down.append(linear(f"{expert}.down", [last], [given(expert, inner)], biases[1]))
    experts = Experts("experts", gate_up, down)
    assert isinstance(experts.grouped, GroupedExperts), experts.grouped
    return experts


def draw(tokens: int, seed: int = 0, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    x = random(tokens, hidden, seed=seed + tokens)
    chosen = random(tokens, EXPERTS, seed=seed + tokens + 1).argsort(-1)[:, :K].contiguous()
    return x, chosen, random(tokens, K, seed=seed + 2).softmax(-1)


def states(experts: Experts) -> list[Tensor]:
    found = []
    for layer in (*experts.gate_up, *experts.down):
        found += [t.state.amax_history for t in layer.inputs or () if t is not None and t.state is not None]
    return found


def check(experts: Experts, tokens: int, activation: str = "silu", chosen: Tensor | None = None) -> Tensor:
    x, drawn, weights = draw(tokens, hidden=experts.down[0].weights[0].shape[0])
    chosen = drawn if chosen is None else chosen
    before = [state.clone() for state in states(experts)]
    found = experts(x, chosen, weights, activation)
    after = [state.clone() for state in states(experts)]
    for state, old in zip(states(experts), before, strict=True):
        state.copy_(old)
    wanted = experts.one_by_one(x, chosen, weights, activation)
    assert torch.equal(found, wanted), (found - wanted).abs().max()
    assert wanted.isfinite().all() and (wanted != 0).any()
    assert all(map(torch.equal, after, states(experts)))
    return found


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_scheme(name: str) -> None:
    experts = make(WEIGHTS[name])
    for tokens in TOKENS:
        check(experts, tokens)


@pytest.mark.parametrize("height", [0, 16, 24])
def test_scales_of_columns(height: int) -> None:
    """Gate and up in one weight and apart, with biases and inputs of an expert's own."""

    def columns(shape: Shape) -> QuantizedTensor:
        return by_columns("uint4", height, shape=shape, apart=height > 0)

    for given, parts in (("as they are", 1), ("as they are", 2), ("multipliers", 1)):
        experts = make(columns, INPUTS[given], bias=True, parts=parts)
        assert experts.down[0].weights[0].kernel.name == "cpu_columns"
        for tokens in TOKENS:
            check(experts, tokens)


def transformed(name: str, given: str = "as they are", bias: bool = False, parts: int = 2) -> Experts:
    weight, hidden, inner = TRANSFORMED[name]
    return make(weight, INPUTS[given], bias, parts, hidden, inner)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_weights_between_transforms(name: str) -> None:
    """Each expert's gate, up and down have transforms of their own; also with inputs quantized before."""
    for given, parts in (("as they are", 2), ("as they are", 1), ("int8 per token", 2), ("multipliers", 2)):
        experts = transformed(name, given, bias=parts == 2, parts=parts)
        assert isinstance(experts.down[0].weights[0], TransformedWeight)
        for tokens in TOKENS:
            check(experts, tokens)


def test_outputs_in_another_order() -> None:
    """Of a weight whose rows could not be moved, up before gate for one; a bias is as the rows lie."""
    for name, parts in (("trellis", 1), ("trellis, some rows", 1), ("lattice", 2)):
        experts = transformed(name, bias=True, parts=parts)
        for layer in (*experts.gate_up, *experts.down[1:]):
            rows = sum(weight.shape[0] for weight in layer.weights)
            layer.order = random(rows, seed=rows).argsort()
        ordered = Experts("experts", experts.gate_up, experts.down)
        assert isinstance(ordered.grouped, GroupedExperts)
        for tokens in TOKENS:
            check(ordered, tokens)


def test_experts_with_and_without_transforms() -> None:
    """Parts of one expert, and experts, in different packings."""
    experts = transformed("trellis, padded", "int8 per token", bias=True)
    plain = make(WEIGHTS["int4 g32"], INPUTS["int8 per token"], bias=True, parts=2)
    for expert in (2, 5):
        experts.down[expert] = plain.down[expert]
        experts.gate_up[expert].weights[1] = plain.gate_up[expert].weights[1]
    mixed = Experts("experts", experts.gate_up, experts.down)
    for tokens in TOKENS:
        check(mixed, tokens)


def test_transforms_that_ranks_share_run_one_by_one() -> None:
    experts = transformed("lattice")
    part = CpuLattice().pack(rank_of_lattice(lattice(shape=(256, 192))), CPU)
    experts.down[1] = Linear("1.down", [part], None)
    mixed = Experts("experts", experts.gate_up, experts.down)
    assert mixed.grouped == "ranks gather the products of 1.down"
    native_ones = make(WEIGHTS["int4 g32"])
    native_ones.down[2].order = torch.arange(HIDDEN).flip(0)
    mixed = Experts("experts", native_ones.gate_up, native_ones.down)
    assert mixed.grouped == "2.down has outputs in another order"


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("weight", ["int8 channel", "uint4 g32 act-order"])
def test_every_way_to_quantize_inputs(weight: str, name: str) -> None:
    experts = make(WEIGHTS[weight], INPUTS[name], bias=True)
    for tokens in TOKENS:
        check(experts, tokens)


def test_what_is_quantized_once_for_all() -> None:
    def shared(name: str) -> bool:
        grouped = make(WEIGHTS["int8 channel"], INPUTS[name]).grouped
        assert isinstance(grouped, GroupedExperts) and grouped.gate_up.shared == grouped.down.shared
        return bool(grouped.down.shared)

    assert [name for name in INPUTS if shared(name)] == [
        *("int8 per token", "int8 with a zero point", "fp8 per token", "fp8 in groups", "one static scale"),
        "rotated",
    ]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_clamped"])
def test_activations_and_biases(activation: str) -> None:
    experts = make(WEIGHTS["e2m1 g32 e8m0 (MXFP4)"], bias=True)
    for tokens in TOKENS:
        check(experts, tokens, activation)


def test_parts_that_differ() -> None:
    """Gate and up apart with inputs of their own, experts in several formats, row scales."""
    experts = make(WEIGHTS["int4 g32"], INPUTS["static scales"], parts=2)
    for expert, layer in enumerate(experts.gate_up):
        assert layer.inputs is not None
        layer.inputs[1] = [INPUTS["fp8 per token"](0, HIDDEN), None, layer.inputs[0]][expert % 3]
    experts.down[3] = linear("3.down", [WEIGHTS["f32"]((HIDDEN, INNER))], [None], random(HIDDEN))
    mixed = Experts("experts", experts.gate_up, experts.down)
    for tokens in TOKENS:
        check(mixed, tokens)


def test_row_scales() -> None:
    def scaled(shape: Shape) -> QuantizedTensor:
        inner = canonical("e2m1", 16, "e4m3", shape=shape)
        f32 = number_format("f32")
        scheme = replace(inner.scheme, blocks=((1, 16), (1, 0)), scales=(*inner.scheme.scales, f32))
        return replace(
            inner, scheme=scheme, scales=(inner.scales[0], torch.linspace(-2, 3, shape[0])[:, None])
        )

    experts = make(scaled, INPUTS["fp8 per token"], bias=True)
    assert "row_scale" in experts.down[0].weights[0].buffers
    for tokens in TOKENS:
        check(experts, tokens)


@pytest.mark.parametrize("given", ["as they are", "int8 per token", "static scales"])
def test_all_tokens_on_the_same_experts(given: str) -> None:
    experts = make(WEIGHTS["int8 channel"], INPUTS[given])
    for tokens in TOKENS:
        check(experts, tokens, chosen=torch.tensor([[5, 2, 6]]).repeat(tokens, 1))


@pytest.mark.parametrize("given", ["as they are", "int8 per token", "fp8 in groups", "static scales"])
def test_a_token_does_not_see_its_neighbours(given: str) -> None:
    alone(make(WEIGHTS["int8 channel"], INPUTS[given]))


@pytest.mark.parametrize("name", ["trellis, some rows", "lattice, two codes"])
def test_a_token_does_not_see_its_neighbours_between_transforms(name: str) -> None:
    alone(transformed(name))


def alone(experts: Experts) -> None:
    hidden = experts.down[0].weights[0].shape[0]
    x, chosen, weights = draw(70, hidden=hidden)
    added = random(70, hidden, seed=5)
    whole = experts(x, chosen, weights, "silu", added)
    for first, end in ((0, 1), (69, 70), (3, 20), (20, 70)):
        rows = slice(first, end)
        for threads in (1, 2, 5):
            native.set_threads(threads)
            found = experts(x[rows], chosen[rows].clone(), weights[rows].clone(), "silu", added[rows])
            assert torch.equal(found, whole[rows])
    x[8] = torch.nan
    found = experts(x, chosen, weights, "silu", added)
    assert found[8].isnan().all()
    others = torch.arange(70) != 8
    assert torch.equal(found[others], whole[others])


@pytest.mark.parametrize(
    "name", ["int4 g32", "codebooks", "int8 channel", "trellis", "trellis, padded", "lattice, two codes"]
)
def test_prompts_tokens_have_their_bits_in_any_company(name: str) -> None:
    """Where weights are rounded for them, tokens before them still meet what is stored."""
    experts = transformed(name) if name in TRANSFORMED else make(WEIGHTS[name])
    x, chosen, weights = draw(70, hidden=experts.down[0].weights[0].shape[0])
    assert isinstance(experts.grouped, GroupedExperts)

    def mixed(first: int | None, rows: slice = slice(None)) -> Tensor:
        with prompt_rows(first, len(x[rows])):
            return experts(x[rows], chosen[rows], weights[rows], "silu")

    stored, rounded = mixed(None), mixed(0)
    off = float((rounded - stored).norm() / stored.norm())
    changes = rounding("cpu") and (name != "int8 channel" or native.base_isa() in ("avx2", "avx512_vnni"))
    reordered = 1e-6 if native.base_isa() == "avx512" else 0.0  # sums go on to the end of a row
    assert (2e-4 < off < 1e-2) if changes else off <= reordered, off
    for first in (1, 33, 69):
        both = mixed(first)
        assert torch.equal(both[:first], stored[:first]) and torch.equal(both[first:], rounded[first:])
        assert torch.equal(mixed(0, slice(first, first + 1))[0], rounded[first])


def test_an_expert_of_few_tokens_is_never_rounded() -> None:
    experts = make(WEIGHTS["int4 g32"]).grouped
    assert isinstance(experts, GroupedExperts)
    few = replace(experts, count=512)
    assert experts._meet_many_tokens(K) and not few._meet_many_tokens(8)


def test_what_is_added_comes_last() -> None:
    experts, (x, chosen, weights), added = (
        make(WEIGHTS["bf16"]),
        draw(9),
        random(9, 2 * HIDDEN, seed=4)[:, 3 : 3 + HIDDEN],
    )
    plain = experts(x, chosen, weights, "silu")
    assert torch.equal(experts(x, chosen, weights, "silu", added), plain + added)


def test_many_tokens_go_a_few_experts_at_a_time() -> None:
    """More than fit between the products at once."""
    tokens = 12000
    assert tokens * K * (3 * INNER + 2 * HIDDEN + INNER) > 1 << 23
    experts = make(WEIGHTS["int8 channel"], INPUTS["int8 per token"], bias=True)
    found = check(experts, tokens)
    x, chosen, weights = draw(tokens)
    assert torch.equal(experts(x[-5:], chosen[-5:], weights[-5:], "silu"), found[-5:])
    check(experts, tokens, chosen=torch.full((tokens, K), 3))


@pytest.mark.parametrize("name", ["trellis, some rows", "lattice, x twice"])
def test_many_tokens_between_transforms_too(name: str) -> None:
    _, hidden, inner = TRANSFORMED[name]
    tokens = 6000
    assert tokens * K * (4 * inner + 2 * hidden) > 1 << 23
    experts = transformed(name, "int8 per token", bias=True)
    found = check(experts, tokens)
    x, chosen, weights = draw(tokens, hidden=hidden)
    assert torch.equal(experts(x[-5:], chosen[-5:], weights[-5:], "silu"), found[-5:])


@pytest.mark.parametrize("name", ["int4 g32", "trellis, some rows", "lattice, x twice"])
def test_a_plan_chooses_anew(name: str) -> None:
    given = "static scales"
    experts = transformed(name, given) if name in TRANSFORMED else make(WEIGHTS[name], INPUTS[given])
    hidden = experts.down[0].weights[0].shape[0]
    x, chosen, weights = draw(5, hidden=hidden)
    _, plan = Recorder(Arena(1 << 22)).record(lambda: experts(x, chosen, weights, "silu"))
    assert plan is not None
    for seed in (10, 20):
        for ours, drawn in zip((x, chosen, weights), draw(5, seed, hidden), strict=True):
            ours.copy_(drawn)
        assert torch.equal(plan.run(), experts.one_by_one(x, chosen, weights, "silu"))
    chosen[3, 1] = EXPERTS
    with pytest.raises(LowbitError, match="E0703.*expert"):
        plan.run()
    chosen[3, 1] = -1
    with pytest.raises(LowbitError, match="E0703.*expert"):
        experts(x, chosen, weights, "silu")


def test_no_tokens() -> None:
    experts = make(WEIGHTS["int8 channel"], INPUTS["int8 per token"])
    x, chosen, weights = draw(1)
    assert experts(x[:0], chosen[:0], weights[:0], "silu").shape == (0, HIDDEN)


def test_what_runs_one_by_one_says_why() -> None:
    experts = make(WEIGHTS["int8 channel"])
    weight = WEIGHTS["int8 channel"]((HIDDEN, INNER))
    experts.down[4] = Linear("4.down", [Reference().pack(weight, CPU)], None)
    mixed = Experts("experts", experts.gate_up, experts.down)
    assert mixed.grouped == "4.down runs on the kernel reference"
    x, chosen, weights = draw(7)
    recorder = Recorder(Arena(1 << 22))
    _, plan = recorder.record(lambda: mixed(x, chosen, weights, "silu"))
    assert plan is None and recorder.reason == "experts: 4.down runs on the kernel reference"
