"""Every option once: name, type, default, help. Flags, LOWBIT_* variables and docs/options.md derive from it.

A field ``max_running_requests: int`` of ``Settings`` *is* the flag ``--max-running-requests``, the variable
``LOWBIT_MAX_RUNNING_REQUESTS`` and a row of docs/options.md; a flag beats a variable beats the default.
Flag names are SGLang's where SGLang has the option. Nothing heavy is imported here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from lowbit.errors import LowbitError, printable

# Choices that SGLang has and lowbit has not, and what does what they are chosen for.
_PICKLES = "numpy's cache of the weights; use the model's .safetensors, or pt for its pytorch_model.bin"
_PLAIN_FILES = "weights come from files: use a folder, a GGUF file or a hub id with auto"
_LOAD_FORMATS_REFUSED = (
    ("npcache", _PICKLES),
    ("dummy", "random weights answer nothing; lowbit inspect MODEL says what a model needs"),
    ("bitsandbytes", "use auto: a bitsandbytes checkpoint says so itself, and --quantization bitsandbytes "
     "quantizes a float one"),
    ("sharded_state", "shards of several devices are not joined; use the original model"),
    ("presharded", "shards of several devices are not joined; use the original model"),
    ("expert_pack", "experts are read from the GGUF file itself; use gguf"),
    ("flash_rl", "weights are not replaced while serving; use --quantization, and restart for new ones"),
    ("remote", _PLAIN_FILES),
    ("remote_instance", _PLAIN_FILES),
    ("private", _PLAIN_FILES),
    ("runai_streamer", "files are mapped, not streamed; fetch them with lowbit pull and use auto"),
    ("fastsafetensors", "files are mapped already; use safetensors"),
)  # fmt: skip
_POLICIES_REFUSED = (
    ("random", "no order is better by chance; use fcfs"),
    ("dfs-weight", "use lpm, which also runs requests with a common prefix together"),
    ("lof", "the lengths of answers are not known beforehand; use fcfs"),
    ("priority", "requests have no priorities here; use fcfs"),
    ("routing-key", "there is one engine and no router; use lpm"),
    ("hrrn", "the lengths of answers are not known beforehand; use fcfs"),
    ("shortest-prefill-first", "long prompts would wait for ever; use fcfs"),
)
_DRAFTS_REFUSED = tuple(
    (name, "there are no draft models or heads here; use NGRAM, which drafts from the sequence's own text")
    for name in ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "DFLASH", "DSPARK", "UNO", "FROZEN_KV_MTP")
)

# Backends of SGLang's that lowbit has not: they compute the same, so that its own choice serves.
_ATTENTION_SYNONYMS = (
    ("torch_native", "reference"),
    *dict.fromkeys(
        (
            *("fa3", "fa4", "flashmla", "cutlass_mla", "trtllm_mla", "trtllm_mha", "intel_amx", "hpc_ops"),
            *("flex_attention", "dsa", "nsa", "qsa", "dsv4", "compressed", "cutedsl_mla", "tokenspeed_mla"),
            *("dual_chunk_flash_attn", "llada2_cfg_flashinfer", "minicpm_flashattn", "minicpm_flashinfer"),
            *("aiter", "wave", "ascend", "intel_xpu"),
        ),
        "auto",
    ).items(),
)

Flags = Mapping[str, tuple[str, str | bool]]  # field -> the flag as written and its text, True for a switch

GROUPS = {  # in the order help and docs list them
    "model": "Model and checkpoint",
    "engine": "Engine and memory",
    "server": "Server",
    "messages": "Messages",
}


CPU_FRACTION, GPU_FRACTION = 0.4, 0.85  # what mem_fraction_static is on each
RUNNING = 64  # what max_running_requests is on a CPU

_CACHE_TYPES = ("auto", "bf16", "fp16", "f32", "fp8_e4m3", "fp8_e5m2", "int8", "int4")
_CACHES_REFUSED = tuple(
    (name, "there is no such cache; use int4, int8 or fp8_e4m3")
    for name in (
        "nvfp4",
        "mxfp8",
        "fp4_e2m1",
        "fp4_mx_block16",
        "q8_0",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "iq4_nl",
    )
)
_CACHE_SYNONYMS = (
    *(("bfloat16", "bf16"), ("float16", "fp16"), ("half", "fp16"), ("f16", "fp16")),
    *(("float32", "f32"), ("float", "f32"), ("fp32", "f32")),
    *(("fp8", "fp8_e4m3"), ("float8_e4m3fn", "fp8_e4m3"), ("float8_e5m2", "fp8_e5m2")),
)


@dataclass(frozen=True)
class Option:
    """What ``option()`` stores beside a field."""

    help: str
    group: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # further flag spellings: ("--model-path",)
    minimum: float | None = None
    maximum: float | None = None
    metavar: str = ""
    synonyms: tuple[tuple[str, str], ...] = ()  # (what others call a choice, the choice)
    refused: tuple[tuple[str, str], ...] = ()  # (another engine's choice, what to use instead)
    many: bool = False  # several words on the command line, which are joined by commas
    also: tuple[int, ...] = ()  # numbers outside the range that mean something of their own


def option(default: Any, help: str, group: str, **more: Any) -> Any:
    """A settings field with what its flag needs."""
    metadata = {"option": Option(help, group, **more)}
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """The settings of one server or engine. Field ``max_running_requests`` is ``--max-running-requests``
    and ``LOWBIT_MAX_RUNNING_REQUESTS``; a flag beats a variable beats the default."""

    model: str = option(
        "smollm2",
        "Folder, GGUF file or hub id; 'smollm2' is the embedded model.",
        "model",
        aliases=("--model-path",),
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", "model")
    tokenizer: str | None = option(
        None, "Folder or hub id of the tokenizer, if not the model's own.", "model",
        aliases=("--tokenizer-path",),
    )  # fmt: skip
    chat_template: str | None = option(
        None, "File with a chat template to use instead of the model's.", "model"
    )
    served_model_name: str | None = option(None, "Name under which the API serves the model.", "model")
    context_length: int | None = option(
        None, "Longest sequence in tokens; default: the model's own.", "model",
        aliases=("--max-context", "--max-model-len"), minimum=1,
    )  # fmt: skip
    dtype: str = option(
        "auto", "Type of unquantized weights and activations.", "model",
        choices=("auto", "bfloat16", "float16", "float32"),
        synonyms=(
            ("bf16", "bfloat16"), ("half", "float16"), ("f16", "float16"), ("float", "float32"),
            ("f32", "float32"),
        ),
    )  # fmt: skip
    load_format: str = option(
        "auto", "What the model's files must be. auto: what they are; safetensors, pt (PyTorch's pickled "
        "files, read as data), mistral (consolidated.safetensors) or gguf: an error where they are not, and "
        "gguf the choice where a folder holds others too; layered: auto, as lowbit always loads and "
        "quantizes one layer after another.", "model",
        choices=("auto", "safetensors", "pt", "mistral", "gguf", "layered"), refused=_LOAD_FORMATS_REFUSED,
    )  # fmt: skip
    quantization: str | None = option(
        None, "Method[:option=value,...] that quantizes a float model while it loads (below). Not needed for "
        "quantized checkpoints: their config says the method.", "model",
    )  # fmt: skip
    torchao_config: str | None = option(
        None, "Quantize a float model while it loads, with torchao's numerics: int8dq, int8wo, fp8wo, "
        "fp8dq-per_tensor, fp8dq-per_row, int4wo-32, -64, -128 or -256.", "model",
    )  # fmt: skip
    quantization_recipe: str | None = option(
        None, "TOML file that gives parts of a float model different methods (below).", "model"
    )
    quantization_ignore: str = option(
        "", "Patterns of layers that stay as they are, comma-separated.", "model"
    )
    gguf_type: str | None = option(
        None, "Type or mix of --quantization gguf: q4_k_m, q4_0, q8_0, ...; default: q4_k_m.", "model"
    )
    calibration_data: str | None = option(
        None, "Text for gptq and awq: a .txt file, or .jsonl with text in every line; default: built-in "
        "text.", "model",
    )  # fmt: skip
    save_quantized: str | None = option(
        None, "Folder (gguf: file) to leave the quantized checkpoint in, to be loaded without flags.", "model"
    )
    lm_head_screen: str = option(
        "auto", "An int8 copy beside an output head of 16 or 32 bits a weight, on a CPU: steps whose "
        "sequences are all greedy read it, and of the head itself only what may hold the largest logit. The "
        "tokens are the same; each of the head's weights takes 8.5 bits more. auto: where the head is a "
        "tenth or more of what a step reads.",
        "model",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    packed_cache: str = option(
        "off", "Keep what was made of the weights, quantized and packed for this CPU, and map it at the next "
        "start: off; on, in lowbit's cache folder; or a folder. It is as large as the model in memory.",
        "model",
    )  # fmt: skip
    packed_cache_gb: float = option(
        64.0, "GiB that --packed-cache may take; what was used longest ago goes first.", "model", minimum=0
    )
    strict: bool = option(
        False, "Refuse checkpoints whose config and tensors contradict each other, and layers that cannot "
        "take the method asked for.", "model",
    )  # fmt: skip
    activation_quantization: str = option(
        "none", "int8: round the inputs of weight-only integer layers, but those of the model's last layer, "
        "to int8 in groups of 32 columns, where the kernel can multiply them: faster prefill and batches, at "
        "a mean KL of about 0.003. Layers that quantize their inputs anyway stay as their checkpoint says.",
        "model",
        choices=("none", "int8"),
    )  # fmt: skip
    exact_prompts: bool = option(
        False, "Let prompts' tokens meet weights exactly as they are stored, as generated tokens always do. "
        "Without it weights are rounded for them, to bfloat16 where a scale stands for every few columns "
        "(AMX, AVX-512 with BF16), to whole numbers of 12 bits (AVX2, other AVX-512), which takes down to "
        "half of the time.",
        "model",
    )  # fmt: skip
    quantization_param_path: str | None = option(
        None, "JSON file with a scale for each layer's fp8 KV cache, instead of the checkpoint's.", "model"
    )

    device: str = option("auto", "Where to run.", "engine", choices=("auto", "cpu", "cuda"))
    tp_size: int = option(
        1, "Ranks that share every layer, a process each (tensor parallelism): a GPU for each, or a share of "
        "the cores. lowbit inspect says how a model is cut.", "engine",
        aliases=("--tp", "--tensor-parallel-size"), minimum=1, maximum=256,
    )  # fmt: skip
    threads: int | None = option(
        None, "CPU threads of a process; default: the cores it may use, shared by the ranks of --tp-size.",
        "engine", minimum=1,
    )  # fmt: skip
    kv_cache_dtype: str = option(
        "auto", "Type of the KV cache; auto: what the checkpoint was calibrated for, else bf16, or f32 for "
        "f32 models. fp8 takes the checkpoint's scales; without them, and for int8 and int4, every token "
        "and head has its own.", "engine",
        choices=_CACHE_TYPES, synonyms=_CACHE_SYNONYMS, refused=_CACHES_REFUSED,
    )  # fmt: skip
    k_cache_dtype: str = option(
        "auto", "Type of K in the KV cache; auto: as --kv-cache-dtype.", "engine",
        choices=_CACHE_TYPES, synonyms=_CACHE_SYNONYMS, refused=_CACHES_REFUSED,
    )  # fmt: skip
    v_cache_dtype: str = option(
        "auto", "Type of V in the KV cache; auto: as --kv-cache-dtype.", "engine",
        choices=_CACHE_TYPES, synonyms=_CACHE_SYNONYMS, refused=_CACHES_REFUSED,
    )  # fmt: skip
    page_size: int = option(16, "Tokens in a KV page.", "engine", choices=("16",))
    mem_fraction_static: float | None = option(
        None,
        "CPU: share of the memory left free by the weights that the KV pool may take, "
        f"{CPU_FRACTION} unless set. GPU: share of all its memory for weights and KV pool together, "
        f"{GPU_FRACTION} unless set; the rest is for the step's own tensors and CUDA graphs.",
        "engine",
        minimum=0.01,
        maximum=0.95,
    )
    max_total_tokens: int | None = option(
        None, "Tokens the KV pool holds; default: by memory.", "engine", minimum=16
    )
    max_running_requests: int | None = option(
        None, f"Sequences that run at once. Default: {RUNNING}; on a GPU with 35 GiB 128, with 60 GiB 256, "
        "unless recurrent layers keep a state for each.", "engine", minimum=1,
    )  # fmt: skip
    max_queued_requests: int | None = option(
        None, "Requests that may wait; default: max(64, 4 x running).", "engine", minimum=1
    )
    chunked_prefill_size: int | None = option(
        None, "Prompt tokens computed in one step; -1: whole prompts. Default: 512; on a GPU 2048, with 35 "
        "GiB 4096, with 60 GiB 8192.", "engine", minimum=1, also=(-1,),
    )  # fmt: skip
    schedule_policy: str = option(
        "fcfs", "Which waiting request runs next. fcfs: first come, first served; lpm: the one with the "
        "longest prefix in the cache, but none is passed over more than 16 times.", "engine",
        choices=("fcfs", "lpm"), refused=_POLICIES_REFUSED, synonyms=(("fifo", "fcfs"),),
    )  # fmt: skip
    num_continuous_decode_steps: int | None = option(
        None, "Decode steps taken in one go on a CPU; their tokens come together. Default: as many as take "
        "16 ms, 8 at most.", "engine", minimum=1, maximum=64,
    )  # fmt: skip
    disable_radix_cache: bool = option(False, "Do not reuse the KV cache of shared prefixes.", "engine")
    disable_cuda_graph: bool = option(
        False, "Run every step eagerly (CUDA graphs, CPU step plans).", "engine",
        aliases=("--disable-decode-cuda-graph",),
    )  # fmt: skip
    cuda_graph_bs: str = option(
        "", "Sequences of the steps that get a CUDA graph, 1 2 4 8 …; others are padded to the next of them. "
        "Default: 1, 2, 4, 8, 16, 24 … up to --cuda-graph-max-bs.", "engine", many=True, metavar="N [N ...]",
        aliases=("--cuda-graph-bs-decode",),
    )  # fmt: skip
    cuda_graph_max_bs: int | None = option(
        None, "Most sequences of a step with a CUDA graph; larger ones run eagerly. Default: "
        "--max-running-requests, but at most 256.", "engine", minimum=1,
        aliases=("--cuda-graph-max-bs-decode",),
    )  # fmt: skip
    disable_overlap_schedule: bool = option(
        False, "On a GPU, finish each step before the next is prepared.", "engine"
    )
    speculative_algorithm: str | None = option(
        None, "NGRAM: compute several tokens of a sequence in one step where its next ones can be guessed "
        "from its own text, as in copies and edits. Answers stay the same, token for token.", "engine",
        choices=("NGRAM",), synonyms=(("ngram", "NGRAM"),), refused=_DRAFTS_REFUSED,
    )  # fmt: skip
    speculative_num_draft_tokens: int = option(
        12, "Guessed tokens of a sequence in one step, at most; fewer while they are wrong, and when many "
        "sequences run.", "engine", minimum=1, maximum=64,
    )  # fmt: skip
    speculative_ngram_min_match_window_size: int = option(
        2, "Tokens that must have stood in the text before what is guessed.", "engine", minimum=1, maximum=64
    )
    speculative_ngram_max_match_window_size: int = option(
        12, "Of several places the one where more tokens match is taken, up to so many.", "engine",
        minimum=1, maximum=64,
    )  # fmt: skip
    speculative_config: str | None = option(
        None, "The same as a JSON object of vLLM's: {\"method\": \"ngram\", \"num_speculative_tokens\": 8}, "
        "with prompt_lookup_min and prompt_lookup_max.", "engine",
    )  # fmt: skip
    linear_kernel: str = option(
        "auto", "Kernel of the linear layers. auto: the first that takes a layer, or one that timings on "
        "disk show to be faster with the same weights; a kernel's name: for all layers it is for; "
        "pattern=NAME: for those that match, several comma-separated. cpu_dequantized holds quantized "
        "weights as bf16, rounded. lowbit inspect says what each layer gets and what else would run it.",
        "engine",
        aliases=("--linear-backend",),
    )  # fmt: skip
    attention_backend: str = option(
        "auto", "Attention kernels. auto: the first that serves the KV cache; triton: lowbit's own on a GPU; "
        "flashinfer: FlashInfer's (pip install 'lowbit[flashinfer]'), without CUDA graphs; reference: in "
        "PyTorch. One that cannot serve the cache is an error.", "engine",
        choices=("auto", "triton", "flashinfer", "reference"), synonyms=_ATTENTION_SYNONYMS,
    )  # fmt: skip
    kernel_timings: str = option(
        "auto", "On a CPU: time each kind of layer beside bf16, lowbit's and torch's (0.1 s each, kept on "
        "disk), log the ratios and warn where bf16 is faster; a server does it once it is ready and idle, "
        "with --strict before. auto: lowbit serve only; off: nor do timings on disk count for "
        "--linear-kernel auto.",
        "engine", choices=("auto", "on", "off"),
    )  # fmt: skip
    random_seed: int | None = option(None, "Seed of requests that bring none.", "engine")

    sampling_defaults: str = option(
        "model", "How requests that do not say it are sampled. model: as its generation_config.json says, "
        "else as OpenAI does (GGUF files say nothing); openai: temperature 1, nothing cut.", "engine",
        choices=("model", "openai"),
    )  # fmt: skip
    preferred_sampling_params: str | None = option(
        None, "JSON object with temperature, top_p, top_k, min_p or repetition_penalty for requests that do "
        "not say it, before what --sampling-defaults gives: '{\"temperature\": 0.2, \"top_p\": 0.9}'.",
        "engine", aliases=("--override-generation-config",),
    )  # fmt: skip

    host: str = option("127.0.0.1", "Address to listen on.", "server")
    port: int = option(30000, "Port to listen on.", "server", minimum=1, maximum=65535)
    api_key: str | None = option(None, "Key that requests must bring as a bearer token.", "server")
    api_key_file: str | None = option(None, "File with one API key a line.", "server")
    max_body_mb: int = option(8, "Largest request body in MiB.", "server", minimum=1)
    max_connections: int = option(1024, "Connections open at once.", "server", minimum=1)
    queue_timeout: float = option(60.0, "Seconds a request may wait before it gets 503.", "server", minimum=0)
    request_timeout: float = option(600.0, "Seconds a request may take in all.", "server", minimum=1)
    drain_timeout: float = option(30.0, "Seconds running requests get after SIGTERM.", "server", minimum=0)
    watchdog_timeout: float = option(
        300.0, "Seconds that a step may do nothing before the engine is killed and started again.", "server",
        minimum=1,
    )  # fmt: skip
    soft_watchdog_timeout: float = option(
        60.0, "Seconds that a step may do nothing before its stack is logged and /readyz says 503.", "server",
        minimum=1,
    )  # fmt: skip
    allowed_hosts: str = option(
        "", "Extra Host header values to accept, comma-separated; '*' accepts any.", "server"
    )
    incremental_streaming_output: bool = option(
        False, "Streams of /generate carry the new text alone, not all the text so far.", "server",
        aliases=("--stream-output",),
    )  # fmt: skip
    stream_response_default_include_usage: bool = option(
        False, "Streams end with a chunk of usage also where the request does not ask for it.", "server",
        aliases=("--enable-force-include-usage",),
    )  # fmt: skip
    default_chat_template_kwargs: str | None = option(
        None, "JSON object of variables for the chat template, where a request's chat_template_kwargs do not "
        "say them: '{\"enable_thinking\": false}'.", "server",
    )  # fmt: skip
    log_level: str = option(
        "info", "How much to log.", "server", choices=("debug", "info", "warning", "error")
    )
    json_errors: bool = option(False, "Print the error that ends a command as one JSON line.", "messages")
    debug: bool = option(False, "Print the traceback of an error as well.", "messages")

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Field name -> its option."""
        return options_of(cls)

    @classmethod
    def from_sources(cls, flags: Flags, environ: Mapping[str, str]) -> Settings:
        """Settings from what stands on the command line and in the environment, every value checked."""
        values: dict[str, object] = {}
        for name in cls.options():
            if name in flags:
                values[name] = parse(cls, name, *flags[name])
            elif (text := environ.get(variable_of(name), "")) and not _is_service_link(text):
                values[name] = parse(cls, name, variable_of(name), text)
        return cls(**values)  # type: ignore[arg-type]

    def check(self) -> Settings:
        """Every field against its type, choices and range, for settings made in Python; returns self."""
        for name in self.options():
            value = getattr(self, name)
            check(type(self), name, value, name)
        return self

    @property
    def running_limit(self) -> int:
        """How many sequences run at once; ``engine.load`` sets what depends on the device."""
        return self.max_running_requests or RUNNING

    def queue_limit(self, running: int) -> int:
        """How many requests may wait where so many run."""
        return self.max_queued_requests or max(64, 4 * running)


def flag_of(name: str) -> str:
    """``max_body_mb`` -> ``--max-body-mb``."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """``max_body_mb`` -> ``LOWBIT_MAX_BODY_MB``."""
    return "LOWBIT_" + name.upper()


def options_of(owner: type) -> dict[str, Option]:
    """The options of a dataclass whose fields were made by ``option()``."""
    return {f.name: f.metadata["option"] for f in fields(owner) if "option" in f.metadata}


@cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner)


def type_of(owner: type, name: str) -> tuple[type, bool]:
    """The type of a field's value and whether it may be None."""
    hint = _hints(owner)[name]
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
    return kinds[0], NoneType in get_args(hint)


def default_of(owner: type, name: str) -> object:
    """What the field is when nobody sets it."""
    entry: Field[object] = owner.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return None if entry.default is MISSING else entry.default


def parse(owner: type, name: str, spelled: str, text: str | bool) -> object:
    """The value that ``text`` means for field ``name``; ``spelled`` is the flag or variable as written."""
    kind, _ = type_of(owner, name)
    if isinstance(text, bool):
        return text
    text = dict(options_of(owner)[name].synonyms).get(text, text)
    value: object = text
    if kind is bool:
        value = _SWITCH.get(text.strip().lower())
        if value is None:
            raise _bad(spelled, "is a switch: use 1 or 0", text)
    elif kind is int or kind is float:
        try:
            value = kind(text.strip())
        except ValueError:
            raise _bad(spelled, f"needs {_NOUN[kind]}", text) from None
    check(owner, name, value, spelled)
    return value


def check(owner: type, name: str, value: object, spelled: str) -> None:
    """E0103 unless ``value`` has the type, is one of the choices and lies in the range of field ``name``."""
    kind, optional = type_of(owner, name)
    rule = options_of(owner)[name]
    if value is None and optional:
        return
    number = kind is float and isinstance(value, int)
    if not (number or isinstance(value, kind)) or (isinstance(value, bool) and kind is not bool):
        raise _bad(spelled, f"needs {_NOUN[kind]}", value)
    if instead := dict(rule.refused).get(str(value)):
        raise LowbitError("E0105", f"{spelled} {printable(value)}: {instead}")
    if rule.choices and str(value) not in rule.choices:
        one = len(rule.choices) == 1
        allowed = f"can only be {rule.choices[0]}" if one else f"must be one of {', '.join(rule.choices)}"
        raise _bad(spelled, allowed, value, did_you_mean(str(value), rule.choices))
    if isinstance(value, (int, float)) and kind is not bool and value not in rule.also:
        low, high = rule.minimum, rule.maximum
        if (
            not math.isfinite(value)
            or (low is not None and value < low)
            or (high is not None and value > high)
        ):
            raise _bad(spelled, f"must be {range_text(rule)}", value)


_SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
_NOUN = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def _bad(spelled: str, rule: str, found: object, hint: str = "") -> LowbitError:
    return LowbitError("E0103", f"{spelled} {rule}, got {printable(repr(found))}{hint}")


def range_text(rule: Option) -> str:
    """The range of a number in words, or '' where it has none."""
    low, high = rule.minimum, rule.maximum
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}"
    if low is not None:
        return ", or ".join([f"{low:g} or more", *map(str, rule.also)])
    return f"at most {high:g}" if high is not None else "finite"


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or nothing where none is near."""
    close = difflib.get_close_matches(found, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# Read before any option is: they choose the native library or force a rare path in tests.
ENVIRONMENT_ONLY = (
    *("LOWBIT_ISA", "LOWBIT_TEST_RETRACT", "LOWBIT_TEST_EVICT", "LOWBIT_TEST_CHUNK"),
    "LOWBIT_TEST_OVERLAP",
)


def _is_service_link(text: str) -> bool:
    """A Kubernetes service called "lowbit" sets LOWBIT_PORT=tcp://… in every pod: that is no option."""
    return text.startswith(("tcp://", "udp://"))


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for each LOWBIT_* variable that is no option but looks like a misspelt one."""
    known = [variable_of(name) for name in Settings.options()]
    warnings = []
    for variable in sorted(environ):
        if not variable.startswith("LOWBIT_") or variable in (*known, *ENVIRONMENT_ONLY):
            continue
        if nearest := difflib.get_close_matches(variable, known, n=1, cutoff=0.8):
            warnings.append(f"{variable} is no option of lowbit; did you mean {nearest[0]}?")
    return warnings
