"""The graph of a run, and which settings change the keys of which artifacts."""

from __future__ import annotations

from functools import cache

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.config import Settings
from pipeline.driver.graph import Inputs, Node, build_graph, forced, make_report, select_nodes

INPUTS = Inputs(model="m", corpus="c", instructions="i", interpreter="p")


@cache
def _settings(*overrides: str) -> Settings:
    return compose_jobs(["+experiment=quickstart", *overrides], False, None)[0].settings


def _keys(*overrides: str, inputs: Inputs = INPUTS) -> dict[str, str]:
    return {name: node.artifact.key for name, node in build_graph(_settings(*overrides), inputs).items()}


def _changed(*overrides: str) -> set[str]:
    before, after = _keys(), _keys(*overrides)
    return {name for name in before if before[name] != after[name]}


def test_answers_depend_on_conversations_and_scores_do_not() -> None:
    asking = _keys("evaluate.sample_answers=3")
    silent = _keys("evaluate.sample_answers=0")
    assert {name for name in asking if asking[name] != silent.get(name)} == {"evaluate/answers", "report"}
    tuned_otherwise = _keys("evaluate.sample_answers=3", "sft.sequence_length=128")
    changed = {name for name in asking if asking[name] != tuned_otherwise[name]}
    assert changed == {"tokenize/instructions", "sft", "evaluate/sft", "evaluate/answers", "report"}


AFTER_EXPAND = {
    "expand",
    "pretrain",
    "sft",
    "evaluate/expand",
    "evaluate/pretrain",
    "evaluate/sft",
    "evaluate/answers",
    "report",
}
AFTER_SFT = {"sft", "evaluate/sft", "evaluate/answers", "report"}


@pytest.mark.parametrize(
    "override",
    [
        "tracking=online", "launch.processes=2", "launch.threads=1", "pretrain.micro_batch=2",
        "pretrain.checkpoint_every_steps=3", "pretrain.deepspeed.zero_stage=3", "evaluate.batch_size=4",
        "evaluate.rescore=true",
        "pretrain.snapshot_at=[0.5]", "sft.keep_checkpoints=4",
        "force=[expand]", "stages=[load]", "output_dir=elsewhere",
        "data.max_forgetting_tokens=100",  # without data.forgetting
    ],
)  # fmt: skip
def test_settings_that_cannot_change_numbers_change_no_key(override: str) -> None:
    assert _changed(override) == set()


def test_the_limit_of_forgetting_tokens_is_in_the_key_of_a_corpus_with_forgetting() -> None:
    forgetting = (
        "data.forgetting={kind: files, path: /f, config_name: null, split: null, revision: null, text_field: text, "
        "weight: 1.0}"
    )
    assert _keys(forgetting)["tokenize/corpus"] != _keys(forgetting, "data.max_forgetting_tokens=9")["tokenize/corpus"]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("sft.learning_rate=1e-5", AFTER_SFT),
        ("sft.corpus_fraction=0.1", AFTER_SFT),
        ("sft.router_aux_loss=0.0", AFTER_SFT),
        ("data.chat_template=plain", {"tokenize/instructions", *AFTER_SFT}),
        ("sft.deepspeed.overrides={gradient_clipping: 0.1}", AFTER_SFT),
        ("expand=average", AFTER_EXPAND),
        ("expand.position=bottom", AFTER_EXPAND),
        ("pretrain.steps=7", AFTER_EXPAND - {"expand", "evaluate/expand"}),
        ("evaluate.limit=5", {"evaluate/load", "evaluate/expand", "evaluate/pretrain", "evaluate/sft", "report"}),
        ("model.dtype=bfloat16", set(_keys())),
        ("seed=1", AFTER_EXPAND - {"expand", "evaluate/expand"}),  # llama_pro draws no random numbers
    ],
)
def test_a_changed_setting_changes_the_keys_of_its_stage_and_of_dependent_stages(
    override: str, changed: set[str]
) -> None:
    assert _changed(override) == changed


def test_only_matched_training_of_none_depends_on_where_layers_would_be_added() -> None:
    def none(*overrides: str) -> dict[str, str]:
        return _keys("expand=none", *overrides)

    elsewhere, matched = "expand.position=bottom", "pretrain.trainable=matched"
    assert none() == none(elsewhere) == none("expand.new_layers=3")
    assert none()["expand"] != none(matched)["expand"] != none(elsewhere, matched)["expand"]
    assert none("sft.trainable=matched")["expand"] == none(matched)["expand"]
    assert _keys()["expand"] == _keys(matched)["expand"]


def test_an_expansion_depends_on_the_corpus_only_if_layers_are_ranked() -> None:
    ranked = "expand.position=least_important"
    other = Inputs(model="m", corpus="other", instructions="i", interpreter="p")
    assert _keys()["expand"] == _keys(inputs=other)["expand"] == _keys("expand.probe_tokens=7")["expand"]
    assert _keys(ranked)["expand"] != _keys(ranked, inputs=other)["expand"]
    assert _keys(ranked)["expand"] != _keys(ranked, "expand.probe_tokens=7")["expand"]
    assert set(select_nodes(build_graph(_settings(ranked), INPUTS), ["expand"])) == {
        "load",
        "tokenize/corpus",
        "expand",
    }
    assert _settings(ranked, "stages=[expand]").reads_data and not _settings("stages=[expand]").reads_data


def test_the_seed_changes_the_key_of_an_expansion_that_draws_random_numbers() -> None:
    lesa, again = _keys("expand=lesa"), _keys("expand=lesa", "seed=1")
    assert lesa["expand"] != again["expand"] and lesa["load"] == again["load"]


def test_the_name_of_a_run_changes_only_the_key_of_its_report() -> None:
    assert _changed("name=another") == {"report"}


def test_the_content_of_an_input_changes_the_keys_of_what_is_made_from_it() -> None:
    before, after = _keys(), _keys(inputs=Inputs(model="m", corpus="other", instructions="i", interpreter="p"))
    same = {name for name in before if before[name] == after[name]}
    assert same == {"load", "expand", "tokenize/instructions"}


def test_a_sweep_shares_artifacts_that_do_not_depend_on_the_method() -> None:
    nodes: dict[str, set[str]] = {}
    for method in ("lesa", "llama_pro", "none"):
        for name, key in _keys(f"expand={method}").items():
            nodes.setdefault(name, set()).add(key)
    shared = {name for name, keys in nodes.items() if len(keys) == 1}
    assert shared == {"load", "tokenize/corpus", "tokenize/instructions", "evaluate/load"}


def test_stages_are_selected_with_their_dependencies() -> None:
    nodes = build_graph(_settings(), INPUTS)
    assert list(select_nodes(nodes, ["expand"])) == ["load", "expand"]
    assert list(select_nodes(nodes, ["tokenize"])) == ["load", "tokenize/corpus", "tokenize/instructions"]
    assert list(select_nodes(nodes, ["report"])) == list(nodes)


def test_a_run_without_conversations_neither_tokenizes_nor_tunes() -> None:
    """What remains has the same keys, so that it is shared with runs that tune."""
    without = Inputs(model="m", corpus="c", instructions=None, interpreter="p")
    tuned, untuned = _keys(), _keys("data.instructions=null", inputs=without)
    assert set(tuned) - set(untuned) == {"tokenize/instructions", "sft", "evaluate/sft", "evaluate/answers"}
    assert {name for name in untuned if untuned[name] != tuned[name]} == {"report"}
    ignored = ("expand=none", "sft.trainable=matched", "data.instructions=null")
    assert _keys(*ignored, inputs=without)["expand"] == _keys("expand=none")["expand"]


def test_only_models_that_are_scored_are_trained() -> None:
    stages, targets = "stages=[load,expand,tokenize,pretrain,evaluate]", "evaluate.targets=[load,pretrain]"
    run = _settings(stages, targets)
    selected = select_nodes(build_graph(run, INPUTS), run.stages)
    assert {"pretrain", "evaluate/pretrain", "evaluate/answers"} <= set(selected)
    assert {"sft", "evaluate/sft", "report"}.isdisjoint(selected)


def test_force_rebuilds_a_stage_and_its_dependents() -> None:
    nodes = build_graph(_settings(), INPUTS)
    assert forced(nodes, ["expand"]) == AFTER_EXPAND
    assert forced(nodes, ["sft"]) == AFTER_SFT


def test_the_report_on_a_sweep_depends_on_every_job() -> None:
    runs = [_settings(f"expand={method}", f"name=q/{method}") for method in ("lesa", "none")]
    graphs: list[tuple[Settings, dict[str, Node]]] = [(run, build_graph(run, INPUTS)) for run in runs]
    node = make_report(runs[0], graphs)
    assert "q/lesa:expand" in node.parents and "q/none:evaluate/sft" in node.parents
    assert not any(role.endswith(":report") for role in node.parents)


def test_a_model_that_keeps_the_logits_reuses_the_scores_of_the_base() -> None:
    """In any order of targets, and only if both are scored."""

    def reused(*overrides: str) -> dict[str, list[str]]:
        nodes = build_graph(_settings(*overrides), INPUTS)
        return {name: [other.name for other in node.reuses.values()] for name, node in nodes.items() if node.reuses}

    assert reused() == reused("evaluate.targets=[sft,expand,load]") == {"evaluate/expand": ["evaluate/load"]}
    for override in ("expand=average", "evaluate.rescore=true", "evaluate.targets=[expand,sft]"):
        assert reused(override) == {}


def test_evaluating_a_snapshot_adds_a_node_and_changes_no_other_key() -> None:
    way = "evaluate.targets=[load,expand,pretrain@20%,pretrain@40%,pretrain,sft]"
    plain, asked = _keys(), _keys(way)
    assert set(asked) - set(plain) == {"evaluate/pretrain-at-20", "evaluate/pretrain-at-40"}
    assert {name for name in plain if plain[name] != asked[name]} == {"report"}
    assert asked["evaluate/pretrain-at-20"] != asked["evaluate/pretrain-at-40"]
    nodes = build_graph(_settings(way), INPUTS)
    assert nodes["evaluate/pretrain-at-20"].parents["model"] is nodes["pretrain"]
    assert nodes["pretrain"].settings.snapshot_at == [0.2, 0.4] and nodes["sft"].settings.snapshot_at == []


def test_snapshots_alone_are_not_asked_questions() -> None:
    assert "evaluate/answers" in _keys()
    assert "evaluate/answers" not in _keys("evaluate.targets=[pretrain@50%]")
