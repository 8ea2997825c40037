"""Whatever a chat template says, it is refused with one message or renders what transformers renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from pipeline.data import chat_worker, templates
from pipeline.data.chat import ChatTokenizer, end_of_turn
from pipeline.data.records import Conversation, Drops, Example
from pipeline.data.templates import PLAIN_TEMPLATE, TemplateProcess, check_template
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from tests.data.test_chat import LLAMA_3, MISTRAL, QWEN_3
from tests.fuzz.limits import examples, outcome
from tests.fuzz.strategies import damaged, texts

NAMES = ("message", "messages", "m", "loop", "ns", "x", "add_generation_prompt", "bos_token", "eos_token",
    "pad_token", "tools",
         "documents", "caller", "self", "undefined", "true", "none", "content", "role")  # fmt: skip
LITERAL = ("'user'", "'assistant'", "'system'", "'<|im_end|>'", "'\\n'", "' '", "''", "0", "1", "-1", "2.5", "[]",
    "{}", "{'a': [1, none]}",
           "('a', 1)", "range(3)", "dict(a=1)", "dict(messages[0], content='x')", "dict.fromkeys('ab', 1)",
           "dict.mro()", "namespace(x=0)",
           "namespace({'x': 1}, y=2)", "namespace(_x=1)", "cycler('a', 'b').next()", "joiner('-')()", "''.__class__",
           "messages.append(1)",
           "'%s-%s' % ('a', 1)", "'{}'.format(x)", "[1, 2][::-1]")  # fmt: skip
ACCESS = ("['content']", "['role']", ".content", ".role", "[0]", "[-1]", "[1:]", "[:-1]", "['tool_calls']",
    ".tool_calls", ".get('content', 'x')", ".split('\\n')",
          ".strip()", ".items()", "['tool_calls'][0]['function']['arguments']", ".index", ".first", ".last", ".x",
          "._x", ".startswith('a')",
          ".replace('a', 'b')", ".name", ".upper()", ".keys() | list")  # fmt: skip
FILTERS = ("trim", "upper", "length", "tojson", "tojson(indent=2)", "tojson(true, 2)",
    "tojson(separators=(',', ':'))", "tojson(sort_keys=true)",
           "tojson(default=1)", "tojson(skipkeys=true)", "first", "last", "join(', ')", "replace('a', 'b')",
           "default('d')", "d('d', true)", "list", "string", "safe", "escape",
           "int", "float", "reverse", "sort", "unique | list", "map(attribute='content') | list",
           "selectattr('role', 'equalto', 'user') | list",
           "rejectattr('content') | list", "map('upper') | list", "items", "dictsort", "indent(2)", "wordcount",
           "batch(2) | list", "urlize", "xmlattr",
           "pprint", "sum", "min", "title", "format(1)", "e", "attr('role')", "unknown")  # fmt: skip
TESTS = (
    "defined",
    "none",
    "string",
    "mapping",
    "iterable",
    "sequence",
    "number",
    "true",
    "odd",
    "callable",
    "sameas none",
    "in ['user', 'assistant']",
    "unknown",
)
OPERATORS = (" + ", " ~ ", " * ", " == ", " != ", " and ", " or ", " in ", " not in ", " < ", " % ", " - ", " // ")
PIECES = ("", "\n", "  ", "\n  ", "<|im_start|>", "<|im_end|>\n", "[INST] ", "user", "{# note #}", "{{ '{{' }}", "}}",
    "%}", "é😀", "{% raw %}{{ x }}{% endraw %}",
          "<think>\n", "</think>", "\r\n", "# x", "{{", "{%", "\0", "\u2028")  # fmt: skip

atoms = (
    st.sampled_from(NAMES)
    | st.sampled_from(NAMES[:3]).map(lambda name: name + "['content']")
    | st.sampled_from(LITERAL)
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, st.sampled_from(ACCESS)),
        st.builds("{} | {}".format, inner, st.sampled_from(FILTERS)),
        st.builds("({}{}{})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("({} is {}{})".format, inner, st.sampled_from(["", "not "]), st.sampled_from(TESTS)),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("not {}".format, inner),
    ),
    max_leaves=3,
)  # fmt: skip
opening, closing = st.sampled_from(["{%", "{%", "{%-", "{%+"]), st.sampled_from(["%}", "%}", "-%}", "+%}"])


def _tag(content: Any) -> st.SearchStrategy[str]:
    return st.builds("{} {} {}".format, opening, content, closing)


statements = st.recursive(
    st.sampled_from(PIECES)
    | st.builds("{} {} {}".format, st.sampled_from(["{{", "{{", "{{-"]), expressions, st.sampled_from(["}}", "}}",
        "-}}"]))
    | st.just("{{ m['role'] + '\\n' + m['content'] + '<|im_end|>' }}")
    | _tag(st.builds("set {} = {}".format, st.sampled_from(["x", "ns", "ns.x", "ns._x", "messages", "m", "loop",
        "caller"]), expressions))
    | _tag(st.sampled_from(["break", "continue", "set ns = namespace(x=0)", "do x", "include 'a'", "import 'a' as b",
        "extends 'a'", "block a", "endfor"]))
    | st.builds("{{{{ raise_exception({}) }}}}".format, st.sampled_from(["'no'", "1", "x", "", "messages"])),
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{}{}{}{}".format, _tag(expressions.map("if {}".format)), inner, st.just("{% else %}") | inner,
            st.just("{% endif %}")),
        st.builds("{}{}{}".format, _tag(st.builds("for m in {}".format,
            st.sampled_from(["messages"] * 4 + ["messages[1:] if m.role != 'system'", "messages recursive",
                "tools or []"]) | expressions)), inner, _tag(st.just("endfor"))),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{{% macro f(m) %}}{}{{% endmacro %}}{{{{ f(messages[0]) }}}}".format, inner),
        st.builds("{{% call f(1) %}}{}{{% endcall %}}".format, inner),
        st.builds("{{% set x %}}{}{{% endset %}}{{{{ x }}}}".format, inner),
        st.builds("{{% filter trim %}}{}{{% endfilter %}}".format, inner),
        st.builds("{{% with x = 1 %}}{}{{% endwith %}}".format, inner),
        st.builds("{{% block a %}}{}{{% endblock %}}".format, inner),
        st.builds("{{% autoescape true %}}{}{{% endautoescape %}}".format, inner),
    ),
    max_leaves=6,
)  # fmt: skip
TOOLS = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REAL = (LLAMA_3, MISTRAL, QWEN_3, PLAIN_TEMPLATE, TOOLS + PROMPT)


@st.composite
def _real(draw: st.DrawFn) -> str:
    """A template that works, in which something was replaced or put in."""
    template = draw(st.sampled_from(REAL))
    at = draw(st.integers(0, len(template)))
    match draw(st.sampled_from(["statement", "damage", "keep"])):
        case "statement":
            return template[:at] + draw(statements) + template[at:]
        case "damage":
            return draw(damaged(template.encode())).decode("utf-8", "replace")
    return template


calls = st.just(
    {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, None, "é"], "b": {}}}}]}
)
contents = texts.map(lambda text: text.encode("utf-8", "ignore").decode()) | st.sampled_from(["Hello.",
    "Hi <|im_end|>", "<think>\na\n</think>\n\nb", " a\n\nb "])  # fmt: skip


@st.composite
def _conversation(draw: st.DrawFn) -> Conversation:
    found: Conversation = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        found += [
            {"role": "user", "content": draw(contents)},
            {"role": "assistant", "content": draw(contents), **draw(st.just({}) | calls)},
        ]
        if "tool_calls" in found[-1]:
            found += [{"role": "tool", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
    return found


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_with_bos: Path) -> TextTokenizer:
    return TextTokenizer(tiny_llama_with_bos)


class _Unlike:
    """What transformers raised, which is equal to nothing."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __repr__(self) -> str:
        return repr(self.error)


def _by_transformers(tokenizer: TextTokenizer, template: str, messages: Conversation, prompt: bool = False) -> Any:
    try:
        return tokenizer.inner.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # noqa: BLE001  a template can raise anything
        return _Unlike(error)


def _rendered(template: str, tokenizer: TextTokenizer, messages: Conversation, prompt: bool) -> Any:
    try:
        return chat_worker.Renderer(template, tokenizer.special_tokens).render(messages, prompt)
    except Exception as error:  # noqa: BLE001  a template can raise anything
        return _Unlike(error)


@examples(140)
@given(statements.map(lambda text: text + PROMPT) | _real(), _conversation())
def test_rendering_equals_that_of_transformers(tokenizer: TextTokenizer, template: str, messages: Conversation) -> None:
    for prompt in (False, True):
        expected = _by_transformers(tokenizer, template, messages, prompt)
        rendered = outcome(lambda prompt=prompt: _rendered(template, tokenizer, messages, prompt))  # type: ignore[misc]
        assert type(rendered) is type(expected) and (isinstance(expected, _Unlike) or rendered == expected), expected
    reply = outcome(lambda: _turns(template, tokenizer, messages))
    if reply is None or "fault" in reply:
        event("fault" if reply else "no template")
        json.dumps(reply)
        return
    event("texts")
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    ends = turns if len(reply["texts"]) > 1 else [len(messages) - 1]
    assert sum(len(spans) for _, spans in reply["texts"]) == len(turns)
    assert [text for text, _ in reply["texts"]] == [
        _by_transformers(tokenizer, template, messages[: end + 1]) for end in ends
    ]
    for turn, (text, begin, end) in zip(
        turns, ((text, *span) for text, spans in reply["texts"] for span in spans), strict=True
    ):
        assert text[:begin] == _by_transformers(tokenizer, template, messages[:turn], True)
        assert text[:end] == _by_transformers(tokenizer, template, messages[: turn + 1])


def _turns(template: str, tokenizer: TextTokenizer, messages: Conversation) -> chat_worker.Reply | None:
    try:
        renderer = chat_worker.Renderer(template, tokenizer.special_tokens)
    except Exception:  # noqa: BLE001  reported by chat_worker.choose
        return None
    return renderer.turns(messages)


# ------------------------------------------------------------------------------ supervised text

plain_texts = st.text(st.sampled_from("ab \n.:[]é"), max_size=5)


@examples(70)
@given(st.tuples(plain_texts, plain_texts, plain_texts), st.sampled_from(["<|im_end|>", "<|im_end|>\n",
    "<|im_end|><|endoftext|>", "<|im_end|> x"]), st.booleans(), _conversation())  # fmt: skip
def test_exactly_the_answers_are_supervised(
    tokenizer: TextTokenizer, pieces: tuple[str, str, str], end: str, marked: bool, messages: Conversation
) -> None:
    """The template writes a header, the content and an end for every message, so what must be taught is known."""
    before, after, between = map(json.dumps, pieces)
    content = "{% generation %}{{ m.content }}{% endgeneration %}" if marked else "{{ m.content }}"
    template = (
        f"{{% for m in messages %}}{{{{ {before} + m.role + {after} + '<|im_start|>' }}}}{content}"
        f"{{{{ {json.dumps(end)} + {between} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {before} + 'assistant' + {after} + '<|im_start|>' }}}}{{% endif %}}"
    )
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    dropped, renderer = Drops(), chat_worker.Renderer(template, tokenizer.special_tokens)
    tokenized = outcome(lambda: ChatTokenizer(tokenizer, renderer, 10_000, dropped).tokenize(Example(messages, None)))
    assert not isinstance(tokenized, UserError)
    if dropped:
        assert set(dropped) <= {"control_token_in_text", "no_answer"}, dropped
        return
    (example,) = tokenized
    runs: list[list[int]] = [[]]
    for id_, is_target in zip(example.input_ids, example.loss_mask, strict=True):
        runs = [*runs, []] if not is_target and runs[-1] else runs
        runs[-1] += [id_] if is_target else []
    taught = [tokenizer.inner.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]
    last = end[: end.rindex("|>") + 2]
    assert taught == [message["content"] + last for message in messages if message["role"] == "assistant"]
    expected = tokenizer.inner.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)
    assert example.input_ids[-len(expected) :] == expected


# ------------------------------------------------------------------------------------------ limits

HOSTILE = (
    "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "{{ 'x' * 10 ** 10 }}", "{{ 'x' * 3 * 10 ** 8 }}", "{{ 9 ** 9 ** 9 }}", "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ messages * 10 ** 9 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10 ** 9) }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ messages | tojson(indent=10 ** 9) }}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ " + "-" * 5000 + "1 }}",
    "{% if x %}" * 300 + "{% endif %}" * 300, "{{ [1] | batch(10 ** 10, 1) | list }}",
    "{{ ('x' * 10 ** 6) | wordwrap(1) }}",
    "{{ ('a' * 100000) | urlize }}",
    "{% set ns = namespace(x='y' * 1000) %}{% for i in range(99999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ lipsum(n=10 ** 6) }}", "{{ messages[0].content.__class__ }}", "{{ '\\ud800' }}", "{{ 10 ** 5000 }}",
    "{{ raise_exception('\\ud800\\x1b[2J') }}",
    "{% set messages = 1 %}", "{{ messages.clear() }}", "{{ '" + "\\ud83d" + "' }}",
    "{% for m in messages %}{{ loop(messages) }}{% endfor %}",
)  # fmt: skip


@pytest.fixture
def _little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 0.3)


@examples(10)
@given(st.sampled_from(HOSTILE) | statements, st.sampled_from(["{}",
    "{{% if messages | length > 3 %}}{}{{% endif %}}", "{{% if 'é' in messages[0].content %}}{}{{% endif %}}"]),
    st.sampled_from(REAL), _conversation())  # fmt: skip
@pytest.mark.usefixtures("_little_time")
def test_templates_have_limits(
    tokenizer: TextTokenizer, hostile: str, where: str, real: str, messages: Conversation
) -> None:
    template = where.format(hostile) + real

    def use() -> None:
        check_template(template, tokenizer.special_tokens, {"data.instructions": [messages]}, folds=True)
        with TemplateProcess(template, tokenizer.special_tokens) as process:
            end_of_turn(tokenizer, process, process.probe)
            ChatTokenizer(tokenizer, process, 10_000, Drops()).tokenize(Example(messages, None))

    if not isinstance(outcome(use), UserError):
        event("usable")
