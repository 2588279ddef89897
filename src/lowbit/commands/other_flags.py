"""Flags of vLLM and llama.cpp, and lowbit's word for each, for somebody who comes from there.

None of them is accepted: the same word may mean another thing here (llama.cpp's --ctx-size is of all slots
together, vLLM's --gpu-memory-utilization of another share). Names from vLLM 0.33 and llama-server's list.
"""

from __future__ import annotations

from lowbit.commands.sglang_flags import CONFIG_SAYS, NO_ADAPTERS, NO_GRAMMARS, TEXT_ONLY

_PARALLEL = "a model is shared by --tp-size alone, on one machine; drop it"
_NOT_PARSED = "answers are text as the model writes it; drop it, and parse tool calls in the client"
_MEMORY_ONLY = "the KV cache lies in memory only; enlarge it with --mem-fraction-static or --max-total-tokens"
_DRAFTS = "there are no draft models; use --speculative-algorithm NGRAM"
_LOGS = "prompts are never logged, see --log-level; drop it"
_SAMPLING = "use --preferred-sampling-params, a JSON object, or the fields of a request"
_SAMPLERS = "there is no such sampler; drop it"
_ORIGINS = "web pages of other origins are refused; put a proxy before the server"
_PROXY = "the server speaks plain HTTP/1.1 over TCP; put a proxy before it"
_ALWAYS = "it is always so; drop it"
_OFFLOAD = "a model lies on one device; use --device cpu or cuda, or a smaller one by --quantization"
_THREADS = "use --threads, and taskset or numactl for which cores"
_ONE_MODEL = "one server serves one model; start several"
_MAPPED = "files are mapped and read once; drop it"


def _use(flag: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"use {flag}")


def _say(advice: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), advice)


# Name elsewhere -> the way out here.
OTHER_FLAGS: dict[str, str] = {
    # The model
    **_use("--model", "-m"),
    **_use(
        "MODEL: org/name, or org/name:Q4_K_M for one GGUF file of it", "-hf -hfr --hf-repo -hff --hf-file"
    ),
    **_say("use MODEL: a folder, a GGUF file or a hub id", "-mu --model-url -dr --docker-repo"),
    **_use("--served-model-name", "-a --alias"),
    **_use("--context-length", "-c --ctx-size"),
    **_use("--quantization", "-q"),
    **_use("--chat-template FILE", "--chat-template-file"),
    **_use("--default-chat-template-kwargs", "--chat-template-kwargs"),
    **_say("parts become what the template expects; drop it", "--chat-template-content-format"),
    **_say("templates are always rendered; drop it", "--jinja --no-jinja"),
    **_say(
        CONFIG_SAYS,
        "--hf-overrides --hf-config-path --rope-scaling --rope-theta --rope-scale",
    ),
    **_say(
        CONFIG_SAYS,
        "--rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor --override-kv --config-format",
    ),
    **_use("--revision", "--code-revision --tokenizer-revision"),
    **_say("set HF_TOKEN", "--hf-token -hft"),
    **_say("set HF_HUB_OFFLINE=1", "--offline"),
    **_say("lowbit generates text only; drop it", "--runner --task --convert --pooler-config --pooling"),
    **_say("lowbit generates text only; serve such a model elsewhere", "--embedding --embeddings --rerank"),
    **_say("lowbit generates text only; serve such a model elsewhere", "--reranking"),
    **_say("use lowbit inspect, or --device", "-dev --list-devices"),
    # Memory and batches
    **_use("--mem-fraction-static", "--gpu-memory-utilization --device-memory-utilization"),
    **_use("--max-total-tokens", "--kv-cache-memory-bytes --num-gpu-blocks-override"),
    **_use("--page-size", "--block-size"),
    **_use("--max-running-requests", "--max-num-seqs --max-num-active-seqs -np --parallel"),
    **_use("--max-queued-requests", "--max-num-queued-reqs"),
    **_use(
        "--chunked-prefill-size", "--max-num-batched-tokens --max-num-scheduled-tokens -b --batch-size -ub"
    ),
    **_use("--chunked-prefill-size", "--ubatch-size --long-prefill-token-threshold"),
    **_say(
        "prompts are computed in chunks; --chunked-prefill-size -1 turns it off", "--enable-chunked-prefill"
    ),
    **_use("--chunked-prefill-size -1", "--no-enable-chunked-prefill"),
    **_say("it is on; --disable-radix-cache turns it off", "--enable-prefix-caching --cache-prompt"),
    **_use("--disable-radix-cache", "--no-enable-prefix-caching --no-cache-prompt"),
    **_use("--schedule-policy", "--scheduling-policy"),
    **_use("--k-cache-dtype", "-ctk --cache-type-k"),
    **_use("--v-cache-dtype", "-ctv --cache-type-v"),
    **_say(_MEMORY_ONLY, "--swap-space --kv-offloading-size --kv-offloading-backend --kv-transfer-config"),
    **_say(_MEMORY_ONLY, "--slot-save-path -cram --cache-ram -ctxcp --ctx-checkpoints --cache-reuse"),
    **_say("the prompt must fit; raise --context-length", "--context-shift --keep"),
    **_say(
        _ALWAYS, "-cb --cont-batching -kvu --kv-unified --enable-prompt-tokens-details --async-scheduling"
    ),
    **_say(_ALWAYS, "--metrics --warmup --repack --ui --webui --swa-full --no-mmproj"),
    **_say(
        _MAPPED, "--mlock --no-mmap --mmap -lm --load-mode --safetensors-load-strategy --use-tqdm-on-load"
    ),
    **_say("the server warms itself up; drop it", "--no-warmup"),
    # Devices and kernels
    **_use("--tp-size", "-tp"),
    **_say(_PARALLEL, "-dp -pp -ep -pcp -dcp --enable-expert-parallel --headless -asc -ts -sm -mg"),
    **_say(_PARALLEL, "--api-server-count --distributed-executor-backend --all2all-backend --master-addr"),
    **_say(_PARALLEL, "--master-port --tensor-split --split-mode --main-gpu --rpc --data-parallel-rank"),
    **_say(_PARALLEL, "--data-parallel-size-local --data-parallel-address --data-parallel-backend"),
    **_say(
        _OFFLOAD, "-ngl --n-gpu-layers --gpu-layers -cmoe --cpu-moe -ncmoe --n-cpu-moe -ot --override-tensor"
    ),
    **_use("--disable-cuda-graph", "--enforce-eager"),
    **_use("--cuda-graph-bs", "--cudagraph-capture-sizes"),
    **_use("--cuda-graph-max-bs", "--max-cudagraph-capture-size --max-seq-len-to-capture"),
    **_say(
        "there is no graph to compile; --disable-cuda-graph runs every step eagerly",
        "-O -cc --compilation-config --optimization-level",
    ),
    **_say(
        "lowbit chooses kernels itself, or --attention-backend; drop it", "-fa --flash-attn --moe-backend"
    ),
    **_use("--threads", "-t -tb --threads-batch"),
    **_say(_THREADS, "-C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll --numa --threads-http"),
    # Sampling
    **_use("--random-seed", "-s --seed"),
    **_use("--sampling-defaults model or openai", "--generation-config"),
    **_say(_SAMPLING, "--temp --temperature --top-k --top-p --min-p --repeat-penalty --presence-penalty"),
    **_say(_SAMPLING, "--frequency-penalty --ignore-eos -l --logit-bias"),
    **_say(
        _SAMPLERS, "--samplers --sampler-seq --mirostat --typical --typical-p --dry-multiplier --top-nsigma"
    ),
    **_say(_SAMPLERS, "--xtc-probability --dynatemp-range --repeat-last-n"),
    **_say("requests say max_tokens; drop it", "-n --predict --n-predict"),
    **_say("requests may have up to 20; drop it", "--max-logprobs"),
    **_say(NO_GRAMMARS, "--grammar --grammar-file -j --json-schema -jf --json-schema-file"),
    **_say(NO_GRAMMARS, "--guided-decoding-backend --structured-outputs-config"),
    **_say(_DRAFTS, "-md --model-draft -hfd --hf-repo-draft --spec-model --spec-method"),
    **_use("--speculative-num-draft-tokens", "--num-speculative-tokens --spec-tokens --draft --draft-max"),
    **_use("--speculative-config", "-sc"),
    # The API
    **_say(_NOT_PARSED, "--enable-auto-tool-choice --tool-parser-plugin --reasoning-parser-plugin --tools"),
    **_say(_NOT_PARSED, "--reasoning-format --reasoning-budget -rea --reasoning --reasoning-config"),
    **_say("use --default-chat-template-kwargs", "--reasoning-effort"),
    **_say(NO_ADAPTERS, "--max-cpu-loras --lora --control-vector"),
    **_say(TEXT_ONLY, "--mmproj -mm --mmproj-url --allowed-local-media-path"),
    **_say(TEXT_ONLY, "--interleave-mm-strings --media-io-kwargs --skip-mm-profiling --media-path"),
    **_use("--drain-timeout", "--shutdown-timeout"),
    **_use("--request-timeout", "-to --timeout"),
    **_use("--log-level debug", "-v --verbose --log-verbose"),
    **_use("--log-level", "-lv --verbosity --log-verbosity --log-disable --uvicorn-log-level"),
    **_say(_LOGS, "--disable-log-requests --enable-log-requests --disable-log-stats --max-log-len"),
    **_say(_LOGS, "--disable-uvicorn-access-log --enable-log-outputs --log-file --log-prefix --log-colors"),
    **_say(_ORIGINS, "--allowed-origins --allowed-methods --allowed-headers --allow-credentials"),
    **_say(_ORIGINS, "--cors-origins --cors-methods --cors-headers --cors-credentials"),
    **_say(_PROXY, "--uds --grpc"),
    **_say("let the proxy take the prefix off", "--root-path --api-prefix"),
    **_say("lowbit runs no code of others; drop it", "--middleware --logits-processors --worker-cls"),
    **_say("lowbit runs no code of others; drop it", "--worker-extension-cls --scheduler-cls"),
    **_say("use /get_server_info or /metrics", "--slots --no-slots --props --enable-server-load-tracking"),
    **_say("requests choose the role by their messages; drop it", "--response-role"),
    **_say("the page stays; keep the port closed, or set --api-key-file", "--no-ui --no-webui"),
    **_say(_ONE_MODEL, "--models-dir --models-preset --models-max"),
    **_say("memory is given back only when the server ends; drop it", "--enable-sleep-mode"),
}


def what_instead(flag: str) -> str | None:
    """The way out for a flag of vLLM's or llama.cpp's; None where it is none of theirs."""
    return OTHER_FLAGS.get(flag)
