"""Whether prompts may meet rounded weights: where kernels do that, unless the flag says no."""

from __future__ import annotations

import pytest

from lowbit.engine import prompts
from lowbit.engine.prompts import rounds_prompts
from lowbit.settings import Settings


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_the_flag_and_the_processor_decide(
    exact: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "rounding", lambda device: kernels and device == "cpu")
    assert rounds_prompts(Settings(exact_prompts=exact), "cpu") is (kernels and not exact)
    assert not rounds_prompts(Settings(exact_prompts=exact), "cuda")
