"""Which tokens of a conversation are trained on, verified by decoding the tokens under the mask."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import chat_worker
from pipeline.data.chat import PLAIN_TEMPLATE, ChatTokenizer, TokenizedConversation, chat_template, end_of_turn
from pipeline.data.records import Conversation, Drops, Example, single_turn
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


@pytest.mark.parametrize("template", ["own", "plain", LLAMA_3])
def test_the_ids_equal_those_of_apply_chat_template(template: str, tokenizer: TextTokenizer) -> None:
    text = {"own": chat_template(tokenizer, "model"), "plain": PLAIN_TEMPLATE}.get(template, LLAMA_3)
    expected = tokenizer.inner.apply_chat_template(TURNS, chat_template=text, tokenize=True, return_dict=False)
    assert _tokenize(tokenizer, text).input_ids == expected


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
