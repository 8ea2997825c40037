"""The report's sentences: they state what the numbers show, and no more."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import MODEL_TARGETS
from pipeline.files import read_json, write_json
from pipeline.report.findings import (
    caveats,
    final_target,
    headline,
    lead_findings,
    number_of_comparisons,
    suggestions,
    title,
)
from pipeline.report.report import compose
from pipeline.report.results import collect_results
from pipeline.report.runs import RunArtifacts, labels
from pipeline.report.scores import Scores
from tests.report.finished_runs import MEASURED_BLOCKS, SCORES, finished_run, with_other_data


def _headline(*runs: RunArtifacts) -> str:
    return headline(runs, Scores(collect_results(runs)))


def _scores_with(pretrained: dict[str, float], stderr: float | None = 0.015) -> dict:
    """The default scores with other values for the pre-trained model."""
    return {
        (task, metric): (n, stderr, {**values, "pretrain": pretrained.get(task, values["pretrain"])})
        for (task, metric), (n, _, values) in SCORES.items()
    }


def test_the_headline_of_one_run_states_its_scores(tmp_path: Path) -> None:
    assert _headline(finished_run(tmp_path)) == (
        "Expanded from 6 to 8 layers with LESA. Pre-training on 1,000 tokens lowered word perplexity on held-out "
        "corpus text by 24.0 % relative to the base model (35.00 → 26.60). From base to pre-trained: multiple-choice "
        "questions about the standard library 40.0 % → 47.0 % (+7.0 points, better); general-English minimal pairs "
        "81.4 % → 80.9 % (−0.5 points, within noise). From base to tuned: held-out corpus text, word perplexity 35.00 "
        "→ 27.00 (−22.9 %, better); multiple-choice questions about the standard library 40.0 % → 46.0 % (+6.0 points, "
        "better); general-English minimal pairs 81.4 % → 80.6 % (−0.8 points, within noise). All stages took "
        "3 min 34 s, and training 2.0×10¹² FLOPs."
    )


def test_a_report_says_that_models_were_scored_in_different_precisions(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    results = collect_results([run])
    assert not any("precision" in caveat for caveat in caveats([run], Scores(results)))
    file = run.directories["evaluate/sft"] / "evaluation.json"
    write_json(file, {**read_json(file), "dtype": "bfloat16"})
    assert any("different precisions (bfloat16, float32)" in caveat for caveat in caveats([run], Scores(results)))


def _next_steps(run: RunArtifacts) -> str:
    return " ".join(suggestions(run, Scores(collect_results([run]))))


def test_what_to_try_next_follows_from_the_scores(tmp_path: Path) -> None:
    good = finished_run(tmp_path / "good", scores=_scores_with({"held_out_text": 26.99}))
    assert _next_steps(good).startswith("Growing is worth it only if it beats the base")
    lost = finished_run(tmp_path / "lost")  # 26.6 after pre-training, 27.0 after tuning
    assert "`sft.corpus_fraction=0.2`" not in _next_steps(lost)  # within noise
    lost = finished_run(tmp_path / "lost", scores=_scores_with({"held_out_text": 20.0}))
    assert "Tuning lost on held-out text: try `sft.corpus_fraction=0.2`" in _next_steps(lost)
    useless = finished_run(tmp_path / "useless", scores=_scores_with({"held_out_text": 36.0}))
    assert "tune `pretrain.learning_rate`" in _next_steps(useless)
    control = finished_run(tmp_path / "control", "control", "none", scores=_scores_with({"held_out_text": 26.99}))
    assert _next_steps(control) == ""


def test_an_increase_is_described_as_an_increase(tmp_path: Path) -> None:
    text = _headline(finished_run(tmp_path, scores=_scores_with({"held_out_text": 70.0})))
    assert "raised word perplexity on held-out corpus text by 100.0 %" in text


def test_every_source_of_a_mixture_has_a_sentence(tmp_path: Path) -> None:
    """One source was learned, the other forgotten."""
    values = {"data.corpus.0": (20.0, 20.0, 15.0, 15.0), "data.corpus.1": (16.0, 16.0, 18.0, 18.0)}
    by_source = {
        (f"held_out_text/{source}", "word_perplexity"): (40, 0.4, dict(zip(MODEL_TARGETS, of, strict=True)))
        for source, of in values.items()
    }
    text = _headline(finished_run(tmp_path, scores={**SCORES, **by_source}))
    assert "lowered word perplexity on held-out corpus text by 24.0 %" in text
    assert "lowered word perplexity on held-out corpus text of data.corpus.0 by 25.0 %" in text
    assert "raised word perplexity on held-out corpus text of data.corpus.1 by 12.5 %" in text


def test_a_difference_within_noise_or_without_a_standard_error_is_marked(tmp_path: Path) -> None:
    noisy = finished_run(tmp_path / "a", scores=_scores_with({"held_out_text": 34.0}, stderr=0.6))
    assert "(35.00 → 34.00, within noise)" in _headline(noisy)
    silent = finished_run(tmp_path / "b", scores=_scores_with({}, stderr=None))
    assert "(35.00 → 26.60, no standard error)" in _headline(silent)


def test_a_score_that_stays_the_same_is_neither_raised_nor_lowered(tmp_path: Path) -> None:
    scores = _scores_with({"held_out_text": 35.0})
    assert "left word perplexity on held-out corpus text unchanged (35.00)." in _headline(
        finished_run(tmp_path, scores=scores)
    )


def test_without_standard_errors_pre_training_is_not_called_useless(tmp_path: Path) -> None:
    """The perplexity of a single document fell from 35 to 26.6."""
    assert "did not improve" not in _next_steps(finished_run(tmp_path, scores=_scores_with({}, stderr=None)))


def test_scores_of_the_base_that_all_runs_share_have_no_leader(tmp_path: Path) -> None:
    stages = ["load", "expand", "evaluate/load"]
    runs = [finished_run(tmp_path, method, method, stages=stages) for method in ("lesa", "llama_pro")]
    text = compose(runs, Scores(collect_results(runs)), {})
    assert "leads" not in text and "has the best" not in text


def test_without_scores_the_headline_uses_the_held_out_loss_of_training(tmp_path: Path) -> None:
    text = _headline(finished_run(tmp_path, stages=["load", "expand", "pretrain"], losses=[4.0, 3.0]))
    assert "changed the expanded model's perplexity on held-out blocks of the corpus from 54.60 to 20.09" in text


def test_the_change_of_the_held_out_loss_has_an_error_over_pairs_of_blocks(tmp_path: Path) -> None:
    run = finished_run(tmp_path, stages=["load", "expand", "pretrain"], blocks=MEASURED_BLOCKS)
    assert "from 20.09 to 7.389; the loss fell by 1.00 ± 0.10, paired over 2 blocks." in _headline(run)
    worse = finished_run(tmp_path, "worse", stages=["load", "expand", "pretrain"], blocks=MEASURED_BLOCKS[::-1])
    assert "the loss rose by 1.00 ± 0.10" in _headline(worse)


def test_the_headline_has_the_loss_of_the_averages_where_they_are_the_result(tmp_path: Path) -> None:
    stages = ["load", "expand", "pretrain"]
    averaged = finished_run(tmp_path, "a", "copy", stages=stages, blocks=MEASURED_BLOCKS, averages=2.5)
    assert (
        "changed the expanded model's perplexity on held-out blocks of the corpus from 20.09 to 12.18, that of the "
        "averages of the weights (loss 2.500)." in _headline(averaged)
    )
    plain = finished_run(tmp_path, "b", "lesa", stages=stages, losses=[3.0, 2.2])
    assert "LESA 2.200, copying 2.500" in _headline(averaged, plain)


def test_the_number_of_comparisons_counts_every_judged_difference(tmp_path: Path) -> None:
    """Three scores: nine differences from the base, and from stage to stage six that are not among them."""
    run = finished_run(tmp_path)
    assert number_of_comparisons([run], Scores(collect_results([run]))) == [
        "Of all differences from the base and between stages, 9 of 15 are significant, about 0.75 would be by chance; "
        "each is judged alone, without a correction for their number."
    ]
    same = {**SCORES, ("other", "acc"): (10, 0.1, dict.fromkeys(MODEL_TARGETS, 0.5))}
    silent = {("other", "acc"): (10, None, SCORES["minimal_pairs", "acc"][2])}
    run = finished_run(tmp_path, "same", scores=same)  # what is the same cannot count, nor what has no error
    assert "9 of 15 are significant" in number_of_comparisons([run], Scores(collect_results([run])))[0]
    run = finished_run(tmp_path, "silent", scores=silent)
    assert number_of_comparisons([run], Scores(collect_results([run]))) == []


def test_a_sweep_says_in_how_many_rows_a_lead_would_count_by_chance(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, method, method) for method in ("lesa", "copy")]
    first, *others = SCORES
    n, stderr, values = SCORES[first]
    changed = {
        first: (n, stderr, {**values, "pretrain": 1.01 * values["pretrain"]}),
        **{key: SCORES[key] for key in others},
    }
    runs.append(finished_run(tmp_path, "solar", "solar", scores=changed))
    against_base, lead = number_of_comparisons(runs, Scores(collect_results(runs)))
    assert against_base.startswith(
        "Of all differences from the base, 18 of 27 are significant, about 1.35 would be by chance"
    )
    # In the other two rows all methods have the same score.
    assert "Tukey's studentized range" in lead and "about 0.05 of 1 rows" in lead


def test_without_training_the_change_is_attributed_to_the_expansion(tmp_path: Path) -> None:
    run = finished_run(tmp_path, stages=["load", "expand", "evaluate/load", "evaluate/expand"])
    assert "Expansion raised word perplexity on held-out corpus text by 42.9 %" in _headline(run)


def test_a_change_is_attributed_to_everything_up_to_the_model_that_was_scored(tmp_path: Path) -> None:
    stages = ["load", "expand", "pretrain", "sft", "evaluate/load", "evaluate/sft"]
    text = _headline(finished_run(tmp_path, stages=stages))
    assert "Pre-training on 1,000 tokens and instruction tuning lowered word perplexity" in text
    large = finished_run(tmp_path / "large", stages=["load", "pretrain", "evaluate/load", "evaluate/pretrain"])
    file = large.directories["pretrain"] / "training.json"
    write_json(file, {**read_json(file), "tokens": 1_500_000})
    assert "Pre-training on 1.5 M tokens lowered" in _headline(large)


def test_titles_of_a_run_a_control_and_a_sweep(tmp_path: Path) -> None:
    control = finished_run(tmp_path, "sweep/expand-none", "none")
    grown = finished_run(tmp_path, "sweep/expand-lesa", "lesa")
    assert title([grown]) == "sweep/expand-lesa: expanded from 6 to 8 layers with LESA"
    assert title([control]) == "sweep/expand-none: the base model, not expanded"
    assert title([control, grown]) == "sweep: 2 runs side by side"


def test_labels_are_methods_unless_methods_repeat_and_unknown_methods_keep_their_name(tmp_path: Path) -> None:
    methods = [RunArtifacts("s/a", "lesa", {}), RunArtifacts("s/b", "brand_new", {})]
    assert labels(methods) == {"s/a": "LESA", "s/b": "brand_new"}
    seeds = [RunArtifacts("s/seed-0", "lesa", {}), RunArtifacts("s/seed-1", "lesa", {})]
    assert labels(seeds) == {"s/seed-0": "seed-0", "s/seed-1": "seed-1"}


def test_a_sweep_names_the_leader_and_the_runs_within_noise_of_it(tmp_path: Path) -> None:
    values = {"lesa": 26.0, "llama_pro": 26.5, "solar": 30.0}
    runs = [
        finished_run(tmp_path, name, name, scores=_scores_with({"held_out_text": value}, stderr=0.4))
        for name, value in values.items()
    ]
    first = lead_findings(Scores(collect_results(runs)), runs, "pretrain")[0]
    assert first == "LESA has the best word perplexity on held-out corpus text (26.00), but within noise of LLaMA Pro."
    alone = [runs[0], runs[2]]
    first = lead_findings(Scores(collect_results(alone)), alone, "pretrain")[0]
    assert first.endswith("(26.00), significantly ahead of all others.")


def test_a_sweep_without_standard_errors_claims_no_lead(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, name, name, scores=_scores_with({"held_out_text": value}, stderr=None))
        for name, value in (("lesa", 26.0), ("copy", 30.0))
    ]
    first = lead_findings(Scores(collect_results(runs)), runs, "pretrain")[0]
    assert first.endswith("(26.00), but without standard errors this lead may be noise.")


def test_a_sweep_is_compared_by_the_last_target_that_all_runs_have(tmp_path: Path) -> None:
    complete = finished_run(tmp_path, "a", "lesa")
    short = finished_run(tmp_path, "b", "copy", stages=["load", "expand", "evaluate/load", "evaluate/expand"])
    assert final_target(Scores(collect_results([complete, short])), [complete, short]) == "expand"
    assert final_target(Scores(collect_results([complete])), [complete]) == "pretrain"


def test_a_sweep_ranks_held_out_losses_and_states_the_loss_of_the_base(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, "a", "lesa", losses=[4.5, 3.1]),
        finished_run(tmp_path, "b", "none", losses=[3.4, 3.2]),
    ]
    assert "one run each (base model: 3.400): LESA 3.100, no expansion 3.200" in _headline(*runs)


def _runs_on_two_datasets(root: Path) -> list[RunArtifacts]:
    stages = ["load", "expand", "tokenize/corpus", "pretrain"]
    found = []
    for share, losses in ((0.2, [3.4, 3.2]), (0.4, [3.6, 3.1])):
        for name, method, tokens in (("a", "none", 500), ("b", "copy", 1000)):
            name = f"sweep/{name}-{share}"
            run = finished_run(root / str(share), name, method, stages=stages, losses=losses, tokens=tokens)
            found.append(run)
        with_other_data(run, "tokenize/corpus", held_out_fraction=share)
    return found


def test_losses_on_different_held_out_blocks_are_not_in_one_ranking(tmp_path: Path) -> None:
    runs = _runs_on_two_datasets(tmp_path)
    text = _headline(*runs)
    first = "Held-out loss after pre-training with held_out_fraction=0.2, one run each (base model: 3.400): "
    second = "Held-out loss after pre-training with held_out_fraction=0.4, one run each (base model: 3.600): "
    assert f"{first}a-0.2 3.200, b-0.2 3.200." in text and f"{second}a-0.4 3.100, b-0.4 3.100." in text
    found = " ".join(caveats(runs, Scores([])))
    assert "are on different text, and cannot be compared" in found and "(500 to 1,000)" in found
    found = " ".join(caveats(runs[::2], Scores([])))
    assert "are on different text, and cannot be compared" in found and "numbers of tokens" not in found
    found = " ".join(caveats(runs[:2], Scores([])))
    assert "different text" not in found and "(500 to 1,000)" in found


def test_the_number_of_held_out_blocks_distinguishes_losses_too(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, method, method) for method in ("copy", "lesa")]
    file = runs[0].directories["pretrain"] / "manifest.json"
    write_json(file, {**read_json(file), "settings": {"held_out_blocks": 8, "sequence_length": 64}})
    assert "with held_out_blocks=8, one run each: copying 3.000." in _headline(*runs)
    assert "with held_out_blocks=4, one run each: LESA 3.000." in _headline(*runs)


def test_caveats_of_a_small_run_state_seed_tokens_and_held_out_blocks(tmp_path: Path) -> None:
    run = finished_run(tmp_path, seed=7)
    text = " ".join(caveats([run], Scores(collect_results([run]))))
    assert "(seed 7)" in text and "1,000 tokens" in text
    assert "4 blocks of 64 tokens and has no standard error." in text  # it is from an earlier version
    assert "learning rate" not in text
    file = run.directories["expand"] / "manifest.json"
    write_json(file, {**read_json(file), "seed": 0})  # as of a method that draws no random numbers
    assert "(seed 7)" in " ".join(caveats([run], Scores(collect_results([run]))))
    run = finished_run(tmp_path, blocks=MEASURED_BLOCKS)
    text = " ".join(caveats([run], Scores(collect_results([run]))))
    assert "4 blocks of 64 tokens. Its standard error is over these blocks" in text


def test_a_sweep_warns_if_its_runs_train_different_numbers_of_parameters(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, method, method) for method in ("lesa", "copy", "none")]
    assert "(400,000 to 1.5 M)" in " ".join(caveats(runs, Scores(collect_results(runs))))
    assert "numbers of parameters" not in " ".join(caveats(runs[:2], Scores(collect_results(runs[:2]))))


def test_a_sweep_warns_of_shared_learning_rates_different_placements_and_missing_scores(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, "a", "lesa", num_new=2),
        finished_run(tmp_path, "b", "copy", num_new=3, stages=["load", "expand", "pretrain", "evaluate/load"]),
    ]
    text = " ".join(caveats(runs, Scores(collect_results(runs))))
    assert "one learning rate" in text and "same places" in text
    assert "Not scored in b: expanded, pre-trained." in text
