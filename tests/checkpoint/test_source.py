"""From a name to a checkpoint, small documents, and tensor payloads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.tiny import write_folder, write_gguf_file
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.documents import MAX_DEPTH, read_json, read_text
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError

FORMATS = ("auto", "safetensors", "gguf")


def test_folder_file_and_folder_of_one_gguf(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    assert open_checkpoint(str(folder)).container == "safetensors"
    only = tmp_path / "ggufs"
    only.mkdir()
    file = write_gguf_file(only / "model.gguf")
    assert open_checkpoint(str(file)) == open_checkpoint(str(only))


def test_load_format_chooses_where_both_are_and_refuses_the_other(tmp_path: Path) -> None:
    folder, file = write_folder(tmp_path / "hf"), write_gguf_file(tmp_path / "model.gguf")
    for load_format in ("auto", "layered", "safetensors"):
        assert open_checkpoint(str(folder), load_format=load_format).container == "safetensors"
    for load_format in ("auto", "layered", "gguf"):
        assert open_checkpoint(str(file), load_format=load_format).container == "gguf"
    for place, wrong, found in ((folder, "gguf", "safetensors"), (file, "safetensors", "gguf")):
        with pytest.raises(LowbitError, match=f"--load-format {wrong}: .* is {found}; use") as caught:
            open_checkpoint(str(place), load_format=wrong)
        assert caught.value.code == "E0406" and caught.value.exit_code == 2
    shutil.copy(file, folder / "model.gguf")
    found_in_both = {name: open_checkpoint(str(folder), load_format=name).container for name in FORMATS}
    assert found_in_both == {"auto": "safetensors", "safetensors": "safetensors", "gguf": "gguf"}


def test_folder_of_several_ggufs_lists_them(tmp_path: Path) -> None:
    first = write_gguf_file(tmp_path / "a-Q4_0.gguf")
    shutil.copy(first, tmp_path / "a-Q8_0.gguf")
    with pytest.raises(LowbitError, match=r"a-Q4_0\.gguf, a-Q8_0\.gguf") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.code == "E0201"


@pytest.mark.parametrize(
    ("name", "guess"),
    [("smolm2", "smollm2"), ("./hf-modell", "hf-model"), ("nothing-like-it", None), ("a/b/c/d", None)],
)
def test_a_name_that_is_nothing(
    name: str, guess: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "hf-model")
    with pytest.raises(LowbitError, match="no model") as caught:
        open_checkpoint(name)
    assert caught.value.code == "E0201"
    assert (guess in caught.value.message) if guess else "did you mean" not in caught.value.message


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": [1, {"y": "ü"}]}')
    (tmp_path / "t.txt").write_text("Grüße")
    assert read_json(tmp_path, "a.json") == {"x": [1, {"y": "ü"}]}
    assert read_text(tmp_path, "t.txt") == "Grüße"
    assert read_json(tmp_path, "none.json") is None and read_text(tmp_path, "none") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[1]", "list"),
        (b"\xff\xfe", "no valid JSON"),
        (b'{"a":' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", "deeper than"),
        (b'{"a": "' + b"x" * (5 << 20) + b'"}', "limit 4 194 304"),
        (b'{"a": ' + b"1" * 5000 + b"}", "no valid JSON"),
    ],
)
def test_documents_that_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LowbitError, match="config.json") as caught:
        read_json(tmp_path, "config.json")
    assert caught.value.code == "E0227" and words in caught.value.message


def test_payload_is_mapped_not_copied(tmp_path: Path) -> None:
    header = open_checkpoint(str(write_folder(tmp_path / "hf")))
    with TensorData(header) as data:
        first, again = data.tensor("lm_head.weight"), data.tensor("lm_head.weight")
        assert first.data_ptr() == again.data_ptr()
        assert first.shape == (40, 64) and first.dtype is torch.float32
        with pytest.raises(LowbitError, match="no tensor 'nothing'"):
            data.tensor("nothing")


def test_a_file_that_shrank_meanwhile_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    header = open_checkpoint(str(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    last = max(header.tensors.values(), key=lambda entry: entry.start)
    with TensorData(header) as data, pytest.raises(LowbitError) as caught:
        data.tensor(last.name)
    assert caught.value.code == "E0203"


def test_what_sees_pictures_beside_a_model(tmp_path: Path) -> None:
    """llama.cpp keeps it in a file of its own, which is never the model."""
    write_gguf_file(tmp_path / "m-Q8_0.gguf")
    write_gguf_file(tmp_path / "mmproj-m-Q8_0.gguf")
    assert open_checkpoint(str(tmp_path)).root.name == "m-Q8_0.gguf"
    write_gguf_file(tmp_path / "m-Q4_0.gguf")
    with pytest.raises(LowbitError, match="holds 3 GGUF files; name one of"):
        open_checkpoint(str(tmp_path))
