"""What every method promises: tensors, logits, placement, resumption, settings and random numbers.

No module outside a method's own may name the method.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pipeline.__main__ import CONF
from pipeline.config import METHODS, AnyExpand
from pipeline.expansion import surgery
from pipeline.expansion.method import InsertionMethod, Method, NewTensor, Workspace
from pipeline.expansion.methods import built_in_method
from pipeline.expansion.surgery import TensorNames, write_weights
from pipeline.models.families import family_of
from pipeline.models.reading import ModelDirectory
from pipeline.stages import expand
from tests.expansion.random_layer import CONFIG, Layers
from tests.stages.one_task import make_task

PIPELINE = Path(surgery.__file__).parents[1]
SMALL = {"epochs": 1, "hidden_size": 16}  # of a method that has such settings
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS),
    *((method, {"zero_init": True}) for method in METHODS if "zero_init" in built_in_method(method).model_fields),
    *(
        (method, {"output_scale": scale})
        for method in METHODS
        for scale in (0.0, 0.5, 1.0)
        if "output_scale" in built_in_method(method).model_fields
    ),
]
CPU = torch.device("cpu")

MakeMethod = Callable[..., Method]


@pytest.fixture
def make_method(expand_settings: Callable[..., AnyExpand]) -> MakeMethod:
    """``make_method("copy", new_layers=2)``: a built-in method with some settings changed."""

    def make(name: str, **changes: Any) -> Method:
        small = {key: value for key, value in SMALL.items() if key in built_in_method(name).model_fields}
        method = expand_settings(name, **{"new_layers": 2, **small, **changes})
        assert isinstance(method, Method)
        return method

    return make


def _workspace(method: Method) -> Workspace:
    return Workspace(declared_seed=0 if method.draws_random_numbers else None, config=CONFIG)


@pytest.mark.parametrize("name", METHODS)
def test_every_tensor_of_every_new_layer_comes_once_with_the_shape_of_the_base(
    make_method: MakeMethod, random_layers: Callable[[int], Layers], name: str
) -> None:
    base, method = random_layers(5), make_method(name, new_layers=3)
    plan = method.place(5)
    made = list(method.new_tensors(base, plan, _workspace(method)))
    wanted = {(planned.layer, tensor) for planned in plan.new_layers for tensor in base[0]}
    assert {(new.layer, new.tensor) for new in made} == wanted and len(made) == len(wanted)
    for new in made:
        assert new.value.shape == base[0][new.tensor].shape
        assert new.value.is_floating_point() and torch.isfinite(new.value).all()


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_logits_and_dtypes_are_kept_as_promised(
    make_method: MakeMethod, tiny_llama_dir: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    method = make_method(name, **changes)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).save_pretrained(base)
    for file in tiny_llama_dir.glob("token*"):
        (base / file.name).write_bytes(file.read_bytes())
    expand.run(make_task("expand", method, tmp_path / "out", {"load": base}))
    assert {spec.dtype for spec in ModelDirectory(tmp_path / "out").specs.values()} == {torch.bfloat16}
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (base, tmp_path / "out")
        )
    assert torch.equal(before, after) == method.keeps_logits


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_base_layers", [4, 7])
def test_a_plan_has_all_base_layers_in_order_and_can_be_made(
    make_method: MakeMethod, name: str, num_base_layers: int
) -> None:
    for new_layers in range(1, num_base_layers + 1):
        method = make_method(name, new_layers=new_layers)
        method.check(num_base_layers)
        plan = method.place(num_base_layers)
        assert [layer.layer for layer in plan.layers] == list(range(num_base_layers + method.new_layers))
        assert [layer.base for layer in plan.layers if not layer.new] == [(base,) for base in range(num_base_layers)]
        assert all(0 <= base < num_base_layers for layer in plan.new_layers for base in layer.base)
        available = {layer.layer for layer in plan.layers if not layer.new}
        for layer in plan.new_layers:
            assert set(layer.made_from) <= available
            available.add(layer.layer)
        assert len(available) == len(plan.layers)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("after", [1, 11, 17])
def test_an_interrupted_expansion_ends_with_the_same_weights(
    make_method: MakeMethod,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    after: int,
) -> None:
    method, base = make_method(name, position="top"), ModelDirectory(tiny_llama_dir)
    names = TensorNames(base, family_of("llama"), method.place(4))

    def interrupted(*arguments: Any) -> Iterator[NewTensor]:
        for number, new in enumerate(method.new_tensors(*arguments)):
            if number == after:
                raise KeyboardInterrupt
            yield new

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir(), resumed.mkdir()
    seed = 3 if method.draws_random_numbers else None
    uninterrupted = write_weights(names, method.new_tensors, CPU, whole, seed)
    monkeypatch.setattr(surgery, "WEIGHTS_SAVE_SECONDS", -1.0)
    if names.plan.new_layers:
        with pytest.raises(KeyboardInterrupt):
            write_weights(names, interrupted, CPU, resumed, seed)
    work = write_weights(names, method.new_tensors, CPU, resumed, seed)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (work.records, work.warnings) == (uninterrupted.records, uninterrupted.warnings)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_settings_are_refused(make_method: MakeMethod, name: str) -> None:
    with pytest.raises(ValidationError, match="no_such_setting"):
        make_method(name, no_such_setting=1)


@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(built_in_method(name), InsertionMethod)])
@pytest.mark.parametrize("wrong", [{"new_layers": 0}, {"new_layers": 1.5}, {"position": "side"}, {"position": [0.5]}])
def test_placements_of_the_wrong_type_are_refused(make_method: MakeMethod, name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        make_method(name, **wrong)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_seed_decides_what_is_drawn(
    make_method: MakeMethod, random_layers: Callable[[int], Layers], name: str
) -> None:
    base, method = random_layers(4), make_method(name)
    plan, made = method.place(4), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        made.append(list(method.new_tensors(base, plan, _workspace(method))))
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert all(torch.equal(first.value, second.value) for first, second in zip(*made, strict=True))
    if method.draws_random_numbers:
        other = list(method.new_tensors(base, plan, Workspace(declared_seed=1, config=CONFIG)))
        assert not all(torch.equal(first.value, second.value) for first, second in zip(made[0], other, strict=True))


def test_a_seed_that_is_not_declared_cannot_be_read() -> None:
    assert Workspace(declared_seed=5).seed == 5
    with pytest.raises(RuntimeError, match="draws_random_numbers"):
        _ = Workspace().seed


def test_settings_that_came_later_are_in_the_key_only_if_they_differ_from_what_was_done_before(
    make_method: MakeMethod,
) -> None:
    for name, setting, changed in (("copy", "output_scale", 0.5), ("average", "zero_init", True)):
        assert setting not in make_method(name).key_settings()
        assert make_method(name, **{setting: changed}).key_settings()[setting] == changed


def test_every_method_has_one_yaml_file_and_its_own_title_source_and_color() -> None:
    assert {file.stem for file in (CONF / "expand").glob("*.yaml")} == {*METHODS, "external"}
    methods = [built_in_method(name) for name in METHODS]
    for attribute in ("title", "source", "color"):
        values = [getattr(method, attribute) for method in methods]
        assert all(values) and len(set(values)) == len(values)


def test_no_other_module_names_a_method() -> None:
    """Methods are named neither in identifiers nor in strings outside their own modules. Docstrings do not count."""
    ordinary = {
        "average",
        "copy",
        "none",
        "stack",
    }  # words that mean a method only where strings are compared or listed
    pattern = "|".join({form for name in set(METHODS) - ordinary for form in (name, name.replace("_", ""))})
    naming = []
    for file in sorted(PIPELINE.rglob("*.py")):
        if "expansion" in file.parts and re.match(pattern, file.stem):
            continue
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            words = [str(getattr(node, field, "")) for field in ("id", "attr", "arg", "name", "module")]
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                words.append(str(node.value))
            listed = isinstance(node, ast.Compare | ast.Dict | ast.Set | ast.Tuple | ast.List)
            constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)] if listed else []
            separated = re.sub("(?<=[a-z])(?=[A-Z])", "_", " ".join(words)).lower()  # "tableSand" contains no "lesa"
            if re.search(pattern, separated) or {"average", "copy"} & {*map(str, constants)}:
                naming.append(f"{file.relative_to(PIPELINE)}:{node.lineno}")
    assert naming == []
