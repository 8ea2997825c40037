"""The command line: composes the settings with Hydra, validates them with pydantic, and runs the action.

This is the only module that imports hydra or omegaconf. It uses Hydra's compose API rather than its launcher, which
changes the working directory, writes its own files, and starts the first job of a sweep before it validates the others.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import SafeLoader, YAMLError

from pipeline.command import Job, execute, execute_batch_job
from pipeline.config import Settings
from pipeline.config.data import PURPOSES
from pipeline.config.messages import (
    badly_quoted,
    explain_hydra,
    is_utf8,
    list_choices,
    no_experiment,
    not_a_number,
    not_given,
    not_utf8,
    not_yaml,
    unknown_option,
    validate_settings,
)
from pipeline.config.secrets import HIDDEN, refuse_secret_overrides, refuse_secrets
from pipeline.config.section import MAX_NAME_BYTES
from pipeline.config.untuned import leave_out_tuning
from pipeline.driver.requeue import requeue_this_job
from pipeline.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_REQUEST,
    EXIT_STOPPED,
    DamagedArtifacts,
    NoProgress,
    Stopped,
    UserError,
    WorkersFailed,
)
from pipeline.files import sha256_text
from pipeline.launch.environment import is_secondary_copy
from pipeline.launch.slurm import SlurmUnreachable
from pipeline.study.execute import StudyCommand, execute_study
from pipeline.study.loading import asks_for_study, load_study

CONF = Path(__file__).resolve().parent / "conf"  # in the repository, a symbolic link to the top-level conf/
FREE_DICTIONARY = re.compile(r"[\w.]+=\{")  # keys unknown to Hydra, to be validated by pydantic
SOURCES = {f"data.{purpose}" for purpose in PURPOSES}  # each is one source or a list of sources
LOG_WIDTH = 120  # columns, if the output is not a terminal

# YAML 1.1 reads a time without quotes as a number in base 60: 24:00:00 as 86400, which slurm.*.time takes for minutes.
_TIME = ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d\d)+$"))
SafeLoader.yaml_implicit_resolvers = {
    first: [_TIME, *resolvers] for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see ``pipeline.errors``."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # Slurm sends SIGUSR1 before a time limit
        signal.signal(number, _stop)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
    if is_secondary_copy(os.environ):
        print("the process with local rank 0 runs the pipeline and starts its workers; this one exits", file=sys.stderr)
        return EXIT_DONE
    try:
        options = _parse(sys.argv[1:] if arguments is None else list(arguments))
        if options.job is not None:
            execute_batch_job(options.job, console)
        elif asks_for_study(options.overrides):
            _run_study(options, console)
        else:
            execute(compose_jobs(options.overrides, options.multirun, options.config_dir), console)
    except UserError as error:
        _print_refusal(error)
        return EXIT_REQUEST
    except (Stopped, KeyboardInterrupt):
        print("stopped; progress is saved, and the same command resumes from there", file=sys.stderr)
        if (message := requeue_this_job()) is not None:
            print(message, file=sys.stderr)
        return EXIT_STOPPED
    except (DamagedArtifacts, WorkersFailed, NoProgress) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except SlurmUnreachable as error:
        print(f"Slurm does not answer: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Unwinds the stack on the first signal, like Ctrl-C. Later signals are ignored."""
    for ignored in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    raise Stopped(f"signal {number}")


def _run_study(options: argparse.Namespace, console: Console) -> None:
    """Carries out a command that names a study, every run of which has settings like those of a command line."""
    given: list[str] = options.overrides
    refuse_secret_overrides(given)
    if options.multirun:
        raise UserError(
            setting="--multirun",
            value=" ".join(item for item in given if asks_for_study([item])),
            rule="a study is not a sweep, and runs its contenders by itself",
            remedy="Leave it out. To compare values of a setting, make each a contender of the study.",
        )
    try:
        study, overrides = load_study(given, _folders(options.config_dir))
    except YAMLError as error:
        raise not_yaml(error) from error
    arguments = [*given, *([f"--config-dir={options.config_dir.absolute()}"] if options.config_dir else [])]

    def settings_of(run: Sequence[str]) -> Settings:
        return compose_jobs(list(run), False, options.config_dir)[0].settings

    execute_study(StudyCommand(study, overrides, arguments, settings_of), console)


class _Parser(argparse.ArgumentParser):
    """Reports errors like all others, and without the values of options, which may be secrets."""

    def error(self, message: str) -> NoReturn:
        option = re.match(r"argument (-[\w/-]+)", message)
        raise UserError(
            setting=option[1] if option else "command line",
            value=HIDDEN,
            rule="it has a wrong number of values" if option else "its options cannot be parsed",
            remedy="Run python -m pipeline --help for the options. Settings are given as key=value.",
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    for argument in arguments:
        if not argument.isascii() and not is_utf8(argument):
            raise not_utf8(argument)
    parser = _Parser(
        prog="python -m pipeline",
        description="Turns a pre-trained language model into a deeper, better one.",
        epilog="experiments: " + ", ".join(list_choices("experiment", [CONF])),
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="+experiment=NAME, then any settings")
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: key=a,b runs one job per value")
    parser.add_argument(
        "--config-dir", type=_path, help="a directory with your own configuration, structured like conf/"
    )
    parser.add_argument("--job", type=_path, help="used by the batch scripts of action=submit")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise unknown_option(unknown[0])
    return options


def _path(text: str) -> Path:
    """Returns the path of an option. Shells do not expand the ``~`` of ``--config-dir=~/conf``."""
    return Path(os.path.expanduser(text))


def compose_jobs(overrides: list[str], multirun: bool, config_dir: Path | None) -> list[Job]:
    """Returns all jobs of the command, composed and validated before the first one starts.

    Raises:
        UserError: Hydra or pydantic rejects a setting.
    """
    refuse_secret_overrides(overrides)
    overrides = [f"+{item}" if item.startswith("experiment=") else item for item in overrides]
    folders = _folders(config_dir)
    if not any(item.startswith("+experiment=") for item in overrides):
        raise no_experiment(folders)
    _check_quoting(overrides)
    overrides = [f"++{item}" if FREE_DICTIONARY.match(item) else item for item in overrides]
    overrides = [_listed(item) for item in _choose_external_method(overrides)]
    try:
        jobs = _split_sweep(overrides) if multirun else [(overrides, "")]
        return [Job(_compose(job, suffix, folders), sweep=suffix != "") for job, suffix in jobs]
    except (HydraException, OmegaConfBaseException) as error:
        raise explain_hydra(error, overrides, folders) from error
    except YAMLError as error:
        raise not_yaml(error) from error


def _folders(config_dir: Path | None) -> list[Path]:
    """Returns the directories with configuration files. The user's own one comes last."""
    # Path.is_dir raises an error for a name that is too long.
    if config_dir is not None and not os.path.isdir(config_dir):
        raise UserError(
            setting="--config-dir", value=config_dir, rule="it must be a directory", remedy="Check the path."
        )
    return [CONF, *([config_dir] if config_dir else [])]


def _choose_external_method(overrides: list[str]) -> list[str]:
    """``expand.module=...`` chooses the group's file for methods from outside this repository, unless one is chosen."""
    chosen = any(item.startswith("expand=") for item in overrides)
    if not any(item.startswith("expand.module=") for item in overrides):
        return overrides
    overrides = [f"++{item}" if item.startswith("expand.module=") else item for item in overrides]
    return overrides if chosen else ["expand=external", *overrides]


def _listed(override: str) -> str:
    """Returns ``compare=load,sft`` as ``compare=[load,sft]``. It names models to compare, and is never swept over."""
    key, _, value = override.partition("=")
    return f"compare=[{value}]" if key == "compare" and "," in value and not value.startswith("[") else override


def _check_quoting(overrides: list[str]) -> None:
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException as error:
            raise badly_quoted(override) from error


def _split_sweep(overrides: list[str]) -> list[tuple[list[str], str]]:
    """Returns the overrides of every combination of the swept values, with a name such as ``expand-lesa_seed-1``."""
    parsed: list[Override] = OverridesParser.create().parse_overrides(overrides)
    choices: list[list[tuple[str, str]]] = []
    for override, text in zip(parsed, overrides, strict=True):
        if override.is_sweep_override():
            key = override.get_key_element()
            values = list(override.sweep_string_iterator())
            choices.append([(f"{key}={value}", f"{key.lstrip('+')}-{value}") for value in values])
        else:
            choices.append([(text, "")])
    jobs: dict[str, list[str]] = {}
    for combination in itertools.product(*choices):
        suffix = "_".join(name for _, name in combination if name) or "job"
        name = _directory_name(suffix)
        # Two values can differ only in what a name cannot contain.
        jobs[name if name not in jobs else _directory_name(suffix, unique=True)] = [text for text, _ in combination]
    return [(texts, name) for name, texts in jobs.items()]


def _directory_name(text: str, unique: bool = False) -> str:
    """Returns a name for a job of a sweep that a directory can have. It ends with a hash of the text if need be."""
    printable = "".join(char if char.isprintable() else "-" for char in text.replace("/", "-").replace("%", ""))
    name = printable.strip()
    if not unique and len(name.encode()) <= MAX_NAME_BYTES:
        return name
    digest = sha256_text(text)[:8]
    return name.encode()[: MAX_NAME_BYTES - len(digest) - 1].decode(errors="ignore") + f"-{digest}"


def _compose(overrides: list[str], suffix: str, folders: list[Path]) -> Settings:
    _refuse_method_key(overrides)
    overrides = [part for item in overrides for part in _replacing(item)]
    # Experiment files begin with the command that runs them rather than with Hydra's '# @package _global_'.
    overrides = [item.replace("+experiment=", "+experiment@_global_=", 1) for item in overrides]
    search = [f"hydra.searchpath=[file://{folder.resolve()}]" for folder in folders[1:]]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        try:
            composed = compose("config", overrides=[*overrides, *search])
        except (HydraException, OmegaConfBaseException, YAMLError, Stopped):
            raise
        except ValueError as error:  # from OmegaConf's int() of a list index
            raise not_a_number(overrides, folders) from error
        except Exception as error:  # Hydra asserts what it expects of an override
            raise explain_hydra(error, overrides, folders) from error
    for key in sorted(OmegaConf.missing_keys(composed)):
        raise not_given(key)
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    values["expand"].pop("variants", None)  # the table of presets, from which the selected one has been filled in
    refuse_secrets(values)
    if suffix:
        values["name"] = f"{values['name']}/{suffix}"
    run = validate_settings(values)
    return run if run.tunes else leave_out_tuning(run, _given(overrides))


def _replacing(override: str) -> list[str]:
    """Returns the overrides for ``data.corpus=[...]``. Hydra replaces a single source by null, but not by a list."""
    key, _, value = override.partition("=")
    return [f"{key}=null", override] if key.lstrip("+") in SOURCES and value.startswith("[") else [override]


def _given(overrides: list[str]) -> set[str]:
    """Returns the dotted names of the settings on the command line, also of those within ``sft={steps: 3}``."""
    names: set[str] = set()
    for override in OverridesParser.create().parse_overrides(overrides):
        value = override.value()
        names |= {override.key_or_group, *(f"{override.key_or_group}.{name}" for name in _names_in(value))}
    return names


def _names_in(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, dict) else []


def _refuse_method_key(overrides: list[str]) -> None:
    """Refuses to change the method alone, since each method has its own settings in its group file."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "expand.method":
            raise UserError(
                setting="expand.method",
                value=value,
                rule="each method has its own settings",
                remedy=f"Set expand={value} instead.",
            )


def _print_refusal(error: UserError) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"{error.setting} = {error.value}", style="bold red", markup=False)
    console.print(f"  {error.rule}.", markup=False)
    console.print(f"  {error.remedy}", markup=False)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    status = main()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # too late to stop anything
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
