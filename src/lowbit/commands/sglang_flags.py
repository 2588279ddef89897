"""SGLang's server flags that are no option of lowbit's, so that a launch line written for SGLang still works.

*Compared*: options of lowbit whose meaning or values differ from SGLang's in a way worth knowing. *Without
effect*: lowbit does the thing always, never, or by itself; the flag is accepted and a note says so. *Only*:
what lowbit has one way of, sharing a model above all: the one value is taken and any other refused rather
than ignored. *Refused*: a flag that asks for something lowbit will not do, and what to do instead; SGLang has
many for one thing, and ``REFUSED_PREFIXES`` names those by how they begin. Names from SGLang 0.5.23's server
arguments, and a few that it had before.
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
    "chunked_prefill_size": "the same; -1 turns it off; by the GPU's memory unless set, 512 on a CPU",
    "max_running_requests": "the same",
    "max_queued_requests": "the same; more are answered with 429",
    "schedule_policy": "fcfs, lpm; others are refused by name",
    "num_continuous_decode_steps": "the same on a CPU, where several are the default; a GPU overlaps steps",
    "page_size": "16 only",
    "disable_radix_cache": "the same",
    "disable_cuda_graph": "the same: every step runs eagerly",
    "cuda_graph_bs": "the same",
    "cuda_graph_max_bs": "the same; default --max-running-requests, at most 256",
    "disable_overlap_schedule": "the same; steps overlap on GPUs only, and not with speculation",
    "attention_backend": "auto, triton, flashinfer (installed beside lowbit) and torch_native, which is "
    "reference; fa3 and other kernels are auto",
    "kv_cache_dtype": "the same, and int8 and int4; others are refused by name",
    "random_seed": "the same: equal requests without a seed draw differently, in the same order the same",
    "watchdog_timeout": "of a step that does nothing; one that is slow and gets on may take longer",
    "soft_watchdog_timeout": "the same; 60 s unless set",
    "sampling_defaults": "the same, for /generate too",
    "preferred_sampling_params": "the same, for OpenAI's endpoints too",
    "stream_response_default_include_usage": "the same",
    "default_chat_template_kwargs": "the same",
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
_RANKS = "how ranks exchange sums is lowbit's own"
_LOGGING = "lowbit never logs prompts"
_METRICS = "see /metrics"
_LOADER = "files are mapped and read once, layer by layer"
_NO_PRIORITIES = "requests have no priorities"
_NO_TREES = "a draft is one run of tokens, not a tree"
_ONE_TOKENIZER = "there is one tokenizer"
_DECODE_GRAPHS = "graphs are of steps that decode; prompts run eagerly"
_ONE_POOL = "there is one KV pool"


def _all(arity: Arity, reason: str, flags: str) -> dict[str, tuple[Arity, str]]:
    return dict.fromkeys(flags.split(), (arity, reason))


WITHOUT_EFFECT: dict[str, tuple[Arity, str]] = {
    **_all(
        "value",
        _CHOSEN,
        "--prefill-attention-backend --decode-attention-backend --sampling-backend --fp8-gemm-backend "
        "--fp4-gemm-backend --moe-runner-backend --bf16-gemm-backend --linear-attn-backend "
        "--linear-attn-decode-backend --linear-attn-prefill-backend --linear-attn-verify-backend "
        "--mamba-backend --dsa-prefill-backend --dsa-decode-backend --dsa-topk-backend --dsa-triton-union "
        "--dsa-paged-mqa-logits-backend --dsv4-prefill-backend --dsv4-attn-backend --nsa-prefill-backend "
        "--nsa-decode-backend --triton-attention-num-kv-splits --triton-attention-split-tile-size "
        "--mm-attention-backend --qsa-indexer-dtype --monokernel-backend --linear-replayssm-cache-len",
    ),
    **_all(
        "switch",
        _CHOSEN,
        "--disable-flashinfer-autotune --flashinfer-mla-disable-ragged --enable-fused-qk-norm-rope "
        "--no-enable-fused-qk-norm-rope --enable-dsa-fused-indexer --no-enable-dsa-fused-indexer "
        "--enable-lean-attention --enable-nvidia-megakernel --enable-amd-monokernel "
        "--enable-linear-replayssm --enable-linear-replayssm-spec --disable-shared-experts-fusion "
        "--enforce-shared-experts-fusion --enable-flashinfer-mla --enable-flashmla --disable-mla",
    ),
    "--flashinfer-autotune-skip-ops": ("values", _CHOSEN),
    **_all("switch", _COMPILED, "--enable-torch-compile --enable-torch-compile-debug-mode"),
    "--torch-compile-max-bs": ("value", _COMPILED),
    **_all(
        "switch",
        "sums are float32",
        "--enable-tf32-matmul --no-enable-tf32-matmul --triton-attention-reduce-in-fp32",
    ),
    **_all(
        "switch",
        _ALWAYS,
        "--enable-metrics --enable-metrics-for-all-schedulers --enable-cache-report --enable-mixed-chunk "
        "--enable-fp32-lm-head --sleep-on-idle --language-model-only",
    ),
    "--enable-deterministic-inference": (
        "switch",
        "on a CPU always; on a GPU the last bits of logits may depend on the batch",
    ),
    **_all(
        "switch",
        _NEVER,
        "--skip-server-warmup --disable-custom-all-reduce --disable-chunked-prefix-cache "
        "--disable-outlines-disk-cache --disable-jump-forward --enable-cudagraph-gc",
    ),
    "--warmups": ("value", "lowbit warms itself up"),
    "--disable-cuda-graph-padding": ("switch", "padding rows change nothing"),
    "--disable-prefill-cuda-graph": ("switch", _DECODE_GRAPHS),
    **_all(
        "value",
        _DECODE_GRAPHS,
        "--cuda-graph-backend-prefill --cuda-graph-max-bs-prefill --cuda-graph-max-seq-len-prefill "
        "--cuda-graph-prefill-max-context --context-bucket",
    ),
    "--cuda-graph-bs-prefill": ("values", _DECODE_GRAPHS),
    **_all(
        "value",
        _SCHEDULER,
        "--max-prefill-tokens --prefill-max-requests --schedule-conservativeness "
        "--radix-eviction-policy --radix-eviction-policy-config "
        "--scheduler-recv-interval --min-free-slots-delay --batch-notify-size "
        "--load-snapshot-publish-interval "
        "--prefill-delayer-max-delay-passes --prefill-delayer-token-usage-low-watermark "
        "--prefill-delayer-queue-min-ratio --prefill-delayer-max-delay-ms",
    ),
    "--enable-prefill-delayer": ("switch", _SCHEDULER),
    **_all(
        "values",
        _SCHEDULER,
        "--prefill-delayer-forward-passes-buckets --prefill-delayer-wait-seconds-buckets --gc-threshold",
    ),
    "--retraction-policy": ("value", "the youngest sequence is retracted"),
    **_all(
        "value",
        "prompts and answers share steps",
        "--prefill-decode-interval --prefill-decode-interval-min-bs",
    ),
    **_all("switch", _TP_ALONE, "--enable-dynamic-chunking --enable-dp-attention --enable-p2p-check"),
    **_all("value", _TP_ALONE, "--pp-max-micro-batch-size --pp-async-batch-depth --load-balance-method"),
    **_all(
        "switch",
        _RANKS,
        "--enable-nccl-nvls --enable-symm-mem --enable-mscclpp --enable-torch-symm-mem --pre-warm-nccl "
        "--enforce-disable-flashinfer-allreduce-fusion --enable-flashinfer-allreduce-fusion "
        "--enable-aiter-allreduce-fusion --disable-aiter-allreduce-fusion-in-prefill "
        "--disable-aiter-allreduce-fusion-in-decode --enable-fused-moe-sum-all-reduce "
        "--enable-attn-tp-input-scattered --enable-layernorm-sp --disable-attn-tp-gather "
        "--enable-tp-lm-head-all-to-all --no-enable-tp-lm-head-all-to-all",
    ),
    **_all("value", _RANKS, "--flashinfer-allreduce-fusion-backend --boundary-reduction"),
    **_all("switch", _NO_PRIORITIES, "--disable-priority-preemption --abort-on-priority-when-disabled"),
    **_all("switch", _ONE_POOL, "--disable-hybrid-swa-memory --enable-unified-memory"),
    **_all("value", _ONE_POOL, "--swa-full-tokens-ratio --swa-prefix-tails --mamba-full-memory-ratio"),
    "--enable-page-major-kv-layout": ("switch", "the KV layout is the attention kernel's own"),
    "--max-mamba-cache-size": ("value", "each of --max-running-requests has a state"),
    **_all(
        "value",
        "recurrent states are kept where prefixes part, in their own type",
        "--mamba-ssm-dtype --mamba-max-states-per-path --mamba-radix-cache-strategy --mamba-track-interval "
        "--int8-mamba-ckpt-size",
    ),
    "--quantize-and-serve": ("switch", "what --quantization always does"),
    **_all(
        "value",
        _LOADER,
        "--model-loader-extra-config --startup-weight-load-mode --weight-loader-prefetch-num-threads",
    ),
    **_all(
        "switch",
        _LOADER,
        "--weight-loader-disable-mmap --weight-loader-prefetch-checkpoints "
        "--weight-loader-drop-cache-after-load",
    ),
    "--model-config-parser": ("value", "the files say it"),
    "--weight-version": ("value", "weights do not change while serving"),
    **_all(
        "value",
        _NO_TREES,
        "--speculative-ngram-min-bfs-breadth --speculative-ngram-max-bfs-breadth "
        "--speculative-ngram-match-type --speculative-ngram-branch-length "
        "--speculative-ngram-max-trie-depth",
    ),
    "--speculative-ngram-capacity": ("value", "a sequence's n-grams go with it"),
    "--stream-interval": ("value", "lowbit streams every step's tokens"),
    **_all(
        "value",
        _ONE_TOKENIZER,
        "--tokenizer-mode --tokenizer-worker-num --tokenizer-backend --detokenizer-worker-num "
        "--dynamic-batch-tokenizer-batch-size --dynamic-batch-tokenizer-batch-timeout",
    ),
    **_all(
        "switch",
        _ONE_TOKENIZER,
        "--enable-dynamic-batch-tokenizer --enable-tokenizer-batch-encode --disable-tokenizer-batch-decode",
    ),
    "--model-impl": ("value", "there is one implementation"),
    **_all("value", _VISIBLE, "--base-gpu-id --gpu-id-step"),
    "--numa-node": ("values", "start it under numactl"),
    **_all("value", _MEET, "--nccl-port --dist-init-addr --nccl-init-addr --dist-timeout"),
    "--log-requests": ("switch", _LOGGING),
    **_all("value", _LOGGING, "--log-requests-level --log-requests-format"),
    "--log-requests-target": ("values", _LOGGING),
    "--log-level-http": ("value", "use --log-level"),
    "--uvicorn-access-log-exclude-prefixes": ("values", "what probes ask is not logged"),
    **_all("value", _METRICS, "--decode-log-interval --gc-warning-threshold-secs"),
    **_all(
        "switch",
        _METRICS,
        "--show-time-cost --enable-request-time-stats-logging --enable-mfu-metrics "
        "--collect-tokens-histogram",
    ),
    "--enable-nan-detection": ("switch", _ALWAYS),
    "--enable-http-worker-reuseport": ("switch", "there is one HTTP process"),
}

_PARALLEL = (
    *("--dp-size", "--dp", "--data-parallel-size"),
    *("--pp-size", "--pp", "--pipeline-parallel-size"),
    *("--ep-size", "--ep", "--expert-parallel-size"),
    *("--attn-cp-size", "--attention-context-parallel-size"),
    *("--dcp-size", "--decode-context-parallel-size"),
    *("--moe-dp-size", "--moe-data-parallel-size", "--moe-dense-tp-size", "--dwdp-size"),
    *("--attn-dp-size", "--attention-data-parallel-size", "--shared-experts-tp-size"),
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
    "--cuda-graph-backend-decode": ("full", "steps that decode are captured whole, or not at all with "
    "--disable-cuda-graph"),
    "--kv-canary": ("none", "/metrics counts the page accounting checks that failed"),
    "--decoupled-spec-role": ("null", "prompts, drafts and answers are computed in one process"),
    "--weight-cache-mode": ("off", "there is no daemon; use --packed-cache"),
    "--hicache-host-memory-mode": ("cache", "the KV cache lies in memory only"),
    "--offload-group-size": ("-1", "weights lie on the device that computes; use --quantization"),
    "--disaggregation-mode": ("null", _ONE_PROCESS),
}  # fmt: skip

# Said of other servers' flags too (``other_flags``).
TEXT_ONLY = "lowbit reads and writes text only; drop it"
NO_ADAPTERS = "adapters are not applied at run time; merge them into the weights first"
NO_GRAMMARS = "requests with grammars or JSON schemas are refused; drop it"
CONFIG_SAYS = "a model is what its config says; edit config.json in a copy of the folder"
_EXPORTED = "export the model with ModelOpt and serve the exported folder"
_MEMORY_ONLY = (
    "the KV cache lies in memory only; enlarge it with --mem-fraction-static, --max-total-tokens or "
    "--kv-cache-dtype fp8_e4m3"
)
_STAYS = "memory is given back only when the server ends; start another server instead"
_NO_PRIORITY = "requests have no priorities; use --schedule-policy fcfs or lpm"
_NO_DRAFTS = "there are no draft models or heads; use --speculative-algorithm NGRAM"

_PLAIN_FILES = "weights come from files: use a folder, a GGUF file or a hub id"


def _beginning(reason: str, starts: str) -> dict[str, str]:
    return dict.fromkeys(starts.split(), reason)


_NOT_PARSED = (
    "answers are text as the model writes it, tool calls and reasoning in its own marks; drop it, and parse "
    "the text in the client"
)

REFUSED: dict[str, str] = {
    **dict.fromkeys(("--tool-call-parser", "--reasoning-parser", "--tool-server"), _NOT_PARSED),
    "--grammar-backend": NO_GRAMMARS,
    "--trust-remote-code": "lowbit never runs code from a model, and no flag turns it on; drop it. "
    "The architectures built in: lowbit models",
    "--modelopt-quant": "use --quantization fp8, awq, nvfp4 or mxfp4, which quantize while loading, or "
    + _EXPORTED,
    "--modelopt-checkpoint-restore-path": "such files can run code; " + _EXPORTED,
    "--modelopt-checkpoint-save-path": _EXPORTED,
    "--modelopt-export-path": _EXPORTED,
    "--rl-quant-profile": "weights are not replaced while serving; use --quantization",
    "--json-model-override-args": CONFIG_SAYS,
    "--is-embedding": "lowbit generates text only",
    "--skip-tokenizer-init": "text needs the tokenizer; /v1/completions takes token ids as prompts anyway",
    "--prefill-only-disable-kv-cache": "lowbit generates text, which needs the KV cache; drop it",
    "--config": "options stand on the command line or in LOWBIT_* variables, see docs/options.md",
    "--admin-api-key": "use --api-key-file; its keys open the admin endpoints too",
    "--allow-auto-truncate": "prompts are not cut; raise --context-length, or shorten them in the client",
    "--hf-chat-template-name": "write that template to a file and use --chat-template",
    "--completion-template": "write the marks into the prompt of /v1/completions",
    "--trust-request-chat-template": "a chat template never comes from a request; use --chat-template",
    "--model-checksum": "use lowbit check MODEL, which reads every tensor",
    "--download-dir": "set HF_HUB_CACHE to the folder",
    "--fastapi-root-path": "let the proxy take the prefix off",
    "--file-storage-path": "there are no files on the server; drop it",
    "--enable-response-store": "/v1/responses is not offered; use /v1/chat/completions",
    "--enable-custom-logit-processor": "lowbit runs no code of requests; use logit_bias in the request",
    "--crash-dump-folder": "lowbit never writes prompts to disk; drop it",
    "--use-ray": "ranks are processes of one machine; use --tp-size",
    "--cuda-graph-config": "use --cuda-graph-max-bs, --cuda-graph-bs or --disable-cuda-graph",
    "--radix-cache-backend": "there is one prefix cache; --disable-radix-cache turns it off",
    "--rl-on-policy-target": "lowbit does not train; drop it",
    "--sampling-mask-max-tokens": "sampling masks are not returned; drop it",
    **dict.fromkeys(("--enable-memory-saver", "--enable-weights-cpu-backup"), _STAYS),
}

# How SGLang's names of one thing begin -> what of them. ``REFUSED`` and the lists above go first.
REFUSED_PREFIXES: dict[str, str] = {
    **_beginning(
        _MEMORY_ONLY,
        "--enable-hierarchical-cache --enable-hicache --hicache- --enable-lmcache --lmcache- "
        "--enable-hisparse --hisparse- --hierarchical-sparse- --enable-flexkv --flexkv- "
        "--enable-unified-cache- --unified-cache- --enable-linker- --enable-session-radix-cache "
        "--strip-thinking-cache",
    ),
    **_beginning(
        _NO_PRIORITY,
        "--enable-priority-scheduling --schedule-low-priority- --default-priority- --priority-scheduling-",
    ),
    **_beginning("drafts come from each sequence's own text; drop it", "--speculative-ngram-external-"),
    **_beginning(
        _NO_DRAFTS,
        "--speculative- --spec-trace- --decoupled-spec- --enable-multi-layer-eagle --enable-draft-weights-",
    ),
    **_beginning(
        NO_ADAPTERS,
        "--enable-lora --lora- --max-lora --max-loaded-loras --experts-shared-outer-loras --uno-lora-",
    ),
    **_beginning(
        _ONE_PROCESS + "; drop it",
        "--disaggregation- --enable-pdmux --pdmux- --enable-pd- --sm-group-num --num-reserved-decode-tokens "
        "--optimistic-prefill-",
    ),
    **_beginning(
        TEXT_ONLY,
        "--encoder- --language-only --enable-adaptive-dispatch-to-encoder --mm- --enable-mm- "
        "--enable-multimodal --limit-mm- --trust-mm- --allowed-media- --media-url- --image-processor- "
        "--disable-fast-image-processor --enable-prefix-mm-cache --enable-broadcast-mm- --asr- "
        "--enable-precise-embedding-interpolation --enable-mis",
    ),
    **_beginning(
        f"{_TP_ALONE}; drop it",
        "--elastic-ep- --enable-elastic- --mooncake- --eplb- --enable-eplb --ep-num- --ep-dispatch- "
        "--init-expert-location --expert-distribution- --expert-balancedness- --deepep- --fuseep- "
        "--flashinfer-a2a- --max-ep-size --enable-waterfill --enable-two-batch-overlap "
        "--enable-single-batch-overlap --tbo- --dcp- --enable-prefill-cp --cp-strategy --enable-cp- "
        "--enable-dp- --enable-dsa-cache-layer-split --enable-kv-cache-sharding --enable-shared-experts- "
        "--enable-dense-mlp- --enable-scattered- --enable-quant-communications --gated-launch-port "
        "--enable-ep-moe --enable-deepep-moe",
    ),
    **_beginning(
        "weights lie on the device that computes; use --device cpu, or smaller ones by --quantization",
        "--offload- --ple-offload- --kt- --enable-paged-experts --paged-experts-",
    ),
    **_beginning(
        "lowbit chooses how experts are computed, see lowbit inspect; drop it",
        "--flashinfer-mxfp4- --disable-flashinfer-cutlass- --enable-w4a4- --enable-megamoe-",
    ),
    **_beginning(
        "the cache holds every layer in --kv-cache-dtype; use that",
        "--prefill-kv-cache- --enable-mamba-cache- --mamba-cache- --enable-int8-mamba- "
        "--enable-deepseek-v4-fp4- --c128-page-size --enable-encoder-swa- --enable-decoder-swa-",
    ),
    **_beginning(
        _PLAIN_FILES,
        "--remote-instance- --modelexpress- --custom-weight-loader --checkpoint-engine- --decrypted- "
        "--delete-ckpt- --engine-info-bootstrap-port --weight-cache-",
    ),
    **_beginning(
        "the server speaks plain HTTP/1.1; put a proxy before it",
        "--ssl- --enable-ssl- --enable-http2 --http2- --grpc- --smg- --sidecar",
    ),
    **_beginning(
        "the server's numbers are at /metrics under its own names; drop it",
        "--tokenizer-metrics- --extra-metric-labels --bucket- --prompt-tokens-buckets "
        "--generation-tokens-buckets --export-metrics- --kv-events-config --load-publish-endpoint "
        "--enable-forward-pass-metrics --forward-pass-metrics- --enable-trace --trace-modules --otlp-",
    ),
    **_beginning(
        "a tool for the developers of SGLang's kernels; drop it",
        "--debug- --enable-profile- --enable-layerwise- --forward-hooks --msprobe- --kv-canary-",
    ),
    **_beginning(
        "answers hold text and log-probabilities; drop it, and ask for logprobs in the request",
        "--enable-return- --return- --enable-watermark --watermark-",
    ),
    **_beginning(_NOT_PARSED, "--enable-strict-thinking"),
    **_beginning(NO_GRAMMARS, "--constrained-json-"),
    **_beginning("sessions are not kept; send the whole conversation", "--enable-streaming-session"),
    **_beginning("diffusion models are not served; drop it", "--dllm-"),
    **_beginning("there are no MLX kernels here; use --device cpu", "--mlx-"),
}


def refusal(flag: str) -> str | None:
    """Why a flag of SGLang's is refused, and what to do; None where nothing is known of it."""
    if flag in REFUSED:
        return REFUSED[flag]
    name = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag
    return next((why for start, why in REFUSED_PREFIXES.items() if name.startswith(start)), None)
