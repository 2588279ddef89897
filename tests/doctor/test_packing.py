"""GPTQ: what zero points and g_idx prove, for every width, and the corrections that follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from doctor.helpers import QPROJ, Tensors, checked, edit, fixed, gptq, only, packed, quantization_of, rules
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.formats import Notes, StoredModule, detect
from lowbit.numerics.bit_packing import pack_words, unpack_words

BITS = [2, 3, 4, 8]


def matrix(folder: Path, name: str = QPROJ) -> torch.Tensor:
    """The weight as lowbit reads it."""
    header = open_checkpoint(str(folder))
    with TensorData(header) as data:
        module = StoredModule(name, name, (64, 64))
        return detect(header)(header, Notes()).read(module, data).weight.dequantize()


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_sound_ones(bits: int, sym: bool, act_order: bool, form: str, tmp_path: Path) -> None:
    assert rules(gptq(tmp_path, bits=bits, sym=sym, act_order=act_order, form=form)) == []


@pytest.mark.parametrize(("form", "said"), [("v1", "gptq_v2"), ("v2", "gptq")])
@pytest.mark.parametrize("bits", BITS)
def test_v1_called_v2_and_the_reverse(bits: int, form: str, said: str, tmp_path: Path) -> None:
    folder = gptq(tmp_path / "in", {"checkpoint_format": said}, bits=bits, form=form)
    stored = (1 << bits - 1) - (form == "v1")
    message = only(folder, "D301")
    assert f"and 6 more of 7: all zero points are stored as {stored} (GPTQ {form})" in message
    copy = fixed(folder, tmp_path / "out")
    assert quantization_of(copy)["checkpoint_format"] == ("gptq" if form == "v1" else "gptq_v2")
    assert torch.equal(matrix(folder), matrix(copy))


def test_without_a_checkpoint_format_it_is_v1(tmp_path: Path) -> None:
    gptq(tmp_path / "in", {"checkpoint_format": None}, form="v2")
    assert quantization_of(fixed(tmp_path / "in", tmp_path / "out"))["checkpoint_format"] == "gptq_v2"


def test_the_older_key_and_the_older_file_are_set_too(tmp_path: Path) -> None:
    gptq(tmp_path / "in", {"format": "gptq", "checkpoint_format": None}, form="v2")
    old = {"bits": 4, "group_size": 32, "format": "gptq", "note": "é"}
    (tmp_path / "in" / "quantize_config.json").write_text(json.dumps(old))
    copy = fixed(tmp_path / "in", tmp_path / "out")
    assert quantization_of(copy)["format"] == quantization_of(copy)["checkpoint_format"] == "gptq_v2"
    written = json.loads((copy / "quantize_config.json").read_text())
    assert written == old | {"format": "gptq_v2", "checkpoint_format": "gptq_v2"}


def test_some_modules_of_the_other_form_cannot_be_corrected(tmp_path: Path) -> None:
    folder = gptq(tmp_path)
    edit(folder, lambda tensors: tensors.update({f"{QPROJ}.qzeros": packed(64, 64, form="v2")["qzeros"]}))
    assert "and 0 more of 7" in only(folder, "D301") and not checked(folder).can_fix


def test_sym_false_and_the_other_form_cannot_be_corrected(tmp_path: Path) -> None:
    folder = gptq(tmp_path, {"sym": False}, form="v2")
    edit_config(folder, checkpoint_format="gptq")
    assert "sym false: one of the two is wrong" in only(folder, "D301") and not checked(folder).can_fix


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("bits", BITS)
def test_sym_but_the_zero_points_differ(bits: int, tmp_path: Path) -> None:
    folder = gptq(tmp_path / "in", {"sym": True}, bits=bits, sym=False)
    assert "zero points are stored from 0 to" in only(folder, "D302")
    copy = fixed(folder, tmp_path / "out")
    assert quantization_of(copy)["sym"] is False and torch.equal(matrix(folder), matrix(copy))


def test_symmetric_though_sym_is_false(tmp_path: Path) -> None:
    folder = gptq(tmp_path / "in", {"sym": False})
    assert "hold no zero point but the middle, 8" in only(folder, "D309")
    copy = fixed(folder, tmp_path / "out")
    assert quantization_of(copy)["sym"] is True and torch.equal(matrix(folder), matrix(copy))


def spoil(*lost: str) -> object:
    def change(tensors: Tensors) -> None:
        for name in lost:
            del tensors[name]

    return change


def test_lost_g_idx_with_desc_act(tmp_path: Path) -> None:
    edit(gptq(tmp_path, act_order=True), spoil(f"{QPROJ}.g_idx"))  # type: ignore[arg-type]
    assert f"'{QPROJ}.g_idx' is in no file, and desc_act is true" in only(tmp_path, "D303")
    assert not checked(tmp_path).can_fix


def test_static_groups_need_no_g_idx(tmp_path: Path) -> None:
    gptq(tmp_path, {"desc_act": True, "static_groups": True})
    assert rules(tmp_path) == [], "desc_act with columns in their place is what static groups are"
    edit(tmp_path, spoil(f"{QPROJ}.g_idx"))  # type: ignore[arg-type]
    assert rules(tmp_path) == ["D308"]


@pytest.mark.parametrize("shards", [False, True])
def test_absent_g_idx_is_added(shards: bool, tmp_path: Path) -> None:
    folder = gptq(tmp_path / "in")

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()  # two bytes wide, to be ordered

    edit(folder, change)
    if shards:
        index = {"weight_map": dict.fromkeys(open_checkpoint(str(folder)).tensors, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "and 6 more of 7 are in no file" in only(folder, "D308")
    copy = fixed(folder, tmp_path / "out")
    header = open_checkpoint(str(copy))
    with TensorData(header) as data, TensorData(open_checkpoint(str(folder))) as old:
        down = data.tensor("model.layers.0.mlp.down_proj.g_idx")
        assert down.dtype == torch.int32 and torch.equal(down, (torch.arange(96) // 32).int())
        for name in old.header.tensors:
            assert torch.equal(data.tensor(name), old.tensor(name)), name
    wide = {"F32": 4, "I32": 4, "F16": 2}
    assert all(entry.start % wide[entry.dtype] == 0 for entry in header.tensors.values()), "aligned"


@pytest.mark.parametrize(
    ("value", "words"), [(2, "names groups 0 to 2, there are 2 of 32"), (-1, "names groups -1 to 1")]
)
def test_groups_that_do_not_exist(value: int, words: str, tmp_path: Path) -> None:
    edit(gptq(tmp_path), lambda tensors: tensors[f"{QPROJ}.g_idx"][3].fill_(value))
    assert words in only(tmp_path, "D304")


def test_a_g_idx_that_is_too_short(tmp_path: Path) -> None:
    # 200 rows short is no padding: qweight has rows of more columns than any writer adds.
    edit(
        gptq(tmp_path), lambda tensors: tensors.update({f"{QPROJ}.g_idx": torch.zeros(0, dtype=torch.int32)})
    )
    found = rules(tmp_path)
    assert "D304" in found or "D106" in found, found


def test_groups_of_wrong_sizes(tmp_path: Path) -> None:
    edit(gptq(tmp_path), lambda tensors: tensors[f"{QPROJ}.g_idx"][3].fill_(1))
    assert "puts 31 columns into group 0, a group has 32" in only(tmp_path, "D305")


def test_reordered_though_desc_act_is_false(tmp_path: Path) -> None:
    folder = gptq(tmp_path / "in", {"desc_act": False}, act_order=True)
    assert "and 6 more of 7 put columns in another order" in only(folder, "D306")
    copy = fixed(folder, tmp_path / "out")
    assert quantization_of(copy)["desc_act"] is True and torch.equal(matrix(folder), matrix(copy))


def test_reordered_and_some_without(tmp_path: Path) -> None:
    """desc_act true makes the absent ones needed: they are added with it."""
    folder = gptq(tmp_path / "in", {"desc_act": False}, act_order=True)
    edit(folder, spoil("model.layers.0.mlp.up_proj.g_idx"))  # type: ignore[arg-type]
    assert rules(folder) == ["D306", "D308"]
    fixed(folder, tmp_path / "out")


def test_a_buffer_nobody_filled_in(tmp_path: Path) -> None:
    folder = gptq(tmp_path / "in")
    edit(folder, lambda tensors: tensors[f"{QPROJ}.g_idx"].zero_())
    assert "is all zero, with 2 groups and desc_act false" in only(folder, "D307")
    copy = fixed(folder, tmp_path / "out")
    assert torch.equal(matrix(folder), matrix(copy))


def test_a_buffer_nobody_filled_in_beside_reordered_ones_is_not_corrected(tmp_path: Path) -> None:
    folder = gptq(tmp_path, {"desc_act": False}, act_order=True)
    edit(folder, lambda tensors: tensors[f"{QPROJ}.g_idx"].zero_())
    findings = {finding.rule: finding for finding in checked(folder).report.findings}
    assert set(findings) == {"D306", "D307"} and not findings["D307"].fix


def test_desc_act_with_all_columns_in_place(tmp_path: Path) -> None:
    folder = gptq(tmp_path / "in", {"desc_act": True})
    assert "put every column in its place though desc_act is true" in only(folder, "D311")
    assert quantization_of(fixed(folder, tmp_path / "out"))["desc_act"] is False


@pytest.mark.parametrize("quantizer", [None, "auto_gptq:0.7.1", "gptqmodel:5.0.0"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_autogptqs_borrow(bits: int, quantizer: str | None, tmp_path: Path) -> None:
    """Where a zero point is 0, AutoGPTQ's subtraction writes ones into every higher field of the word."""
    meta = {} if quantizer is None else {"meta": {"quantizer": [quantizer]}}
    folder = gptq(tmp_path, meta, bits=bits, sym=False)

    def change(tensors: Tensors) -> None:
        fields = unpack_words(tensors[f"{QPROJ}.qzeros"], bits, 64, dim=1)
        size = 32 // bits
        fields[1, 2 * size + 1 : 3 * size] = (1 << bits) - 1
        tensors[f"{QPROJ}.qzeros"] = pack_words(fields, bits, dim=1)

    edit(folder, change)
    if quantizer is not None and quantizer.startswith("gptqmodel"):
        assert rules(folder) == []
    else:
        assert "1 words end in fields of all ones" in only(folder, "D310")


def test_ones_below_other_fields_are_no_damage(tmp_path: Path) -> None:
    """Another writer wraps each field by itself."""
    folder = gptq(tmp_path, sym=False)

    def change(tensors: Tensors) -> None:
        fields = unpack_words(tensors[f"{QPROJ}.qzeros"], 4, 64, dim=1)
        fields[0, 5:8] = 15
        fields[1, 3], fields[1, 4] = 15, 2
        tensors[f"{QPROJ}.qzeros"] = pack_words(fields, 4, dim=1)

    edit(folder, change)
    assert rules(folder) == []


def test_modules_with_bits_of_their_own(tmp_path: Path) -> None:
    folder = gptq(tmp_path, {"dynamic": {"+:.*q_proj": {"bits": 8}}})
    edit(
        folder, lambda tensors: tensors.update({f"{QPROJ}.{k}": v for k, v in packed(64, 64, bits=8).items()})
    )
    assert rules(folder) == []
    edit(folder, lambda tensors: tensors[f"{QPROJ}.qzeros"].add_(0x01010101))
    assert "are stored as 128 (GPTQ v2)" in only(folder, "D301")


@pytest.mark.parametrize(
    ("packing", "form"), [("auto_round:auto_gptq", "v2"), ("auto_round:gptqmodel", "v1")]
)
def test_auto_round_says_it_in_another_key(packing: str, form: str, tmp_path: Path) -> None:
    folder = gptq(tmp_path, {"quant_method": "auto-round", "packing_format": packing}, form=form)
    assert f"(GPTQ {form})" in only(folder, "D301") and not checked(folder).can_fix


def test_awq_is_not_judged(tmp_path: Path) -> None:
    shapes = {"q": 64, "k": 64, "v": 64, "o": 64}

    def change(tensors: Tensors) -> None:
        for letter, size in shapes.items():
            stem = f"model.layers.0.self_attn.{letter}_proj"
            for suffix in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"{stem}.{suffix}"]
            generator = torch.Generator().manual_seed(1)
            words = torch.randint(-(1 << 31), (1 << 31) - 1, (size, size // 8), generator=generator)
            tensors[f"{stem}.qweight"] = words.int()
            tensors[f"{stem}.qzeros"] = words[:2].int()
            tensors[f"{stem}.scales"] = torch.full((2, size), 0.01).half()
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]
        for leaf, shape in {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}.items():
            tensors[f"model.layers.0.mlp.{leaf}_proj.weight"] = torch.full(shape, 0.01)

    folder = gptq(tmp_path)
    edit(folder, change)
    edit_config(folder, quant_method="awq", version="gemm")
    assert rules(folder) == []
