"""PyTorch's weight files, both forms: tensors where torch put them; damaged and hostile ones refused."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.tiny import CONFIG, tensors, write_folder
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.pickled_file import read_pickled_header
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.loading import load_model

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(value: object, path: Path, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def state() -> OrderedDict[str, Tensor]:
    found = OrderedDict((name, torch.from_numpy(value)) for name, value in tensors().items())
    found._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return found


def folder_of(folder: Path, zipped: bool, value: object | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    saved(state() if value is None else value, folder / "pytorch_model.bin", zipped)
    return folder


@FORMS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_where_torch_put_it(zipped: bool, protocol: int, tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    held: dict[str, object] = {
        "f32": base,
        "rows of it": base[2:5],  # a view into the same storage
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "one": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "bool": torch.tensor([True, False, True]),
        "narrow": torch.randn(5, 1, 1)[:, :, 0],
    }
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        held[str(dtype)] = torch.randn(7).to(dtype)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16):
        held[str(dtype)] = torch.arange(9).to(dtype)
    folder = folder_of(tmp_path, zipped)
    saved(held, folder / "pytorch_model.bin", zipped, protocol)
    header = open_checkpoint(str(folder))
    assert header.container == "pickle" and list(header.tensors) == list(held)
    with TensorData(header) as data:
        for name, wanted in held.items():
            found = data.tensor(name)
            assert isinstance(wanted, Tensor) and found.dtype == wanted.dtype
            assert torch.equal(found.float(), wanted.detach().float()), name


@FORMS
def test_a_model_is_the_same_as_from_safetensors(zipped: bool, tmp_path: Path) -> None:
    pickled = load_model(open_checkpoint(str(folder_of(tmp_path / "a", zipped))), device="cpu")
    plain = load_model(open_checkpoint(str(write_folder(tmp_path / "b"))), device="cpu")
    [ours], [wanted] = prompt_logits(pickled, [[3, 1, 4, 1, 5]]), prompt_logits(plain, [[3, 1, 4, 1, 5]])
    assert torch.equal(ours, wanted)


def test_shards_with_their_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weight_map, whole = {}, state()
    for number in range(3):
        name = f"pytorch_model-{number + 1:05}-of-00003.bin"
        part = {key: whole[key] for key in list(whole)[number::3]}
        weight_map |= dict.fromkeys(saved(part, tmp_path / name) and part, name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(str(tmp_path)).tensors) == set(whole)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(
        LowbitError, match=r"00002-of-00003.bin is missing \(named in pytorch_model.bin.index"
    ):
        open_checkpoint(str(tmp_path))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "../x.bin")}))
    with pytest.raises(LowbitError, match="outside the model directory"):
        open_checkpoint(str(tmp_path))


def test_safetensors_come_first_and_load_format_says_pt(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", True)
    assert open_checkpoint(str(folder), load_format="pt").container == "pickle"
    with pytest.raises(LowbitError, match="a is pt; use --load-format pt"):
        open_checkpoint(str(folder), load_format="safetensors")
    write_folder(folder)
    assert open_checkpoint(str(folder)).container == "safetensors"


def test_a_state_dict_one_level_down(tmp_path: Path) -> None:
    whole = state()
    for holder in ("state_dict", "model"):
        path = saved({"epoch": 3, "lr": 0.5, holder: whole}, tmp_path / f"{holder}.bin")
        assert set(read_pickled_header(path)[0]) == set(whole)


class Gadget:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


@FORMS
@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        (lambda trace: {"a": torch.ones(2), "b": Gadget(trace)}, "E0231", "asks for|calls"),
        (lambda trace: Gadget(trace), "E0231", "asks for|calls"),
        (lambda trace: {"a": {1, 2}}, "E0231", "opcode|asks for"),
        (lambda trace: {"a": torch.randn(4, 6)[:, ::2]}, "E0230", r"strides \[6, 2\], which leave gaps"),
        (lambda trace: {"a": torch.ones(1).expand(9)}, "E0230", r"strides \[0\]"),
        (lambda trace: {"a": torch.ones(2, 2).to_sparse()}, "E0231", "_rebuild_sparse_tensor"),
        (lambda trace: {"a": torch.ones(2), "b": "text"}, "E0230", "'?b'? is a str"),
        (lambda trace: [torch.ones(2)], "E0230", "holds a list"),
        (lambda trace: {"": torch.ones(2)}, "E0232", "no usable name"),
        (lambda trace: {"x\ny": torch.ones(2)}, "E0232", "no usable name"),
        (lambda trace: torch.nn.Linear(2, 2), "E0231", "torch.nn"),
    ],
)
def test_what_is_no_plain_state_dict(
    value: Callable[[Path], object], code: str, said: str, zipped: bool, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    path = saved(value(trace), tmp_path / "pytorch_model.bin", zipped)
    with pytest.raises(LowbitError, match=said) as caught:
        read_pickled_header(path)
    assert caught.value.code == code and "\n" not in str(caught.value) and "pytorch_model.bin" in str(caught)
    assert not trace.exists()


def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/code/__torch__.py", b"class A: pass")
    with pytest.raises(LowbitError, match="TorchScript archive") as caught:
        read_pickled_header(path)
    assert caught.value.code == "E0230"


STREAMS = {
    "a memo cycle": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "an entry never kept": b"\x80\x02h\x07.",
    "no mark": b"\x80\x02tt.",
    "an empty stack": b"\x80\x02.",
    "an endless text": b"\x80\x02X\xff\xff\xff\x7fa.",
    "INST": b"(iposix\nsystem\n.",
    "OBJ": b"\x80\x02(cposix\nsystem\no.",
    "EXT": b"\x80\x02\x82\x01.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a storage built by hand": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.",
    "BUILD on a number": b"\x80\x02K\x01}b.",
    "a list as key": b"\x80\x02}]K\x01s.",
    "a key twice": b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x01u.",
    "stack global of numbers": b"\x80\x04K\x01K\x02\x93.",
    "a name without an end": b"\x80\x02c" + b"a" * 600,
    "no end": b"\x80\x02}",
    "a protocol of the future": b"\x80\x09}.",
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_written_by_hand(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", STREAMS[name])
    with pytest.raises(LowbitError) as caught:
        read_pickled_header(path)
    assert caught.value.code in ("E0230", "E0231", "E0232") and "\n" not in str(caught.value)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], method: int = 0) -> None:
    """The zip file again with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(name, changed)


@pytest.mark.parametrize(
    ("change", "method", "code"),
    [
        (lambda name, content: content[:-4] if name.endswith("data/0") else content, 0, "E0232"),
        (lambda name, content: content + b"more" if name.endswith("data/0") else content, 0, "E0232"),
        (lambda name, content: None if name.endswith("data/0") else content, 0, "E0232"),
        (lambda name, content: None if name.endswith("data.pkl") else content, 0, "E0205"),
        (lambda name, content: b"big" if name.endswith("byteorder") else content, 0, "E0230"),
        (lambda name, content: content, zipfile.ZIP_DEFLATED, "E0230"),
    ],
)
def test_storages_and_members_that_lie(
    change: Callable[[str, bytes], bytes | None], method: int, code: str, tmp_path: Path
) -> None:
    path = saved(state(), tmp_path / "pytorch_model.bin")
    rewritten(path, change, method)
    with pytest.raises(LowbitError) as caught:
        read_pickled_header(path)
    assert caught.value.code == code, caught.value


def test_entries_that_overlap(tmp_path: Path) -> None:
    """Two names for the same bytes: the directory's second entry points at the first's header."""
    path = tmp_path / "pytorch_model.bin"
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, 2))
        archive.writestr("m/data/0", bytes(64))
        archive.writestr("m/data/1", bytes(64))
    raw = bytearray(held.getvalue())
    directory = raw.rindex(b"PK\x01\x02")
    first = raw.index(b"PK\x03\x04", 4)
    struct.pack_into("<I", raw, directory + 42, first)
    path.write_bytes(raw)
    with pytest.raises(LowbitError, match="not where its zip directory says"):
        read_pickled_header(path)
    raw[first + 30 : first + 38] = b"m/data/1"  # now the names agree for one of them only
    path.write_bytes(raw)
    with pytest.raises(LowbitError) as caught:
        read_pickled_header(path)
    assert caught.value.code == "E0232"


@FORMS
def test_cut_anywhere(zipped: bool, tmp_path: Path) -> None:
    whole = saved({"a": torch.ones(3), "b": torch.ones(5, dtype=torch.int8)}, tmp_path / "x.bin", zipped)
    data = whole.read_bytes()
    path = tmp_path / "pytorch_model.bin"
    for end in range(0, len(data), 3):
        path.write_bytes(data[:end])
        with pytest.raises(LowbitError):
            read_pickled_header(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(LowbitError):
        read_pickled_header(path)


@FORMS
@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes(seed: int, zipped: bool, tmp_path: Path) -> None:
    """Refused, or the same tensors of the same shapes inside the file."""
    generator = random.Random(seed)
    whole = saved({"a": torch.ones(3, 4), "b": torch.ones(5).half()}, tmp_path / "x.bin", zipped)
    data = whole.read_bytes()
    path = tmp_path / "pytorch_model.bin"
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            found, _ = read_pickled_header(path)
        except LowbitError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        for entry in found.values():
            assert entry.start >= 0 and entry.start + entry.nbytes <= len(data)
