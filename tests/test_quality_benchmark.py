"""What docs/results.md says of quality rests on: the dither, the divergence, the document's section."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from benchmark_modules import benchmark_module
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.quality import read_quality
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense
from lowbit.quantize.calibration import built_in_texts

document = benchmark_module("document")
originals = benchmark_module("quality_originals")
report = benchmark_module("quality_report")
quality = benchmark_module("quality")

KINDS = {"q4_1": 32, "q8_0": 32, "q4_k": 256}
ROW = {
    "method": "fp8",
    "group": "8 bit",
    "share": 0.79,
    "bits": 9.7,
    "nbytes": 163_000_000,
    "dithered": {"positions": 960, "mean_kl": 0.03, "p99_kl": 0.15, "max_kl": 0.5, "top1_agreement": 0.9},
}


def blocks(kind: str) -> tuple[QuantizedTensor, np.ndarray]:
    """A weight whose every block has another scale, from a tool of others; and the step of each weight."""
    columns = 2 * KINDS[kind]
    random = np.random.default_rng(3)
    weight = random.standard_normal((6, columns)).astype(np.float32)
    weight *= 10.0 ** random.uniform(-3, 1, (6, columns // 32)).repeat(32, 1).astype(np.float32)
    if kind == "q4_k":  # the package has no encoder: one super-block of scales 1 … 8 after another
        raw = random.integers(0, 256, (12, 144), np.uint8)
        raw[:, :2] = np.float16(0.5).view(np.uint16).reshape(1, 1).view(np.uint8)
        raw[:, 2:4] = 0
        raw[:, 4:8], raw[:, 8:12] = [1, 2, 3, 4], 0
        raw[:, 12:16] = [5, 6, 7, 8]
        packed = raw.reshape(6, 288)
        step = np.tile(0.5 * np.arange(1, 9, dtype=np.float32).repeat(32), (6, 2))
    else:
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind.upper()])
        size = 20 if kind == "q4_1" else 34
        scales = packed.reshape(-1, size)[:, :2].copy().view(np.float16).astype(np.float32)
        step = scales.reshape(6, -1).repeat(32, 1)
    scheme = Scheme(number_format(f"gguf_{kind}"))
    return QuantizedTensor(scheme, (6, columns), torch.from_numpy(packed)), step


@pytest.mark.parametrize("kind", KINDS)
def test_dither_stays_inside_each_blocks_step(kind: str) -> None:
    weight, step = blocks(kind)
    moved = originals.dithered(weight, torch.Generator().manual_seed(1))
    share = (moved - weight.dequantize()).numpy() / step
    assert np.abs(share).max() <= 0.5 + 1e-3
    for block in share.reshape(-1, 32):  # every one of them is used whole: swapped steps would not
        assert np.abs(block).max() > 0.3
    assert abs(share.mean()) < 0.05
    assert torch.equal(moved, originals.dithered(weight, torch.Generator().manual_seed(1)))
    assert not torch.equal(moved, originals.dithered(weight, torch.Generator().manual_seed(2)))


def test_plain_weights_are_not_dithered() -> None:
    matrix = torch.randn(4, 8)
    weight = QuantizedTensor(dense("f32"), (4, 8), matrix)
    assert torch.equal(originals.dithered(weight, torch.Generator()), matrix)


def test_divergence_is_what_its_definition_says() -> None:
    random = np.random.default_rng(5)
    wanted, found = random.standard_normal((2, 7, 11)) * 3
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (wanted, found))
    expected = torch.log_softmax(torch.from_numpy(wanted), -1)
    kl, same = originals.compare(expected, torch.from_numpy(found))
    np.testing.assert_allclose(kl.numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-10)
    assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    kl, same = originals.compare(expected, expected + 5)
    assert kl.abs().max() < 1e-12 and same.all()
    made = originals.Divergence.of([torch.arange(50.0), torch.arange(50.0, 101.0)], [same, ~same])
    assert (made.positions, made.mean_kl, made.max_kl, made.top1_agreement) == (101, 50, 100, 0.5)
    assert made.p99_kl == pytest.approx(99)


def test_text_is_not_calibrations() -> None:
    """No line of it, but for headings and lines of a few words."""
    seen = {line.strip() for text in built_in_texts() for line in text.splitlines()}
    lines = {line.strip() for line in originals.english_text().splitlines()}
    assert not {line for line in lines & seen if len(line) > 40}
    assert sum(map(len, originals.english_prompts(4000))) >= 4000


def test_the_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text("# Results\n\nbefore\n")
    for note in ("first", "second"):
        report.update_document(path, report.markdown([ROW], f"python {note}", "a machine"))
        if note == "first":
            path.write_text(path.read_text() + "\n## After\n")
    text = path.read_text()
    assert text.startswith("# Results\n\nbefore\n\n<!--") and text.endswith("\n## After\n")
    assert "python second" in text and "python first" not in text
    assert "| `fp8` | 79% | 9.70 | 163.0 | 0.0300 | 0.150 | 0.500 | 90.0% | – | – | – | – |" in text
    assert "Speeds were not measured" in text


def test_labels_of_the_plot_lie_on_no_other() -> None:
    random = np.random.default_rng(2)
    names = [f"method {number}" for number in range(60)]
    points = [(x, y, name) for (x, y), name in zip(random.random((60, 2)) * 150, names, strict=True)]
    points += [(10.0, 10.0, "same"), (10.0, 10.0, "place")]
    shifts = report._label_shifts(points)
    for (x, y, name), shift in zip(points, shifts, strict=True):
        for (x2, y2, name2), shift2 in zip(points, shifts, strict=True):
            if name < name2 and abs(x - x2) < 5 * min(len(name), len(name2)):
                assert abs(y + shift - y2 - shift2) > report._LABEL_SIZE
    assert report._label_shifts([(0, 0, "a"), (0, 500, "b")]) == pytest.approx([-3.4, -3.4], abs=1)


def test_a_method_that_fails_is_listed_with_its_error(tmp_path: Path) -> None:
    store = quality._Results(tmp_path / "results.json", False)
    method = quality.Method("broken", "float", quantization="no_such_method")
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    reference = originals.Reference(folder, [[1]])
    quality._measure(method, "stored", reference, store, argparse.Namespace(no_speed=True))
    assert "[E0" in store.rows["broken"]["error"]
    assert f"- `broken`: {store.rows['broken']['error']}" in report.markdown([*store.rows.values()], "x", "y")
    assert json.loads((tmp_path / "results.json").read_text()) == store.rows


def test_methods_are_chosen_by_name_or_beginning() -> None:
    names = [method.name for method in quality.METHODS]
    assert len(names) == len(set(names))
    assert [method.name for method in quality._chosen(["fp8"])] == ["fp8"]
    assert [method.name for method in quality._chosen(["gguf:type=q4"])] == [
        "gguf:type=q4_0",
        "gguf:type=q4_k_m",
    ]
    with pytest.raises(SystemExit, match="none begins with fb8"):
        quality._chosen(["fb8"])


def test_quality_json_is_what_the_reader_takes(tmp_path: Path, embedded_path: Path) -> None:
    quality._write_quality(tmp_path, ROW)
    (tmp_path / "model.gguf").symlink_to(embedded_path)
    found = read_quality(open_checkpoint(str(tmp_path / "model.gguf")))
    assert found is not None and (found.mean_kl, found.positions) == (0.03, 960)


def test_the_plot_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        ROW | {"method": method.name, "group": method.group, "nbytes": 10**8 + number * 10**6}
        for number, method in enumerate(quality.METHODS)
    ]
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        report.plot(rows, path)
    assert paths[0].read_text() == paths[1].read_text()
    assert paths[0].stat().st_size < 100_000
    assert "gguf:type=q4_k_m" in paths[0].read_text() and "KV cache" not in paths[0].read_text()
