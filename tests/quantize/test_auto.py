"""auto's ladder over made-up sizes: which rung, why, and when there is none."""

from __future__ import annotations

import pytest

from lowbit.errors import LowbitError
from lowbit.quantize.auto import LADDERS, Budget, Pick, Sized, parse_budget, pick, size_text
from lowbit.quantize.recipe import Asked
from lowbit.quantize.specification import parse_method

MIB = 1 << 20
SIZES = {"int8:symmetric=true": 800, "int6": 620, "int5": 520, "int4:group_size=32": 460}
SIZES |= {"int4:group_size=64": 430, "int4": 420, "int3:group_size=64": 360, "int3": 310}
STORED = 1600


def sized(method: str | None) -> Sized:
    return Sized((STORED if method is None else SIZES[method]) * MIB)


def chosen(budget: int, size_of: object = sized, device: str = "cpu") -> Pick:
    return pick(device, size_of, Budget(budget, "budget=x"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("123456", 123456),
        ("500M", 500_000_000),
        ("500MB", 500_000_000),
        ("8G", 8_000_000_000),
        ("8GiB", 8 << 30),
        ("1.5G", 1_500_000_000),
        ("0.5TiB", 1 << 39),
        ("3K", 3000),
        ("3KiB", 3072),
    ],
)
def test_budgets(text: str, nbytes: int) -> None:
    assert parse_budget(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "0G", "0.0000001M", "-1G", "+1G", "8 G", " 8G", "8G ", "8g", "8Gb", "8GIB", "8iB", "8B"),
        *("1e9", "0x10", "8.G", ".5G", "1.5", "8,5G", "1_000", "\u0668G", "G", "inf", "nan", "8GG", "8G\n"),
        "9" * 40,
    ],
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(LowbitError, match="is no size; write 500M, 8G") as caught:
        parse_budget(text)
    assert caught.value.code == "E0402" and caught.value.exit_code == 2 and "\n" not in caught.value.message


def test_a_bad_budget_is_told_before_anything_is_read() -> None:
    with pytest.raises(LowbitError, match="budget '8 apples' is no size"):
        Asked("auto:budget=8 apples")
    with pytest.raises(LowbitError, match="auto has no option 'budgets'"):
        Asked("auto:budgets=8G")
    with pytest.raises(
        LowbitError, match="--gguf-type belongs to --quantization gguf, not to --quantization"
    ):
        Asked("auto", gguf_type="q4_k_m")
    assert Asked("auto").auto_budget == "" and Asked("auto:budget=8G").auto_budget == "8G"
    assert Asked("int8").auto_budget is None and Asked().auto_budget is None


def test_every_rung_is_a_method_and_costs_less_than_the_one_above() -> None:
    for ladder in LADDERS.values():
        assert all(parse_method(method).text == method for method in ladder)
    assert list(SIZES) == list(LADDERS["cpu"])


@pytest.mark.parametrize("method", SIZES)
def test_each_rung_at_its_own_size_and_not_a_byte_below(method: str) -> None:
    assert chosen(SIZES[method] * MIB).method == method
    below = [name for name, size in SIZES.items() if size < SIZES[method]]
    if below:
        assert chosen(SIZES[method] * MIB - 1).method == below[0]
    else:
        with pytest.raises(LowbitError):
            chosen(SIZES[method] * MIB - 1)


def test_the_reasons() -> None:
    assert chosen(5 << 30).reason == (
        "auto: int8:symmetric=true: 800.0 MiB of 5.0 GiB for weights (budget=x); as stored needs 1.6 GiB and "
        "reads more bytes a token"
    )
    assert chosen(1000 * MIB).reason == (
        "auto: int8:symmetric=true: 800.0 MiB of 1000.0 MiB for weights (budget=x); as stored needs 1.6 GiB"
    )
    assert chosen(425 * MIB).reason == (
        "auto: int4: 420.0 MiB of 425.0 MiB for weights (budget=x); int4:group_size=64 needs 430.0 MiB"
    )


def test_nothing_is_planned_that_does_not_matter() -> None:
    asked: list[str | None] = []

    def noted(method: str | None) -> Sized:
        asked.append(method)
        return sized(method)

    assert chosen(5 << 30, noted).method == "int8:symmetric=true"
    assert asked == [None, "int8:symmetric=true"]


def test_nothing_fits() -> None:
    budget = Budget.of_free(500 * MIB, 200 * MIB, 4096)
    with pytest.raises(LowbitError) as caught:
        pick("cpu", sized, budget)
    assert (caught.value.code, caught.value.exit_code) == ("E0501", 5)
    assert caught.value.message == (
        "--quantization auto: int3 needs 310.0 MiB for weights, the most that may be used is 200.0 MiB "
        "(0.8 x 500.0 MiB free - 200.0 MiB KV cache of 4096 tokens); free 110.0 MiB more, lower "
        "--context-length, or use a smaller model"
    )
    with pytest.raises(LowbitError, match="the most that may be used is 0 bytes"):
        pick("cpu", sized, Budget.of_free(100 * MIB, 200 * MIB, 4096))


def test_rungs_that_cannot_be_had_or_have_no_native_kernel_are_passed_over() -> None:
    def no_eight(method: str | None) -> Sized | None:
        return None if method == "int8:symmetric=true" else sized(method)

    def slow_fives_and_sixes(method: str | None) -> Sized:
        return Sized(sized(method).nbytes, method not in ("int5", "int6"))

    assert chosen(5 << 30, no_eight).method == "int6"
    assert chosen(700 * MIB, slow_fives_and_sixes).method == "int4:group_size=32"
    assert "int8:symmetric=true needs 800.0 MiB" in chosen(700 * MIB, slow_fives_and_sixes).reason


def test_without_native_kernels_the_model_stays_as_it_is() -> None:
    def slow(method: str | None) -> Sized:
        return Sized(sized(method).nbytes, native=False)

    stored = chosen(STORED * MIB, slow)
    assert stored.method is None
    assert stored.reason == (
        "auto: as stored: 1.6 GiB of 1.6 GiB for weights (budget=x); smaller weights would be slower here, "
        "no native kernel runs them"
    )
    forced = chosen(700 * MIB, slow)
    assert forced.method == "int6"
    assert forced.reason.startswith("auto: int6, on the slow reference kernel: 620.0 MiB of 700.0 MiB")
    with pytest.raises(LowbitError, match="int3 needs 310.0 MiB"):
        chosen(MIB, slow)


def test_cuda_prefers_fp8() -> None:
    def on_cuda(method: str | None) -> Sized:
        sizes = {None: 1600, "fp8": 810, "int4:group_size=32": 460, "int4": 420}
        return Sized(sizes[method] * MIB)

    found = [chosen(budget * MIB, on_cuda, "cuda").method for budget in (9999, 810, 809, 459)]
    assert found == ["fp8", "fp8", "int4:group_size=32", "int4"]


def test_sizes_in_words() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536 * MIB, 5 << 40)] == [
        *("0 bytes", "1023 bytes", "1.0 KiB", "1.5 GiB", "5120.0 GiB")
    ]
