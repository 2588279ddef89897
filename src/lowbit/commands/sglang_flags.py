"""SGLang's server flags that are no option of lowbit's, so that a launch line written for SGLang still works.

*Compared*: options of lowbit whose meaning or values differ from SGLang's in a way worth knowing. *Without
effect*: lowbit does the thing always, never, or by itself; the flag is accepted and a note says so. *Only*:
what lowbit has one way of, sharing a model above all: the one value is taken and any other refused rather
than ignored.
*Refused*: a flag that asks for something lowbit will not do, and what to do instead. Every other flag SGLang
knows and lowbit does not is an unknown option like any other. Names from SGLang's server arguments.
"""

from __future__ import annotations

from typing import Literal

Arity = Literal["switch", "value", "values"]

# Option of lowbit -> what somebody who comes from SGLang should know of it.
COMPARED: dict[str, str] = {
    "load_format": "auto, safetensors, pt, mistral, gguf; layered is how lowbit always loads; others are "
    "refused by name",
    "dtype": "auto keeps each tensor's stored type; SGLang's auto makes f16 of f32",
    "quantization": "names and options below; not needed for quantized checkpoints",
    "tp_size": "the same, on CPUs too; ranks may have unequal parts, cut where groups end",
    "mem_fraction_static": "the same on a GPU; on a CPU the KV pool's share of what the weights leave free",
    "max_total_tokens": "tokens of the KV pool; more than fit is an error, not cut",
    "chunked_prefill_size": "the same; -1 turns it off",
    "max_running_requests": "the same",
    "max_queued_requests": "the same; more are answered with 429",
    "schedule_policy": "fcfs, lpm; others are refused by name",
    "page_size": "16 only",
    "disable_radix_cache": "the same",
    "disable_cuda_graph": "the same: every step runs eagerly",
    "cuda_graph_bs": "the same",
    "cuda_graph_max_bs": "the same; default --max-running-requests, at most 256",
    "disable_overlap_schedule": "the same; steps overlap on GPUs only, and not with speculation",
    "attention_backend": "auto, triton, flashinfer (installed beside lowbit) and torch_native, which is "
    "reference; fa3 and other kernels are auto",
    "random_seed": "of requests that bring no seed",
    "sampling_defaults": "the same, for /generate too",
    "preferred_sampling_params": "the same, for OpenAI's endpoints too",
    "incremental_streaming_output": "the same; OpenAI's endpoints always stream what is new",
    "speculative_algorithm": "NGRAM, from each sequence's own text, on a CPU too; others are refused by name",
    "speculative_num_draft_tokens": "at most; fewer while they are wrong, and beside other sequences",
    "speculative_ngram_min_match_window_size": "the same; 2 unless set",
    "speculative_ngram_max_match_window_size": "the same",
}

_CHOSEN = "lowbit chooses kernels itself, see lowbit inspect"
_COMPILED = "the native kernels are compiled already; there is no graph to compile"
_ALWAYS = "always on"
_NEVER = "lowbit has no such thing"
_SCHEDULER = "lowbit's scheduler sets it itself"
_TP_ALONE = "a model is shared by --tp-size alone, on one machine"
_VISIBLE = "ranks take the visible GPUs in their order, see CUDA_VISIBLE_DEVICES"
_MEET = "the ranks of one machine find each other"
_LOGGING = "lowbit never logs prompts"
_LOADER = "files are mapped and read once, layer by layer"
_NO_PRIORITIES = "requests have no priorities"
_NO_TREES = "a draft is one run of tokens, not a tree"

WITHOUT_EFFECT: dict[str, tuple[Arity, str]] = {
    "--prefill-attention-backend": ("value", _CHOSEN),
    "--decode-attention-backend": ("value", _CHOSEN),
    "--sampling-backend": ("value", _CHOSEN),
    "--fp8-gemm-backend": ("value", _CHOSEN),
    "--fp4-gemm-backend": ("value", _CHOSEN),
    "--moe-runner-backend": ("value", _CHOSEN),
    "--bf16-gemm-backend": ("value", _CHOSEN),
    "--enable-torch-compile": ("switch", _COMPILED),
    "--torch-compile-max-bs": ("value", _COMPILED),
    "--enable-tf32-matmul": ("switch", "sums are float32"),
    "--enable-metrics": ("switch", _ALWAYS),
    "--enable-cache-report": ("switch", _ALWAYS),
    "--enable-mixed-chunk": ("switch", _ALWAYS),
    "--enable-fp32-lm-head": ("switch", _ALWAYS),
    "--enable-deterministic-inference": (
        "switch",
        "on a CPU always; on a GPU the last bits of logits may depend on the batch",
    ),
    "--skip-server-warmup": ("switch", _NEVER),
    "--disable-custom-all-reduce": ("switch", _NEVER),
    "--disable-cuda-graph-padding": ("switch", "padding rows change nothing"),
    "--max-prefill-tokens": ("value", _SCHEDULER),
    "--prefill-max-requests": ("value", _SCHEDULER),
    "--schedule-conservativeness": ("value", _SCHEDULER),
    "--num-continuous-decode-steps": ("value", _SCHEDULER),
    "--radix-eviction-policy": ("value", _SCHEDULER),
    "--retraction-policy": ("value", "the youngest sequence is retracted"),
    "--prefill-decode-interval": ("value", "prompts and answers share steps"),
    "--scheduler-recv-interval": ("value", _SCHEDULER),
    "--enable-dynamic-chunking": ("switch", _TP_ALONE),
    "--pp-max-micro-batch-size": ("value", _TP_ALONE),
    "--pp-async-batch-depth": ("value", _TP_ALONE),
    "--enable-dp-attention": ("switch", _TP_ALONE),
    "--disable-priority-preemption": ("switch", _NO_PRIORITIES),
    "--abort-on-priority-when-disabled": ("switch", _NO_PRIORITIES),
    "--disable-hybrid-swa-memory": ("switch", "there is one KV pool"),
    "--swa-full-tokens-ratio": ("value", "there is one KV pool"),
    "--enable-unified-memory": ("switch", "there is one KV pool"),
    "--enable-page-major-kv-layout": ("switch", "the KV layout is the attention kernel's own"),
    "--disable-chunked-prefix-cache": ("switch", _NEVER),
    "--max-mamba-cache-size": ("value", "each of --max-running-requests has a state"),
    "--quantize-and-serve": ("switch", "what --quantization always does"),
    "--model-loader-extra-config": ("value", _LOADER),
    "--weight-loader-disable-mmap": ("switch", _LOADER),
    "--weight-loader-prefetch-checkpoints": ("switch", _LOADER),
    "--model-config-parser": ("value", "the files say it"),
    "--sleep-on-idle": ("switch", _ALWAYS),
    **dict.fromkeys(
        (
            *("--speculative-ngram-min-bfs-breadth", "--speculative-ngram-max-bfs-breadth"),
            *("--speculative-ngram-match-type", "--speculative-ngram-branch-length"),
            "--speculative-ngram-max-trie-depth",
        ),
        ("value", _NO_TREES),
    ),
    "--speculative-ngram-capacity": ("value", "a sequence's n-grams go with it"),
    "--stream-interval": ("value", "lowbit streams every step's tokens"),
    "--tokenizer-mode": ("value", "there is one tokenizer"),
    "--tokenizer-worker-num": ("value", "there is one tokenizer"),
    "--tokenizer-backend": ("value", "there is one tokenizer"),
    "--detokenizer-worker-num": ("value", "there is one tokenizer"),
    "--model-impl": ("value", "there is one implementation"),
    "--base-gpu-id": ("value", _VISIBLE),
    "--gpu-id-step": ("value", _VISIBLE),
    "--nccl-port": ("value", _MEET),
    "--dist-init-addr": ("value", _MEET),
    "--dist-timeout": ("value", _MEET),
    "--load-balance-method": ("value", _TP_ALONE),
    "--enable-p2p-check": ("switch", _TP_ALONE),
    "--log-requests": ("switch", _LOGGING),
    "--log-requests-level": ("value", _LOGGING),
    "--log-level-http": ("value", "use --log-level"),
    "--decode-log-interval": ("value", "see /metrics"),
    "--show-time-cost": ("switch", "see /metrics"),
    "--watchdog-timeout": ("value", "the watchdog is set by lowbit"),
    "--soft-watchdog-timeout": ("value", "the watchdog is set by lowbit"),
}

_PARALLEL = (
    *("--dp-size", "--dp", "--data-parallel-size"),
    *("--pp-size", "--pp", "--pipeline-parallel-size"),
    *("--ep-size", "--ep", "--expert-parallel-size"),
    *("--attn-cp-size", "--attention-context-parallel-size"),
    *("--dcp-size", "--decode-context-parallel-size"),
    *("--moe-dp-size", "--moe-data-parallel-size", "--moe-dense-tp-size", "--dwdp-size"),
    "--nnodes",
)
_ONE_PROCESS = "prompts and answers are computed in one process"

# flag -> (the value it may have, why there is no other)
ONLY: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_PARALLEL, ("1", _TP_ALONE)),
    "--node-rank": ("0", _TP_ALONE),
    "--moe-a2a-backend": ("none", _TP_ALONE),
    "--cpu-offload-gb": (
        "0", "weights lie on the device that computes; use --device cpu, or smaller ones by --quantization"
    ),
    "--offload-group-size": ("-1", "weights lie on the device that computes; use --quantization"),
    "--disaggregation-mode": ("null", _ONE_PROCESS),
}  # fmt: skip

_EXPORTED = "export the model with ModelOpt and serve the exported folder"
_MEMORY_ONLY = (
    "the KV cache lies in memory only; enlarge it with --mem-fraction-static, --max-total-tokens or "
    "--kv-cache-dtype fp8_e4m3"
)
_STAYS = "memory is given back only when the server ends; start another server instead"
_NO_PRIORITY = "requests have no priorities; use --schedule-policy fcfs or lpm"
_NO_DRAFTS = "there are no draft models or heads; use --speculative-algorithm NGRAM"
_NO_ADAPTERS = "adapters are not applied at run time; merge them into the weights first"

_NOT_PARSED = (
    "answers are text as the model writes it, tool calls and reasoning in its own marks; drop it, and parse "
    "the text in the client"
)

REFUSED: dict[str, str] = {
    **dict.fromkeys(("--tool-call-parser", "--reasoning-parser", "--tool-server"), _NOT_PARSED),
    "--grammar-backend": "requests with grammars or JSON schemas are refused; drop it",
    "--trust-remote-code": "lowbit never runs code from a model, and no flag turns it on; drop it. "
    "The architectures built in: lowbit models",
    "--modelopt-quant": "use --quantization fp8, awq, nvfp4 or mxfp4, which quantize while loading, or "
    + _EXPORTED,
    "--modelopt-checkpoint-restore-path": "such files can run code; " + _EXPORTED,
    "--modelopt-checkpoint-save-path": _EXPORTED,
    "--modelopt-export-path": _EXPORTED,
    "--rl-quant-profile": "weights are not replaced while serving; use --quantization",
    "--json-model-override-args": "a model is what its config says; edit config.json in a copy of the folder",
    "--is-embedding": "lowbit generates text only",
    "--skip-tokenizer-init": "text needs the tokenizer; /v1/completions takes token ids as prompts anyway",
    "--prefill-only-disable-kv-cache": "lowbit generates text, which needs the KV cache; drop it",
    **dict.fromkeys(
        (
            *("--enable-hierarchical-cache", "--hicache-ratio", "--hicache-size", "--hicache-write-policy"),
            *("--hicache-io-backend", "--hicache-mem-layout", "--hicache-storage-backend"),
            "--enable-lmcache",
        ),
        _MEMORY_ONLY,
    ),
    **dict.fromkeys(("--enable-memory-saver", "--enable-weights-cpu-backup"), _STAYS),
    **dict.fromkeys(
        (
            *("--enable-priority-scheduling", "--schedule-low-priority-values-first"),
            *("--default-priority-value", "--priority-scheduling-preemption-threshold"),
        ),
        _NO_PRIORITY,
    ),
    **dict.fromkeys(
        (*("--speculative-draft-model-path", "--speculative-num-steps", "--speculative-eagle-topk"),),
        _NO_DRAFTS,
    ),
    **dict.fromkeys(("--enable-lora", "--lora-paths", "--max-lora-rank"), _NO_ADAPTERS),
}
