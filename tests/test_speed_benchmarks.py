"""What the CPU speed benchmarks' figures rest on: rates, turns and ratios, equality first, the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark_modules import FOLDER, benchmark_module
from lowbit.kernels import native
from lowbit.numerics.quantized_tensor import QuantizedTensor

machine = benchmark_module("machine")
document = benchmark_module("document")
page = benchmark_module("results_page")
targets = benchmark_module("targets")
regimes = benchmark_module("regimes")
comparison = benchmark_module("comparison")
linear_formats = benchmark_module("linear_formats")
cliffs = benchmark_module("cliffs")
linear = benchmark_module("linear")
for name in ("made_models", "quality_originals", "serving"):
    benchmark_module(name)
accuracy = benchmark_module("accuracy")

RIVAL = f"""
import sys, time
import numpy as np
sys.path.insert(0, {str(FOLDER / "rivals")!r})
from line_protocol import Lines, options
lines = Lines()
print("noise that is no answer")

def complete(prompts, max_tokens, variant, copied):
    if max_tokens == 99:
        raise ValueError("99 is too many")
    if max_tokens == 98:
        sys.exit(3)
    count = max_tokens - (variant == "short")
    return [([p[-1]] * count, [float(i + 1) for i in range(count)]) for p in prompts]

def logits(prompt, variant):
    return np.arange(10) == np.array(prompt)[:, None] if 9 not in prompt else np.zeros((1, 10))

told = options()
also = [logits] if told.get("logits") else []
lines.answer("1.2", {{"model": told["model"], "prefix_cache": False}}, ["plain", "short"], complete, *also)
"""


def answer(*times: float) -> Any:
    return targets.Answer(len(times), "", list(times), [1] * len(times))


def test_decode_counts_only_while_all_streams_decode() -> None:
    early, late = answer(1, 2, 3, 4, 5), answer(3, 4, 5, 6, 7)
    # From 3, when the second had its first token, to 5, when the first had its last: 4, 5 and 4, 5.
    assert regimes.decode_window_rate([early, late]) == {"decode": 4 / 2}
    assert regimes.stream_rates([early, late]) == {"decode": 2.0, "with prefill": 10 / 7}
    assert regimes.decode_rate([early]) == {"": 1.0}
    with pytest.raises(SystemExit, match="never decoded together"):
        regimes.decode_window_rate([answer(1, 2), answer(2, 3)])


def test_long_contexts_and_shared_prefixes_are_what_they_are_called() -> None:
    prompts = regimes.Prompts(1000)
    assert [len(p) for p in regimes.long_contexts(prompts, 4)] == [256, 512, 768, 1024]
    shared = regimes.shared_prefix(prompts, 3)
    assert len({tuple(p[:512]) for p in shared}) == 1 and len({tuple(p) for p in shared}) == 3
    chosen = {regime.key: regime for regime in regimes.rival_regimes([8, 32])}
    assert list(chosen) == ["prefill", "decode", "streams8", "streams32", "long", "prefix"]
    assert len(chosen["streams8"].requests(prompts)) == 8
    warm = chosen["prefix"].warm_up(shared)
    assert warm[:512] == shared[0][:512] and warm[512:] != shared[0][512:]


def test_a_rival_answers_line_by_line(tmp_path: Path) -> None:
    script = tmp_path / "rival.py"
    script.write_text(RIVAL)
    rival = targets.RivalTarget("fake", sys.executable, str(script), {"model": "m"})
    try:
        assert (rival.version, rival.variants, rival.details["model"]) == ("1.2", ["plain", "short"], "m")
        found = rival.complete([[5, 6], [7]], 3)
        assert [a.ids for a in found] == [[6, 6, 6], [7, 7, 7]] and found[0].times == [1, 2, 3]
        with pytest.raises(targets.RivalError, match="ValueError: 99 is too many"):
            rival.complete([[5]], 99)
        rival.variant = "short"
        with pytest.raises(targets.RivalError, match=r"\[2\] tokens where 3"):
            rival.complete([[5]], 3)
        with pytest.raises(targets.RivalError, match="it gives tokens and no logits"):
            rival.logits([5], tmp_path / "logits")
        with pytest.raises(targets.RivalError, match="ended with status 3"):
            rival.complete([[5]], 98)
    finally:
        rival.close()
    with pytest.raises(targets.RivalError, match="does not run"):
        targets.RivalTarget("fake", str(tmp_path / "no-python"), str(script), {})


def test_a_rivals_logits_are_its_own(tmp_path: Path) -> None:
    """Each position's logits name its own token, and this rival serves the prompt's last one."""
    script, file = tmp_path / "rival.py", tmp_path / "logits"
    script.write_text(RIVAL)
    rival = targets.RivalTarget("fake", sys.executable, str(script), {"model": "m", "logits": True})
    try:
        found = accuracy.rival_logits(rival, [5, 6, 2], file)
        assert found.shape == (3, 10) and found.argmax(1).tolist() == [5, 6, 2]
        accuracy.assert_served(rival, [5, 6], file)
        rival.complete = lambda prompts, tokens: [targets.Answer(1, "", [1.0], [4])]
        with pytest.raises(targets.RivalError, match="serves token 4, its logits name 6"):
            accuracy.assert_served(rival, [5, 6], file)
        with pytest.raises(targets.RivalError, match="1 x 10 logits in 40 bytes for 2 tokens"):
            rival.logits([5, 9], file)
    finally:
        rival.close()


def test_the_accuracy_section_has_a_row_an_engine() -> None:
    originals = benchmark_module("quality_originals")
    expected, logits = (torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log() for _ in range(2))
    logits[1] = logits[1].flip(0)  # 0.8 and 0.2 the other way round: KL 0.6 ln 4
    found = originals.Divergence.of(*([each] for each in originals.compare(expected, logits)))
    rows = [accuracy.Row("lowbit", "q4_1", 98_000_000, "", found)]
    text = accuracy.markdown(rows, ["vllm was not run"], "python benchmarks/accuracy.py", "One")
    assert "| lowbit | q4_1 | 98 |  | 0.415888 | 0.8235 | 0.832 | 50.00% |" in text
    assert text.startswith(accuracy.BEGIN) and "- vllm was not run" in text and "2 positions" in text


class Fake:
    """Decodes at a rate; counts its runs."""

    def __init__(self, rate: float) -> None:
        self.rate, self.runs = rate, 0

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[Any]:
        self.runs += 1
        if self.rate < 0:
            raise targets.RivalError("broken")
        return [answer(*(i / self.rate for i in range(max_tokens)))]


def test_turns_ratio_and_who_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "REST_SECONDS", 0)
    fakes = {name: Fake(rate) for name, rate in RATES.items()}
    contestants = [
        comparison.Contestant(name, fake, 100, counts=name != "large", always=name in ("lowbit", "same"))
        for name, fake in fakes.items()
    ]
    made = comparison.Comparison(contestants)
    regime = next(r for r in regimes.rival_regimes([2]) if r.key == "decode")
    made.run(regime, regimes.Prompts(1000), repeats=3, decode_tokens=4)
    row = made.figures["decode, 1 stream"]
    assert made.ratio("decode, 1 stream") == pytest.approx(50 / 40)  # not the large model's 80
    assert made.best_rival("decode, 1 stream")[0] == "fast"
    assert [len(row[name].values) for name in ("lowbit", "fast", "same", "slow")] == [3, 3, 3, 1]
    assert fakes["slow"].runs == 1 and fakes["broken"].runs == 1 and "broken" not in row
    notes = " ".join(made.notes)
    assert "slow is far behind" in notes and "broken" in notes and "same is" not in notes
    assert json.dumps(made.record())


RATES = {"lowbit": 50.0, "fast": 40.0, "same": 5.0, "slow": 10.0, "large": 80.0, "broken": -1.0}


def test_the_fastest_variant_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "REST_SECONDS", 0)

    class Variants(targets.RivalTarget):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self.variants, self.variant, self.details = ["a", "b", "c"], "", {"prefix_cache": False}

        def complete(self, prompts: list[list[int]], max_tokens: int) -> list[Any]:
            if self.variant == "c":
                raise targets.RivalError("no such thing here")
            return Fake({"a": 2.0, "b": 3.0}[self.variant]).complete(prompts, max_tokens)

    regime = next(r for r in regimes.rival_regimes([2]) if r.key == "decode")
    rival = Variants()
    rates, variant = comparison._Asker(regime, [[1]], 4).best_variant(rival)
    assert (rates, variant, rival.variant) == ({"": pytest.approx(3)}, "b", "b")


def test_pythons_of_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_RIVAL_PYTHON", "llama.cpp=a/python,vllm=b/python")
    assert comparison.rival_pythons([]) == {"llama.cpp": "a/python", "vllm": "b/python"}
    assert comparison.rival_pythons(["c"]) == dict.fromkeys(comparison.ENGINES, "c")
    with pytest.raises(SystemExit, match="no engine lama"):
        comparison.rival_pythons(["lama=x"])


SMALL = {"small": (128, 256)}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    if native.library() is None:
        pytest.skip("no native kernels")
    monkeypatch.setattr(linear, "SHAPES", SMALL)
    monkeypatch.setattr(linear, "MOST_COPIES", 2)
    bounds = linear.Bounds(10.0, {}, {"fp32": 0.1, "bf16": 0.2, "int8": 0.4})
    return linear.Bench("small", bounds, torch.device("cpu"), 1)


@pytest.mark.parametrize("format", linear_formats.FORMATS)
def test_every_format_is_checked_and_gives_rows(bench: Any, format: str) -> None:
    few, many = bench.run(format, [1, 5])
    assert (few.tokens, many.tokens, few.format) == (1, 5, format) and few.us > 0 < few.torch_us
    assert few.kernel != "reference" and 0 <= few.error < linear.TOLERANCE
    assert few.bound_us == pytest.approx(few.nbytes / 10e3, abs=0.01) and few.bound_by == "memory"
    expected = {"bf16": 16, "int8 channel": 8, "q4_0": 4.5, "int4 g32": 4.5, "fp8 channel": 8, "nf4": 4.5}
    if format in expected:
        assert few.nbytes * 8 / (128 * 256) == pytest.approx(expected[format], rel=0.05)


def test_a_wrong_product_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = linear_formats.FORMATS["int4 g32"](bench.values)
    weight: QuantizedTensor = made.weight
    packed = linear.choose(weight.scheme, weight.shape, bench.device).kernel.pack(weight, bench.device)
    assert bench._compare(packed, made, 4) < 1e-4
    other = replace(weight, codes=weight.codes.flip(0))
    with pytest.raises(SystemExit, match="differs by"):
        bench._compare(packed, replace(made, weight=other), 4)


def test_without_a_gpu_cuda_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["linear.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="no GPU here"):
        linear.main()


def serving_record(kind: str, speed: float) -> dict[str, Any]:
    figures = {
        name: {"median": rate, "spread": 2.0} for name, rate in (("lowbit", speed), ("llama.cpp", 100.0))
    }
    return {
        "benchmark": "serving",
        "machine": kind,
        "isa": "avx512",
        "threads": 2,
        "model": "smollm2",
        "file": "q4_1",
        "commit": "abc",
        "command": "python benchmarks/serving.py --rival-python llama.cpp=/" + "opt/venv/bin/python",
        "contestants": {"lowbit": {"ready_seconds": 1.0}, "llama.cpp": {"ready_seconds": 2.0}},
        "figures": {"server ready beyond import torch": {"median": 0.5, "spread": 0.1}},
        "rows": {"decode, 1 stream": {"ratio": speed / 100, "figures": figures}},
        "notes": ["vllm was not run"],
    }


def test_a_machines_part_is_replaced_and_no_other(tmp_path: Path) -> None:
    folder, path = tmp_path / "results", tmp_path / "results.md"
    path.write_text("# Results\n\nbefore\n")
    for kind, speed in (
        ("One (family 1, model 2)", 150.0),
        ("Two", 250.0),
        ("One (family 1, model 2)", 350.0),
    ):
        page.store("serving-smollm2", serving_record(kind, speed), folder)
        page.update(folder, path)
    path.write_text(path.read_text() + "\n## After\n")
    page.update(folder, path)
    text = path.read_text()
    assert text.startswith("# Results\n\nbefore\n\n<!--") and text.endswith("\n## After\n")
    assert text.count("### ") == 2 and "### One (family 1, model 2), avx512, 2 threads" in text
    assert "| decode, 1 stream | 350 ± 1 | 100 ± 1 | **3.50** |" in text and "| 250 ± 1 |" in text
    assert "150" not in text and "- vllm was not run" in text
    assert "llama.cpp=…/python" in text and "opt/venv" not in text


def test_decoding_is_where_the_line_begins() -> None:
    decoding = benchmark_module("decoding")
    once, each = decoding.fitted((8, 16, 64), [3e-6 + 2e-6 * tokens for tokens in (8, 16, 64)])
    assert (once, each) == (pytest.approx(3e-6), pytest.approx(2e-6))
    assert decoding.Line("x", 32.0, 0.5).share == pytest.approx(0.5)


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_decoding_is_measured_of_a_real_kernel() -> None:
    threads = native.threads()
    native.set_threads(1)
    try:
        line = benchmark_module("decoding").measure("q4_k", 2)
    finally:
        native.set_threads(threads)
    assert line.format == "q4_k" and line.token_us > 0


def test_linear_rows_are_added_up_over_a_model(tmp_path: Path) -> None:
    row = {"format": "q4_0", "shape": "135M out", "tokens": 1, "us": 10.0, "bound_us": 5.0, "torch_us": 40.0}
    rows = [row, {**row, "shape": "135M down", "us": 30.0, "bound_us": 25.0, "torch_us": 40.0}]
    record = {**serving_record("One", 1.0), "benchmark": "linear", "rows": rows}
    record["bounds"] = {"memory": 40.0, "dots": {"fp32": 0.5, "bf16 tiles": 0.0}}
    stored = page.store("linear", record, tmp_path / "results")
    assert json.loads(stored.read_text())["rows"] == rows
    assert "| q4_0 | 75% · 2.0 |" in page.section(tmp_path / "results")


def test_of_the_cliffs_only_the_far_formats_have_a_line(tmp_path: Path) -> None:
    rows = [
        {"format": name, "kernel": "k", "bits": bits, "seconds": {"1": 1.0}, "ratios": {"1": one, "32": many}}
        for name, bits, one, many in (
            ("near", 4.0, 1.0, 1.5),
            ("far", 4.01, 2.25, 1.0),
            ("wide", 16, 1.0, 1.6),
        )
    ]
    record = {**serving_record("One", 1.0), "benchmark": "cliffs", "threads": 1, "rows": rows}
    page.store("cliffs", record, tmp_path / "results")
    text = page.section(tmp_path / "results")
    assert "Of 3 formats" in text and "2 with 1 token, 2 with 32 tokens" in text
    assert "| far | 4.01 | 2.25 | 1.00 |" in text and "| wide | 16.00 | 1.00 | 1.60 |" in text
    assert "| near" not in text


def test_the_plot_has_a_panel_a_shape(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    numbers = {"kernel": "k", "nbytes": 1, "spread_us": 0.0, "gb_per_s": 1.0, "tflops": 1.0, "bound_us": 1.0}
    rest = {"bound_by": "memory", "torch_us": 1.0, "ratio_to_torch": 1.0, "error": 0.0, "us": 1.0}
    rows = [
        linear.Row(format=f, shape=s, tokens=t, percent_of_bound=50.0, **numbers, **rest)
        for f in ("q4_0", "nf4")
        for s in ("135M out", "1B out")
        for t in (1, 32)
    ]
    linear.plot(rows, tmp_path / "plot.svg", "a machine")
    assert (tmp_path / "plot.svg").read_text().count('id="axes_') == 2


def test_sampling_shows_tokens_drawn_and_steps_beside_greedy_ones(tmp_path: Path) -> None:
    rows = {"temperature 1": {"native": 2e-5, "torch": 3e-4, "llama.cpp": 4e-4}}
    steps = {"greedy": {"1": 0.004, "32": 0.05}, "temperature 1": {"1": 0.005, "32": 0.05}}
    record = serving_record("One", 1.0) | {"benchmark": "sampling", "rows": rows, "steps": steps}
    record["continued"] = {"1": {"one": 250.0, "default": 270.4}}
    page.store("sampling", record, tmp_path / "results")
    text = page.section(tmp_path / "results")
    assert "| µs a token drawn | native | torch | llama.cpp |" in text
    assert "| temperature 1 | 20 | 300 | 400 |" in text
    assert "| temperature 1 | 5.00 (1.25) | 50.00 (1.00) |" in text
    assert "| a step a call → several | 250 → 270 |" in text


def test_cliffs_are_beside_formats_of_their_size_and_inputs() -> None:
    def cliff(name: str, bits: float, seconds: float, whole: bool = False) -> Any:
        return cliffs.Cliff(name, "cpu_blocks", bits, 1000, whole, {1: seconds})

    rows = [
        cliff("a", 4.5, 1.0),
        cliff("b", 4.3, 3.0),
        cliff("c", 8.0, 0.5),
        cliff("d", 4.5, 0.1, whole=True),
    ]
    assert [cliffs.ratio(row, rows, 1) for row in rows] == [1.0, 3.0, 1.0, 1.0]


@pytest.mark.skipif(native.library() is None, reason="no native library")
@pytest.mark.parametrize("format", cliffs.FORMATS)
def test_no_format_of_the_cliffs_needs_the_reference_kernel(format: str) -> None:
    sample = cliffs.FORMATS[format]((128, 256))
    assert (
        linear.choose(sample.weight.scheme, sample.weight.shape, torch.device("cpu")).kernel.name
        != "reference"
    )
    assert sample.weight.dequantize().isfinite().all()
