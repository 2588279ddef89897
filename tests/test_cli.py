"""The command line: words to settings, and whatever goes wrong to one line and an exit status.

Most tests call ``main`` in this process with the server and the engine replaced; a few start Python to see
what is imported and how a pipe or an interrupt ends.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from lowbit.cli import COMMANDS, main, parser_of
from lowbit.commands.arguments import Parser, parse_arguments
from lowbit.commands.other_flags import OTHER_FLAGS
from lowbit.commands.sglang_flags import (
    COMPARED,
    ONLY,
    REFUSED,
    REFUSED_PREFIXES,
    WITHOUT_EFFECT,
    refusal,
)
from lowbit.engine.messages import EngineReady
from lowbit.error_catalogue import CATALOGUE
from lowbit.errors import LowbitError
from lowbit.settings import Settings, flag_of


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("LOWBIT_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that ``lowbit serve`` called the server with."""
    calls: list[Settings] = []
    stub = ModuleType("lowbit.server.app")

    def serve(
        settings: Settings, on_ready: Callable[..., None], *, on_progress: Callable[..., None], engine: None
    ) -> int:
        calls.append(settings)
        on_progress(1, 2, "weights")
        ready = EngineReady(
            model_name="m\n",
            context_length=8192,
            pool_tokens=65536,
            page_size=16,
            vocab_size=100,
            max_running=64,
            details={"kernels": "avx2"},
        )
        on_ready(ready, "http://127.0.0.1:30000")
        return 0

    stub.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lowbit.server.app", stub)
    monkeypatch.setattr("lowbit.server.engine_start.EngineProcess", nullcontext)
    return calls


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make ``lowbit serve`` raise."""

    def serve(*arguments: object, **keywords: object) -> int:
        raise error

    stub = ModuleType("lowbit.server.app")
    stub.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lowbit.server.app", stub)
    monkeypatch.setattr("lowbit.server.engine_start.EngineProcess", nullcontext)


READY = (
    "lowbit: ready: m\\n on http://127.0.0.1:30000, context 8 192 tokens, KV cache 65 536 tokens, "
    "64 requests at once\nlowbit: kernels: avx2\n"
)


def test_serve_without_words_serves_the_embedded_model(
    served: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve"]) == 0
    assert served == [Settings()]
    assert capsys.readouterr() == ("", READY), "no bar where stderr is no terminal"


@pytest.mark.parametrize(
    "words",
    [
        ["m", "--port", "81", "--threads", "2"],
        ["--port", "81", "m", "--threads=2"],
        ["--model-path", "m", "--threads", "2", "--port=81"],
        ["--model", "m", "m", "--port", "80", "--threads", "2", "--port", "81"],
    ],
)
def test_the_model_is_a_word_or_a_flag_and_the_last_flag_counts(
    served: list[Settings], words: list[str]
) -> None:
    assert main(["serve", *words]) == 0
    assert served == [Settings(model="m", port=81, threads=2)]


def test_sglangs_launch_line(served: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model-path org/m --tokenizer-path org/t --host 0.0.0.0 --port 30001 --context-length 4096"
    words += " --mem-fraction-static 0.3 --served-model-name m --chunked-prefill-size 256 --dtype half"
    words += " --disable-radix-cache --disable-cuda-graph --tp-size 1 --dp 1 --attention-backend triton"
    words += " --cuda-graph-bs 1 2 4 --cuda-graph-max-bs 4 --disable-overlap-schedule"
    words += " --sampling-backend pytorch"
    words += " --max-running-requests 8 --max-total-tokens 8192 --random-seed 1 --enable-metrics --api-key k"
    assert main(["serve", *words.split()]) == 0
    assert served == [
        Settings(
            model="org/m",
            tokenizer="org/t",
            host="0.0.0.0",
            port=30001,
            context_length=4096,
            mem_fraction_static=0.3,
            served_model_name="m",
            chunked_prefill_size=256,
            dtype="float16",
            disable_radix_cache=True,
            disable_cuda_graph=True,
            cuda_graph_bs="1,2,4",
            cuda_graph_max_bs=4,
            disable_overlap_schedule=True,
            max_running_requests=8,
            max_total_tokens=8192,
            random_seed=1,
            api_key="k",
            attention_backend="triton",
        )
    ]
    notes = capsys.readouterr().err.splitlines()
    assert notes[1:] == READY.splitlines()
    assert notes[0].startswith("lowbit: note: without effect here: --sampling-backend (")
    assert "--enable-metrics (always on)" in notes[0]


SHAPES = {"switch": [], "value": ["x"], "values": ["1", "2"]}


def test_every_sglang_flag_of_the_lists_is_taken(
    served: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{flag}={only}" for flag, (only, _) in ONLY.items()]
    for flag, (arity, _) in WITHOUT_EFFECT.items():
        words += [flag, *SHAPES[arity]]
    assert main(["serve", *words]) == 0
    assert served == [Settings()]
    note = capsys.readouterr().err.splitlines()[0]
    assert all(f"{flag} ({reason})" in note for flag, (_, reason) in WITHOUT_EFFECT.items())
    own = {flag_of(name) for name in Settings.options()}
    assert not own & {*ONLY, *WITHOUT_EFFECT, *REFUSED}
    assert len({*ONLY, *WITHOUT_EFFECT, *REFUSED}) == len(ONLY) + len(WITHOUT_EFFECT) + len(REFUSED)
    assert set(COMPARED) <= set(Settings.options())


@pytest.mark.parametrize("flag", ONLY)
def test_what_there_is_one_of_can_be_nothing_else(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    only, why = ONLY[flag]
    assert main(["serve", f"{flag}=7"]) == 2
    assert capsys.readouterr().err == f"lowbit: error[E0106]: {flag} 7: {why}; use {flag} {only}\n"


@pytest.mark.parametrize("flag", REFUSED)
def test_refused_flags_say_what_instead(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([flag], [flag, "x"], [f"{flag}=x"], ["m", flag]):
        assert main(["serve", *words]) == 2
        assert capsys.readouterr().err == f"lowbit: error[E0105]: {flag}: {REFUSED[flag]}\n"


def test_every_flag_of_sglang_is_taken_or_refused_by_name() -> None:
    """With what follows it; none is unknown, and none leaves its value behind as the model's name."""
    listed = (Path(__file__).parent / "sglang_flags.txt").read_text().splitlines()[1:]
    parser, unlike = parser_of("serve"), []
    for flag, shape in map(str.split, listed):
        words = [[flag, *(SHAPES | {"toggle": []})[shape]]]
        words += [[f"--no-{flag[2:]}"]] if shape == "toggle" else []
        for line in words:
            try:
                taken = vars(parse_arguments(parser, line))
                if taken["MODEL"] is not None or not (taken["given"] or taken["without_effect"]):
                    unlike.append((line, taken))
            except LowbitError as error:
                if error.code not in ("E0105", "E0106") or not error.message.startswith(line[0]):
                    unlike.append((line, error.message))
    assert len(listed) > 540 and not unlike


def error_of(parser: Parser, words: list[str]) -> str:
    with pytest.raises(LowbitError) as caught:
        parse_arguments(parser, words)
    return str(caught.value)


def test_what_begins_like_a_refused_flag_is_refused() -> None:
    """One that is no option or flag without effect; of the switch's other half too."""
    server, chat = parser_of("serve"), parser_of("chat")
    for start in REFUSED_PREFIXES:
        for flag in (f"{start}zz", f"--no-{start[2:]}zz"):
            assert error_of(server, [flag, "x"]) == f"error[E0105]: {flag}: {refusal(start + 'zz')}"
        assert "unknown option" in error_of(chat, [f"{start}zz"]), "only a server takes a server's flags"


def test_flags_of_vllm_and_llama_cpp_lead_to_lowbits() -> None:
    parser = parser_of("serve")
    for flag, told in OTHER_FLAGS.items():
        for words in ([flag], [flag, "8"], [f"{flag}=8"], ["m", "--port", "81", flag, "8"]):
            assert error_of(parser, words) == f"error[E0102]: unknown option {flag}; {told}"


def test_the_flags_that_others_flags_lead_to_exist() -> None:
    own = set(parser_of("serve")._option_string_actions)
    advice = [*OTHER_FLAGS.values(), *REFUSED.values(), *REFUSED_PREFIXES.values()]
    advice += [why for _, why in (*WITHOUT_EFFECT.values(), *ONLY.values())]
    told = {flag for text in advice for flag in re.findall(r"--[a-z-]+", text)}
    assert told <= own and len(told) > 30
    assert not own & set(OTHER_FLAGS)
    assert not any(refusal(flag) for flag in OTHER_FLAGS), "what SGLang has too is refused by its name"


def test_a_commands_own_flag_is_not_anothers(capsys: pytest.CaptureFixture[str]) -> None:
    """generate has --temperature; pull has no engine to say anything of."""
    words = ["--temperature", "0.5", "--prompt", "x"]
    assert parse_arguments(parser_of("generate"), words).given["temperature"] == ("--temperature", "0.5")
    assert main(["pull", "--max-num-seqs", "8"]) == 2
    assert capsys.readouterr().err.startswith("lowbit: error[E0102]: unknown option --max-num-seqs")


REFUSED_VALUES = [
    (flag_of(name), value, instead)
    for name, rule in Settings.options().items()
    for value, instead in rule.refused
]


@pytest.mark.parametrize(("flag", "value", "instead"), REFUSED_VALUES)
def test_refused_values_say_what_instead(
    flag: str, value: str, instead: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", flag, value]) == 2
    assert capsys.readouterr().err == f"lowbit: error[E0105]: {flag} {value}: {instead}\n"
    monkeypatch.setenv("LOWBIT" + flag[1:].replace("-", "_").upper(), value)
    assert main(["serve"]) == 2
    assert value in capsys.readouterr().err


def test_sglangs_memory_and_scheduling_flags(served: list[Settings]) -> None:
    words = "--load-format layered --schedule-policy lpm --chunked-prefill-size -1 --dtype bfloat16"
    assert main(["serve", "m", *words.split()]) == 0
    expected = {"load_format": "layered", "schedule_policy": "lpm", "chunked_prefill_size": -1}
    assert served == [Settings(model="m", dtype="bfloat16", **expected)]
    served[0].check()


def test_variables_reach_the_server(served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_MODEL", "m")
    monkeypatch.setenv("LOWBIT_PORT", "81")
    assert main(["serve", "--port", "82"]) == 0
    assert served == [Settings(model="m", port=82)]


def test_a_misspelt_variable_is_a_warning(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWBIT_THREAD", "2")
    assert main(["serve"]) == 0
    expected = "lowbit: warning: LOWBIT_THREAD is no option of lowbit; did you mean LOWBIT_THREADS?\n"
    assert capsys.readouterr().err == expected + READY


def test_the_servers_exit_status_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("lowbit.server.app")
    stub.serve = lambda *arguments, **keywords: 9  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lowbit.server.app", stub)
    assert main(["serve"]) == 9


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (LowbitError("E0203", "x is short"), 3, "lowbit: error[E0203]: x is short"),
        (
            FileNotFoundError(2, "No such file or directory", "a\nb"),
            7,
            "lowbit: error[E0300]: a\\nb: No such file or directory",
        ),
        (
            MemoryError(),
            5,
            "lowbit: error[E0500]: out of memory; close other programs, or use a smaller model or context",
        ),
        (
            ValueError("odd\nthing"),
            70,
            "lowbit: error[E0700]: unexpected ValueError: odd\\nthing. This is a fault in lowbit; "
            "--debug shows where",
        ),
        (
            AssertionError(),
            70,
            "lowbit: error[E0700]: unexpected AssertionError. This is a fault in lowbit; --debug shows where",
        ),
        (
            OSError("no file at all"),
            70,
            "lowbit: error[E0700]: unexpected OSError: no file at all. This is a fault in lowbit; "
            "--debug shows where",
        ),
    ],
)
def test_any_exception_is_one_line_and_a_status(
    error: Exception,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, error)
    assert main(["serve"]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


def test_json_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, LowbitError("E0203", 'x "is" short'))
    expected = {"error": {"code": "E0203", "message": 'x "is" short', "exit_code": 3}}
    for words in (["serve", "--json-errors"], ["--json-errors", "serve"]):
        assert main(words) == 3
        assert json.loads(capsys.readouterr().err) == expected
    monkeypatch.setenv("LOWBIT_JSON_ERRORS", "1")
    assert main(["serve"]) == 3
    assert json.loads(capsys.readouterr().err) == expected


def test_traceback_with_debug_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, ValueError("odd"))
    for words in (["--debug", "serve"], ["serve", "m", "--debug"]):
        assert main(words) == 70
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "Traceback (most recent call last):" and "ValueError: odd" in lines
        assert lines[-1].startswith("lowbit: error[E0700]: unexpected ValueError: odd")


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["serve"]) == 130
    assert capsys.readouterr().err == ""


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().err == overview
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lowbit ")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lowbit {name}") and "--debug" in text
    assert "--dp-size" not in text, "SGLang's flags are hidden"
    assert parser_of(name).description == COMMANDS[name]


@pytest.mark.parametrize(
    "words,told",
    [
        (["quantize", "m"], "unknown command 'quantize'; use: lowbit serve MODEL --quantization METHOD"),
        (["doctor"], "unknown command 'doctor'; use: lowbit check MODEL"),
        (
            ["convert", "m", "--quantization", "int4"],
            "lowbit convert has no option --quantization. See: lowbit",
        ),
        (
            ["serve", "--tool-call-parser", "hermes"],
            "--tool-call-parser: answers are text as the model writes",
        ),
    ],
)
def test_what_is_elsewhere(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_help_of_serve_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {flag_of(name)}" in text for name in Settings.options())


@pytest.mark.parametrize("spelled", ["E0203", "e0203", "0203", "203", "error[E0203]:"])
def test_explain(spelled: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", spelled]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"E0203: {CATALOGUE['E0203'].title}\n\n")
    assert "What to do:" in text and "status 3" in text


def test_explain_of_no_code_names_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "E9999"]) == 2
    assert (
        capsys.readouterr().err
        == "lowbit: error[E0108]: no error has the code 'E9999'; all: lowbit explain\n"
    )


def test_two_models_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "one", "--model-path", "another"]) == 2
    said = "lowbit: error[E0107]: two models: 'one' and --model-path 'another'; name one\n"
    assert capsys.readouterr().err == said


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["inspect", "smollm2", "--device", "cuda"]) == 4
    assert "error[E0412]: --device cuda: torch sees no CUDA device here" in capsys.readouterr().err


def test_explain_lists_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == sorted(CATALOGUE)


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, lowbit.cli; lowbit.cli.main(['serve', '--help']); lowbit.cli.main(['explain']);"
    code += "print('loaded', sorted({'torch', 'rich', 'fastapi', 'uvicorn', 'msgspec'} & set(sys.modules)))"
    assert run_python("-c", code).stdout.splitlines()[-1] == "loaded []"


def test_module_and_launch_server_run_the_command_line() -> None:
    result = run_python("-m", "lowbit.launch_server", "--modle-path", "x")
    assert result.returncode == 2
    assert (
        result.stderr == "lowbit: error[E0102]: unknown option --modle-path; did you mean '--model-path'?\n"
    )
    assert run_python("-m", "lowbit", "explain", "E0101").stdout.startswith("E0101: ")


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m lowbit explain | true; echo ${{PIPESTATUS[0]}}"
    for _ in range(3):  # whether the writer notices depends on who is first
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert result.stderr == "" and result.stdout.strip() in ("0", "141")
