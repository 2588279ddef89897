"""What the table of whole models by format rests on: who is compared with whom, turns with a rival, the page,
and a file with columns in an order of their own that holds the model's numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmark_modules import benchmark_module
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.loading.source_modules import SourceModel
from lowbit.quantize.specification import parse_method

for name in ("machine", "document", "targets", "regimes", "linear_formats", "cliffs"):
    benchmark_module(name)
page = benchmark_module("results_page")
comparison = benchmark_module("comparison")
made_models = benchmark_module("made_models")
served = benchmark_module("served_formats")


def row(name: str, megabytes: float, rate: float, int8_inputs: bool = False) -> dict[str, Any]:
    figures = {"1 stream": {"median": rate, "spread": 2.0}}
    return {"format": name, "layer_bytes": megabytes * 1e6, "int8_inputs": int8_inputs, "figures": figures}


def test_a_format_is_compared_with_those_of_its_size() -> None:
    rows = [
        row("fast", 100, 300.0),
        row("slow", 111, 150.0),
        row("larger", 124, 75.0),  # near the second, far from the first
        row("int8 inputs", 101, 600.0, int8_inputs=True),
    ]
    assert [served.beside(one, rows, "1 stream") for one in rows] == [1.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("model", served.GROUPS)
def test_every_format_is_one_that_can_be_asked_for(model: str) -> None:
    every = served.formats(model)
    assert len({one.key for one in every}) == len(every)
    assert set(served.RIVAL_FORMATS) <= {one.key for one in every}
    for one in every:
        if one.quantization is not None:
            assert one.told.startswith(parse_method(one.quantization).text)
    assert {one.key for one in every} >= {*served.GGUF, "act-order", "bf16"}
    with pytest.raises(SystemExit, match="--formats lama: no such format; known: q4_0"):
        served.chosen(every, ["bf16", "lama"])
    assert [one.key for one in served.chosen(every, ["bf16", "nf4"])] == ["nf4", "bf16"]


class FakeEngine:
    """Decodes at a rate, which is the format's or a rival's."""

    def __init__(self, rate: float, nbytes: int = 100) -> None:
        self.rate, self.weight_bytes = rate, nbytes
        self.asked: list[int] = []

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[Any]:
        self.asked.append(max_tokens)
        times = [(i + 1) / self.rate for i in range(max_tokens)]
        answer = benchmark_module("targets").Answer
        return [answer(max_tokens, "", times, [1] * max_tokens) for _ in prompts]


def test_the_uncounted_round_is_a_short_look() -> None:
    engine = FakeEngine(10.0)
    made = comparison.Comparison([comparison.Contestant(comparison.OWN, engine, 100)])
    regimes = benchmark_module("regimes")
    decode = next(one for one in regimes.rival_regimes([2]) if one.key == "decode")
    made.run(decode, regimes.Prompts(1000), repeats=2, decode_tokens=8, first_tokens=4)
    assert engine.asked == [4, 8, 8] and len(made.figures["decode, 1 stream"]["lowbit"].values) == 2


def options(**changes: Any) -> argparse.Namespace:
    plain = {"model": "smollm2", "threads": 2, "streams": [2], "decode_tokens": 4, "repeats": 1}
    return argparse.Namespace(
        **{**plain, "rival_python": ["llama.cpp=python"], "rival_formats": ["q4_0"]} | changes
    )


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = {"nf4": 25.0, None: 50.0}

    def engine(model: str, threads: int, quantization: str | None) -> FakeEngine:
        if quantization == "nvfp4":
            raise LowbitError("E0405", "not on this machine")
        return FakeEngine(rates[quantization])

    def rival(engine: Any, python: str, model: Path, label: str, *rest: Any) -> Any:
        return comparison.Contestant(f"llama.cpp {label}", FakeEngine(40.0), 100, details={"version": "1.2"})

    monkeypatch.setattr(comparison, "REST_SECONDS", 0)
    monkeypatch.setattr(served, "EngineTarget", engine)
    monkeypatch.setattr(served, "rival_contestant", rival)
    monkeypatch.setattr(served, "model_bytes", lambda path: 100)
    monkeypatch.setattr(served, "layer_bytes", lambda model, quantization: 2_000_000)
    monkeypatch.setattr(served, "open_checkpoint", lambda path: None)
    monkeypatch.setattr(served, "load_tokenizer", lambda header: argparse.Namespace(encode=lambda text: [1]))
    monkeypatch.setattr(served.Format, "model", lambda self, model: tmp_path)


@pytest.mark.usefixtures("faked")
def test_a_run_is_kept_and_becomes_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wanted = served.chosen(served.formats("smollm2"), ["q4_0", "nf4", "nvfp4"])
    served.run(options(), wanted)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["names"] == ["prefill 512", "1 stream", "2 streams"]
    assert [row["format"] for row in found["rows"]] == ["q4_0", "nf4"]
    q4_0, nf4 = (row["figures"] for row in found["rows"])
    assert q4_0["1 stream"] == {"median": 50, "spread": 0, "rival": 40, "rival_spread": 0, "ratio": 1.25}
    assert nf4["2 streams"] == {"median": 50, "spread": 0}  # two at 25
    assert found["notes"] == ["nvfp4 (W4A16): not on this machine"]
    page.store("served-formats", found, tmp_path / "results")
    text = page.section(tmp_path / "results")
    assert "| smollm2, tok/s · times as long | MB | layers, MB | prefill 512 | 1 stream | 2 streams |" in text
    assert "within\n12 % of" in text and "Beyond 1.5 times: 1 of 2." in text
    assert "| nf4 (groups of 64) | 0.0 | 2.0 | 12,800 · **2.00** | 25 · **2.00** | 50 · **2.00** |" in text
    assert "| GGUF q4_0 | 0.0 | 2.0 | 25,600 · 1.00 | 50 · 1.00 | 100 · 1.00 |" in text
    assert "| the same file in llama.cpp, tok/s · ratio | prefill 512 | 1 stream | 2 streams |" in text
    assert "| GGUF q4_0 | 20,480 · **1.25** | 40 · **1.25** | 80 · **1.25** |" in text
    assert "- nvfp4 (W4A16): not on this machine" in text


@pytest.mark.usefixtures("faked")
def test_without_the_rivals_python_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOWBIT_RIVAL_PYTHON", raising=False)
    served.run(options(rival_python=[]), served.chosen(served.formats("smollm2"), ["q4_0"]))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "llama.cpp was not run: no Python with llama_cpp is named" in found["notes"][0]
    assert "ratio" not in found["rows"][0]["figures"]["1 stream"]


def test_columns_in_an_order_of_their_own_hold_the_models_numbers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "float")
    (tmp_path / "made").mkdir()
    made_models._write_act_order(tmp_path / "float", tmp_path / "made", 32)
    read = {}
    for folder in ("float", "made"):
        header = open_checkpoint(str(tmp_path / folder))
        source = SourceModel(header)
        with TensorData(header) as data:
            read[folder] = {
                part.target.name: source.read(part, data).weight
                for part in source.modules
                if part.target.name.endswith("_proj")
            }
    assert len(read["made"]) == 7
    orders = {}
    for module, weight in read["made"].items():
        assert weight.scheme.reordered and weight.scheme.blocks[0] == (1, 32)
        step = weight.scales[0].float().max()
        assert (weight.dequantize() - read["float"][module].dequantize()).abs().max() <= 0.51 * step
        orders[module.rpartition(".")[2]] = weight.column_order.tolist()
    assert orders["q_proj"] == orders["k_proj"] == orders["v_proj"] != orders["o_proj"]
    assert orders["gate_proj"] == orders["up_proj"]
