import pytest

from pipeline.config import Target


@pytest.mark.parametrize(
    "text, stage, fraction, file_name",
    [
        ("load", "load", None, "load"),
        ("pretrain@20%", "pretrain", 0.2, "pretrain-at-20"),
        ("sft@12.5%", "sft", 0.125, "sft-at-12.5"),
        ("pretrain@7%", "pretrain", 0.07, "pretrain-at-7"),
    ],
)
def test_parsing_a_target_reverses_formatting_it(text: str, stage: str, fraction: float | None, file_name: str):
    target = Target.parse(text)
    assert (target.stage, target.fraction, str(target), target.file_name) == (stage, fraction, text, file_name)
    assert Target.of_role(target.role) == target and "%" not in target.role


@pytest.mark.parametrize("text", ["pretrian", "load@20%", "pretrain@20", "pretrain@-1%", "pretrain@0%", "sft@100%"])
def test_an_invalid_target_is_refused(text: str):
    with pytest.raises(ValueError, match="use expand for 0 %|use pretrain for 0 %|must be one of load, expand"):
        Target.parse(text)


def test_targets_are_sorted_from_the_base_to_the_tuned_model():
    texts = ["sft", "pretrain", "pretrain@80%", "load", "sft@50%", "pretrain@9%", "expand"]
    ordered = sorted(map(Target.parse, texts), key=lambda target: target.order)
    assert list(map(str, ordered)) == ["load", "expand", "pretrain@9%", "pretrain@80%", "pretrain", "sft@50%", "sft"]
