"""Which tokens of a conversation are trained on, verified by decoding the tokens under the mask."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from pipeline.data import chat_worker, templates
from pipeline.data.chat import ChatTokenizer, TokenizedConversation, chat_template, end_of_turn, template_to_save
from pipeline.data.records import Conversation, Drops, Example, single_turn
from pipeline.data.templates import PLAIN_TEMPLATE, TemplateProcess, check_template, default_template, fold
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError

TURNS: Conversation = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does json.dumps do?"},
    {"role": "assistant", "content": "It makes a string.\n\nAlways."},
    {"role": "user", "content": "And größe?"},
    {"role": "assistant", "content": " It is size – 😀."},
]

# In the style of Llama 3: begins with BOS, and ends turns with a token but no newline.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# In the style of Mistral: no generation prompt, and a space before the answer.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# In the style of Qwen3: removes the reasoning from an answer once another turn follows.
QWEN_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> TextTokenizer:
    return TextTokenizer(tiny_llama_dir)


@pytest.fixture
def bos_tokenizer(tiny_llama_with_bos: Path) -> TextTokenizer:
    return TextTokenizer(tiny_llama_with_bos)


def _chat_tokenizer(tokenizer: TextTokenizer, template: str, max_length: int = 10_000) -> tuple[ChatTokenizer, Drops]:
    dropped, renderer = Drops(), chat_worker.Renderer(template, tokenizer.special_tokens)
    return ChatTokenizer(tokenizer, renderer, max_length, dropped), dropped


def _tokenize(tokenizer: TextTokenizer, template: str, conversation: Conversation = TURNS) -> TokenizedConversation:
    (example,) = _chat_tokenizer(tokenizer, template)[0].tokenize(Example(conversation, None))
    return example


def _targets(tokenizer: TextTokenizer, example: TokenizedConversation) -> list[str]:
    """Every run of tokens that is trained on, decoded."""
    runs: list[list[int]] = []
    before = 0
    for id_, is_target in zip(example.input_ids, example.loss_mask, strict=True):
        if is_target and not before:
            runs.append([])
        if is_target:
            runs[-1].append(id_)
        before = is_target
    return [tokenizer.inner.decode(run) for run in runs]


def test_only_assistant_messages_and_their_end_of_turn_are_trained_on(tokenizer: TextTokenizer) -> None:
    example = _tokenize(tokenizer, chat_template(tokenizer, "model"))
    assert _targets(tokenizer, example) == ["It makes a string.\n\nAlways.<|im_end|>", " It is size – 😀.<|im_end|>"]


@pytest.mark.parametrize("template", [LLAMA_3, MISTRAL, PLAIN_TEMPLATE], ids=["llama_3", "mistral", "plain"])
def test_other_templates_are_masked_correctly(template: str, bos_tokenizer: TextTokenizer) -> None:
    turns = TURNS if template is not MISTRAL else TURNS[1:]
    answers = [part.strip() for part in _targets(bos_tokenizer, _tokenize(bos_tokenizer, template, turns))]
    assert answers == ["It makes a string.\n\nAlways.<|im_end|>", "It is size – 😀.<|im_end|>"]


def test_the_plain_template_writes_only_the_assistants_messages_as_responses(tokenizer: TextTokenizer) -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": "I will look."},
        {"role": "tool", "content": "21 C"},
        {"role": "assistant", "content": "21 degrees."},
    ]
    example = _tokenize(tokenizer, PLAIN_TEMPLATE, turns)
    assert tokenizer.inner.decode(example.input_ids) == (
        "Be brief.\n\n### Instruction:\nHow warm is it?\n\n### Response:\nI will look.<|im_end|>\n\n"
        "### Tool result:\n21 C\n\n### Response:\n21 degrees.<|im_end|>\n\n"
    )
    assert _targets(tokenizer, example) == ["I will look.<|im_end|>", "21 degrees.<|im_end|>"]


@pytest.mark.parametrize("template", ["own", "plain", LLAMA_3])
def test_the_ids_equal_those_of_apply_chat_template(template: str, tokenizer: TextTokenizer) -> None:
    text = {"own": chat_template(tokenizer, "model"), "plain": PLAIN_TEMPLATE}.get(template, LLAMA_3)
    expected = tokenizer.inner.apply_chat_template(TURNS, chat_template=text, tokenize=True, return_dict=False)
    assert _tokenize(tokenizer, text).input_ids == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson(true, 2) }}", "{{ messages | tojson(default=1) }}", "{{ namespace(_x=1) is defined }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}", "{{ namespace(self=1).self }}", "{{ dict.mro() }}",
        "{{ dict.fromkeys('ab', 1) }}", "{{ dict([('a', 1)], b=2) }}",
    ],
)  # fmt: skip
def test_templates_have_the_functions_of_transformers_and_no_others(template: str, tokenizer: TextTokenizer) -> None:
    def by_transformers() -> str:
        rendered: str = tokenizer.inner.apply_chat_template(TURNS, chat_template=template, tokenize=False)
        return rendered

    def by_worker() -> str:
        return chat_worker.Renderer(template, tokenizer.special_tokens).render(TURNS)

    try:
        expected = by_transformers()
    except (TypeError, TemplateError):
        with pytest.raises((TypeError, TemplateError)):
            by_worker()
    else:
        assert by_worker() == expected


@pytest.mark.parametrize("name", ["model", "plain"])
def test_examples_begin_with_exactly_one_bos(name: Any, bos_tokenizer: TextTokenizer) -> None:
    example = _tokenize(bos_tokenizer, chat_template(bos_tokenizer, name))
    assert bos_tokenizer.bos is not None
    assert example.input_ids[0] == bos_tokenizer.bos and example.input_ids.count(bos_tokenizer.bos) == 1
    assert example.loss_mask[0] == 0
    assert _tokenize(bos_tokenizer, LLAMA_3).input_ids.count(bos_tokenizer.bos) == 1


def test_a_template_that_writes_two_bos_is_refused(bos_tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="two beginning-of-sequence"):
        _tokenize(bos_tokenizer, "{{ bos_token }}" + LLAMA_3)


def test_the_generation_prompt_is_a_prefix_of_the_training_example(tokenizer: TextTokenizer) -> None:
    for template in (chat_template(tokenizer, "model"), PLAIN_TEMPLATE):
        prompt = tokenizer.inner.apply_chat_template(
            TURNS[:2], chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        example = _tokenize(tokenizer, template, TURNS[:3])
        assert example.input_ids[: len(prompt)] == prompt
        assert example.loss_mask[len(prompt)] == 1 and not any(example.loss_mask[: len(prompt)])


def test_prompts_of_the_tuned_model_begin_as_its_training_examples(
    tokenizer: TextTokenizer, bos_tokenizer: TextTokenizer
) -> None:
    """Three processes of 0.2 s."""
    own = chat_template(bos_tokenizer, "model")
    with TemplateProcess(own, bos_tokenizer.special_tokens) as process:
        saved = template_to_save(bos_tokenizer, process)
        assert template_to_save(tokenizer, process) == own
    prompt = bos_tokenizer.inner.apply_chat_template(
        TURNS[:2], chat_template=saved, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    example = _tokenize(bos_tokenizer, own, TURNS[:3])
    assert prompt[0] == bos_tokenizer.bos and example.input_ids[: len(prompt)] == prompt
    assert _tokenize(bos_tokenizer, saved, TURNS[:3]) == example
    with TemplateProcess(saved, bos_tokenizer.special_tokens) as process:
        assert template_to_save(bos_tokenizer, process) == saved


def test_a_template_without_end_of_turn_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="never learn to stop"):
        _tokenize(tokenizer, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")


def test_the_end_of_turn_token_is_found_in_any_template(bos_tokenizer: TextTokenizer) -> None:
    """It is not always EOS: in Qwen2.5's base model, turns end with another token."""
    names = {
        LLAMA_3: "<|im_end|>",
        PLAIN_TEMPLATE: "<|im_end|>",
        MISTRAL.replace("eos_token", "bos_token"): "<|endoftext|>",
    }
    for template, name in names.items():
        renderer = chat_worker.Renderer(template, bos_tokenizer.special_tokens)
        assert end_of_turn(
            bos_tokenizer, renderer, single_turn("Hi.", "Ho.")
        ) == bos_tokenizer.inner.convert_tokens_to_ids(name)


def test_a_template_that_rewrites_earlier_turns_yields_one_example_per_turn(tokenizer: TextTokenizer) -> None:
    examples = _chat_tokenizer(tokenizer, QWEN_3)[0].tokenize(Example(TURNS, None))
    assert [_targets(tokenizer, example) for example in examples] == [
        ["<think>\n\n</think>\n\nIt makes a string.\n\nAlways.<|im_end|>"],
        ["<think>\n\n</think>\n\n It is size – 😀.<|im_end|>"],
    ]
    for example, turns in zip(examples, (TURNS[:3], TURNS), strict=True):
        assert example.input_ids == tokenizer.inner.apply_chat_template(
            turns, chat_template=QWEN_3, tokenize=True, return_dict=False
        )


def test_a_template_that_prints_the_date_renders_the_same_text_every_day(tokenizer: TextTokenizer) -> None:
    dated = _tokenize(tokenizer, "{{ strftime_now('%d %b %Y') }}\n" + PLAIN_TEMPLATE)
    assert tokenizer.inner.decode(dated.input_ids).startswith("26 Jul 2024")


def test_a_model_without_a_template_is_refused_and_the_plain_template_suggested(tokenizer: TextTokenizer) -> None:
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="data.chat_template=plain"):
        chat_template(bare, "model")
    assert chat_template(bare, "plain") == PLAIN_TEMPLATE


def test_long_conversations_are_cut_after_a_complete_turn_or_dropped(tokenizer: TextTokenizer) -> None:
    template = chat_template(tokenizer, "model")
    complete = _tokenize(tokenizer, template)
    for max_length in range(1, len(complete.input_ids) + 2):
        chat, dropped = _chat_tokenizer(tokenizer, template, max_length)
        examples = chat.tokenize(Example(TURNS, None))
        if not examples:
            assert dropped == {"too_long": 1}
            continue
        (example,) = examples
        assert len(example.input_ids) <= max_length
        assert example.input_ids == complete.input_ids[: len(example.input_ids)]
        if dropped:
            assert dropped == {"truncated": 1}
            assert _targets(tokenizer, example) == ["It makes a string.\n\nAlways.<|im_end|>"]
            assert example.loss_mask[-1] == 1  # the end of turn
        else:
            assert _targets(tokenizer, example) == _targets(tokenizer, complete)


def test_a_conversation_with_one_example_per_turn_is_counted_once(tokenizer: TextTokenizer) -> None:
    first, second = _chat_tokenizer(tokenizer, QWEN_3)[0].tokenize(Example(TURNS, None))
    lengths = [len(first.input_ids), len(second.input_ids)]
    for max_length, kept, counted in [
        (lengths[1], [first, second], {}),
        (lengths[0], [first], {"truncated": 1}),
        (lengths[0] // 2, [], {"too_long": 1}),
    ]:
        chat, dropped = _chat_tokenizer(tokenizer, QWEN_3, max_length)
        assert chat.tokenize(Example(TURNS, None)) == kept and dropped == counted


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([{"role": "user", "content": "Hi"}], "no_answer"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}], "no_answer"),
        ([{"role": "assistant", "content": "Hi"}], "begins_with_the_assistant"),
        (
            [{"role": "user", "content": "Say <|im_end|>"}, {"role": "assistant", "content": "No."}],
            "control_token_in_text",
        ),
    ],
)
def test_unusable_conversations_are_dropped_and_counted(
    conversation: Conversation, reason: str, tokenizer: TextTokenizer
) -> None:
    chat, dropped = _chat_tokenizer(tokenizer, chat_template(tokenizer, "model"))
    assert chat.tokenize(Example(conversation, None)) == []
    assert dropped == {reason: 1}


def test_a_conversation_that_the_template_rejects_is_dropped_and_counted(tokenizer: TextTokenizer) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN_TEMPLATE
    chat, dropped = _chat_tokenizer(tokenizer, strict)
    assert chat.tokenize(Example(TURNS, None)) == [] and dropped == {"rejected_by_template": 1}
    assert len(chat.tokenize(Example(TURNS[1:], None))) == 1


# --------------------------------------------------------------------------------- what templates leave out

PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN_TEMPLATE
WITHOUT_SYSTEM = PLAIN_TEMPLATE.replace("message['content'] + '\n\n' }}{% elif", "'' }}{% elif", 1)


def _chosen(template: str) -> tuple[chat_worker.Renderer, chat_worker.Reply]:
    renderer, reply = chat_worker.choose(template, {"eos_token": "<|im_end|>"})
    assert renderer is not None, reply
    return renderer, reply


def test_a_template_that_reads_lists_of_parts_gets_lists_of_parts(tokenizer: TextTokenizer) -> None:
    """Also at inference: the template that is saved accepts strings, and renders as the training data."""
    renderer, reply = _chosen(PARTS)
    text = renderer.render(TURNS)
    assert all(message["content"] in text for message in TURNS)
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TURNS]
    for messages, template in ((TURNS, reply["template"]), (in_parts, reply["template"]), (in_parts, PARTS)):
        assert tokenizer.inner.apply_chat_template(messages, chat_template=template, tokenize=False) == text


def test_answers_that_begin_as_the_generation_prompt_can_be_trained_on() -> None:
    renderer, reply = _chosen(THINK)
    assert reply["probe"][-1]["content"].startswith("<think>\n")
    ((text, ((begin, end),)),) = renderer.turns(single_turn("Hi.", "<think>\nHm.\n</think>\nHo."))["texts"]
    assert text[begin:end] == "Hm.\n</think>\nHo.<|im_end|>\n"
    assert renderer.turns(single_turn("Hi.", "Ho."))["fault"] == "differs_from_generation_prompt"


@pytest.mark.parametrize(
    ("template", "fault", "words"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "text_not_in_rendering", ["line 1"]),
        ("\n{{ tools | length }}" + PLAIN_TEMPLATE, "rejected_by_template", ["line 2", "NoneType"]),
        ("\n\n{{ raise_exception('never') }}", "rejected_by_template", ["line 3", "never"]),
        ("{{ '\\ud83d' }}" + PLAIN_TEMPLATE, "rejected_by_template", ["surrogates not allowed"]),
        (PLAIN_TEMPLATE + "{% if %}", "syntax", ["line 1"]),
        ("{{" + "(" * 9999, "syntax", []),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "rejected_by_template", ["RecursionError"]),
        ("{{ messages.append(1) }}", "rejected_by_template", ["unsafe"]),
        (THINK.replace("m['content']", "m['content'].split('>')[-1]"), "differs_from_generation_prompt", ["<think>"]),
    ],
)
def test_templates_that_cannot_be_trained_on_are_found_with_the_line(
    template: str, fault: str, words: list[str]
) -> None:
    renderer, reply = chat_worker.choose(template, {"eos_token": "<|im_end|>"})
    assert renderer is None and reply["fault"] == fault and all(word in reply["detail"] for word in words), reply


def test_a_conversation_whose_text_is_not_in_the_rendering_is_dropped(tokenizer: TextTokenizer) -> None:
    shortened = PLAIN_TEMPLATE.replace("message['content']", "message['content'][:20]")
    chat, dropped = _chat_tokenizer(tokenizer, shortened)
    assert len(chat.tokenize(Example(single_turn("Hi.", "Ho."), None))) == 1
    for conversation in (
        single_turn("Hi.", "o" * 21),
        [{"role": "system", "content": "s" * 30}, *single_turn("a", "b")],
    ):
        assert chat.tokenize(Example(conversation, None, "a.jsonl", "line 2")) == []
    assert dropped == {"text_not_in_rendering": 2}
    assert dropped.locations == {"text_not_in_rendering": ["a.jsonl, line 2"] * 2}


@pytest.mark.parametrize(
    ("text", "rewritten", "missing"),
    [
        ("yes no yes", False, False),
        ("yes no", False, True),  # the second yes
        ("no yes yes", False, False),  # in another order, as templates that put the system message last
        ("y\nes no yes", False, False),
    ],
)
def test_every_message_counts_but_whitespace_does_not(text: str, rewritten: bool, missing: bool) -> None:
    messages = [
        {"role": role, "content": word} for role, word in (("user", "yes "), ("assistant", "no"), ("user", "yes"))
    ]
    assert (chat_worker.find_missing(messages, text, rewritten) is not None) == missing


# In the style of Qwen3: tools are in front, and only answers after the last question have their reasoning.
TOOLS_AND_REASONING = (
    "{% for tool in tools or [] %}{{ '<|im_start|>tool\n' + (tool | tojson) + '<|im_end|>\n' }}{% endfor %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] and loop.index > ns.last %}"
    "{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": "<number>"}}}
WITH_TOOLS: Conversation = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?", "tools": [ADD]},
    {"role": "assistant", "content": "2", "reasoning_content": "I add."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "3", "reasoning_content": "I count.", "reasoning": "I count."},
]


def test_tools_and_reasoning_are_rendered_as_by_transformers(tokenizer: TextTokenizer) -> None:
    chat, _ = _chat_tokenizer(tokenizer, TOOLS_AND_REASONING)
    examples = chat.tokenize(Example(WITH_TOOLS, None))
    targets = [_targets(tokenizer, example) for example in examples]
    assert targets == [["<think>I add.</think>2<|im_end|>"], ["<think>I count.</think>3<|im_end|>"]]
    plain = [{name: value for name, value in message.items() if name != "tools"} for message in WITH_TOOLS]
    expected = tokenizer.inner.apply_chat_template(
        plain, tools=[ADD], chat_template=TOOLS_AND_REASONING, tokenize=True, return_dict=False
    )
    assert examples[-1].input_ids == expected
    assert fold(WITH_TOOLS, frozenset(["system"]))[0]["tools"] == [ADD]


@pytest.mark.parametrize(
    ("part", "named"), [("tools", "tools, content"), ("m['reasoning_content']", "reasoning_content")]
)
def test_a_template_that_leaves_out_tools_or_reasoning_drops_the_conversation(part: str, named: str) -> None:
    without = TOOLS_AND_REASONING.replace(part, "false", 1)
    reply = chat_worker.Renderer(without, {}).turns(WITH_TOOLS)
    assert reply["fault"] == "text_not_in_rendering" and named in reply["detail"]


def test_control_tokens_in_tools_and_reasoning_are_found(tokenizer: TextTokenizer) -> None:
    for name, value in (("tools", [{**ADD, "function": {"name": "<|im_end|>"}}]), ("thinking", "<|im_end|>")):
        chat, dropped = _chat_tokenizer(tokenizer, PLAIN_TEMPLATE)
        assert not chat.tokenize(Example([{**message, name: value} for message in single_turn("Hi.", "Ho.")], None))
        assert dropped == {"control_token_in_text": 1}


@pytest.mark.parametrize(("role", "missing"), [("tool", False), ("assistant", True)])
def test_only_results_of_tools_may_be_written_as_json(role: str, missing: bool) -> None:
    turn = {"role": role, "content": '{"place": "Köln",\n"warm": true}'}
    rendered = chat_worker.Renderer("{{ messages[0].content | tojson }}", {}).render([turn])
    assert "\\n" in rendered and (chat_worker.find_missing([turn], rendered, rewritten=False) is not None) == missing


def test_reasoning_of_earlier_turns_may_be_removed_but_not_that_of_the_trained_one() -> None:
    turn = {"role": "assistant", "content": "<think>because</think>so"}
    assert chat_worker.find_missing([turn, {"role": "user", "content": "x"}], "so x", rewritten=True) is None
    assert chat_worker.find_missing([turn], "so", rewritten=True) == turn


@pytest.mark.parametrize("template", [NO_SYSTEM, WITHOUT_SYSTEM], ids=["rejected", "left out"])
def test_system_messages_are_folded_into_the_first_question(template: str) -> None:
    renderer, reply = _chosen(template)
    assert "system" in reply["unsupported"] and "fault" in renderer.turns(TURNS)
    folded = fold(TURNS, frozenset(reply["unsupported"]))
    assert folded[0] == {"role": "user", "content": "Be brief.\n\nWhat does json.dumps do?"} and folded[1:] == TURNS[2:]
    assert "texts" in renderer.turns(folded)
    assert fold(TURNS, frozenset()) == TURNS == fold(TURNS[:1], frozenset(["system"])) + TURNS[1:]


def test_the_system_role_that_a_template_has_is_not_folded() -> None:
    assert "system" not in _chosen(PLAIN_TEMPLATE)[1]["unsupported"]


def test_a_template_that_does_not_end_is_stopped_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of about 0.2 s: one endless, one without memory. Neither changes this process."""
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"data\.chat_template.*0\.1 seconds of CPU"):
        check_template(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}, {}, folds=False
        )
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 20.0)
    with pytest.raises(UserError, match="MemoryError"):
        check_template("\n{{ 'x' * 10**11 }}", {}, {}, folds=False)


@pytest.mark.parametrize(
    ("template", "conversation", "folds", "words"),
    [
        (THINK, single_turn("Hi.", "Ho."), False, "must begin with '<think>"),
        (THINK, single_turn("Hi.", "<think>\nHm.</think>Ho."), False, None),
        (NO_SYSTEM, TURNS, False, "system_messages=fold"),
        (NO_SYSTEM, TURNS, True, None),
    ],
)
def test_the_first_conversations_are_rendered_before_a_run(
    template: str, conversation: Conversation, folds: bool, words: str | None
) -> None:
    """Four processes of 0.2 s."""
    conversations = {"data.instructions": [conversation] * 3}
    if words is None:
        check_template(template, {"eos_token": "e"}, conversations, folds)
    else:
        with pytest.raises(UserError, match=rf"data\.instructions\.path = its first 3.*{words}"):
            check_template(template, {"eos_token": "e"}, conversations, folds)


def test_named_templates_need_a_default() -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]
    with pytest.raises(UserError, match="rag, tool_use"):
        default_template(named)
    assert default_template([*named, {"name": "default", "template": "d"}]) == "d"


def test_a_template_of_a_processor_is_used(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for file in tiny_llama_dir.glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from the processor"}))
    assert chat_template(TextTokenizer(tmp_path), "model") == "from the processor"
