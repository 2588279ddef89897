"""Every family from GGUF files that llama.cpp's converter wrote, against transformers on the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from forward_helpers import differences, prompt_logits
from gguf_blocks import F16_FIELDS, random_blocks
from gguf_blocks import NAMES as TYPES
from gguf_writing import GgufTensor, write_gguf
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from lowbit.numerics.number_formats import number_format
from models.family_cases import check_stored_logits
from numerics.test_block_layouts import dequantized

FOLDER = Path(__file__).parents[1] / "fixtures" / "gguf_families"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str) -> None:
    expected = load_file(FOLDER / f"{name}.safetensors")
    model = load_model(open_checkpoint(str(FOLDER / f"{name}.gguf")), device="cpu", dtype="float32")
    [logits] = prompt_logits(model, [expected["tokens"].flatten().tolist()])
    wanted = expected["logits"].view(logits.shape)
    worst = differences(logits, wanted).max()
    # Quantized weights meet inputs rounded to bfloat16 in the native kernels.
    assert worst <= (1e-3 if model.kernels == {"cpu_dense"} else 3e-2), f"{name}: {worst:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_on_torch_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    check_stored_logits(FOLDER, name, 1e-3)


def with_metadata(
    name: str,
    path: Path,
    *,
    flat: bool = False,
    halves: bool = False,
    apart: bool = False,
    **changes: int | None,
) -> Path:
    """A copy of the fixture with other metadata under its architecture; None: without the key. ``flat``: what
    has one row is a vector. ``halves``: GLM-4 as files of GLM-4.1V have it, its neighbours in halves.
    ``apart``: a tensor for each expert."""
    reader = gguf.GGUFReader(FOLDER / f"{name}.gguf")
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch)
    named = {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    assert set(named) <= set(reader.fields), "nothing to change"
    for field in reader.fields.values():
        value = named.get(field.name, field.contents())
        if not field.name.startswith("GGUF.") and field.name != "general.architecture" and value is not None:
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, value, field.types[0], inner)
    for tensor in reader.tensors:
        data = tensor.data.reshape(-1) if flat and tensor.data.shape[0] == 1 else tensor.data
        if halves and ("attn_q." in tensor.name or "attn_k." in tensor.name):
            order = [*range(0, 8, 2), *range(1, 8, 2), *range(8, 16)]  # half of 16 rotate
            data = data.reshape(-1, 16, data.shape[-1])[:, order].reshape(data.shape)
        if apart and "_exps." in tensor.name:
            for number, matrix in enumerate(data):
                single = tensor.name.replace("_exps.", f".{number}.")
                writer.add_tensor(single, matrix, raw_dtype=tensor.tensor_type)
        else:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    if halves:
        writer.add_rope_dimension_sections([2, 1, 1, 0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sigmoid_goes_with_corrections(tmp_path: Path) -> None:
    """The converter leaves the key out where config.json has no ``scoring_func``, as of transformers."""
    told = load_model(open_checkpoint(str(FOLDER / "deepseek3.gguf")), device="cpu", dtype="float32")
    bare = with_metadata("deepseek3", tmp_path / "bare.gguf", expert_gating_func=None)
    assumed = load_model(open_checkpoint(str(bare)), device="cpu", dtype="float32")
    [wanted], [logits] = (prompt_logits(model, [[3, 1, 4, 1, 5]]) for model in (told, assumed))
    assert torch.equal(logits, wanted)
    softmax = with_metadata("deepseek3", tmp_path / "softmax.gguf", expert_gating_func=1)
    with pytest.raises(LowbitError, match="expert_gating_func 1 with corrections"):
        load_model(open_checkpoint(str(softmax)), device="cpu")


@pytest.mark.parametrize("name", ["qwen2moe", "qwen3next"])
def test_matrices_of_one_row_are_vectors_after_llama_quantize(name: str, tmp_path: Path) -> None:
    """It writes the shared experts' gate, (1, in), as (in,)."""
    flat = with_metadata(name, tmp_path / "flat.gguf", flat=True)
    kept, forgot = (open_checkpoint(str(path)) for path in (FOLDER / f"{name}.gguf", flat))
    gate = "blk.0.ffn_gate_inp_shexp.weight"
    assert kept.tensors[gate].shape == (1, *forgot.tensors[gate].shape)
    [[wanted], [logits]] = (
        prompt_logits(load_model(header, device="cpu", dtype="float32"), [[3, 1, 4, 1, 5]])
        for header in (kept, forgot)
    )
    assert torch.equal(logits, wanted)


def test_experts_one_by_one(tmp_path: Path) -> None:
    """As llama.cpp wrote Mixtral before April 2024: ``blk.0.ffn_gate.3``."""
    stacked = open_checkpoint(str(FOLDER / "mixtral.gguf"))
    single = open_checkpoint(str(with_metadata("mixtral", tmp_path / "apart.gguf", apart=True)))
    assert "blk.1.ffn_down.3.weight" in single.tensors and "blk.1.ffn_down_exps.weight" not in single.tensors
    [[wanted], [logits]] = (
        prompt_logits(load_model(header, device="cpu", dtype="float32"), [[3, 1, 4, 1, 5]])
        for header in (stacked, single)
    )
    assert torch.equal(logits, wanted)
    for header, name in ((stacked, "stacked"), (single, "single")):
        convert(header, "dense", tmp_path / name)
    whole, found = (load_file(tmp_path / name / "model.safetensors") for name in ("stacked", "single"))
    assert whole.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("leaf", ["gate", "up", "down"])
def test_an_expert_that_is_missing(leaf: str, tmp_path: Path) -> None:
    path = with_metadata("mixtral", tmp_path / "apart.gguf", apart=True)
    header = open_checkpoint(str(path))
    lost = header.tensors.pop(f"blk.1.ffn_{leaf}.2.weight")
    with pytest.raises(LowbitError, match=f"no file contains '{lost.name}'") as caught:
        plan_model(header)
    assert caught.value.code == "E0209"


def test_glm4_that_sees_turns_halves(tmp_path: Path) -> None:
    """ggml turns positions of several parts by halves only; the converter moves the rows."""
    seeing = open_checkpoint(str(with_metadata("glm4", tmp_path / "glm4v.gguf", halves=True)))
    plain = open_checkpoint(str(FOLDER / "glm4.gguf"))
    models = [load_model(header, device="cpu", dtype="float32") for header in (plain, seeing)]
    [[wanted], [logits]] = (prompt_logits(model, [list(range(2, 26))]) for model in models)
    assert torch.allclose(logits, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    with pytest.raises(LowbitError, match="halves of heads"):
        convert(seeing, "dense", tmp_path / "folder")


def test_no_window_is_zero_in_phi4(tmp_path: Path) -> None:
    """More tokens than Phi-3's window: all of them are seen."""
    tokens = list(range(2, 26))
    windowed = load_model(open_checkpoint(str(FOLDER / "phi3.gguf")), device="cpu", dtype="float32")
    path = with_metadata("phi3", tmp_path / "phi4.gguf", attention__sliding_window=0)
    model = load_model(open_checkpoint(str(path)), device="cpu", dtype="float32")
    [near], [logits] = (prompt_logits(each, [tokens]) for each in (windowed, model))
    window = max(spec.window for spec in windowed.cache_specs())
    assert torch.equal(logits[:window], near[:window]) and not torch.equal(logits[-1], near[-1])


def test_plan_counts_experts() -> None:
    plan = plan_model(open_checkpoint(str(FOLDER / "mixtral.gguf")))
    assert sum(".experts." in module.name for module in plan.modules) == 2 * 4 * 3


MIXED = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "Q5_1", "F16", "Q4_1", "Q5_0")]


@pytest.mark.parametrize("name", NAMES)
def test_mixed_types_in_split_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix in another type and spread over several files, against their floats in one file."""
    reader = gguf.GGUFReader(FOLDER / f"{name}.gguf")
    arch = reader.fields["general.architecture"].contents()
    split = gguf.GGUFWriter(tmp_path / "split.gguf", arch, split_max_tensors=len(reader.tensors) // 3 + 1)
    plain = gguf.GGUFWriter(tmp_path / "plain.gguf", arch)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            for writer in (split, plain):
                inner = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for number, tensor in enumerate(reader.tensors):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(".weight") and values.ndim > 1 and values.shape[-1] % 32 == 0:
            kind = MIXED[number % len(MIXED)]
            stored = gguf.quants.quantize(values, kind)
            split.add_tensor(tensor.name, stored, raw_dtype=kind)
            values = gguf.quants.dequantize(stored, kind)
        else:
            split.add_tensor(tensor.name, values)
        plain.add_tensor(tensor.name, values)
    for writer in (split, plain):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    [first, *rest] = sorted(tmp_path.glob("split-*.gguf"))
    assert rest
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    tokens = load_file(FOLDER / f"{name}.safetensors")["tokens"].flatten().tolist()
    found, wanted = (
        prompt_logits(load_model(open_checkpoint(str(path)), device="cpu", dtype="float32"), [tokens])[0]
        for path in (first, tmp_path / "plain.gguf")
    )
    assert not torch.equal(wanted, torch.zeros_like(wanted))
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


HIDDEN, INNER, WORDS, HEADS = 256, 512, 40, 4
MATRICES = {
    "token_embd": ("model.embed_tokens", WORDS, HIDDEN),
    "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN),
    "blk.0.attn_k": ("model.layers.0.self_attn.k_proj", HIDDEN // 2, HIDDEN),
    "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", HIDDEN // 2, HIDDEN),
    "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", HIDDEN, HIDDEN),
    "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", INNER, HIDDEN),
    "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", INNER, HIDDEN),
    "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", HIDDEN, INNER),
    "output": ("lm_head", WORDS, HIDDEN),
}
NORMS = {
    "output_norm": "model.norm",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
}
LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": HEADS // 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{n}" for n in range(WORDS)],
    "tokenizer.ggml.token_type": [1] * WORDS,
}


def moderate_blocks(kind: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(raw blocks, float32 values), random codes under scales that leave values of about 0.06."""
    layout = gguf_block(kind)
    raw = random_blocks(kind, rows, columns // layout[0]).reshape(rows, -1, layout[1])
    if kind == "mxfp4":
        raw[..., 0] = 121 + raw[..., 0] % 4
    if kind == "nvfp4":
        raw[..., :4] = 0x20 + raw[..., :4] % 8
    if kind == "iq1_m":
        raw[..., 55] &= 0x8F  # the top nibble of its f16
        raw[..., 55] |= 0x20
    fields = F16_FIELDS.get(kind, ())
    factor = 0.06 / dequantized(kind, raw.reshape(rows, -1)).std() if fields else 1.0
    for at in fields:
        scales = np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16) * np.float16(factor)
        raw[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1), dequantized(kind, raw.reshape(rows, -1))


def gguf_block(kind: str) -> tuple[int, int]:
    """(weights, bytes) of a block."""
    layout = number_format(f"gguf_{kind}").block
    assert layout is not None
    return layout.weights, layout.bytes


def unpaired(rows: Tensor, heads: int) -> Tensor:
    """Rows of adjacent rotary pairs as Hugging Face has them: first halves, then second ones."""
    return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("start", range(0, len(TYPES), len(MATRICES)))
def test_every_block_type_in_a_whole_model(
    start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine types to a Llama, K and IQ types included; transformers has what the gguf package dequantizes."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2, vocab_size=WORDS, max_position_embeddings=128, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(start)
    oracle = transformers.LlamaForCausalLM(config).eval()
    state, tensors = oracle.state_dict(), []
    for stored, name in NORMS.items():
        state[f"{name}.weight"].uniform_(0.5, 1.5)
        values = state[f"{name}.weight"].numpy()
        tensors.append(GgufTensor(f"{stored}.weight", "F32", values.shape, values.tobytes()))
    for number, (stored, (name, rows, columns)) in enumerate(MATRICES.items()):
        kind = TYPES[(start + number) % len(TYPES)]
        raw, values = moderate_blocks(kind, rows, columns)
        assert np.isfinite(values).all() and 0.005 < values.std() < 1, (kind, values.std())
        heads = {"attn_q": HEADS, "attn_k": HEADS // 2}.get(stored.rpartition(".")[2])
        matrix = torch.from_numpy(np.ascontiguousarray(values))
        state[f"{name}.weight"].copy_(unpaired(matrix, heads) if heads else matrix)
        tensors.append(GgufTensor(f"{stored}.weight", kind.upper(), (rows, columns), raw.tobytes()))
    write_gguf(tmp_path / "m.gguf", LLAMA, tensors)
    tokens = torch.randint(0, WORDS, (40,), generator=torch.Generator().manual_seed(start)).tolist()
    with torch.no_grad():
        wanted = oracle(torch.tensor([tokens])).logits[0]
    for limit, by_reference in ((3e-2, False), (1e-3, True)):
        if by_reference:
            monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
        model = load_model(open_checkpoint(str(tmp_path / "m.gguf")), device="cpu", dtype="float32")
        [logits] = prompt_logits(model, [tokens])
        worst = differences(logits, wanted).max()
        assert worst <= limit, f"{worst:.2e} on {sorted(model.kernels)}"
