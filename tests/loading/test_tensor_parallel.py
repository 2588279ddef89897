"""Models that two ranks share, against the same models in one process, on the reference kernel and the native
ones.

The reference multiplies float32: what differs there is the order of sums, about 1e-7. Native kernels round
inputs to bfloat16 and codes of inputs may tip, on the last bit of those sums. So layers that are summed are
also compared one by one, on the inputs that the ranks had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.hqq_columns import columns_llama
from forward_helpers import prompt_logits
from kernel_inputs import ROUNDS_INPUTS
from kernels.test_parallel import together
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.kernels.parallel import Parallel
from lowbit.layers.experts import Experts
from lowbit.loading import load_model, plan_model
from lowbit.loading.loader import Loader
from lowbit.quantize.recipe import Asked
from models.family_cases import SIZES, saved
from models.test_deepseek import SIZES as DEEPSEEK
from models.test_quantized_experts import FORMATS, fp8_block, made, per_expert, quantize_experts, write
from models.test_qwen_next import make_checkpoint
from oracles import gptq as gptq_oracle
from parallel_ranks import Answer, Job, Ranks, answer, layers_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
PROMPTS = [[3, 1, 2, 5, 9, 11, 2, 7, 8, 15, 12, 1, 7, 7, 13, 4, 4, 9], [6, 2, 2], [10] * 40]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks(2)
    yield started
    started.close()


def shared(ranks: Ranks, job: Job) -> tuple[Answer, list[Answer]]:
    """(in one process, on both ranks): both have the same bits."""
    both = ranks.run(job)
    for first, second in zip(*(rank.logits for rank in both), strict=True):
        assert torch.equal(first, second)
    return answer(job), both


def difference(one: Answer, other: Answer) -> float:
    """The largest of the logits' differences, over the largest logit."""
    pairs = list(zip(one.logits, other.logits, strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


def check(ranks: Ranks, job: Job, limit: float = 1e-5) -> tuple[Answer, list[Answer]]:
    one, both = shared(ranks, job)
    assert one.logits[0].std() > 1e-3
    assert difference(one, both[0]) <= limit
    return one, both


# ---- checkpoints ---------------------------------------------------------------------------------------


def llama(folder: Path, **more: Any) -> Path:
    saved("Llama", folder, **{**SIZES, "num_hidden_layers": 2, **more})
    return folder


def deepseek(folder: Path) -> Path:
    sizes = {**DEEPSEEK, "num_hidden_layers": 2, "n_group": 4, "topk_group": 2, "q_lora_rank": 32}
    saved("DeepseekV3", folder, **sizes)
    return folder


def q4_k(folder: Path) -> Path:
    """A GGUF file of super-blocks of 256: three of them before the down projections."""
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 1}
    source = llama(folder / "float", **sizes)
    file = folder / "m.gguf"
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}  # nobody reads them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.loading.gguf_saving.tokenizer_metadata", lambda header, rows: tokens)
        load_model(open_checkpoint(str(source)), device="cpu", quantization=Asked("gguf"), save=file)
    return file


def with_act_order(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """GPTQ, each column in a group of its own choosing."""
    rows, columns = weight.shape
    groups = torch.randperm(columns, generator=torch.Generator().manual_seed(columns + rows)) // 32
    scales = torch.stack([weight[:, groups == g].abs().amax(1) / 7 for g in range(columns // 32)], 1).half()
    spread = scales.float()[:, groups]
    codes = (weight / spread).round().clamp(-8, 7) + 8
    packed = gptq_oracle.stream(codes.T.numpy().astype(np.int64), 4)
    zeros = np.full((columns // 32, rows // 8), 0x77777777, np.uint32)
    return {
        "qweight": torch.from_numpy(packed.view(np.int32).copy()),
        "qzeros": torch.from_numpy(zeros.view(np.int32)),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }, (codes - 8) * spread


def experts(folder: Path, name: str, fmt: str) -> Path:
    quantize, config = FORMATS["gptq" if fmt == "act-order" else fmt]
    if fmt == "act-order":
        quantize, config = with_act_order, {**config, "desc_act": True}
    model = made(name)
    folder.mkdir()
    return write(folder, model, quantize_experts(model, quantize), config)


CASES: dict[str, Callable[[Path], Path]] = {
    "float32": llama,
    "one K/V head": lambda folder: llama(folder, num_key_value_heads=1),
    "unequal heads": lambda folder: llama(
        folder, hidden_size=96, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True
    ),
    "biases": lambda folder: llama(folder, attention_bias=True, mlp_bias=True),
    "latent attention": deepseek,
    "norms of whole projections": lambda folder: _family(folder, "Olmo2"),
    "norms of whole projections, K shared": lambda folder: _family(folder, "Olmo2", num_key_value_heads=1),
    "halves side by side, heads' norms": lambda folder: _family(folder, "Cohere", use_qk_norm=True),
    "heads' norms behind the rotation": lambda folder: _family(folder, "HunYuanDenseV1", head_dim=16),
    "no gate, squared, norms with an offset": lambda folder: _family(folder, "Nemotron"),
    "experts chosen by sigmoids, norms of whole projections": lambda folder: _family(
        folder, "MiniMaxM2", num_local_experts=4, num_experts_per_tok=2, rotary_dim=8
    ),
    "learned positions, transposed": lambda folder: _gpt2(folder),
    "sinks, experts with biases": lambda folder: experts_float(folder, "GptOss"),
    "shared expert with a gate": lambda folder: experts_float(folder, "Qwen2Moe"),
    "Q4_K": q4_k,
    "scales of 16 rows of a column, apart": lambda folder: columns_llama(folder, 16)[0],
    "scales of columns, whole and of 32 rows": lambda folder: columns_llama(folder, 32)[0],
    "experts, int4": lambda folder: experts(folder, "Qwen3Moe", "gptq"),
    "experts, int4, act-order": lambda folder: experts(folder, "Mixtral", "act-order"),
    "experts, int8 inputs by token": lambda folder: experts(folder, "Qwen3Moe", "w8a8_int8"),
    "experts, fp8 blocks": lambda folder: experts(folder, "Qwen2Moe", "fp8"),
}


def fp8_blocks(folder: Path, heads: int) -> Path:
    """All projections in blocks of 128 x 128. The inputs of each output projection are three of them, and so
    many heads."""
    sizes = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 1}
    llama(folder, num_attention_heads=heads, num_key_value_heads=heads, **sizes)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stored, _ = fp8_block(tensors.pop(name), 128)
        stem = name.removesuffix("weight")
        tensors |= {stem + suffix: tensor.contiguous() for suffix, tensor in stored.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": method}))
    return folder


def _family(folder: Path, name: str, **more: Any) -> Path:
    saved(name, folder, **{**SIZES, "num_hidden_layers": 2, **more})
    return folder


def _gpt2(folder: Path) -> Path:
    saved("GPT2", folder, n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=131)
    return folder


def experts_float(folder: Path, name: str) -> Path:
    made(name).save_pretrained(folder)
    return folder


def recurrent(folder: Path) -> Path:
    make_checkpoint(folder)
    return folder


# ---- the same logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_one_process(ranks: Ranks, case: str, tmp_path: Path) -> None:
    path = CASES[case](tmp_path / "m")
    one, both = check(ranks, Job(path, PROMPTS))
    # What is on both ranks: norms are not counted; a router, a K/V head or the latent projections are small.
    assert sum(rank.weight_bytes for rank in both) <= 1.25 * one.weight_bytes
    limit = 0.05 if case in ("experts, int8 inputs by token", "experts, fp8 blocks") else 0.01
    check(ranks, Job(path, PROMPTS, reference=False), limit)


STORED = [
    "aqlm/1x8_g8",
    "aqlm/1x12_g4x2",
    "vptq/v4_k128_plain",
    "vptq/v8_k256_res16",
    "aqlm/2x8_g8",
    "higgs/p2_2bit",
    "exl3/mul1",
    "exl3/mcg_padded_tied",
    "spqr/csr_act_order",
    "spqr/ptcsr_act_order",
    "awq/gemm",
    "gptq/w4_asym_actorder",
    "gptq/w4_sym",
    "gptq/w3_asym",
    "compressed_tensors/w4a16_actorder",
    "compressed_tensors/w8a8_dynamic",
    "compressed_tensors/w8a8_static_asym",
    "compressed_tensors/fp8_channel_dynamic",
    "compressed_tensors/nvfp4",
    "transforms/quip_block_mxfp4",
    "fp8/tensor_static",
    "fp8/experts_block_16",
    "bitsandbytes/int8",
    "gguf_families/deepseek2.gguf",
    "gguf_families/gpt_oss.gguf",
    "gguf_families/phi3.gguf",
]


@pytest.mark.parametrize("case", STORED)
def test_files_that_tools_wrote(ranks: Ranks, case: str) -> None:
    check(ranks, Job(FIXTURES / case, PROMPTS))


@pytest.mark.parametrize("case", ["quip_sharp/e8p12", "quip_sharp/e8p12_rvq4"])
def test_codes_of_lattices_are_shared(ranks: Ranks, case: str) -> None:
    """Between the transforms: ranks gather products, and no sum has another order than in one process."""
    one, both = shared(ranks, Job(FIXTURES / case, PROMPTS, reference=False))
    assert all(torch.equal(*pair) for pair in zip(one.logits, both[0].logits, strict=True))
    assert both[0].kernels == one.kernels and "cpu_lattice" in one.kernels
    # What multiplies columns is on both, and so are tables; 16 bits a weight would be four times as much.
    assert sum(rank.weight_bytes for rank in both) <= 1.3 * one.weight_bytes
    # Weights in one process were rounded to float16.
    check(ranks, Job(FIXTURES / case, PROMPTS), 1e-3)


def test_codebooks_of_columns_are_cut_between_them(ranks: Ranks) -> None:
    """Two of 28 columns behind 8 outliers: a rank has one, and the first of them the outliers."""
    path = FIXTURES / "vptq" / "v6_k64_outliers"
    one, both = check(ranks, Job(path, PROMPTS, reference=False), 1e-3)
    assert both[0].kernels == one.kernels and "cpu_row_vectors" in one.kernels
    assert sum(rank.weight_bytes for rank in both) <= 1.3 * one.weight_bytes, "up's codebooks are on both"
    check(ranks, Job(path, PROMPTS))
    plan = plan_model(open_checkpoint(str(path)), tp_size=2)
    planned = {module.name.rpartition(".")[2]: module for module in plan.modules}
    assert planned["down_proj"].cut == "columns 36 | 28 with their codebooks, inputs gathered (act-order)"
    assert str(planned["down_proj"].scheme) == "rvq6_64_f16_1x28_out8 allx1 f16 offset"
    assert planned["up_proj"].cut == "rows 48 | 16", "between vectors of 6 and tiles of 16"


@pytest.mark.parametrize("case", ["vptq/v4_k128_plain", "vptq/v8_k256_res16"])
def test_vectors_of_rows_are_cut_between_them(ranks: Ranks, case: str) -> None:
    """Where down projections have act-order, no row before them moves: their inputs are gathered."""
    one, both = check(ranks, Job(FIXTURES / case, PROMPTS, reference=False), 1e-3)
    assert "cpu_row_vectors" in one.kernels and both[0].kernels == one.kernels
    plan = plan_model(open_checkpoint(str(FIXTURES / case)), tp_size=2)
    cuts = {module.name.rpartition(".")[2]: module.cut for module in plan.modules}
    assert cuts["gate_proj"].startswith("rows") and "order" not in cuts["gate_proj"]
    assert cuts["down_proj"].endswith("inputs gathered (act-order)") == ("v8" in case)


ONLINE = {
    "int4 in groups": {"quantization": "int4:group_size=32"},
    "int8 inputs": {"torchao_config": "int8dq"},
    "a scale for a step's inputs": {"torchao_config": "fp8dq-per_tensor"},
    "delayed scales": {"quantization": "fp8:activation=delayed,history=4"},
    "outliers": {"quantization": "bitsandbytes:type=int8"},
}


@pytest.mark.parametrize("case", ONLINE)
def test_quantized_at_load(ranks: Ranks, case: str, tmp_path: Path) -> None:
    asked = Asked(**ONLINE[case])
    check(ranks, Job(llama(tmp_path / "m"), PROMPTS, options={"quantization": asked}))


def test_blocks_that_run_over_row_ends(ranks: Ranks, tmp_path: Path) -> None:
    """The 224 columns of down projections are no whole blocks of 64: ranks have smaller ones."""
    sizes = {"hidden_size": 192, "intermediate_size": 224, "num_attention_heads": 4}
    path = llama(tmp_path / "m", **sizes)
    for reference in (True, False):
        options = {"quantization": Asked("nf4")}
        check(ranks, Job(path, PROMPTS, reference, options), 1e-5 if reference else 0.01)
    plan = plan_model(open_checkpoint(str(path)), quantization="nf4", tp_size=2)
    cuts = {module.name.rpartition(".")[2]: (module.cut, str(module.scheme)) for module in plan.modules}
    assert cuts["down_proj"] == ("columns 128 | 96 in groups of 32", "nf4 1x32 f32")


def random_vptq(
    rows: int, columns: int, generator: torch.Generator, books: int = 1, ordered: bool = True
) -> dict[str, Tensor]:
    """Vectors of 8 rows, of 16 and of 8 others: 7 bits a vector. ``ordered``: with act-order."""
    size = (books, rows // 8, -(-columns // books * 7 // 32))
    order = {"perm": torch.randperm(columns, generator=generator).to(torch.int16)}
    return {
        "centroids.weight": torch.randn(books, 16 * 8, generator=generator).half() * 0.2,
        "res_centroids.weight": torch.randn(books, 8 * 8, generator=generator).half() * 0.1,
        "indices": torch.randint(-(2**31), 2**31, size, generator=generator).int(),
        **(order if ordered else {}),
        "weight_scale": torch.rand(columns, generator=generator).half() + 0.5,
        "weight_bias": torch.randn(columns, generator=generator).half() * 0.02,
    }


def random_quip(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    signs = (torch.randint(2, (size,), generator=generator) * 2 - 1 for size in (columns, rows))
    return {
        "Qidxs": torch.randint(-(2**62), 2**62, (rows, columns * 2 // 64), generator=generator),
        **dict(zip(("SU", "SV"), (sign.half() * 0.5 for sign in signs), strict=True)),
        "Wscale": torch.tensor(0.3),
        "codebook_id": torch.tensor(7),
    }


def random_trellis(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    """3 bits a weight, in whole blocks of 128."""
    blocks = [-(-size // 128) * 128 for size in (columns, rows)]
    suh, svh = (torch.randn(size, generator=generator).half() * 0.3 for size in blocks)
    words = torch.randint(-(2**15), 2**15, (blocks[0] // 16, blocks[1] // 16, 48), generator=generator)
    flag = torch.tensor(0xCBAC1FED, dtype=torch.uint32).view(torch.int32)
    return {"trellis": words.short(), "suh": suh, "svh": svh, "mcg": flag}


def test_trellises_are_cut_inside_blocks(ranks: Ranks, tmp_path: Path) -> None:
    """Sizes that 128 does not divide; the block that rows of two ranks lie in is on both."""
    path = llama(
        tmp_path, hidden_size=192, intermediate_size=320, num_attention_heads=6, num_key_value_heads=2
    )
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if "_proj" in name or "lm_head" in name:
            stored = random_trellis(*tensor.shape, generator)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": each for suffix, each in stored.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((path / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "exl3", "version": "1.4.1", "bits": 3.0, "head_bits": 3}
    (path / "config.json").write_text(json.dumps(said))
    for reference in (True, False):
        one, both = check(ranks, Job(path, PROMPTS, reference), 2e-3)
        assert (both[0].kernels == one.kernels and reference) or "cpu_trellis" in one.kernels
    plan = plan_model(open_checkpoint(str(path)), tp_size=2)
    planned = {module.name.rpartition(".")[2]: module for module in plan.modules}
    assert all(module.scheme.weight.trellis for name, module in planned.items() if name != "embed_tokens")
    assert planned["q_proj"].cut == "rows 96 | 96" and planned["lm_head"].cut == "rows 128 | 3"
    assert (
        planned["o_proj"].cut
        == "columns 128 | 64 in groups of 128, inputs gathered (heads end inside groups)"
    )
    assert planned["down_proj"].cut == "columns 256 | 64 in groups of 128"


VPTQ_RULE = {
    "vector_lens": [-1, 8],
    "num_centroids": [-1, 16],
    "num_res_centroids": [-1, 8],
    "group_num": 1,
    "group_size": 64,
    "enable_norm": True,
    "enable_perm": True,
}
RANDOM: dict[str, tuple[Callable[..., dict[str, Tensor]], dict[str, Any]]] = {
    "vptq": (
        random_vptq,
        {
            "quant_method": "vptq",
            "shared_layer_config": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), VPTQ_RULE),
        },
    ),
    "quip_sharp": (random_quip, {"codebook": "E8P12", "codebook_version": 1, "codesz": 8}),
}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("books", "wanted"), [(2, "columns 48 | 48"), (3, "columns 64 | 32")])
def test_codebooks_with_and_without_act_order(
    ranks: Ranks, books: int, wanted: str, ordered: bool, tmp_path: Path
) -> None:
    """Without it rows before a down projection are cut as its codebooks end: nothing is gathered."""
    path, generator = llama(tmp_path), torch.Generator().manual_seed(4)
    tensors, rules = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".mlp." in name:
            rows, columns = tensor.shape
            parts = books if "down_proj" in name else 1
            stored = random_vptq(rows, columns, generator, parts, ordered)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": each for suffix, each in stored.items()}
            sizes = {"group_num": parts, "group_size": columns // parts, "enable_perm": ordered}
            rules[name.split(".")[-2]] = VPTQ_RULE | sizes
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((path / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "vptq", "shared_layer_config": rules}
    (path / "config.json").write_text(json.dumps(said))
    for reference in (True, False):
        one, both = check(ranks, Job(path, PROMPTS, reference), 1e-5 if reference else 2e-3)
        assert both[0].kernels == one.kernels
    plan = plan_model(open_checkpoint(str(path)), tp_size=2)
    cuts = {module.name.rpartition(".")[2]: module.cut for module in plan.modules}
    gathered = ", inputs gathered (act-order)" if ordered else ""
    assert cuts["down_proj"] == f"{wanted} with their codebooks{gathered}"
    assert ordered or cuts["up_proj"] == wanted.replace("columns", "rows")


def random_experts(folder: Path, fmt: str) -> Path:
    """Qwen3-MoE whose experts are random codes of a format; the rest is float."""
    make, config = RANDOM[fmt]
    model, generator = made("Qwen3Moe"), torch.Generator().manual_seed(1)
    tensors = {}
    for name, matrix in per_expert(model).items():
        if ".experts." in name:
            stored = make(*matrix.shape, generator)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": each for suffix, each in stored.items()}
        else:
            tensors[name] = matrix
    path = write(folder, model, tensors, None)
    said = json.loads((path / "config.json").read_text())
    said["quip_params" if fmt == "quip_sharp" else "quantization_config"] = config
    (path / "config.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("fmt", RANDOM)
def test_ranks_have_whole_experts_where_a_share_of_each_would_be_decoded(
    ranks: Ranks, fmt: str, tmp_path: Path
) -> None:
    """Four experts: a rank has two, and of each token's those that are its own."""
    path = random_experts(tmp_path, fmt)
    for reference in (True, False):
        one, both = check(ranks, Job(path, PROMPTS, reference), 1e-5 if reference else 1e-2)
        assert both[0].kernels == one.kernels and both[0].kernels == both[1].kernels
    check(ranks, Job(path, [[5]], reference=False), 1e-2)
    assert {"vptq": "cpu_row_vectors", "quip_sharp": "cpu_lattice"}[fmt] in one.kernels
    header = open_checkpoint(str(path))
    plan, whole = plan_model(header, tp_size=2), plan_model(header)
    assert plan.parameters == whole.parameters
    there = [module.nbytes > 0 for module in plan.modules if ".experts." in module.name]
    assert there == ([True] * 6 + [False] * 6) * 2
    why = {
        "vptq": "rows that cannot follow act-order",
        "quip_sharp": "a share of each would be gathered expert by expert",
    }
    said = {module.cut for module in plan.modules if ".experts." in module.name}
    assert said == {f"whole, experts 2 | 2 ({why[fmt]})"}


def test_more_ranks_than_whole_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.test_quantized_experts.EXPERTS", 3)
    header = open_checkpoint(str(random_experts(tmp_path, "vptq")))
    with pytest.raises(
        LowbitError, match="whole on a rank, and there are 3; use --tp-size 3 or less"
    ) as caught:
        plan_model(header, tp_size=4)
    assert caught.value.code == "E0431"


# ---- each layer by itself ------------------------------------------------------------------------------


EXPERTS_ONLINE = {  # whose rows depend on each other
    "experts, a scale for a step's inputs": {"torchao_config": "fp8dq-per_tensor"},
    "experts, outliers": {"quantization": "bitsandbytes:type=int8"},
}
RECURRENT = {"recurrent layers, int8 weights": {"torchao_config": "int8wo"}}
WATCHED: dict[str, Callable[[Path], Path]] = {
    "fp8 blocks, two heads and one": lambda folder: fp8_blocks(folder, 3),
    "fp8 blocks, heads end inside groups": lambda folder: fp8_blocks(folder, 6),
    **{
        name: CASES[name]
        for name in (
            *("latent attention", "shared expert with a gate", "Q4_K", "experts, int8 inputs by token"),
            *("experts, fp8 blocks", "sinks, experts with biases"),
        )
    },
    **{
        name: lambda _, name=name: FIXTURES / name
        for name in (
            *("aqlm/2x8_g8", "bitsandbytes/int8", "bitnet/bitlinear", "compressed_tensors/nvfp4"),
            *("compressed_tensors/fp8_channel_dynamic", "compressed_tensors/w8a8_static_asym"),
            *("fp8/experts_block_16", "fp_quant/mxfp4_quest", "fp_quant/nvfp4", "modelopt/nvfp4_awq"),
            *("modelopt/nvfp4_experts", "paroquant/g16", "qserve/per_channel", "quark/fp8_token"),
            "sglang/w8a8_int8",
            *("torchao/float8dq_tensor", "transforms/quip_block_mxfp4", "transforms/random_matrix_fp8"),
        )
    },
    **dict.fromkeys(ONLINE, llama),
    **dict.fromkeys(EXPERTS_ONLINE, lambda folder: experts_float(folder, "Qwen3Moe")),
    **dict.fromkeys(RECURRENT, lambda folder: recurrent(folder)),
}


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "chosen"])
@pytest.mark.parametrize("case", WATCHED)
def test_layers_give_what_they_give_in_one_process(
    ranks: Ranks, case: str, reference: bool, tmp_path: Path
) -> None:
    """From the same inputs. A code that tips changes what comes after it (by 0.03 of a logit in blocks of
    128), and no limit on logits would tell that from a scale of the wrong columns."""
    online = {**ONLINE, **EXPERTS_ONLINE, **RECURRENT}
    options = {"quantization": Asked(**online[case])} if case in online else {}
    job = Job(WATCHED[case](tmp_path / "m"), PROMPTS, reference, options, watched=True)
    both, whole = ranks.run(job), layers_of(job)
    assert both[0].summed
    for first, second in zip(both[0].summed, both[1].summed, strict=True):
        layer, total = whole[first.name], torch.from_numpy(first.result + second.result)
        if isinstance(layer, Experts):
            x, chosen, weights, activation, added = first.given
            added = None if added is None else torch.from_numpy(added + second.given[4])
            given = [torch.from_numpy(each) for each in (x, chosen, weights)]
            wanted = layer(*given, activation, added)
        else:
            wanted = layer(torch.from_numpy(np.hstack([first.given[0], second.given[0]])))
        # Native code rounds x to 16 bits by each rank's largest there, and without bfloat16 everywhere.
        limit = 1e-4 if "aqlm" in case or not (reference or ROUNDS_INPUTS) else 3e-6
        assert (total - wanted).abs().max() <= limit * wanted.abs().max(), first.name


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "chosen"])
def test_recurrent_layers_of_int8_weights(ranks: Ranks, reference: bool, tmp_path: Path) -> None:
    """Float32 inputs differ by the order of sums alone. Rounded to bfloat16 some tip, and recurrent layers
    carry that on: in one process, too, noise of 1e-7 in what experts give is 5e-3 of a logit, else 8e-6."""
    [asked] = RECURRENT.values()
    job = Job(recurrent(tmp_path / "m"), PROMPTS, reference, {"quantization": Asked(**asked)})
    check(ranks, job, 2e-5 if reference else 0.05)


class Counted(Parallel):
    """A rank that counts what it asks the others."""

    asked: ClassVar[list[int]] = []  # the rows of each

    def largest(self, x: Tensor) -> Tensor:
        self.asked += [len(x)] * (self.rank == 0)
        return super().largest(x)


@pytest.mark.parametrize("case", EXPERTS_ONLINE)
def test_experts_whose_rows_depend_on_each_other_ask_nobody(case: str, tmp_path: Path) -> None:
    """Ranks have whole ones; attention's output projections ask once each."""
    path = experts_float(tmp_path / "m", "Qwen3Moe")
    options: dict[str, Any] = {"device": "cpu", "quantization": Asked(**EXPERTS_ONLINE[case])}

    def work(p: Parallel) -> None:
        model = load_model(open_checkpoint(str(path)), parallel=Counted(p.rank, p.size, p._group), **options)
        prompt_logits(model, [PROMPTS[0][:9]])

    Counted.asked.clear()
    together(tmp_path, 2, work)
    assert Counted.asked == [9] * 2
    plan = plan_model(open_checkpoint(str(path)), tp_size=2, quantization=options["quantization"])
    cuts = [module.cut for module in plan.modules if ".experts.3." in module.name]
    why = "a share of each would ask the other ranks expert by expert"
    assert cuts == [f"whole, experts 2 | 2 ({why})"] * 6


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "chosen"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_all_experts_of_a_layer_ask_ranks_once(tokens: int, reference: bool, tmp_path: Path) -> None:
    """Each token's row once for each of its two experts."""
    path = CASES["experts, int8 inputs by token"](tmp_path / "m")
    options: dict[str, Any] = {"device": "cpu", **({"linear_kernel": "reference"} if reference else {})}

    def work(p: Parallel) -> None:
        model = load_model(open_checkpoint(str(path)), parallel=Counted(p.rank, p.size, p._group), **options)
        prompt_logits(model, [PROMPTS[0][:tokens]])

    Counted.asked.clear()
    together(tmp_path, 2, work)
    assert Counted.asked == [2 * tokens] * 2


def test_int8_inputs_in_groups(ranks: Ranks) -> None:
    job = Job(
        FIXTURES / "gptq" / "w4_sym",
        PROMPTS,
        reference=False,
        options={"activation_quantization": "int8"},
    )
    check(ranks, job, 0.05)


def test_an_fp8_cache(ranks: Ranks) -> None:
    options = {"kv_cache_dtype": "fp8_e4m3"}
    check(ranks, Job(FIXTURES / "modelopt" / "fp8", PROMPTS, options=options), 0.05)


def test_runs_have_the_same_bits(ranks: Ranks) -> None:
    for reference in (True, False):
        job = Job(FIXTURES / "gptq" / "w4_asym_actorder", PROMPTS, reference)
        first, second = ranks.run(job)[0], ranks.run(job)[0]
        assert all(torch.equal(*pair) for pair in zip(first.logits, second.logits, strict=True))


def test_a_token_has_the_same_bits_in_any_batch(ranks: Ranks) -> None:
    path = FIXTURES / "gptq" / "w4_sym"
    together = ranks.run(Job(path, PROMPTS, reference=False))[0]
    for prompt, logits in zip(PROMPTS, together.logits, strict=True):
        [alone] = ranks.run(Job(path, [prompt], reference=False))[0].logits
        assert torch.equal(alone, logits)


# ---- what is cut, and what cannot be -------------------------------------------------------------------


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    """Whole groups, one more on the first rank; in one file of 3 groups, in another of 5."""
    for inner, wanted in ((96, "columns 64 | 32 in groups of 32"), (160, "columns 96 | 64 in groups of 32")):
        path = llama(tmp_path / str(inner), intermediate_size=inner)
        plan = plan_model(open_checkpoint(str(path)), quantization="int4:group_size=32", tp_size=2)
        cuts = {module.name.rpartition(".")[2]: module.cut for module in plan.modules}
        assert cuts["down_proj"] == wanted
        assert cuts["gate_proj"] == wanted.split(" in ")[0].replace("columns", "rows")
        assert cuts["q_proj"] == "rows 32 | 32" and cuts["o_proj"] == "columns 32 | 32 in groups of 32"


def test_act_order_is_said_in_the_plan() -> None:
    plan = plan_model(open_checkpoint(str(FIXTURES / "gptq" / "w4_asym_actorder")), tp_size=2)
    cuts = {module.name.rpartition(".")[2]: module.cut for module in plan.modules}
    assert cuts["o_proj"].endswith("inputs gathered (act-order)")
    assert cuts["down_proj"].endswith("in stored order (act-order)")
    assert cuts["up_proj"].endswith("in the order of the next layer's columns")
    whole = plan_model(open_checkpoint(str(FIXTURES / "gptq" / "w4_asym_actorder")))
    assert whole.parameters == plan.parameters and not any(module.cut for module in whole.modules)
    assert plan.weight_bytes < 0.7 * whole.weight_bytes


def test_too_few_groups_are_named() -> None:
    header = open_checkpoint(str(FIXTURES / "mlx" / "2_g32"))
    with pytest.raises(LowbitError, match=r"32 columns of model\.layers\.0\.self_attn\.o_proj") as caught:
        plan_model(header, tp_size=2)
    assert caught.value.code == "E0431" and caught.value.message.endswith("use --tp-size 1")


def test_a_size_that_heads_do_not_have_is_named(tmp_path: Path) -> None:
    header = open_checkpoint(str(llama(tmp_path / "m")))
    with pytest.raises(LowbitError, match="4 heads with 2 K/V heads .* what works: 1, 2, 4") as caught:
        plan_model(header, tp_size=3)
    assert caught.value.code == "E0430"


def test_calibrating_methods_want_one_process(tmp_path: Path) -> None:
    header = open_checkpoint(str(llama(tmp_path / "m")))
    with pytest.raises(LowbitError, match="--save-quantized FOLDER and without --tp-size"):
        load_model(header, quantization="gptq", parallel=Parallel(0, 2))


def test_a_rank_reads_its_own_rows_and_columns_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs to the other rank is damaged here: nothing of it is seen."""
    path = llama(tmp_path / "m")
    whole = load_model(open_checkpoint(str(path)), device="cpu", parallel=Parallel(1, 2))
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        half = tensor.shape[0] // 2
        if "o_proj" in name or "down_proj" in name:
            tensor[:, : tensor.shape[1] // 2] = torch.nan
        elif tensor.dim() == 2 and "embed" not in name and "lm_head" not in name:
            tensor[:half] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    damaged = load_model(open_checkpoint(str(path)), device="cpu", parallel=Parallel(1, 2))
    for one, other in zip(whole.blocks, damaged.blocks, strict=True):
        for layer in ("qkv", "output"):
            pair = [getattr(block, layer).weights[0].buffers["data"] for block in (one, other)]
            assert torch.equal(*pair)


def test_rows_and_columns_of_mapped_files_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain, fp8 and GGUF matrices the kernel gets views of the file: only their pages are read."""
    seen: list[bool] = []
    pack = Loader._pack

    def spied(self: Loader, weight: Any, transform: Any, wanted: Any) -> Any:
        maps = [mapped.untyped_storage().data_ptr() for mapped in self.data._maps.values()]
        if "o_proj" in weight.origin or "down_proj" in weight.origin or ".attn_output" in weight.origin:
            seen.append(weight.codes.untyped_storage().data_ptr() in maps)
        return pack(self, weight, transform, wanted)

    monkeypatch.setattr(Loader, "_pack", spied)
    for case in ("fp8/tensor_static", "gguf_families/phi3.gguf"):
        header = open_checkpoint(str(FIXTURES / case))
        with TensorData(header):
            load_model(header, device="cpu", parallel=Parallel(0, 2))
    assert seen and all(seen)
