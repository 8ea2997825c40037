"""Whatever is typed, it composes to settings or is refused with one message and exit code 2."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from pipeline import __main__ as command_line
from pipeline.command import Job
from pipeline.config import METHODS, Settings
from pipeline.config.messages import known_keys
from pipeline.errors import EXIT_DONE, EXIT_REQUEST
from tests.fuzz.limits import examples, outcome
from tests.fuzz.strategies import reals, texts

SECRET = "correct-horse-battery"
KEYS = sorted({*known_keys(), "experiment", "expand", "model", "data", "pretrain", "launch", "slurm",
    "hydra.searchpath", "hydra/job_logging",
               "hydra", "expand.variant", "expand.module", "data.corpus.0.path", "data.corpus.1", "data.corpus.x",
               "evaluate.num_fewshot.a",
               "pretrain.role_learning_rates.o", "sft.deepspeed.overrides.a.b", "model.shape.vocab_size", "defaults",
               "experiment@_global_",
               "expand@x", "expand@_here_", "data@a:b", "", ".", "a..b", "pretrain.", ".pretrain", "_target_",
               "name.x", "seed.0"})  # fmt: skip
VALUES = ("null", "true", "0", "1", "-1", "1e3", "1e999", "nan", "inf", "0.5", "64", "99999999999999999999", "[]",
    "{}", "''", '""', "???", "a", "a b",
          "[1,2]", "[a", "a]", "{a:1}", "{a:{b:1}}", "{a", "(", "a,b", "1,2", "'a,b'", "a=b", "~/x", "~", "$", "${",
          "${}", "${seed}", "${name}", "${output_dir}",
          "${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}", "${oc.env:FUZZ_PASSWORD}", "${oc.decode:'['}",
          "${oc.create:1}", "${hydra:runtime}", "${unknown:1}", "${a.b}",
          "${..seed}", "${seed}${seed}", "x${seed}", "range(3)", "range(0,1e9)", "range(1000000000)", "choice(a,b)",
          "choice()", "glob(*)", "interval(0,1)", "sort(3,1)",
          "shuffle(1,2)", "tag(a,choice(1,2))", "int(x)", "str(1)", "float(a)", "json_str(1)", "cast(1)", "'", '"',
          "\\", "\\,", "a\tb", "\n", "\0", "\udcff", "é", "😀", "%", "@",
          "quickstart", "lesa_llama3", "../experiment/quickstart", "/etc/passwd", "quickstart.yaml", *METHODS, "os",
          "os.path", "no.such", "paper", "reference",
          "[load]", "[[load]]", "[null]", "plan", "submit", "pretrain@20%", "[pretrain@20%]", "{o: 2.0}", "{1: 2}",
          "{a: ???}", "[" * 40 + "]" * 40,
          "9" * 5000, "x" * 5000, f"password={SECRET}", "# x", "a # b", "!!python/name:os", "*a", "&a", "|", ">",
          "- a", "2026-01-01", "0x10", "1_000", "0b1", "01:30")  # fmt: skip
OPTIONS = ("--multirun", "-m", "--config-dir", "--config-dir=/no/such", "--config-dir=/tmp", "--config-dir=\0",
    "--job=/no/such", "--job=", "--config-name=x", "-x", "--", "-",
           f"--password={SECRET}", f"--api-key={SECRET}", f"-p={SECRET}", "--multi", "--version", "", "x", "=", "==",
           "~", "+", "++", "@", "~expand", "~seed", "~pretrain.steps=3",
           "~data.corpus", "~name", "+experiment", "+experiment=", "+experiment=quickstart,solar_mistral",
           "expand=[lesa,copy]", "expand=null", "+experiment@x=quickstart")  # fmt: skip


def _mistyped(key: str, at: int) -> str:
    return key[: at % (len(key) + 1)] + key[at % (len(key) + 1) + 1 :]


keys = st.sampled_from(KEYS) | st.builds(_mistyped, st.sampled_from(KEYS), st.integers(0, 30)) | texts
known = st.sampled_from(VALUES)
values = known | known.map("[{}]".format) | known.map("'{}'".format) | texts | (st.integers() | reals).map(str)
overrides = st.builds("{}{}={}".format, st.sampled_from([""] * 6 + ["+", "++", "~"]), keys, values)
arguments = st.lists(overrides | overrides | overrides | st.sampled_from(OPTIONS), min_size=1, max_size=3)


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs of the last command, which are not executed."""
    jobs: list[Job] = []
    monkeypatch.setattr(command_line, "execute", lambda found, console: jobs.extend(found))
    monkeypatch.setenv("FUZZ_PASSWORD", SECRET)
    return jobs


def _check(arguments: Sequence[str], composed: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    composed.clear()
    capsys.readouterr()  # of an example that failed
    status = outcome(lambda: command_line.main(arguments))
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    if status == EXIT_DONE:
        event("composed")
        assert composed and not printed.err
        for job in composed:  # what is written beside a run can be read again
            assert Settings.model_validate_json(job.settings.model_dump_json()) == job.settings
    else:
        assert status == EXIT_REQUEST, (status, printed.err)
        first, *others = printed.err.splitlines()
        event(re.split(r"[^a-z ]", others[0].strip())[0] if others else first)
        assert " = " in first and len(others) >= 2 and "Traceback" not in printed.err


@examples(60)
@given(arguments)
def test_overrides(composed: list[Job], capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    _check(["+experiment=quickstart", *arguments], composed, capsys)


@examples(20)
@given(st.lists(overrides | st.sampled_from(OPTIONS), max_size=3))
def test_whole_command_lines(composed: list[Job], capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    _check(arguments, composed, capsys)
