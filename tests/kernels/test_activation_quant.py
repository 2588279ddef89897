"""What a checkpoint asks of a layer's input: each rule against its definition in plain numpy or torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.kernels.activation_quant import InputTransform
from lowbit.numerics.llm_int8 import llm_int8_inputs
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

INT8, E4M3, E2M1, E8M0 = (number_format(name) for name in ("int8", "e4m3", "e2m1", "e8m0"))


def inputs(tokens: int = 7, columns: int = 96) -> Tensor:
    """Tokens of very unlike sizes; one of zeros."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-3, 3, tokens)[:, None]
    x[2] = 0
    return x


def values(scheme: ActivationScheme, x: Tensor, **more: Tensor) -> Tensor:
    """The values the product sees."""
    found, factor = InputTransform(scheme, **more)(x)
    return found if factor is None else found * factor


def test_int8_per_token() -> None:
    x = inputs()
    found, factor = InputTransform(ActivationScheme(INT8, (1, 0), limit=127.0))(x)
    scale = x.abs().amax(1, keepdim=True) / 127
    assert factor is not None and torch.equal(factor[scale > 0], scale[scale > 0])
    assert torch.equal(found, (x / scale.where(scale > 0, 1.0)).round().clamp(-128, 127))
    assert (found[2] == 0).all() and found.abs().max() == 127


def test_limit_of_compressed_tensors() -> None:
    x = inputs()
    found, _ = InputTransform(ActivationScheme(INT8, (1, 0), limit=127.5))(x)
    assert found.min() == -128 or found.max() == 127


def test_asymmetric_per_token() -> None:
    x = inputs().abs() + 1
    scheme = ActivationScheme(INT8, (1, 0), symmetric=False)
    scale = x.amax(1, keepdim=True) / 255
    assert ((values(scheme, x) - x).abs() <= 0.51 * scale).all()
    zero = values(scheme, torch.zeros(1, 8))
    assert torch.equal(zero, torch.zeros(1, 8))


@pytest.mark.parametrize("columns", [96, 100])
def test_fp8_per_group(columns: int) -> None:
    x = inputs(columns=columns)
    found = values(ActivationScheme(E4M3, (1, 32), limit=448.0), x)
    for start in range(0, columns, 32):
        part = x[:, start : start + 32]
        scale = part.abs().amax(1, keepdim=True) / 448
        scale = scale.where(scale > 0, 1.0)
        wanted = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(found[:, start : start + 32], wanted)


def test_upper_bound_saturates() -> None:
    x = inputs()
    found = values(ActivationScheme(E4M3, (1, 0), limit=448.0, upper_bound=10.0), x)
    assert found.abs().max() <= 10.0 and torch.equal(found[2], x[2])


def test_static() -> None:
    x, scale = inputs(), torch.tensor(0.05)
    found = values(ActivationScheme(E4M3, (0, 0), "static"), x, static_scale=scale)
    assert torch.equal(found, (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)


def test_static_with_a_zero_point() -> None:
    x, scale, zero = inputs(), torch.tensor(0.05), torch.tensor(-20.0)
    scheme = ActivationScheme(INT8, (0, 0), "static", symmetric=False)
    found = values(scheme, x, static_scale=scale, static_zero=zero)
    assert torch.equal(found, ((x / scale + zero).round().clamp(-128, 127) - zero) * scale)


def test_a_static_scale_of_zero_leaves_zeros() -> None:
    scheme = ActivationScheme(E4M3, (0, 0), "static")
    assert not values(scheme, inputs(), static_scale=torch.tensor(0.0)).any()


def test_multiplier_comes_first() -> None:
    x, multiplier = inputs(), torch.linspace(0.1, 3, 96)
    scheme = ActivationScheme(INT8, (1, 0), limit=127.0)
    assert torch.equal(values(scheme, x, multiplier=multiplier), values(scheme, x * multiplier))
    only, factor = InputTransform(multiplier=multiplier)(x)
    assert factor is None and torch.equal(only, x * multiplier)


def llm_int8(x: Tensor, threshold: float = 6.0) -> tuple[Tensor, Tensor, list[int]]:
    """As the paper and the tool have it: codes, scales and the outlier columns of all the tokens of x."""
    columns = [c for c in range(x.shape[1]) if any(abs(value) >= threshold for value in x[:, c].tolist())]
    inner = x.masked_fill(x.abs() >= threshold, 0)  # small numbers of an outlier column count in the scale
    scale = inner.abs().amax(1, keepdim=True) / 127
    codes = (inner / scale.where(scale > 0, 1.0)).round()
    codes[:, columns] = 0
    return codes, scale, columns


def test_llm_int8_takes_out_outlier_columns() -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    x[1, 5], x[4, 5], x[6, 70], x[3, 9] = 8.0, -30.0, -6.0, 5.9999
    x[2] = 0
    codes, scale, columns = llm_int8(x)
    assert columns == [5, 70]
    found, factor = InputTransform(llm_int8_inputs())(x)
    assert factor is not None and torch.equal(factor[scale > 0], scale[scale > 0])
    inner = [c for c in range(96) if c not in columns]
    assert torch.equal(found[:, inner], codes[:, inner]), "codes as they are: a product rounds none of them"
    assert ((found * factor - x)[:, columns].abs() <= 2e-7 * x[:, columns].abs()).all()
    assert factor[3] == torch.tensor(5.9999) / 127


def test_llm_int8_depends_on_the_tokens_beside() -> None:
    """A token with an outlier spares its column in every token of the call, and in none of another call."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    x[3, 7] = 9.0
    alone, together = values(llm_int8_inputs(), x[:3]), values(llm_int8_inputs(), x)[:3]
    differs = (alone != together).any(0)
    assert differs[7] and not differs[:7].any() and not differs[8:].any()
    assert torch.allclose(together[:, 7], x[:3, 7], rtol=2e-7) and (alone[:, 7] - x[:3, 7]).abs().max() > 1e-3


def test_llm_int8_without_outliers_is_int8_per_token() -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3)).clamp(-5.9, 5.9)
    found, plain = InputTransform(llm_int8_inputs())(x), InputTransform(llm_int8_inputs(0.0))(x)
    assert torch.equal(found[0], plain[0]) and plain[1] is not None and torch.equal(found[1], plain[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_token_makes_no_outlier_column(bad: float) -> None:
    """Its neighbours' bits are those they have without it."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    x[0, 3] = 7.0
    wanted = values(llm_int8_inputs(), x[:3])
    x[3, 5], x[3, 8] = bad, 20.0
    found = values(llm_int8_inputs(), x)
    assert torch.equal(found[:3], wanted) and found[3].isnan().all()


def test_llm_int8_in_float16_never_overflows() -> None:
    """An outlier over the scale of a token that is small elsewhere is no float16; the number itself is."""
    x = torch.full((2, 8), 1e-4, dtype=torch.float16)
    x[0, 2], x[1, 3] = 60000.0, -9.0
    found, factor = InputTransform(llm_int8_inputs())(x)
    assert factor is None and found.half().isfinite().all()
    assert torch.equal(found[:, 2:4], x[:, 2:4].float()) and torch.allclose(found, x.float(), rtol=1e-2)
    found, factor = InputTransform(llm_int8_inputs())(x.float())
    assert (
        factor is not None and found.isfinite().all() and torch.allclose(found * factor, x.float(), rtol=1e-2)
    )


@pytest.mark.parametrize(("fmt", "largest"), [(E2M1, 2), (E4M3, 8)])
def test_mx_scales_are_powers_of_two(fmt: object, largest: int) -> None:
    x = inputs()
    found = values(ActivationScheme(fmt, (1, 32), scale=E8M0), x)  # type: ignore[arg-type]
    for start in range(0, 96, 32):
        part = x[:, start : start + 32]
        amax = part.abs().amax(1, keepdim=True)
        scale = torch.exp2(amax.log2().floor() - largest).where(amax > 0, 1.0)
        limit = 6.0 if largest == 2 else 448.0
        error = (found[:, start : start + 32] / scale - (part / scale).clamp(-limit, limit)).abs()
        assert (error <= (1.0 if largest == 2 else 16.0)).all()


def test_compressed_tensors_rounds_the_largest_up() -> None:
    """1.75 and more times a power of two counts as the next one."""
    x = torch.zeros(3, 32)
    x[:, 0] = torch.tensor([1.74, 1.75, 1.99])
    scheme = ActivationScheme(E2M1, (1, 32), scale=E8M0, round_up=1.75)
    # scales 2^-2, 2^-1, 2^-1: 6.96 saturates at 6; 3.5 and 3.98 become 4
    assert values(scheme, x)[:, 0].tolist() == [1.5, 2.0, 2.0]


def test_ue8m0_never_saturates() -> None:
    x = inputs()
    found = values(ActivationScheme(E4M3, (1, 32), limit=448.0, scale=E8M0), x)
    assert ((found - x).abs() <= x.abs() / 8 + 1e-6).all()


def test_nvfp4() -> None:
    x, outer = inputs(), torch.tensor(0.01)
    found = values(ActivationScheme(E2M1, (1, 16), scale=number_format("e4m3")), x, static_scale=outer)
    for start in range(0, 96, 16):
        part = x[:, start : start + 16]
        inner = (part.abs().amax(1, keepdim=True) / (6 * outer)).clamp(2.0**-9, 448.0)
        scale = inner.to(torch.float8_e4m3fn).float() * outer
        steps = found[:, start : start + 16] / scale
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        assert (steps.abs()[..., None] - table).abs().amin(-1).max() < 1e-4, "multiples of the scale"
        assert ((steps - (part / scale).clamp(-6, 6)).abs() <= 1.001).all()


@pytest.mark.parametrize(
    "scheme",
    [
        ActivationScheme(INT8, (1, 0), limit=127.0),
        ActivationScheme(INT8, (1, 0), symmetric=False),
        ActivationScheme(INT8, (1, 0), limit=127.5),
        ActivationScheme(E4M3, (1, 32), limit=448.0),
        ActivationScheme(E2M1, (1, 32), scale=E8M0),
        ActivationScheme(E2M1, (1, 16), scale=number_format("e4m3")),
    ],
    ids=str,
)
def test_a_token_does_not_see_its_neighbours(scheme: ActivationScheme) -> None:
    x = inputs()
    together = values(scheme, x)
    for token in range(len(x)):
        assert torch.equal(values(scheme, x[token : token + 1])[0], together[token])


def test_equal_transforms_are_recognised() -> None:
    scheme = ActivationScheme(INT8, (1, 0), limit=127.0)
    one = InputTransform(scheme, static_scale=torch.tensor(2.0))
    assert one.same_as(InputTransform(scheme, static_scale=torch.tensor(2.0)))
    assert not one.same_as(InputTransform(scheme, static_scale=torch.tensor(3.0)))
    assert not one.same_as(InputTransform(scheme))
