"""Conversations in the terminal: answers of a naive greedy search, with a history, commands and several models."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.chat.model import ChatModel, ContextFull, Generated
from pipeline.chat.terminal import converse
from pipeline.config.actions import Chat
from pipeline.errors import UserError, printable
from pipeline.models import tensors

GREEDY = Chat(max_new_tokens=8, temperature=0.0, seed=0)


@pytest.fixture(scope="module", autouse=True)
def float32_only() -> Iterator[None]:
    """Computes in float32 on all processors, in which all ways to compute the same logits agree on the largest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "bfloat16_flags", list)
        yield


@pytest.fixture(scope="module")
def directory(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random head in place of its embeddings, which would make it repeat the last token."""
    directory = tmp_path_factory.mktemp("talkative") / "model"
    shutil.copytree(tiny_llama_dir, directory)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, tie_word_embeddings=False)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> ChatModel:
    return ChatModel.load("sft", directory, "cpu", GREEDY)


def _naive_ids(directory: Path, turns: Sequence[str]) -> list[int]:
    """The most probable continuation after the turns of a conversation, token by token without a cache."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    roles = ("user", "assistant")
    text = "".join(f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns))
    ids = tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    answer: list[int] = []
    while len(answer) < GREEDY.max_new_tokens and tokenizer.eos_token_id not in answer:
        with torch.no_grad():
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


def _naive(directory: Path, turns: Sequence[str]) -> str:
    ids = _naive_ids(directory, turns)
    decoded: str = AutoTokenizer.from_pretrained(directory).decode(ids, skip_special_tokens=True)
    return decoded


def _shown(models: Sequence[ChatModel], lines: Iterable[str]) -> str:
    console = Console(file=io.StringIO(), soft_wrap=True, width=120)
    converse(models, lines, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _turn(name: str, answer: str) -> str:
    return f"{name}> {printable(answer)}\n"


def test_answers_are_those_of_a_naive_search_and_depend_on_the_turns_before(model: ChatModel, directory: Path) -> None:
    parts: list[str] = []
    first = model.answer([{"role": "user", "content": "What is an item?"}], parts.append)
    assert first == _naive(directory, ["What is an item?"]) == "".join(parts)
    second = _naive(directory, ["What is an item?", first, "Why?"])
    assert second != _naive(directory, ["Why?"])
    shown = _shown([model], ["What is an item?\n", "\n", "Why?"])
    assert shown == _turn("sft", first) + _turn("sft", second)


def test_reset_forgets_and_exit_ends(model: ChatModel) -> None:
    after_reset = _shown([model], ["Hello", "/reset", "Why?", "/exit", "Unread"])
    assert after_reset.endswith(_shown([model], ["Why?"]))
    assert after_reset.count("sft> ") == 2 and "a new conversation" in after_reset
    assert "there is no command /quit; /reset begins" in _shown([model], ["/quit"])


def test_models_are_compared_each_with_its_own_answers(model: ChatModel, directory: Path) -> None:
    other = ChatModel.load("load", directory, "cpu", GREEDY)
    with torch.no_grad():
        other._model.model.layers[1].mlp.down_proj.weight.mul_(-3)
    expected, histories = "", {"load": [], "sft": []}
    for question in ("What is an item?", "Why?"):
        for each in (other, model):
            history = histories[each.name]
            history.append({"role": "user", "content": question})
            history.append({"role": "assistant", "content": each.answer(history)})
            expected += _turn(each.name, history[-1]["content"])
    assert histories["load"] != histories["sft"]
    assert _shown([other, model], ["What is an item?", "Why?"]) == expected


def test_a_terminal_shows_several_models_in_columns(model: ChatModel, directory: Path) -> None:
    other = ChatModel.load("load", directory, "cpu", GREEDY)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    converse([other, model], ["What is an item?"], console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line for line in lines if line.count("load") == 1 and line.count("sft") == 1]
    word = max(re.findall(r"\w+", model.answer([{"role": "user", "content": "What is an item?"}]), re.ASCII), key=len)
    assert [line for line in lines if line.count(word) == 2], (word, lines[-6:])


def test_answers_that_are_generated_together_are_those_of_each_alone(model: ChatModel) -> None:
    """Questions of different lengths are padded on the left."""
    conversations = [[{"role": "user", "content": text}] for text in ("What is an item?", "Why?", "def add(a, b):")]
    together = model.answer_all(conversations)
    assert [answer.text for answer in together] == [model.answer(each) for each in conversations]
    assert len({answer.text for answer in together}) == 3


def test_an_answer_ends_at_a_token_of_the_conversations(model: ChatModel, directory: Path) -> None:
    """A base model does not stop there by itself."""
    ids = _naive_ids(directory, ["Why?"])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    stopping = ChatModel("load", model._model, tokenizer, GREEDY, stop=[ids[4]])
    question = [[{"role": "user", "content": "Why?"}]]
    assert stopping.answer_all(question) == [Generated(tokenizer.decode(ids[: ids.index(ids[4])]), ended=True)]
    assert model.answer_all(question) == [Generated(tokenizer.decode(ids), ended=False)]


def test_sampled_answers_repeat_with_the_same_seed(directory: Path) -> None:
    def answer(seed: int) -> str:
        settings = Chat(max_new_tokens=8, temperature=2.0, seed=seed)
        return ChatModel.load("sft", directory, "cpu", settings).answer([{"role": "user", "content": "Hello"}])

    assert answer(1) == answer(1) != answer(2)


def test_a_conversation_longer_than_the_context_is_not_answered(model: ChatModel) -> None:
    with pytest.raises(ContextFull, match="the model reads at most 256"):
        model.answer([{"role": "user", "content": "container " * 300}])
    shown = _shown([model], ["container " * 300, "Why?"])
    assert "/reset begins a new conversation" in shown
    assert shown.endswith(_shown([model], ["Why?"]))


def test_a_prompt_begins_with_one_bos_token_as_in_training(tiny_llama_with_bos: Path) -> None:
    """Whether the template writes it, as that of a tuned model does, or not."""
    messages = [{"role": "user", "content": "Why?"}]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_with_bos)
    for template in (tokenizer.chat_template, "{{ bos_token }}" + tokenizer.chat_template):
        chat = ChatModel.load("sft", tiny_llama_with_bos, "cpu", GREEDY, template)
        text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        assert chat._prompt(messages) == tokenizer(text)["input_ids"]
        assert chat._prompt(messages)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("content", ["message['content']", "message['content'][0]['text']"], ids=["string", "parts"])
def test_a_model_chats_with_the_template_of_its_processor(
    content: str, model: ChatModel, directory: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(directory, tmp_path / "other"))
    template = (other / "chat_template.jinja").read_text().replace("message['content']", content)
    (other / "chat_template.jinja").unlink()
    (other / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    question = [{"role": "user", "content": "Why?"}]
    assert ChatModel.load("load", other, "cpu", GREEDY).answer(question) == model.answer(question)


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(UserError, match="target = sft: transformers cannot load the model"):
        ChatModel.load("sft", tmp_path, "cpu", GREEDY)
