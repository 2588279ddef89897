"""quality.json: read where it belongs to the model, refused where it makes no sense."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from checkpoint.tiny import write_folder, write_gguf_file
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.quality import Quality, read_quality
from lowbit.engine.load import load_engine
from lowbit.errors import LowbitError
from lowbit.settings import Settings

SOUND = {"mean_kl": 0.012345, "top1_agreement": 1, "positions": 2048, "against": "the original"}
READ = Quality(0.012345, 1.0, 2048, "the original")


def write(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**SOUND, **changes}))


def test_a_folders_file(tmp_path: Path) -> None:
    header = open_checkpoint(str(write_folder(tmp_path)))
    assert read_quality(header) is None
    write(tmp_path / "quality.json", tool="somebody's")
    assert read_quality(header) == READ
    assert str(READ) == "mean KL 0.01235, 100.0% same first token, over 2048 positions against the original"


def test_a_gguf_files_own(tmp_path: Path) -> None:
    file = write_gguf_file(tmp_path / "a-Q4_0.gguf")
    header = open_checkpoint(str(file))
    write(tmp_path / "quality.json", positions=1)
    alone = read_quality(header)
    assert alone is not None and alone.positions == 1
    write(tmp_path / "a-Q4_0.quality.json")
    assert read_quality(header) == READ
    other = tmp_path / "a-Q8_0.gguf"
    shutil.copy(file, other)
    assert read_quality(header) == READ
    assert read_quality(open_checkpoint(str(other))) is None, "whose it is cannot be known"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("mean_kl", wrong) for wrong in (-1e-9, "0.1", None, True, [0.1])),
        *(("top1_agreement", wrong) for wrong in (1.01, -0.1, "97 %", False)),
        *(("positions", wrong) for wrong in (0, 1.5, "2048", True)),
        *(("against", wrong) for wrong in ("", "x" * 201, 16)),
    ],
)
def test_what_makes_no_sense(key: str, value: object, tmp_path: Path) -> None:
    header = open_checkpoint(str(write_folder(tmp_path)))
    write(tmp_path / "quality.json", **{key: value})
    with pytest.raises(LowbitError, match=f"quality.json: {key} must be ") as caught:
        read_quality(header)
    assert caught.value.code == "E0227"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"mean_kl": NaN}', json.dumps(SOUND)[:-1], "{" * 300])
def test_garbage(text: str, tmp_path: Path) -> None:
    header = open_checkpoint(str(write_folder(tmp_path)))
    (tmp_path / "quality.json").write_text(text)
    with pytest.raises(LowbitError) as caught:
        read_quality(header)
    assert caught.value.code == "E0227" and "quality.json" in caught.value.message


def test_the_engine_passes_it_on(
    embedded_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "model.gguf"
    place.symlink_to(embedded_path)
    settings = Settings(model=str(place), device="cpu", max_total_tokens=64)
    write(tmp_path / "quality.json")
    ready = load_engine(settings).ready()
    assert ready.quality is not None and ready.quality.mean_kl == 0.012345
    assert ready.details["quality"] == str(READ)
    assert (ready.architecture, ready.quantization) == ("llama", "gguf, Q4_1, Q8_0")
    assert str(ready.weight_bytes) == ready.details["weight bytes"]
    write(tmp_path / "quality.json", positions=-5)
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert load_engine(settings).ready().quality is None
    assert "the measured quality is left out: quality.json: positions must be" in caplog.text
