"""--quantization auto over a tiny model: sizes from its plan, what is loaded, and what is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from forward_helpers import prompt_logits
from loading.test_online import PROMPT, make
from lowbit.checkpoint import open_checkpoint
from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.kernels.reference import Reference
from lowbit.loading import ModelPlan, choice, load_model, plan_model
from lowbit.quantize.auto import LADDERS, Budget, Pick, Sized
from lowbit.quantize.recipe import Asked
from lowbit.settings import Settings

# Layers large enough for every group size, and sizes that differ on every rung.
BIG = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "tiny-model", **BIG)
    return tmp_path / "tiny-model"


def plan_of(folder: Path, quantization: Asked | str | None, **how: object) -> ModelPlan:
    return plan_model(open_checkpoint(str(folder)), device="cpu", quantization=quantization, **how)  # type: ignore[arg-type]


def rung_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each rung, as auto sees them."""
    seen: dict[str | None, int] = {}

    def note(device: str, size_of: Callable[[str | None], Sized], budget: Budget) -> Pick:
        seen.update({method: size_of(method).nbytes for method in LADDERS[device]})
        return Pick(None, "")

    with monkeypatch.context() as patch:
        patch.setattr(choice, "pick", note)
        plan_of(folder, "auto")
    return [seen[method] for method in LADDERS["cpu"]]


def test_each_rung(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = rung_sizes(folder, monkeypatch)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    for place in (0, 3, 7):  # the others are loaded below
        method = LADDERS["cpu"][place]
        plan = plan_of(folder, f"auto:budget={sizes[place - 1] - 1 if place else 1 << 40}")
        assert plan.described == f"auto: {method}, quantized at load"
        assert plan.choice.startswith(f"auto: {method}: ")
        assert plan.weight_bytes == plan_of(folder, method).weight_bytes
        quantized = [module for module in plan.modules if not module.scheme.is_dense]
        assert quantized and all(module.error is not None for module in quantized)


@pytest.mark.parametrize("place", range(len(LADDERS["cpu"])))
def test_what_is_loaded_fits_its_budget(place: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = rung_sizes(folder, monkeypatch)[place]
    model = load_model(open_checkpoint(str(folder)), device="cpu", quantization=f"auto:budget={budget}")
    assert model.quantization == f"auto: {LADDERS['cpu'][place]}, quantized at load"
    assert budget * 0.97 < model.weight_bytes <= budget * 1.01


def test_what_is_chosen_is_loaded_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = open_checkpoint(str(folder))
    with caplog.at_level(logging.INFO, "lowbit"):
        model = load_model(header, device="cpu", quantization="auto:budget=8GiB")
    said = [record.getMessage() for record in caplog.records]
    assert sum("auto" in line for line in said) == 1 and said[0].startswith(
        "lowbit: --quantization auto: int8:symmetric=true: 1.3 MiB of 8.0 GiB for weights (budget=8GiB); "
    )
    assert model.quantization == "auto: int8:symmetric=true, quantized at load"
    same = load_model(header, device="cpu", quantization="int8:symmetric=true")
    assert prompt_logits(model, [PROMPT])[0].equal(prompt_logits(same, [PROMPT])[0])
    assert model.weight_bytes == same.weight_bytes


def test_nothing_fits(folder: Path) -> None:
    for use in (load_model, plan_model):
        with pytest.raises(LowbitError) as caught:
            use(open_checkpoint(str(folder)), device="cpu", quantization="auto:budget=100K")
        assert caught.value.code == "E0501"
        assert "int3 needs " in caught.value.message and "(budget=100K)" in caught.value.message


def test_the_default_budget_is_what_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "free_memory", lambda device: 10 << 20)
    plan = plan_of(folder, "auto")
    assert plan.choice.startswith("auto: int8:symmetric=true: 1.3 MiB of 7.5 MiB for weights (0.8 x 10.0 MiB")
    assert "free - 512.0 KiB KV cache of 256 tokens); as stored needs 4.7 MiB" in plan.choice
    settings = Settings(quantization="auto", max_total_tokens=3000)
    assert "KV cache of 3000 tokens" in plan_of(folder, Asked.by(settings)).choice
    settings = Settings(quantization="auto", context_length=64)
    assert "KV cache of 64 tokens" in plan_of(folder, Asked.by(settings)).choice
    with pytest.raises(LowbitError, match="0.8 x 10.0 MiB free - 15.6 MiB KV cache of 8000 tokens"):
        plan_of(folder, Asked("auto", tokens=8000))


def test_ignored_layers_stay_and_count(folder: Path) -> None:
    budget = plan_of(folder, Asked("int5", ignore="down_proj")).weight_bytes
    plan = plan_of(folder, Asked(f"auto:budget={budget}", ignore="down_proj"))
    assert plan.described == "auto: int4:group_size=32, quantized at load", "int5's zero points are 16 bits"
    kept = [module for module in plan.modules if module.name.endswith("down_proj")]
    assert kept and all(module.scheme.is_dense for module in kept)


def test_a_quantized_model_is_as_it_is(folder: Path, embedded_path: Path) -> None:
    plan = plan_of(embedded_path, "auto:budget=1K")
    assert plan.described == "gguf, Q4_1, Q8_0"
    assert plan.choice == "auto: as stored: the model is quantized already (gguf, Q4_1, Q8_0)"


def test_strict_passes_over_what_a_layer_cannot_have(tmp_path: Path) -> None:
    """208 columns: 16 divides them, no larger group of the ladder does."""
    make(tmp_path, hidden_size=256, intermediate_size=208)
    header = open_checkpoint(str(tmp_path))
    sizes = {
        method: plan_model(header, device="cpu", quantization=method, strict=True).weight_bytes
        for method in ("int5", "int4")
    }
    plan = plan_model(header, device="cpu", quantization=f"auto:budget={sizes['int5'] - 1}", strict=True)
    assert plan.described == "auto: int4, quantized at load"


def test_without_native_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = (Reference(),)
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: only)
    plan = plan_of(folder, "auto:budget=8G")
    assert plan.described == plan_of(folder, None).described
    assert "no native kernel runs them" in plan.choice


def test_inspect_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", str(folder), "--device", "cpu", "--quantization", "auto:budget=8G"]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "auto: int8:symmetric=true: 1.3 MiB of 7.5 GiB for weights (budget=8G); as stored needs" in shown
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quantization_choice"].startswith("auto: int8") and told["described"].startswith("auto: int8")
