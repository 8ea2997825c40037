"""What of a conversation is taught, read by decoding the mask."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.chat import PLAIN_TEMPLATE, ChatRenderer, Rendered, chat_template, end_of_turn
from pipeline.data.records import Conversation
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError

TURNS: Conversation = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does json.dumps do?"},
    {"role": "assistant", "content": "It makes a string.\n\nAlways."},
    {"role": "user", "content": "And größe?"},
    {"role": "assistant", "content": " It is size – 😀."},
]

# A template in the manner of Llama 3 (begins with BOS, ends turns with a token and no newline), one in that of Mistral
# (no generation prompt, a space before the answer).
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
QWEN_3 = (  # an answer's thinking is left out once another turn follows
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


def _renderer(tokenizer: TextTokenizer, template: str, longest: int = 10_000) -> tuple[ChatRenderer, Counter[str]]:
    dropped: Counter[str] = Counter()
    return ChatRenderer(tokenizer, template, longest, dropped), dropped


def _render(tokenizer: TextTokenizer, template: str, conversation: Conversation = TURNS) -> Rendered:
    (rendered,) = _renderer(tokenizer, template)[0].render(conversation)
    return rendered


def _taught(tokenizer: TextTokenizer, rendered: Rendered) -> list[str]:
    """The taught runs of tokens, decoded."""
    runs: list[list[int]] = []
    before = 0
    for id_, taught in zip(rendered.input_ids, rendered.loss_mask, strict=True):
        if taught and not before:
            runs.append([])
        if taught:
            runs[-1].append(id_)
        before = taught
    return [tokenizer.inner.decode(run) for run in runs]


def test_only_what_the_assistant_says_and_its_end_of_turn_is_taught(tokenizer: TextTokenizer) -> None:
    rendered = _render(tokenizer, chat_template(tokenizer, "model"))
    assert _taught(tokenizer, rendered) == ["It makes a string.\n\nAlways.<|im_end|>", " It is size – 😀.<|im_end|>"]


@pytest.mark.parametrize("template", [LLAMA_3, MISTRAL, PLAIN_TEMPLATE], ids=["llama_3", "mistral", "plain"])
def test_other_templates(template: str, bos_tokenizer: TextTokenizer) -> None:
    turns = TURNS if template is not MISTRAL else TURNS[1:]
    said = [part.strip() for part in _taught(bos_tokenizer, _render(bos_tokenizer, template, turns))]
    assert said == ["It makes a string.\n\nAlways.<|im_end|>", "It is size – 😀.<|im_end|>"]


@pytest.mark.parametrize("template", ["own", "plain", LLAMA_3])
def test_the_ids_are_those_of_the_chat_template(template: str, tokenizer: TextTokenizer) -> None:
    text = {"own": chat_template(tokenizer, "model"), "plain": PLAIN_TEMPLATE}.get(template, LLAMA_3)
    expected = tokenizer.inner.apply_chat_template(TURNS, chat_template=text, tokenize=True, return_dict=False)
    assert _render(tokenizer, text).input_ids == expected


@pytest.mark.parametrize("name", ["model", "plain"])
def test_exactly_one_beginning_of_sequence(name: Any, bos_tokenizer: TextTokenizer) -> None:
    rendered = _render(bos_tokenizer, chat_template(bos_tokenizer, name))
    assert bos_tokenizer.bos is not None
    assert rendered.input_ids[0] == bos_tokenizer.bos and rendered.input_ids.count(bos_tokenizer.bos) == 1
    assert rendered.loss_mask[0] == 0
    assert _render(bos_tokenizer, LLAMA_3).input_ids.count(bos_tokenizer.bos) == 1


def test_two_beginnings_of_sequence_are_refused(bos_tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="two beginning-of-sequence"):
        _render(bos_tokenizer, "{{ bos_token }}" + LLAMA_3)


def test_the_prompt_of_a_generation_is_a_prefix_of_what_is_trained_on(tokenizer: TextTokenizer) -> None:
    for template in (chat_template(tokenizer, "model"), PLAIN_TEMPLATE):
        prompt = tokenizer.inner.apply_chat_template(
            TURNS[:2], chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        rendered = _render(tokenizer, template, TURNS[:3])
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.loss_mask[len(prompt)] == 1 and not any(rendered.loss_mask[: len(prompt)])


def test_a_template_without_end_of_turn_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="never learn to stop"):
        _render(tokenizer, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")


def test_the_token_that_ends_a_turn_is_found_in_any_template(bos_tokenizer: TextTokenizer) -> None:
    """Not always the end of sequence: Qwen2.5's base ends turns with another token."""
    names = {
        LLAMA_3: "<|im_end|>",
        PLAIN_TEMPLATE: "<|im_end|>",
        MISTRAL.replace("eos_token", "bos_token"): "<|endoftext|>",
    }
    for template, name in names.items():
        assert end_of_turn(bos_tokenizer, template) == bos_tokenizer.inner.convert_tokens_to_ids(name)


def test_a_template_that_rewrites_earlier_turns_gives_one_example_a_turn(tokenizer: TextTokenizer) -> None:
    examples = _renderer(tokenizer, QWEN_3)[0].render(TURNS)
    assert [_taught(tokenizer, example) for example in examples] == [
        ["<think>\n\n</think>\n\nIt makes a string.\n\nAlways.<|im_end|>"],
        ["<think>\n\n</think>\n\n It is size – 😀.<|im_end|>"],
    ]
    for example, turns in zip(examples, (TURNS[:3], TURNS), strict=True):
        assert example.input_ids == tokenizer.inner.apply_chat_template(
            turns, chat_template=QWEN_3, tokenize=True, return_dict=False
        )


def test_a_template_that_rewrites_what_was_asked_is_refused(tokenizer: TextTokenizer) -> None:
    rewriting = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{{ eos_token }}{% endfor %}"
    with pytest.raises(UserError, match="otherwise than it asks for one"):
        _render(tokenizer, rewriting)


def test_a_template_that_writes_the_date_gives_the_same_on_every_day(tokenizer: TextTokenizer) -> None:
    dated = _render(tokenizer, "{{ strftime_now('%d %b %Y') }}\n" + PLAIN_TEMPLATE)
    assert tokenizer.inner.decode(dated.input_ids).startswith("26 Jul 2024")


def test_a_model_without_template_asks_for_the_plain_one(tokenizer: TextTokenizer) -> None:
    bare = copy.copy(tokenizer)
    bare.inner = copy.deepcopy(tokenizer.inner)
    bare.inner.chat_template = None
    with pytest.raises(UserError, match="data.chat_template=plain"):
        chat_template(bare, "model")
    assert chat_template(bare, "plain") == PLAIN_TEMPLATE


def test_too_long_conversations_are_cut_to_whole_turns_or_dropped(tokenizer: TextTokenizer) -> None:
    template = chat_template(tokenizer, "model")
    whole = _render(tokenizer, template)
    for longest in range(1, len(whole.input_ids) + 2):
        renderer, dropped = _renderer(tokenizer, template, longest)
        examples = renderer.render(TURNS)
        if not examples:
            assert dropped == {"too_long": 1}
            continue
        (rendered,) = examples
        assert len(rendered.input_ids) <= longest
        assert rendered.input_ids == whole.input_ids[: len(rendered.input_ids)]
        if dropped:
            assert dropped == {"cut_to_whole_turns": 1}
            assert _taught(tokenizer, rendered) == ["It makes a string.\n\nAlways.<|im_end|>"]
            assert rendered.loss_mask[-1] == 1  # the end of turn
        else:
            assert _taught(tokenizer, rendered) == _taught(tokenizer, whole)


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
def test_what_cannot_be_taught_is_dropped_and_counted(
    conversation: Conversation, reason: str, tokenizer: TextTokenizer
) -> None:
    renderer, dropped = _renderer(tokenizer, chat_template(tokenizer, "model"))
    assert renderer.render(conversation) == []
    assert dropped == {reason: 1}


def test_a_conversation_that_the_template_refuses_is_dropped_and_counted(tokenizer: TextTokenizer) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN_TEMPLATE
    renderer, dropped = _renderer(tokenizer, strict)
    assert renderer.render(TURNS) == [] and dropped == {"refused_by_template": 1}
    assert len(renderer.render(TURNS[1:])) == 1
