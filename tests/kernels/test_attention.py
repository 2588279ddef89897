"""Paged attention against float64, and its law: nothing a token is computed with changes its bits."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from attention_helpers import (
    BF16,
    CPU,
    E4M3,
    F16,
    F32,
    FLOAT_PRODUCTS,
    NOWHERE,
    Sequence,
    Step,
    assert_equal_bits,
    draw,
    expected,
    hand_out_pages,
    key_codes,
    latent_of,
    make_batch,
    plain,
    simulate,
    spec_of,
    whole,
)
from guard_page import at_guard_page, rows_at_guard_page
from lowbit.errors import LowbitError
from lowbit.kernels import attention_cpu, attention_reference, native
from lowbit.kernels.attention import (
    PAGE_SIZE,
    AttentionKernel,
    AttentionParameters,
    CacheSpec,
    choose_attention,
)
from lowbit.kernels.attention_cpu import CpuAttention
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.kernels.step_plan import Arena, Recorder
from lowbit.numerics.cache_format import KvDtype
from sparse_memory import far_apart, sparse_zeros

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="the native library was not built"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    native.set_threads(2)
    yield
    native.set_threads(2)


INT8, INT4 = KvDtype.of("int8"), KvDtype.of("int4")
CASES: dict[str, tuple[CacheSpec, int, dict[str, Any]]] = {
    "llama": (spec_of(3, 64), 3, {}),
    "llama f32": (spec_of(3, 64, dtype=F32), 3, {}),
    "no groups, 80": (spec_of(2, 80), 1, {}),
    "groups of 4, 96 f32": (spec_of(1, 96, dtype=F32), 4, {}),
    "groups of 8, 128": (spec_of(1, 128), 8, {}),
    "256": (spec_of(1, 256), 2, {}),
    "256 f32": (spec_of(1, 256, dtype=F32), 2, {}),
    "16": (spec_of(2, 16), 7, {}),
    "k 192, v 128": (spec_of(1, 192, 128), 3, {}),
    "k 48, v 112 f32": (spec_of(1, 48, 112, F32), 3, {}),
    "one K/V head, 50 queries": (spec_of(1, 32), 50, {}),
    "window": (spec_of(2, 64, window=37), 3, {}),
    "window of one": (spec_of(1, 32, window=1), 2, {}),
    "window wider than a segment": (spec_of(1, 64, window=300), 2, {}),
    "softcap": (spec_of(2, 64), 2, {"softcap": 3.0}),
    "sinks": (spec_of(2, 64), 2, {"sinks": torch.tensor([1.5, -3.0, 60.0, 0.0])}),
    "all of it": (
        spec_of(1, 64, dtype=F32, window=290),
        2,
        {"sinks": torch.tensor([4.0, -1.0]), "softcap": 8.0},
    ),
    "fp16": (spec_of(2, 64, dtype=F16), 3, {}),
    "fp16, k 96, v 128": (spec_of(1, 96, 128, F16, window=290), 9, {"softcap": 3.0}),
    "fp16 latent": (latent_of(112, 80, F16), 5, {}),
    "e4m3": (spec_of(2, 64, dtype=E4M3), 3, {}),
    "e4m3, k 96, v 128": (spec_of(1, 96, 128, E4M3), 9, {"softcap": 3.0}),
    "e4m3 window": (spec_of(1, 128, dtype=E4M3, window=290), 4, {}),
    "int8": (spec_of(3, 64, dtype=INT8), 3, {}),
    "int8, k 96, v 128": (spec_of(2, 96, 128, INT8, window=37), 4, {"softcap": 3.0}),
    "int4": (spec_of(3, 64, dtype=INT4), 3, {}),
    "int4, 80, short groups": (spec_of(2, 80, dtype=INT4), 1, {}),
    "int4, 256": (spec_of(1, 256, dtype=INT4, window=290), 9, {}),
    "e4m3 of each token": (spec_of(2, 128, dtype=KvDtype.of("fp8_e4m3")), 2, {}),
    "e5m2": (spec_of(2, 80, dtype=KvDtype.of("fp8_e5m2")), 3, {"softcap": 3.0}),
    "all of it, K int8, V int4": (
        spec_of(2, 64, dtype=KvDtype.of("int8", "int4"), window=290),
        2,
        {"sinks": torch.tensor([4.0, -1.0, 0.0, 9.0]), "softcap": 8.0},
    ),
    "latent int8": (latent_of(576, 512, INT8), 5, {}),
    "latent int4": (latent_of(112, 80, INT4, window=290), 3, {}),
    "DeepSeek's latent": (latent_of(576, 512), 16, {}),
    "DeepSeek's latent f32": (latent_of(576, 512, F32), 5, {}),
    "latent with a short strip": (latent_of(112, 80), 50, {}),
    "latent with a short strip f32": (latent_of(112, 80, F32), 3, {}),
    "latent that is all value": (latent_of(16, 16), 2, {}),
    "all of it, latent": (
        latent_of(96, 48, window=290),
        2,
        {"sinks": torch.tensor([4.0, -1.0]), "softcap": 8.0},
    ),
}
LENGTHS = [1, 15, 16, 17, 130, 600]


@lru_cache(1)  # both kernels of a case follow each other
def by_definition(case: str) -> tuple[list[Sequence], list[torch.Tensor]]:
    """Sequences, and what attention makes of them."""
    spec, group, extra = CASES[case]
    sequences = draw(spec, group, LENGTHS)
    return sequences, [expected(spec, one, replace(plain(spec), **extra)) for one in sequences]


@pytest.mark.parametrize("kernel", [CpuAttention(), ReferenceAttention()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: str, kernel: AttentionKernel) -> None:
    spec, _, extra = CASES[case]
    parameters = replace(plain(spec), **extra)
    sequences, exactly = by_definition(case)
    outputs = simulate(spec, sequences, whole(sequences), parameters, kernel)
    exact = kernel.name == "reference" or native.base_isa() in FLOAT_PRODUCTS
    rounded = not exact and spec.v_format.name not in ("f32", "fp16")
    for sequence, wanted, found in zip(sequences, exactly, outputs, strict=True):
        if rounded:  # the softmax weights: each, and so their sum, is wrong by 2^-9 at most
            assert ((found - wanted).abs() <= 2**-8 * expected(spec, sequence, parameters, True)).all()
        else:
            assert (found - wanted).abs().max() <= 4e-6 * wanted.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_sees_exactly_what_it_should(case: str) -> None:
    """Queries of zero weigh all visible tokens alike, without rounding: one too many or few would show."""
    spec, group, extra = CASES[case]
    parameters = replace(plain(spec), **extra)
    sequences = [(torch.zeros_like(q), k, v) for q, k, v in draw(spec, group, LENGTHS)]
    outputs = simulate(spec, sequences, whole(sequences), parameters)
    for sequence, found in zip(sequences, outputs, strict=True):
        wanted = expected(spec, sequence, parameters)
        assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("group_scores", [1, 500_000, 1 << 26])
def test_padded_reference(group_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, with one, some and all sequences a group."""
    monkeypatch.setattr(attention_reference, "GROUP_SCORES", group_scores)
    monkeypatch.setattr(ReferenceAttention, "_one_by_one", ReferenceAttention._padded)
    spec, group, extra = CASES["all of it"]
    parameters = replace(plain(spec), **extra)
    sequences = draw(spec, group, LENGTHS)
    steps: list[Step] = [
        [(owner, 0, length // 2) for owner, length in enumerate(LENGTHS) if length > 1],
        [(owner, length // 2, length) for owner, length in enumerate(LENGTHS)],
    ]
    outputs = simulate(spec, sequences, steps, parameters, ReferenceAttention())
    for sequence, found in zip(sequences, outputs, strict=True):
        wanted = expected(spec, sequence, parameters)
        assert (found - wanted).abs().max() <= 4e-6 * wanted.abs().max()


def test_e4m3_pages_round_as_torch_does() -> None:
    """Every bfloat16 number, ties between codes among them; what is too large saturates."""
    if native.library() is None:
        pytest.skip("no native library")
    numbers = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    numbers = numbers[~numbers.isnan()]
    numbers = torch.cat((numbers, numbers * 1.0009765625, torch.tensor([464.0, 2**-10, 3 * 2**-10])))
    tokens = -(-numbers.numel() // 16)
    k = torch.nn.functional.pad(numbers, (0, tokens * 16 - numbers.numel())).view(tokens, 1, 16)
    spec, kernel = spec_of(1, 16, dtype=E4M3), CpuAttention()
    cache = kernel.allocate(spec, -(-tokens // PAGE_SIZE), PAGE_SIZE, CPU)
    batch = make_batch([(0, 0, tokens)], [list(range(-(-tokens // PAGE_SIZE)))])
    kernel.write(cache, k, k, batch)
    stored = key_codes(cache.buffers["k"].view(torch.uint8).view(-1, 1, 16 * PAGE_SIZE), 16)[:tokens, 0]
    wanted = k[:, 0].clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(stored, wanted)


def test_rounding_queries_costs_what_bfloat16_costs() -> None:
    """Queries that are no bfloat16 numbers: the error is that of keys rounded the same way."""
    spec = spec_of(3, 64)
    sequences = draw(spec, 3, [500])
    sequences = [(q + 1e-3 * q.roll(1, 0), k, v) for q, k, v in sequences]
    wanted = expected(spec, sequences[0], plain(spec))
    (found,) = simulate(spec, sequences, whole(sequences), plain(spec))
    assert (found - wanted).norm() <= 3e-3 * wanted.norm()


@pytest.mark.parametrize("case", CASES)
def test_same_bits_alone_chunked_and_moved(case: str) -> None:
    spec, group, extra = CASES[case]
    parameters = replace(plain(spec), **extra)
    sequences = draw(spec, group, LENGTHS)
    together = simulate(spec, sequences, whole(sequences), parameters)

    alone: list[Step] = [[(owner, 0, length)] for owner, length in enumerate(LENGTHS)]
    assert_equal_bits(simulate(spec, sequences, alone, parameters, seed=1), together)

    chunked: list[Step] = []
    chooser = random.Random(2)
    done = [0] * len(LENGTHS)
    while any(end < length for end, length in zip(done, LENGTHS, strict=True)):
        step: Step = []
        for owner, length in enumerate(LENGTHS):
            end = min(done[owner] + chooser.choice((1, 5, 16, 77)), length)
            if end > done[owner] and chooser.random() < 0.8:
                step.append((owner, done[owner], end))
                done[owner] = end
        if step:
            chunked.append(step)
    assert_equal_bits(simulate(spec, sequences, chunked, parameters, seed=3), together)

    native.set_threads(1)
    assert_equal_bits(simulate(spec, sequences, whole(sequences), parameters, seed=4), together)
    assert_equal_bits(simulate(spec, sequences, chunked, parameters, seed=5), together)


@pytest.mark.parametrize(
    ("spec", "group"),
    [
        (spec_of(1, 64), 1),
        (spec_of(1, 64), 3),
        (latent_of(96, 80), 8),
        (spec_of(2, 64, dtype=INT8), 3),
        (spec_of(2, 80, dtype=INT4), 2),
    ],
)
def test_same_bits_token_by_token(spec: CacheSpec, group: int) -> None:
    """Decode from the first token on, over two segment borders: threads share the segments of a row."""
    sequences = draw(spec, group, [560])
    together = simulate(spec, sequences, whole(sequences), plain(spec))
    steps: list[Step] = [[(0, position, position + 1)] for position in range(560)]
    for threads in (2, 1):
        native.set_threads(threads)
        assert_equal_bits(simulate(spec, sequences, steps, plain(spec)), together)


def test_shared_prefix_pages() -> None:
    spec, shared = spec_of(2, 64), 20 * PAGE_SIZE
    first, second = draw(spec, 3, [400, 470])
    q, k, v = (torch.cat([a[:shared], b[shared:]]) for a, b in zip(first, second, strict=True))
    second = (q, k, v)
    apart = simulate(spec, [first, second], whole([first, second]), plain(spec))
    (mine, other), _ = hand_out_pages([400, 470])
    pages = [mine, mine[: shared // PAGE_SIZE] + other[shared // PAGE_SIZE :]]
    steps: list[Step] = [[(0, 0, 400)], [(1, shared, 470)]]
    found = simulate(spec, [first, second], steps, plain(spec), pages=pages)
    assert_equal_bits([found[0], found[1][shared:]], [apart[0], apart[1][shared:]])


PREFIX_CASES: dict[str, tuple[CacheSpec, int, dict[str, Any]]] = {
    "llama": (spec_of(3, 64), 3, {}),
    "no groups f32, k 48, v 112": (spec_of(2, 48, 112, F32), 1, {}),
    "fp16": (spec_of(1, 64, dtype=F16), 4, {}),
    "int8": (spec_of(2, 64, dtype=INT8), 3, {}),
    "K int8, V int4": (spec_of(1, 96, 80, dtype=KvDtype.of("int8", "int4")), 2, {}),
    "window": (spec_of(1, 64, window=400), 3, {}),
    "window over the prefix's end": (spec_of(2, 32, window=130), 2, {}),
    "softcap and sinks": (
        spec_of(2, 64),
        2,
        {"sinks": torch.tensor([1.5, -3.0, 60.0, 0.0]), "softcap": 3.0},
    ),
    "latent": (latent_of(112, 80), 5, {}),
    "latent int8": (latent_of(96, 48, INT8), 2, {}),
}
# Pages each sequence shares with the first, and its tokens: whole segments, parts of one, a pair that goes on
# together, contexts that end with what is shared, others that share nothing.
PREFIXES = [
    (33, 530),
    (33, 700),
    (33, 529),
    (32, 513),
    (20, 520),
    (20, 340),
    (16, 257),
    (9, 300),
    (5, 90),
    (5, 81),
    (3, 60),
    (0, 600),
    (0, 1),
]


def prefix_pages() -> tuple[list[list[int]], list[list[int]]]:
    """Pages that share PREFIXES, and pages that share nothing."""
    apart, _ = hand_out_pages([length for _, length in PREFIXES], seed=7)
    return [apart[0][:shared] + own[shared:] for (shared, _), own in zip(PREFIXES, apart, strict=True)], apart


def prefix_sequences(spec: CacheSpec, group: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Sequences whose tokens are alike where PREFIXES share them."""
    drawn = draw(spec, group, [length for _, length in PREFIXES])
    return [
        tuple(
            torch.cat([first[: shared * PAGE_SIZE], own[shared * PAGE_SIZE :]])
            for first, own in zip(drawn[0], sequence, strict=True)
        )
        for (shared, _), sequence in zip(PREFIXES, drawn, strict=True)
    ]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", PREFIX_CASES)
def test_a_shared_prefix_changes_no_bit(case: str, threads: int) -> None:
    """Decode, and a few tokens at once, on pages that sequences share and on copies of them."""
    spec, group, extra = PREFIX_CASES[case]
    parameters = replace(plain(spec), **extra)
    sequences = prefix_sequences(spec, group)
    shared_pages, own_pages = prefix_pages()
    native.set_threads(threads)
    count = 1 + max(number for row in own_pages for number in row)
    found = []
    for pages in (shared_pages, own_pages):
        kernel = CpuAttention()
        cache = kernel.allocate(spec, count, PAGE_SIZE, CPU)
        for buffer in cache.buffers.values():
            buffer.view(torch.uint8).fill_(0xFF)
        for owner, (_, k, v) in enumerate(sequences):
            kernel.write(cache, k, v, make_batch([(owner, 0, len(k))], pages))
        for last in (1, 3):  # tokens a sequence
            step = [(owner, max(len(q) - last, 0), len(q)) for owner, (q, _, _) in enumerate(sequences)]
            chooser = random.Random(last)
            chooser.shuffle(step)
            q = torch.cat([sequences[owner][0][first:end] for owner, first, end in step])
            found.append(kernel.attend(q, cache, make_batch(step, pages), parameters))
            # Alone there is nobody to share with.
            alone = [
                kernel.attend(
                    sequences[owner][0][first:end],
                    cache,
                    make_batch([(owner, first, end)], pages),
                    parameters,
                )
                for owner, first, end in step
            ]
            assert_equal_bits([found[-1]], [torch.cat(alone)])
    assert_equal_bits(found[:2], found[2:])


def test_a_captured_step_finds_the_prefix_of_its_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay with pages that are shared, and then with others, in the tensors it was recorded with."""
    monkeypatch.undo()  # a recorder gives out new tensors itself
    spec, group, extra = PREFIX_CASES["llama"]
    parameters = replace(plain(spec), **extra)
    sequences = prefix_sequences(spec, group)
    shared_pages, own_pages = prefix_pages()
    kernel = CpuAttention()
    count = 1 + max(number for row in own_pages for number in row)
    cache = kernel.allocate(spec, count, PAGE_SIZE, CPU)
    for owner, (_, k, v) in enumerate(sequences):
        kernel.write(cache, k, v, make_batch([(owner, 0, len(k))], own_pages))
    step = [(owner, len(q) - 1, len(q)) for owner, (q, _, _) in enumerate(sequences)]
    q = torch.cat([sequences[owner][0][-1:] for owner, _, _ in step])
    batch, shared = (make_batch(step, pages) for pages in (own_pages, shared_pages))
    wanted = kernel.attend(q, cache, batch, parameters)
    _, plan = Recorder(Arena(1 << 22)).record(lambda: kernel.attend(q, cache, batch, parameters))
    assert plan is not None
    own = batch.page_table.clone()
    for table in (shared.page_table, own):
        batch.page_table.copy_(table)
        assert_equal_bits([plan.run()], [wanted])


@pytest.mark.parametrize("sequences", [2, 17, 70])
def test_many_streams_of_one_prefix(sequences: int) -> None:
    """More rows than a block holds; NaN in one sequence's own token is nobody else's."""
    spec, group, shared = spec_of(2, 64), 4, 300
    (q, k, v), *_ = draw(spec, group, [shared + sequences])
    prefix = list(range(-(-shared // PAGE_SIZE)))
    kernel = CpuAttention()
    pages = [[*prefix[:-1], len(prefix) + owner] for owner in range(sequences)]
    cache = kernel.allocate(spec, len(prefix) + sequences, PAGE_SIZE, CPU)
    kernel.write(cache, k[:shared], v[:shared], make_batch([(0, 0, shared)], [prefix]))
    border = (len(prefix) - 1) * PAGE_SIZE
    for owner in range(sequences):
        own = torch.cat([k[border:shared], k[shared + owner :][:1]])
        if owner == 1:
            own[-1] = torch.nan
        kernel.write(cache, own, v[: len(own)], make_batch([(owner, border, shared + 1)], pages))
    step = [(owner, shared, shared + 1) for owner in range(sequences)]
    together = kernel.attend(q[shared:], cache, make_batch(step, pages), plain(spec))
    assert together[1].isnan().all()
    for owner in range(sequences):
        alone = kernel.attend(q[shared + owner :][:1], cache, make_batch([step[owner]], pages), plain(spec))
        if owner != 1:
            assert_equal_bits([together[owner : owner + 1]], [alone])


def test_pages_before_the_window_may_be_gone() -> None:
    spec = spec_of(1, 32, window=40)
    sequences = draw(spec, 2, [700])
    (wanted,) = simulate(spec, sequences, whole(sequences), plain(spec))
    pages, count = hand_out_pages([700])
    kernel = CpuAttention()
    cache = kernel.allocate(spec, count, PAGE_SIZE, CPU)
    q, k, v = sequences[0]
    kernel.write(cache, k, v, make_batch([(0, 0, 700)], pages))
    for first, end in ((699, 700), (600, 700)):
        batch = make_batch([(0, first, end)], pages)
        batch.page_table[0, : (first - 39) // PAGE_SIZE] = NOWHERE
        assert kernel.attend(q[first:end], cache, batch, plain(spec)).equal(wanted[first:end])


def test_later_tokens_do_not_reach_back() -> None:
    """A NaN in a token of the same chunk spoils that token and those after it, no other."""
    spec = spec_of(2, 64)
    (q, k, v), mate = draw(spec, 2, [300, 40])
    clean = simulate(spec, [(q, k, v), mate], whole([(q, k, v), mate]), plain(spec))
    for spoiled in (k.clone(), v.clone()):
        spoiled[283] = torch.nan
        sequence = (q, spoiled, v) if spoiled[0].equal(k[0]) else (q, k, spoiled)
        found = simulate(spec, [sequence, mate], whole([sequence, mate]), plain(spec))
        assert_equal_bits([found[0][:283], found[1]], [clean[0][:283], clean[1]])
        assert found[0][283:].isnan().all()


NOT_FINITE: dict[str, tuple[CacheSpec, int]] = {
    "llama": (spec_of(2, 64), 3),
    "as many rows as tokens": (spec_of(1, 128), 1),
    "k 32, v 80, more rows a token than a tile has": (spec_of(1, 32, 80), 20),
    "window": (spec_of(1, 64, window=37), 3),
    "f32": (spec_of(1, 64, dtype=F32), 2),
    "e5m2 alike for all": (spec_of(2, 64, dtype=KvDtype.of("fp8_e5m2")), 2),
    "latent": (latent_of(96, 48), 5),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_value_that_is_no_number_is_only_for_those_who_see_it(case: str) -> None:
    """Infinities and NaN in V beside tokens that do not see them: each row has the bits it has alone."""
    spec, group = NOT_FINITE[case]
    (q, k, v), mate = draw(spec, group, [330, 40])
    clean = simulate(spec, [(q, k, v), mate], whole([(q, k, v), mate]), plain(spec))
    k, v = k.clone(), v.clone()
    wrong = k if spec.kind == "latent" else v
    for token, number in ((67, torch.inf), (70, -torch.inf), (270, torch.nan)):
        wrong[token, :, 1 if number > 0 else 40] = number
    if spec.kind == "latent":
        v = k[..., : spec.v_dim]
    sequences = [(q, k, v), mate]
    together = simulate(spec, sequences, whole(sequences), plain(spec))
    for first in (0, 60, 71, 256, 269, 300):
        steps: list[Step] = [[(0, 0, first)]] if first else []
        steps += [[(0, token, token + 1)] for token in range(first, first + 12)] + [
            [(0, first + 12, 330), (1, 0, 40)]
        ]
        apart = simulate(spec, sequences, steps, plain(spec), seed=first)
        for mine, other in zip(apart, together, strict=True):
            assert mine.isnan().equal(other.isnan())
            assert_equal_bits([mine.nan_to_num(7)], [other.nan_to_num(7)])
    assert_equal_bits([together[1]], [clean[1]])
    assert_equal_bits([together[0][:67]], [clean[0][:67]])
    assert not together[0].isfinite().all()


def test_a_zero_has_one_sign_in_any_company() -> None:
    """A sum too small for a number becomes -0, to which tokens that a row does not see may add +0."""
    spec = spec_of(1, 64)
    q, k, v = draw(spec, 1, [90])[0]
    q, v = torch.zeros_like(q), torch.zeros_like(v)  # all weights are 1
    v[0], v[32] = 1.5 * 2.0**-126, -1.75 * 2.0**-126
    sequences = [(q, k, v)]
    together = simulate(spec, sequences, whole(sequences), plain(spec))
    steps: list[Step] = [[(0, token, token + 1)] for token in range(90)]
    assert_equal_bits(simulate(spec, sequences, steps, plain(spec)), together)


def test_reads_views_of_a_fused_output() -> None:
    spec, group, tokens = spec_of(2, 32), 3, 50
    fused = torch.randn(tokens, 2 * (group + 2), 32, generator=torch.Generator().manual_seed(6))
    q, k, v = fused.split((2 * group, 2, 2), dim=1)
    kernel, batch = CpuAttention(), make_batch([(0, 0, tokens)], [[2, 0, 5, 1]])
    results = []
    for parts in ((q, k, v), tuple(part.contiguous() for part in (q, k, v)), (q.double(), k.double(), v)):
        cache = kernel.allocate(spec, 6, PAGE_SIZE, CPU)
        kernel.write(cache, parts[1], parts[2], batch)
        results.append(kernel.attend(parts[0], cache, batch, plain(spec)))
    assert results[0].equal(results[1])
    assert results[2].dtype is torch.float64 and results[2].float().equal(results[0])


def test_rounds_to_the_cache_as_torch_does() -> None:
    """Ties, subnormals, infinities and NaN: what is stored is what ``to(bfloat16)`` gives."""
    cruel = torch.tensor([1.00390625, 1.01171875, -1e-40, 3.4e38, torch.inf, -torch.inf, torch.nan, -0.0])
    cruel = torch.cat([cruel, torch.randn(8)]).repeat(16, 1, 1)  # (16 tokens, 1 head, 16)
    kernel, spec = CpuAttention(), spec_of(1, 16)
    cache = kernel.allocate(spec, 1, PAGE_SIZE, CPU)
    kernel.write(cache, cruel, cruel.flip(2), make_batch([(0, 0, 16)], [[0]]))
    k = cache.buffers["k"][0, 0].permute(1, 0, 2).flatten(1)  # (16 tokens, k_dim)
    v = cache.buffers["v"][0, 0].permute(0, 2, 1).flatten(0, 1)
    for stored, given in ((k, cruel), (v, cruel.flip(2))):
        rounded = given[:, 0].bfloat16()
        assert stored.isnan().equal(rounded.isnan())
        assert stored.nan_to_num(7).view(torch.int16).equal(rounded.nan_to_num(7).view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, F16, F32, E4M3], ids=str)
def test_a_latent_is_stored_once(dtype: KvDtype) -> None:
    """576 numbers a token, from which the same results come as from K and V stored apart, bit for bit."""
    spec = latent_of(576, 512, dtype)
    assert spec.token_bytes() == 576 * dtype.k.bits // 8
    for kernel in (CpuAttention(), ReferenceAttention()):
        buffers = kernel.allocate(spec, 3, PAGE_SIZE, CPU).buffers
        assert sum(buffer.nbytes for buffer in buffers.values()) == 3 * PAGE_SIZE * spec.token_bytes()
    sequences = draw(spec, 16, [1, 300, 33])
    apart = simulate(replace(spec, kind="paged"), sequences, whole(sequences), plain(spec))
    assert_equal_bits(simulate(spec, sequences, whole(sequences), plain(spec)), apart)


def test_extreme_scores() -> None:
    """Scores of hundreds and sinks far above them neither overflow nor vanish."""
    spec = spec_of(1, 64, dtype=F32)
    parameters = AttentionParameters(scale=1.0, sinks=torch.tensor([-1e4, 100.0]))
    sequences = [(8 * q, 4 * k, v) for q, k, v in draw(spec, 2, [300])]
    (found,) = simulate(spec, sequences, whole(sequences), parameters)
    (wanted,) = simulate(spec, sequences, whole(sequences), parameters, ReferenceAttention())
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


REFUSED = {
    "recurrent": ("paged", CacheSpec("recurrent", 1, 64, 64, BF16)),
    "values beyond the key": ("v_dim 80 > k_dim 64", latent_of(64, 80)),
    "latent of two types": ("one type for both", latent_of(64, 48, KvDtype.of("int8", "bf16"))),
    "odd": ("k_dim % 16 == 0 and k_dim <= 576, got 40", spec_of(1, 40)),
    "wide": ("v_dim <= 512, got 528", spec_of(1, 64, 528)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_the_reason(case: str) -> None:
    text, spec = REFUSED[case]
    assert text in str(CpuAttention().refuses(spec, CPU))


def test_choice() -> None:
    assert choose_attention(spec_of(1, 64), CPU).name == "cpu"
    assert choose_attention(spec_of(1, 40), CPU).name == "reference"
    assert choose_attention(latent_of(576, 512), CPU).name == "cpu"
    assert choose_attention(latent_of(32, 24), CPU).name == "reference"
    assert "cuda" in str(CpuAttention().refuses(spec_of(1, 64), torch.device("cuda")))
    with pytest.raises(LowbitError, match="'recurrent'"):
        choose_attention(CacheSpec("recurrent", 1, 64, 64, BF16), CPU)
    with pytest.raises(LowbitError, match="even head size, got 33"):
        choose_attention(spec_of(1, 33, dtype=KvDtype.of("int4")), CPU)
    with pytest.raises(LowbitError, match="pages of 16 tokens, got 32"):
        CpuAttention().allocate(spec_of(1, 64), 4, 32, CPU)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert choose_attention(spec_of(1, 64), CPU).name == "reference"


def test_a_batch_that_does_not_fit_is_an_error() -> None:
    """Wrong page numbers, slots and lengths never become wild reads."""
    spec, kernel = spec_of(1, 16), CpuAttention()
    cache = kernel.allocate(spec, 2, PAGE_SIZE, CPU)
    q = torch.zeros(20, 1, 16)
    batch = make_batch([(0, 0, 20)], [[0, 1]])
    for slot in (-1, 2 * PAGE_SIZE):
        slots = batch.write_slots.clone()
        slots[7] = slot
        with pytest.raises(LowbitError, match="write slot"):
            kernel.write(cache, q, q, replace(batch, write_slots=slots))
    for page in (-1, 2, NOWHERE):
        table = batch.page_table.clone()
        table[0, 1] = page
        with pytest.raises(LowbitError, match="page table"):
            kernel.attend(q, cache, replace(batch, page_table=table), plain(spec))
    for field, number in (("query_lengths", 19), ("query_lengths", 21), ("context_lengths", 2000)):
        with pytest.raises(LowbitError, match="lengths"):
            wrong: dict[str, Any] = {field: torch.tensor([number], dtype=torch.int32)}
            kernel.attend(q, cache, replace(batch, **wrong), plain(spec))


@pytest.mark.parametrize("case", CASES)
def test_nothing_past_the_end_is_touched(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_cpu, "zeros", lambda shape, dtype: at_guard_page(torch.zeros(shape, dtype=dtype))
    )
    spec, group, extra = CASES[case]
    if "sinks" in extra:
        extra = extra | {"sinks": at_guard_page(extra["sinks"])}
    sequence = draw(spec, group, [48])[0]
    (wanted,) = simulate(spec, [sequence], whole([sequence]), replace(plain(spec), **extra))
    kernel = CpuAttention()
    cache = kernel.allocate(spec, 3, PAGE_SIZE, CPU)
    for first, end in ((0, 1), (1, 20), (20, 48)):
        whole_batch = make_batch([(0, first, end)], [[1, 0, 2]])
        guarded = {
            field: at_guard_page(getattr(whole_batch, field))
            for field in ("write_slots", "query_lengths", "context_lengths")
        }
        table = at_guard_page(whole_batch.page_table[:, : -(-end // PAGE_SIZE)].contiguous())
        batch = replace(whole_batch, page_table=table, **guarded)
        q, k, v = (
            rows_at_guard_page(part[first:end].flatten(1), part[0].numel() + 5).view(
                end - first, *part.shape[1:]
            )
            for part in sequence
        )
        kernel.write(cache, k, v, batch)
        found = kernel.attend(q, cache, batch, replace(plain(spec), **extra))
        assert_equal_bits([found], [wanted[first:end]])


def test_populated_pages_have_memory_and_keep_what_is_in_them() -> None:
    spec = spec_of(4, 64)
    cache = CpuAttention().allocate(spec, 4000, PAGE_SIZE, CPU)
    size = mmap.PAGESIZE

    def resident(part: torch.Tensor) -> int:
        first, end = -(-part.data_ptr() // size) * size, (part.data_ptr() + part.nbytes) // size * size
        states = (ctypes.c_ubyte * ((end - first) // size))()
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(end - first), states)
        return sum(state & 1 for state in states) * size

    assert not any(resident(buffer) for buffer in cache.buffers.values())
    for buffer in cache.buffers.values():
        buffer[1].fill_(3)
    steps = sum(1 for _ in cache.populate(0, 1500))
    if not steps:
        pytest.skip("this system cannot be asked for memory before it is written")
    for buffer in cache.buffers.values():
        assert resident(buffer[:1500]) > buffer[:1500].nbytes - size, "all of it"
        assert resident(buffer) < buffer.nbytes - (1 << 21), "and not the rest"
        assert buffer[1].eq(3).all() and not buffer[0].any() and not buffer[2:1500].any()
    assert steps >= 2 * (cache.buffers["k"][:1500].nbytes >> 21), "none takes long"


@pytest.mark.parametrize("name", ["bf16", "f32", "int8", "int4"])
@pytest.mark.parametrize("kind", ["paged", "latent"])
def test_pages_past_two_to_the_31(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pages of a cache of more than 2^31 elements; q, k and v of tokens that lie as far apart."""
    dtype = KvDtype.of(name)
    spec = spec_of(8, 256, dtype=dtype) if kind == "paged" else latent_of(576, 512, dtype)
    sequence = draw(spec, 2, [40])[0]
    (wanted,) = simulate(spec, [sequence], whole([sequence]), plain(spec))
    monkeypatch.setattr(attention_cpu, "zeros", sparse_zeros)
    kernel = CpuAttention()
    page = kernel.allocate(spec, 1, PAGE_SIZE, CPU).buffers["k"].numel()
    count = (1 << 31) // page + 9
    cache = kernel.allocate(spec, count, PAGE_SIZE, CPU)
    batch = make_batch([(0, 0, 40)], [[count - 2, 3, count - 1]])
    q, k, v = (far_apart(part) for part in sequence)
    kernel.write(cache, k, v, batch)
    assert_equal_bits([kernel.attend(q, cache, batch, plain(spec))], [wanted])
