"""Every option through its three doors (flag, variable, Python), and every way to get one wrong."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from lowbit.errors import LowbitError
from lowbit.settings import (
    GROUPS,
    Settings,
    check,
    default_of,
    flag_of,
    option,
    parse,
    type_of,
    unknown_variables,
    variable_of,
)

# A legal text for every field and the value it means; a new field without a row fails the test below.
EXAMPLES: dict[str, tuple[str, object]] = {
    "model": ("/models/a b", "/models/a b"),
    "sampling_defaults": ("openai", "openai"),
    "preferred_sampling_params": ('{"temperature": 0.2}', '{"temperature": 0.2}'),
    "incremental_streaming_output": ("1", True),
    "revision": ("v1.0", "v1.0"),
    "strict": ("true", True),
    "quantization_param_path": ("scales.json", "scales.json"),
    "activation_quantization": ("int8", "int8"),
    "tokenizer": ("org/base", "org/base"),
    "chat_template": ("x.jinja", "x.jinja"),
    "served_model_name": ("mine", "mine"),
    "context_length": ("4096", 4096),
    "dtype": ("float32", "float32"),
    "quantization": ("int4", "int4"),
    "load_format": ("gguf", "gguf"),
    "schedule_policy": ("lpm", "lpm"),
    "num_continuous_decode_steps": ("4", 4),
    "lm_head_screen": ("off", "off"),
    "exact_prompts": ("true", True),
    "packed_cache": ("on", "on"),
    "packed_cache_gb": ("12.5", 12.5),
    "speculative_algorithm": ("ngram", "NGRAM"),
    "speculative_num_draft_tokens": ("16", 16),
    "speculative_ngram_min_match_window_size": ("3", 3),
    "speculative_ngram_max_match_window_size": ("8", 8),
    "speculative_config": ('{"method": "ngram"}', '{"method": "ngram"}'),
    "linear_kernel": ("*.down_proj=reference", "*.down_proj=reference"),
    "attention_backend": ("torch_native", "reference"),
    "kernel_timings": ("off", "off"),
    "torchao_config": ("int8wo", "int8wo"),
    "quantization_recipe": ("mixed.toml", "mixed.toml"),
    "quantization_ignore": ("*.o_proj,layers.0", "*.o_proj,layers.0"),
    "gguf_type": ("q5_k_m", "q5_k_m"),
    "calibration_data": ("texts.jsonl", "texts.jsonl"),
    "save_quantized": ("out", "out"),
    "device": ("cpu", "cpu"),
    "tp_size": ("2", 2),
    "threads": ("3", 3),
    "kv_cache_dtype": ("f32", "f32"),
    "k_cache_dtype": ("int8", "int8"),
    "v_cache_dtype": ("int4", "int4"),
    "page_size": ("16", 16),
    "mem_fraction_static": ("0.25", 0.25),
    "max_total_tokens": ("2048", 2048),
    "max_running_requests": ("7", 7),
    "max_queued_requests": ("9", 9),
    "chunked_prefill_size": ("128", 128),
    "disable_radix_cache": ("1", True),
    "disable_cuda_graph": ("true", True),
    "cuda_graph_bs": ("1,2,8", "1,2,8"),
    "cuda_graph_max_bs": ("32", 32),
    "disable_overlap_schedule": ("1", True),
    "random_seed": ("-5", -5),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("8080", 8080),
    "api_key": ("secret", "secret"),
    "api_key_file": ("keys.txt", "keys.txt"),
    "max_body_mb": ("2", 2),
    "max_connections": ("10", 10),
    "queue_timeout": ("1.5", 1.5),
    "request_timeout": ("30", 30.0),
    "drain_timeout": ("0", 0.0),
    "watchdog_timeout": ("900", 900.0),
    "soft_watchdog_timeout": ("90", 90.0),
    "allowed_hosts": ("a.example,b.example", "a.example,b.example"),
    "stream_response_default_include_usage": ("1", True),
    "default_chat_template_kwargs": ('{"enable_thinking": false}', '{"enable_thinking": false}'),
    "log_level": ("debug", "debug"),
    "json_errors": ("on", True),
    "debug": ("yes", True),
}


def test_every_field_has_an_option_a_group_and_an_example() -> None:
    names = [f.name for f in fields(Settings)]
    assert names == list(Settings.options())
    assert {rule.group for rule in Settings.options().values()} == set(GROUPS)
    assert set(EXAMPLES) == set(names)


def test_no_two_options_share_a_spelling() -> None:
    spellings = [flag_of(name) for name in Settings.options()]
    spellings += [alias for rule in Settings.options().values() for alias in rule.aliases]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("name", list(Settings.options()))
def test_flag_and_variable_mean_the_same(name: str) -> None:
    text, value = EXAMPLES[name]
    by_flag = Settings.from_sources({name: (flag_of(name), text)}, {})
    by_variable = Settings.from_sources({}, {variable_of(name): text})
    assert by_flag == by_variable
    assert getattr(by_flag, name) == value and type(getattr(by_flag, name)) is type(value)
    for other in Settings.options():
        if other != name:
            assert getattr(by_flag, other) == default_of(Settings, other)


def test_a_flag_beats_a_variable_beats_the_default() -> None:
    environ = {"LOWBIT_PORT": "1111", "LOWBIT_HOST": "10.0.0.1", "LOWBIT_THREADS": ""}
    settings = Settings.from_sources({"port": ("--port", "2222")}, environ)
    assert (settings.port, settings.host) == (2222, "10.0.0.1")
    assert settings.threads is None, "an empty variable is not set"
    assert settings.max_body_mb == 8


def test_defaults_are_legal() -> None:
    Settings().check()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("port", "0", "--port must be between 1 and 65535, got 0"),
        ("port", "65536", "--port must be between 1 and 65535, got 65536"),
        ("port", "80.0", "--port needs a whole number, got '80.0'"),
        ("port", "", "--port needs a whole number, got ''"),
        ("threads", "0", "--threads must be 1 or more, got 0"),
        ("mem_fraction_static", "nan", "--mem-fraction-static must be between 0.01 and 0.95, got nan"),
        ("mem_fraction_static", "1", "--mem-fraction-static must be between 0.01 and 0.95, got 1.0"),
        ("queue_timeout", "inf", "--queue-timeout must be 0 or more, got inf"),
        ("queue_timeout", "soon", "--queue-timeout needs a number, got 'soon'"),
        ("chunked_prefill_size", "0", "--chunked-prefill-size must be 1 or more, or -1, got 0"),
        ("chunked_prefill_size", "-2", "--chunked-prefill-size must be 1 or more, or -1, got -2"),
        (
            "schedule_policy",
            "lmp",
            "--schedule-policy must be one of fcfs, lpm, got 'lmp'; did you mean 'lpm'?",
        ),
        ("page_size", "32", "--page-size can only be 16, got 32"),
        (
            "dtype",
            "bfloat",
            "--dtype must be one of auto, bfloat16, float16, float32, got 'bfloat'; did you mean 'bfloat16'?",
        ),
        ("device", "tpu", "--device must be one of auto, cpu, cuda, got 'tpu'; did you mean 'cpu'?"),
        ("log_level", "loud", "--log-level must be one of debug, info, warning, error, got 'loud'"),
        ("disable_radix_cache", "maybe", "--disable-radix-cache is a switch: use 1 or 0, got 'maybe'"),
        ("max_body_mb", "1\x1b[31m", "--max-body-mb needs a whole number, got '1\\x1b[31m'"),
    ],
)
def test_bad_values_say_what_is_allowed(name: str, text: str, message: str) -> None:
    with pytest.raises(LowbitError) as caught:
        Settings.from_sources({name: (flag_of(name), text)}, {})
    assert (caught.value.code, caught.value.message) == ("E0103", message)
    assert caught.value.exit_code == 2


def test_a_bad_variable_is_named_as_the_variable() -> None:
    with pytest.raises(LowbitError, match="LOWBIT_MAX_RUNNING_REQUESTS needs a whole number, got 'many'"):
        Settings.from_sources({}, {"LOWBIT_MAX_RUNNING_REQUESTS": "many"})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *(
            ("dtype", "half", "float16"),
            ("dtype", "bf16", "bfloat16"),
            ("kv_cache_dtype", "bfloat16", "bf16"),
        ),
        *(("kv_cache_dtype", "fp8", "fp8_e4m3"), ("kv_cache_dtype", "float8_e4m3fn", "fp8_e4m3")),
        *(("kv_cache_dtype", "half", "fp16"), ("v_cache_dtype", "float8_e5m2", "fp8_e5m2")),
    ],
)
def test_the_words_other_engines_use_for_a_choice(name: str, text: str, value: str) -> None:
    assert getattr(Settings.from_sources({name: (flag_of(name), text)}, {}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", True), ("port", "80"), ("threads", 1.0), ("dtype", "int4"), ("model", None), ("debug", 1)],
)
def test_settings_made_in_python_are_checked_too(name: str, value: object) -> None:
    with pytest.raises(LowbitError) as caught:
        Settings(**{name: value}).check()  # type: ignore[arg-type]
    assert caught.value.code == "E0103" and caught.value.message.startswith(f"{name} ")


def test_a_kubernetes_service_link_is_no_option() -> None:
    """A service named lowbit puts LOWBIT_PORT=tcp://… into every pod of its namespace."""
    assert Settings.from_sources({}, {"LOWBIT_PORT": "tcp://10.0.0.7:30000"}).port == 30000


def test_misspelt_variables_are_noticed_and_foreign_ones_are_not() -> None:
    environ = {
        "LOWBIT_MAX_RUNING_REQUESTS": "3",
        "LOWBIT_SERVICE_HOST": "10.0.0.7",
        "LOWBIT_ISA": "scalar",
        "LOWBIT_PORT": "1",
        "HOME": "/",
    }
    assert unknown_variables(environ) == [
        "LOWBIT_MAX_RUNING_REQUESTS is no option of lowbit; did you mean LOWBIT_MAX_RUNNING_REQUESTS?"
    ]


def test_the_queue_follows_the_running_requests() -> None:
    assert Settings().running_limit == 64
    assert Settings().queue_limit(64) == 256
    assert Settings().queue_limit(2) == 64
    assert Settings(max_queued_requests=5).queue_limit(256) == 5


@dataclass
class Own:
    """Another class of options, as the sampling options of ``lowbit chat`` are."""

    ratio: float | None = option(None, "A ratio.", "own", maximum=1)
    count: int = option(3, "A count.", "own")


def test_options_of_another_class() -> None:
    assert (type_of(Own, "ratio"), type_of(Own, "count")) == ((float, True), (int, False))
    assert parse(Own, "ratio", "--ratio", "-2") == -2.0
    assert parse(Own, "count", "--count", "-2") == -2
    check(Own, "ratio", 1, "ratio")
    with pytest.raises(LowbitError, match=r"--ratio must be at most 1, got 1\.5"):
        parse(Own, "ratio", "--ratio", "1.5")
    with pytest.raises(LowbitError, match="--ratio must be at most 1, got -inf"):
        parse(Own, "ratio", "--ratio", "-inf")
