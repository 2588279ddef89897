"""How much memory and time loading takes: ``python benchmarks/loading.py [--layers N] [--hidden N]``.

A random Llama is written in each format (weights of no sense, packing as the tools have it) and loaded twice:
by a fresh process, which gives packed bytes over the scheme's own and the seconds beside transformers loading
the bf16 original in the same run; and by ``lowbit serve``, whose processes (HTTP and engine) are watched
until it is ready. *Served*: the peak of their anonymous memory together, pages of the KV cache included,
beyond what the imports of both take. It must stay under the bound: packed model + largest module with one
byte a code + 300 MB. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from watched_load import SLACK, load, memory, printed

FORMATS = ("bf16", "gptq", "gptq act-order", "awq", "fp8 block", "compressed-tensors W4A16", "nf4")
UNBACKED = ("RssAnon", "RssShmem")  # no file is behind them; the second: pages of a KV cache
VOCABULARY = 32_000


def module_tensors(kind: str, out: int, columns: int, seed: int) -> dict[str, Tensor]:
    """The stored tensors of one linear layer, by suffix."""
    generator = torch.Generator().manual_seed(seed)

    def words(rows: int, width: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (rows, width), generator=generator, dtype=torch.int64).int()

    def scales(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 0.01 + 0.001

    groups = columns // 128
    match kind:
        case "bf16":
            return {"weight": torch.randn(out, columns, generator=generator).bfloat16() * 0.02}
        case "gptq" | "gptq act-order":
            index = torch.arange(columns, dtype=torch.int32) // 128
            if kind != "gptq":
                index = index[torch.randperm(columns, generator=generator)]
            return {
                "qweight": words(columns // 8, out),
                "qzeros": words(groups, out // 8),
                "scales": scales(groups, out).half(),
                "g_idx": index,
            }
        case "awq":
            return {
                "qweight": words(columns, out // 8),
                "qzeros": words(groups, out // 8),
                "scales": scales(groups, out).half(),
            }
        case "fp8 block":
            codes = torch.randint(0, 0x7F, (out, columns), generator=generator, dtype=torch.uint8)
            grid = scales(-(-out // 128), -(-columns // 128))
            return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": grid}
        case "compressed-tensors W4A16":
            return {
                "weight_packed": words(out, columns // 8),
                "weight_scale": scales(out, groups).bfloat16(),
                "weight_shape": torch.tensor([out, columns]),
            }
    from lowbit.numerics.number_formats import number_format

    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, columns]}
    said = list(json.dumps(state).encode())
    raw = torch.randint(0, 256, (out * columns // 2, 1), generator=generator, dtype=torch.uint8)
    return {
        "weight": raw,
        "weight.absmax": scales(out * columns // 64),
        "weight.quant_map": number_format("nf4").table(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(said, dtype=torch.uint8),
    }


QUANTIZATION: dict[str, dict[str, object]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False},
    "gptq act-order": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "fp8 block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors W4A16": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": 128,
                    "symmetric": True,
                },
            }
        },
    },
}


def write_model(folder: Path, kind: str, layers: int, hidden: int) -> None:
    """A Llama with heads of 64, a word for each token and one shard a layer."""
    inner, heads, vocabulary = hidden * 4, hidden // 64, VOCABULARY
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 or 1, "vocab_size": vocabulary, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    if kind in QUANTIZATION:
        config["quantization_config"] = QUANTIZATION[kind]
    kv = (heads // 4 or 1) * 64
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv,
        hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj":
        (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shards = [
        {
            "model.embed_tokens.weight": torch.randn(vocabulary, hidden).bfloat16(),
            "lm_head.weight": torch.randn(vocabulary, hidden).bfloat16(),
            "model.norm.weight": torch.ones(hidden).bfloat16(),
        }
    ]
    places = dict.fromkeys(shards[0], 0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.{norm}_layernorm.weight": torch.ones(hidden).bfloat16()
            for norm in ("input", "post_attention")
        }
        for number, (name, (out, columns)) in enumerate(shapes.items()):
            for suffix, tensor in module_tensors(kind, out, columns, 100 * layer + number).items():
                tensors[f"{prefix}.{name}.{suffix}"] = tensor
        shards.append(tensors)
        places |= dict.fromkeys(tensors, layer + 1)
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: names[shard] for tensor, shard in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


# What the two processes of a server hold before they know of a model.
IMPORTS = (
    "import lowbit.commands.serve, lowbit.server.app, lowbit.tokenization, uvicorn",
    "import torch, lowbit.engine.process, lowbit.engine.engine, lowbit.loading\n"
    "from lowbit.kernels import native; native.library()",
)
TRANSFORMERS = """
import json, sys, time
import torch, transformers
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def anonymous(pid: int) -> int:
    """Unbacked bytes of a process; 0 when it is gone."""
    with contextlib.suppress(OSError):
        return memory(Path(f"/proc/{pid}/status").read_text(), *UNBACKED)
    return 0


def with_children(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def imports() -> int:
    """Anonymous bytes after the imports of both processes."""
    script = "\nimport json; print(json.dumps(open('/proc/self/status').read()))"
    return sum(memory(printed("-c", imported + script), *UNBACKED) for imported in IMPORTS)


def served_peak(folder: Path) -> int:
    """The most anonymous bytes all processes of ``lowbit serve`` hold together until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lowbit", "serve", str(folder), "--port", str(port)]
    server = subprocess.Popen([*command, "--log-level", "error"], stderr=subprocess.PIPE, text=True)
    peak, asked = 0, time.perf_counter()
    try:
        while True:
            peak = max(peak, sum(anonymous(pid) for pid in with_children(server.pid)))
            if server.poll() is not None:
                assert server.stderr is not None
                raise SystemExit(f"the server ended: {server.stderr.read()[-2000:]}")
            if time.perf_counter() - asked > 0.1:
                asked = time.perf_counter()
                with (
                    contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as response,
                ):
                    if response.status == 200:
                        return peak
            time.sleep(0.002)
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    """Write, load and print one line a format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    options = parser.parse_args()
    mib = 1 << 20
    rows, rival = [], None
    titles = ("packed", "of own", "loaded", "served", "bound", "load", "transformers")
    imported = imports()
    print(f"{'format':26} " + " ".join(f"{title:>12}" for title in titles))
    for kind in options.formats:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder, kind, options.layers, options.hidden)
            load(folder)  # the files' pages are in memory from here on
            found = load(folder)
            if kind == "bf16":
                printed("-c", TRANSFORMERS, str(folder))
                rival = printed("-c", TRANSFORMERS, str(folder))["seconds"]
            served = served_peak(folder) - imported
        bound = found["packed"] + found["predicted"] - found["planned"] + SLACK
        cells = (
            f"{found['packed'] / mib:.0f} M",
            f"{found['packed'] / found['own']:.3f}",
            f"{found['peak'] / mib:.0f} M",
            f"{served / mib:.0f} M",
            f"{bound / mib:.0f} M",
            f"{found['seconds']:.2f} s",
            f"x {found['seconds'] / rival:.2f}" if rival else "-",
        )
        print(f"{kind:26} " + " ".join(f"{cell:>12}" for cell in cells), flush=True)
        within = max(found["peak"], served) <= bound
        rows.append({"format": kind, **found, "served": served, "bound": bound, "within": within})
    told = {"time": time.strftime("%Y-%m-%d"), "options": vars(options), "transformers": rival}
    print(json.dumps({**told, "rows": rows}))


if __name__ == "__main__":
    main()
