"""Pickles, zips and other archives in place of weights are refused; nothing in them ever runs."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest

from checkpoint.tiny import write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError


class Gadget:
    """Unpickling one writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


def zipped(payload: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3")
    return held.getvalue()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "model.gguf", "consolidated.00.pth"]
)
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_unpickled(protocol: int, archive: bool, name: str, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    payload = pickle.dumps({"model.embed_tokens.weight": Gadget(trace)}, protocol)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / name).write_bytes(zipped(payload) if archive else payload)
    with pytest.raises(LowbitError):
        open_checkpoint(str(folder))
    assert not trace.exists()


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_that_begin_like_a_pickle(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    write_folder(tmp_path)
    start = generator.choice(
        [b"\x80\x02", b"\x80\x04\x95", b"PK\x03\x04", b"cposix\nsystem\n", b"(S'echo'\ntR."]
    )
    (tmp_path / "model.safetensors").write_bytes(start + generator.randbytes(generator.randrange(2000)))
    with pytest.raises(LowbitError) as caught:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_pickles_beside_safetensors_are_not_touched(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    folder = write_folder(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Gadget(trace)))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Gadget(trace)))
    open_checkpoint(str(folder))
    assert not trace.exists()
