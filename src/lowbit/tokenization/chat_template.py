"""Chat templates: Jinja from a checkpoint, run in a sandbox under a deadline, rendered straight to token ids.

A template is text from a stranger, and message contents are text from another: the sandbox is immutable,
output and time are bounded, and special tokens written inside a message never become control tokens. For
that, special texts in contents are replaced by private-use marks before rendering; afterwards the text is cut
at the template's own special tokens, the marks turn back into text, and the pieces are encoded as plain text.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.visitor import NodeTransformer

from lowbit.checkpoint.documents import read_json, read_text
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.tokenization.fast_tokenizer import FastTokenizer
from lowbit.tokenization.special_tokens import named_tokens

MAX_SOURCE = 1 << 20
MAX_OUTPUT = 16 << 20
DEADLINE_SECONDS = 1.0
_LARGEST_REPEAT = 1 << 16
_FIRST_MARK = 0xF0000  # Unicode's supplementary private-use plane
_MARKS = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + 0xFFFD)}]")

# Where transformers keeps what older folders have as a list of templates in tokenizer_config.json.
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class FoundTemplate:
    """``variables``: special tokens' texts, which templates print; ``with_tools``: the template of requests
    that have tools, where there is one of their own."""

    source: str
    place: str
    variables: dict[str, str] = field(default_factory=dict)
    with_tools: str | None = None


def find_template(header: CheckpointHeader, override: str | None = None) -> FoundTemplate | None:
    """The template to use, and where it came from."""
    if header.container == "gguf":
        variables = _gguf_specials(header)
    else:
        config = read_json(header, "tokenizer_config.json") or {}
        variables = named_tokens(header)
    if override == "chatml":
        return FoundTemplate(CHATML, "chatml", variables)
    if override is not None:
        path = Path(override)
        source = read_text(path.parent, path.name)
        if source is None:
            raise LowbitError(
                "E0253", f"--chat-template {printable(override)}: no such file, and not 'chatml'"
            )
        return FoundTemplate(source, path.name, variables)
    if header.container == "gguf":
        stored, place = header.metadata.get("tokenizer.chat_template"), header.root.name
        with_tools = header.metadata.get("tokenizer.chat_template.tool_use")
    else:
        stored, place = read_text(header, "chat_template.jinja"), "chat_template.jinja"
        with_tools = read_text(header, TOOL_TEMPLATE)
    if stored is None and header.container != "gguf":
        stored, place = config.get("chat_template"), "tokenizer_config.json"
        if isinstance(stored, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
            with_tools = named.get("tool_use") if with_tools is None else with_tools
            stored = named.get("default", next(iter(named.values()), None))
    if stored is None and header.container != "gguf":  # of models that see pictures, too
        place = "chat_template.json"
        stored = (read_json(header, place) or {}).get("chat_template")
    if not isinstance(stored, str):
        return None
    return FoundTemplate(stored, place, variables, with_tools if isinstance(with_tools, str) else None)


def _gguf_specials(header: CheckpointHeader) -> dict[str, str]:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    found = {}
    for stored, name in names.items():
        number = header.metadata.get(f"tokenizer.ggml.{stored}_token_id")
        if isinstance(number, int) and isinstance(tokens, list) and 0 <= number < len(tokens):
            found[name] = str(tokens[number])
    return found


class _TooLarge(jinja2.exceptions.SecurityError):
    """An operation that would build an enormous string."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here its body is simply printed."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Immutable, and without cheap ways to enormous strings."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Parse, with ``~`` turned into a call that bounds its result."""
        return _BoundedConcat().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                sequence = isinstance(text, str | list | tuple) and isinstance(count, int)
                if sequence and len(text) * count > _LARGEST_REPEAT:
                    raise _TooLarge(f"a repetition of {count}")
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _bounded(len(left) + len(right))
        if operator == "**" and (abs(_number(left)) > 1e6 or abs(_number(right)) > 64):
            raise _TooLarge("a large power")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise _TooLarge("a wide format")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        name = getattr(__obj, "__name__", "")
        wide = any(isinstance(arg, int) and arg > _LARGEST_REPEAT for arg in args)
        if wide and name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            raise _TooLarge(f"{name} of a large width")
        if name in ("replace", "join") and args:
            own = getattr(__obj, "__self__", "")
            _bounded(_product_size(name, own, args))
        if name in ("format", "format_map") and re.search(r"\d{5}", str(getattr(__obj, "__self__", ""))):
            raise _TooLarge("a wide format")
        return super().call(__context, __obj, *args, **kwargs)


class _BoundedConcat(NodeTransformer):
    """``a ~ b`` becomes ``[a, b] | _concat``."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(parts, "_concat", [], [], None, None, lineno=node.lineno)


def _bounded(size: int) -> None:
    if size > MAX_OUTPUT:
        raise _TooLarge(f"a text of {size} characters")


def _concat(parts: list[object]) -> str:
    texts = [str(part) for part in parts]
    _bounded(sum(map(len, texts)))
    return "".join(texts)


def _product_size(name: str, own: object, args: tuple[Any, ...]) -> int:
    """The most characters str.replace or str.join can make."""
    if not isinstance(own, str):
        return 0
    if name == "replace":
        return len(own) * max(1, len(str(args[1])) if len(args) > 1 else 1)
    items = list(args[0])
    return sum(len(str(item)) for item in items) + len(own) * len(items)


def _replace(text: object, old: str, new: str, count: int | None = None) -> str:
    """Jinja's replace, bounded."""
    _bounded(len(str(text)) * max(1, len(str(new))))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _bounded_width(name: str) -> Callable[..., object]:
    """A Jinja filter with a width that cannot be enormous."""
    from jinja2.filters import FILTERS

    plain = FILTERS[name]

    def filtered(*args: Any, **kwargs: Any) -> object:
        if any(isinstance(v, int) and v > _LARGEST_REPEAT for v in (*args, *kwargs.values())):
            raise _TooLarge(f"{name} of a large width")
        return plain(*args, **kwargs)

    return filtered


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """JSON as transformers' templates expect it: no HTML escapes, characters as they are."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _ExpiredError(Exception):
    """Thrown into a template's thread when its time is up."""


@dataclass(frozen=True)
class _Compiled:
    """``takes_parts``: contents may be lists of parts; ``takes_text``: and texts."""

    code: jinja2.Template
    takes_parts: bool
    takes_text: bool


class JinjaTemplate:
    """See ``tokenizer.ChatTemplate``."""

    def __init__(
        self,
        source: str,
        place: str,
        tokenizer: FastTokenizer,
        variables: Mapping[str, str],
        with_tools: str | None = None,
    ) -> None:
        self.source = source
        self._place = place
        self._tokenizer = tokenizer
        self._variables = dict(variables)
        self._template = self._compiled(source)
        self._with_tools = self._template if with_tools is None else self._compiled(with_tools)
        # Special texts, longest first, so that a longer one is never cut by a shorter.
        texts = sorted(tokenizer.special_texts, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._controls = tokenizer.special_ids - tokenizer.made_ids

    def _compiled(self, source: str) -> _Compiled:
        place = self._place
        if len(source) > MAX_SOURCE:
            raise LowbitError(
                "E0253", f"{place}: chat_template of {len(source)} characters, limit {MAX_SOURCE}"
            )
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters.update(tojson=_tojson, _concat=_concat, replace=_replace)
        for name in ("center", "indent", "batch", "slice", "wordwrap", "truncate"):
            environment.filters[name] = _bounded_width(name)
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        environment.globals.pop("lipsum", None)
        try:
            return _Compiled(environment.from_string(source), *_takes(source))
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise LowbitError(
                "E0253",
                f"{place}: chat_template is no valid Jinja: {printable(error).rstrip('.')}. Start with "
                "--chat-template <file> to use your own",
            ) from None

    def render(
        self,
        messages: list[dict[str, object]],
        *,
        tools: list[dict[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, object] | None = None,
    ) -> list[int]:
        """Token ids of the conversation."""
        marks = _Marks(self._special)
        template = self._with_tools if tools else self._template
        prepared = [self._prepare(message, marks, template) for message in messages]
        final = None
        if continue_final_message:
            if add_generation_prompt or not messages:
                raise LowbitError(
                    "E0256", "continue_final_message needs a last message and add_generation_prompt false"
                )
            final = _last_text(prepared[-1].get("content"))
            if not isinstance(final, str):
                raise LowbitError("E0256", "continue_final_message: the last message has no text to continue")
        context = {
            **self._variables,
            **(marks.hide(variables) if variables else {}),
            "messages": prepared,
            "tools": marks.hide(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(template.code, context)
        if isinstance(final, str):
            text = _cut_after(text, final)
        return self._encode(text, marks)

    def _prepare(self, message: dict[str, object], marks: _Marks, template: _Compiled) -> dict[str, object]:
        """A copy with contents in the form the template takes, arguments parsed and special texts hidden."""
        prepared = {key: value for key, value in message.items() if value is not None or key == "content"}
        content = prepared.get("content")
        if isinstance(content, str) and not template.takes_text:
            prepared["content"] = [{"type": "text", "text": content}]
        if isinstance(content, list) and not template.takes_parts:
            prepared["content"] = "".join(
                str(part.get("text", "")) for part in content if isinstance(part, dict)
            )
        calls = prepared.get("tool_calls")
        if isinstance(calls, list):
            prepared["tool_calls"] = [_parsed_arguments(call) for call in calls]
        hidden = marks.hide(prepared)
        assert isinstance(hidden, dict), "a message stays an object"
        return hidden

    def _run(self, template: jinja2.Template, context: dict[str, object]) -> str:
        """Render in a thread of its own, which is thrown out when its time is up."""
        result: list[str] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                length, pieces = 0, []
                for piece in template.generate(**context):
                    length += len(piece)
                    if length > MAX_OUTPUT:
                        raise _TooLarge(f"more than {MAX_OUTPUT} characters of output")
                    pieces.append(piece)
                result.append("".join(pieces))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True, name="chat-template")
        thread.start()
        thread.join(DEADLINE_SECONDS)
        if thread.is_alive():
            # Python code can be interrupted between two bytecodes; a template is nothing else.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_ExpiredError)
            )
            thread.join(DEADLINE_SECONDS)
            raise LowbitError(
                "E0253", f"{self._place}: chat_template took longer than {DEADLINE_SECONDS:g} s; refused"
            )
        if result:
            return result[0]
        raise self._explained(failure[0])

    def _explained(self, error: BaseException) -> LowbitError:
        place = self._place
        if isinstance(error, jinja2.exceptions.SecurityError):
            return LowbitError(
                "E0253",
                f"{place}: chat_template is not safe: {printable(error)}; refused. Start with "
                "--chat-template <file> to use your own",
            )
        if isinstance(error, jinja2.exceptions.TemplateError):  # raise_exception: the template refuses
            return LowbitError("E0256", f"the chat template refuses this conversation: {printable(error)}")
        return LowbitError("E0256", f"{place}: chat_template failed on this conversation: {printable(error)}")

    def _encode(self, text: str, marks: _Marks) -> list[int]:
        """The template's special tokens as ids, everything between as plain text.

        In one piece, so that tokens that swallow the spaces beside them do (Phi-3's), and that a space is put
        before the first word alone where it is (Mistral's). What has hidden texts in it is encoded by itself.
        """
        tokenizer = self._tokenizer
        found = list(self._special.finditer(text)) if self._special else []
        own = [tokenizer.special_texts[match[0]] for match in found]
        ids = tokenizer.encode(text, add_special=False)
        # Others than the template's own: a normalizer turned ordinary text into a special token.
        wanted = [token for token in own if token in self._controls]
        same = [token for token in ids if token in self._controls] == wanted
        if same and not marks:
            return ids
        pieces = tokenizer.pieces(text)
        if not same or [token for *_, token in pieces] != [*own, None]:
            cuts = [0, *(place for match in found for place in match.span()), len(text)]
            texts = [text[begin:end] for begin, end in zip(cuts[::2], cuts[1::2], strict=True)]
            pieces = [(plain, [], token) for plain, token in zip(texts, [*own, None], strict=True)]
        ids = []
        for plain, known, token in pieces:
            shown = marks.show(plain)
            if plain and (not known or shown != plain):
                known = tokenizer.encode(shown, add_special=False, parse_special=False)
            ids += known if token is None else [*known, token]
        return ids


class _Marks:
    """Special texts inside messages <-> private-use characters that no template or tokenizer treats."""

    def __init__(self, special: re.Pattern[str] | None) -> None:
        self._special = special and re.compile(f"{_MARKS.pattern}|{special.pattern}")
        self._texts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._texts)

    def hide(self, value: object) -> Any:
        """A copy of nested lists and objects with every special text marked."""
        if isinstance(value, str):
            return value if self._special is None else self._special.sub(self._mark, value)
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return value

    def _mark(self, found: re.Match[str]) -> str:
        if found[0] not in self._texts:
            self._texts.append(found[0])
        return chr(_FIRST_MARK + self._texts.index(found[0]))

    def show(self, text: str) -> str:
        """The special texts again."""
        return _MARKS.sub(self._text, text) if self else text

    def _text(self, found: re.Match[str]) -> str:
        return self._texts[ord(found[0]) - _FIRST_MARK]


def _parsed_arguments(call: object) -> object:
    """A tool call whose arguments are an object: OpenAI sends JSON text, templates want the object."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call  # not JSON: the template gets the text as it is
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function}


def _cut_after(text: str, final: str) -> str:
    """``text`` up to the end of the last message's words, as transformers continues them."""
    place = text.rfind(final)
    if place < 0:
        final = final.strip()
        place = text.rfind(final)
    if place < 0:
        raise LowbitError(
            "E0256", "continue_final_message: the template does not print the last message as it is"
        )
    return text[: place + len(final)]


def _last_text(content: object) -> object:
    """The text of a message, the last part's where it has parts."""
    if not isinstance(content, list):
        return content
    return next(
        (part["text"] for part in reversed(content) if isinstance(part, dict) and "text" in part), None
    )


_WALKS_PARTS = re.compile(r"for\s+\w+\s+in\s+\w+(\[['\"]content['\"]\]|\.content)")
_ASKS_WHICH = re.compile(r"\bcontent(['\"]\])?\s+is\s+(not\s+)?(string|iterable|sequence|mapping)\b")


def _takes(source: str) -> tuple[bool, bool]:
    """Whether a template walks over the parts of contents, and whether it takes plain texts, too."""
    parts = _WALKS_PARTS.search(source) is not None
    return parts, not parts or _ASKS_WHICH.search(source) is not None
