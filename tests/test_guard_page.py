"""The helpers of kernel tests do what those tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guard_page import at_guard_page, rows_at_guard_page


def page_after(tensor: torch.Tensor) -> str:
    """The rights of the memory that follows the tensor's last element."""
    last = tensor[(-1,) * tensor.dim()]
    end = last.data_ptr() + tensor.element_size()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if int(first, 16) == end:
            return rest.split()[1]
    return "inside a mapping"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e8m0fnu, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (4096,), (1, 4097)], ids=str)
def test_memory_ends_where_the_tensor_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    found = at_guard_page(values)
    assert page_after(found) == "---s" and found.view(torch.uint8).equal(values.view(torch.uint8))


def test_rows_with_poison_between() -> None:
    values = torch.arange(15.0).view(3, 5)
    found = rows_at_guard_page(values, 7)
    assert page_after(found) == "---s" and found.equal(values) and found.stride() == (7, 1)
    assert found.as_strided((2, 2), (7, 1), found.storage_offset() + 5).isnan().all()


@pytest.mark.usefixtures("poisoned")
def test_new_tensors_are_poisoned() -> None:
    x = torch.zeros(2, 3)
    for made in (
        torch.empty(2, 3),
        torch.empty_like(x),
        x.new_empty(4),
        torch.empty((2,), dtype=torch.bfloat16),
    ):
        assert made.isnan().all() and page_after(made) == "---s"
    assert torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3 and torch.empty(0).shape == (0,)
