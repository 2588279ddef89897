"""``lowbit convert --format dense``: every format and every GGUF family as floats, against the tools' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from formats.helpers import FIXTURES, expected
from formats.writing_cases import whole_model
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats.dense_writer import DenseWriter, exact_dtype
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model
from lowbit.loading.convert import convert, summary
from lowbit.loading.source_modules import SourceModel
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme, dense
from lowbit.tokenization import load_chat_template, load_tokenizer
from models.test_deepseek import make_checkpoint

GGUF = FIXTURES / "gguf_families"
MORE = FIXTURES / "gguf_more_families"
FAMILIES = sorted(path.stem for path in GGUF.glob("*.gguf"))
WRITTEN = [name for name in FAMILIES if name != "qwen3next"]
WRITTEN_MORE = sorted(path.stem for path in MORE.glob("*.gguf"))
# Keys of a family's config whose value is another in the folder, and why.
CHANGED = {
    "chatglm": {"max_position_embeddings"},  # the converter's file has the hidden size there
    "glm4moe": {"num_nextn_predict_layers"},  # left out
    "mistral": {"architectures", "model_type"},  # a Llama to GGUF
    "mixtral": {"head_dim"},  # null before, and said now
    "phi3_longrope": {"rope_parameters", "sliding_window"},  # the factor is said; a window beyond the context
}


def whole_models() -> list[Path]:
    """Quantized fixtures that are whole models."""
    folders = sorted(path.parent for path in FIXTURES.glob("*/*/about.json"))
    return [folder for folder in folders if whole_model(folder) is not None]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def by_both(folder: Path, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """The logits of transformers, which must know every tensor, and lowbit's."""
    torch.manual_seed(0)
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0]
    return theirs, by_lowbit(folder, tokens)


def by_lowbit(path: Path, tokens: list[int]) -> Tensor:
    [logits] = prompt_logits(load_model(open_checkpoint(str(path)), device="cpu", dtype="float32"), [tokens])
    return logits


@pytest.mark.parametrize("name", WRITTEN)
def test_gguf_family_in_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is an ordinary one: transformers gets the logits it had before the GGUF file was made."""
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    header = open_checkpoint(str(GGUF / f"{name}.gguf"))
    convert(header, "dense", tmp_path / "out", dtype="f32")
    stored = load_file(GGUF / f"{name}.safetensors")
    tokens = stored["tokens"].flatten().tolist()
    theirs, mine = by_both(tmp_path / "out", tokens)
    wanted = stored["logits"].view(theirs.shape)
    assert (theirs - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    # In lowbit the GGUF file and the folder are the same model.
    before = by_lowbit(GGUF / f"{name}.gguf", tokens)
    assert (mine - before).abs().max() <= 2e-5 * before.abs().max()


@pytest.mark.parametrize("name", WRITTEN)
def test_config_is_the_one_it_came_from(name: str, tmp_path: Path) -> None:
    """What transformers makes of config.json, key by key, beside the config that the weights had."""
    convert(open_checkpoint(str(GGUF / f"{name}.gguf")), "dense", tmp_path / "out", dtype="f32")
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "config.json").write_text((GGUF / f"{name}.json").read_text())
    found, wanted = (AutoConfig.from_pretrained(tmp_path / n).to_dict() for n in ("out", "before"))
    unlike = {key for key in found.keys() & wanted.keys() if found[key] != wanted[key]} - {"_name_or_path"}
    assert unlike == CHANGED.get(name, set())


@pytest.mark.parametrize("name", WRITTEN_MORE)
def test_more_gguf_families_in_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As their own class, or the one they amount to. MiniCPM's stored logits are of weights rounded later."""
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    convert(open_checkpoint(str(MORE / f"{name}.gguf")), "dense", tmp_path / "out", dtype="f32")
    stored = load_file(MORE / f"{name}.safetensors")
    tokens = stored["tokens"].flatten().tolist()
    theirs, mine = by_both(tmp_path / "out", tokens)
    before = by_lowbit(MORE / f"{name}.gguf", tokens)
    for logits in (theirs, mine):
        assert (logits - before).abs().max() <= 2e-5 * before.abs().max()
    wanted = stored["logits"].view(theirs.shape)
    limit = 1e-3 if name == "minicpm" else 2e-5
    assert (theirs - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize("folder", whole_models(), ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_quantized_folders(folder: Path, tmp_path: Path) -> None:
    """Every stored module as the matrix it stands for; the rest as it was."""
    header = open_checkpoint(str(folder))
    done = convert(header, "dense", tmp_path / "out", dtype="f32")
    assert done.rounding == 0
    found, source, multiplied = tensors_of(tmp_path / "out"), SourceModel(header), set()
    with TensorData(header) as data:
        for module in source.modules:
            read = source.read(module, data)
            exact = read.weight.dequantize()
            if read.input is not None and read.input.multiplier is not None:
                exact = exact * read.input.multiplier.float()
                multiplied.add(module.target.stored)
            target = module.target
            stored = found[target.tensor("weight")]
            if target.expert is not None:
                stored = stored[target.expert]
            assert torch.equal(stored.T if target.transposed else stored, exact), module.target.name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    again = SourceModel(open_checkpoint(str(tmp_path / "out")))
    assert again.form.name == "dense"
    assert [m.target.name for m in again.modules] == [m.target.name for m in source.modules]
    names = {name: values for name, values in expected(folder).items() if f"{name}.weight" in found}
    for name, values in names.items():  # before an input multiplier went into the columns
        if values.shape == found[f"{name}.weight"].shape and name not in multiplied:
            worst = (found[f"{name}.weight"] - values.float()).abs().max()
            assert worst <= 2**-7 * values.float().abs().max(), name


@pytest.mark.parametrize(
    ("name", "note"), [("qwen3vl", "the language model alone"), ("bitnet", "inputs are left as they are")]
)
def test_what_a_gguf_file_does_not_hold_is_said(name: str, note: str, tmp_path: Path) -> None:
    done = convert(open_checkpoint(str(MORE / f"{name}.gguf")), "dense", tmp_path / "out")
    assert [line for line in summary(done) if line.startswith(note)]


def test_narrowest_type_and_rounding(tmp_path: Path) -> None:
    header = open_checkpoint(str(FIXTURES / "gptq" / "w4_sym"))
    exact = convert(header, "dense", tmp_path / "exact")
    assert (exact.dtype, exact.rounding) == ("f32", 0)
    assert "f32, exact" in summary(exact)[0]
    rounded = convert(header, "dense", tmp_path / "rounded", dtype="bf16")
    before, after = tensors_of(tmp_path / "exact"), tensors_of(tmp_path / "rounded")
    worst = 0.0
    for name, values in after.items():
        assert torch.equal(values, before[name].to(torch.bfloat16))
        whole = before[name].float()
        worst = max(worst, float(((values.float() - whole).abs() / whole.abs().clamp(min=1e-30)).max()))
    assert rounded.rounding == pytest.approx(worst) and 2**-10 < worst <= 2**-8
    assert f"bf16: largest relative rounding {100 * worst:.2g} %" in summary(rounded)[0]


def test_exact_types() -> None:
    """What exact_dtype promises holds for every code under every scale."""
    e8m0 = number_format("e8m0")
    for name in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int4", "int8"):
        scheme = Scheme(number_format(name), ((1, 32),), (e8m0,))
        assert exact_dtype(scheme) == "bf16"
        values = number_format(name).table()
        values = values[values.isfinite()]
        for exponent in (-100, -20, 0, 20, 100):
            scaled = values * 2.0**exponent
            assert torch.equal(scaled.to(torch.bfloat16).float(), scaled), name
    assert exact_dtype(Scheme(number_format("int4"), ((1, 32),), (number_format("f16"),))) == "f32"
    assert exact_dtype(Scheme(number_format("int8"), ((1, 32),), (e8m0,), offset=True)) == "f32"
    assert exact_dtype(dense("f16")) == "f16"


def test_f16_overflow_is_an_error() -> None:
    from lowbit.formats import StoredModule

    writer = DenseWriter({}, "f16")
    weight = QuantizedTensor(dense("f32"), (1, 2), torch.tensor([[1.0, 70000.0]]))
    with pytest.raises(LowbitError, match=r"numbers up to 7e\+04"):
        writer.write(StoredModule("x", "x", (1, 2)), weight)


def test_large_matrices_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row and block by block the same, ragged edges and flattened blocks included."""
    from lowbit.formats import StoredModule

    monkeypatch.setattr("lowbit.formats.dense_writer._CHUNK", 1)
    random = torch.Generator().manual_seed(1)
    f32 = number_format("f32")
    for scheme, shape in (
        (Scheme(number_format("e4m3"), ((3, 5),), (f32,)), (7, 12)),
        (Scheme(number_format("nf4"), ((1, 64),), (f32,), flattened=True), (6, 24)),
        (Scheme(number_format("int4"), ((0, 8),), (f32,)), (5, 16)),
    ):
        rows, columns = (size or whole for size, whole in zip(scheme.blocks[0], shape, strict=True))
        grid = (-(-shape[0] // rows), -(-shape[1] // columns))
        if scheme.flattened:
            grid = (-(-shape[0] * shape[1] // columns),)
        codes = torch.randint(0, 16, shape, generator=random, dtype=torch.uint8)
        weight = QuantizedTensor(scheme, shape, codes, (torch.rand(grid, generator=random) + 0.5,))
        found = DenseWriter({}, "f32").write(StoredModule("x", "x", shape), weight)["x.weight"]
        assert torch.equal(found, weight.dequantize()), scheme


def test_tokenizer_and_template_from_gguf(tmp_path: Path) -> None:
    """The folder's tokenizer gives the ids that the GGUF file's gives."""
    for name in WRITTEN:
        header = open_checkpoint(str(GGUF / f"{name}.gguf"))
        convert(header, "dense", tmp_path / name)
        folder = open_checkpoint(str(tmp_path / name))
        ours, theirs = load_tokenizer(folder), load_tokenizer(header)
        for text in ("the hour", " and  an", "hinder the ant\n"):
            ids = theirs.encode(text)
            assert ours.encode(text) == ids, name
            assert ours.decode(ids) == theirs.decode(ids)
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_id, theirs.eos_id)
        assert ours.stop_ids == theirs.stop_ids
        template = load_chat_template(folder, ours)
        assert (template is None) == (load_chat_template(header, theirs) is None)


@pytest.mark.slow
def test_embedded_model_in_transformers(tmp_path: Path) -> None:
    """The embedded model as a folder: the same greedy tokens in transformers, template and all."""
    from transformers import AutoTokenizer

    from lowbit.engine.messages import SamplingParams
    from lowbit.llm import LLM

    convert(open_checkpoint("smollm2"), "dense", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    messages = [{"role": "user", "content": "Name three colours of the rainbow."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
    with LLM(model=str(tmp_path / "out")) as llm:
        assert llm.chat_template is not None and llm.chat_template.render(messages) == ids
        [mine] = llm.generate(ids, SamplingParams(max_tokens=24, temperature=0.0))
    assert mine.tokens == theirs[len(ids) :]
    assert "rainbow" in tokenizer.decode(mine.tokens).lower()


@pytest.mark.parametrize("stored", [True, False])
def test_layers_of_prediction_are_left_out_and_said(stored: bool, tmp_path: Path) -> None:
    """And config.json no longer promises them to tools that would use them."""
    make_checkpoint("DeepseekV3", tmp_path / "in")
    file, config = tmp_path / "in" / "model.safetensors", tmp_path / "in" / "config.json"
    if stored:
        save_file({**load_file(file), "model.layers.3.eh_proj.weight": torch.ones(2, 2)}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}))
    done = convert(open_checkpoint(str(tmp_path / "in")), "dense", tmp_path / "out")
    said = "1 tensors of layers that predict further tokens (MTP) were left out, like model.layers.3.eh_proj"
    assert any(note.startswith(said) for note in done.notes) == stored
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == (0 if stored else 1)
    assert "model.layers.3.eh_proj.weight" not in tensors_of(tmp_path / "out")
