"""Error messages for invalid requests. Each has four parts: the setting, its value, the rule and the remedy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from pipeline.config import METHODS, Settings
from pipeline.config.secrets import HIDDEN, contains_secret
from pipeline.errors import UserError

COMMAND_OPTIONS = ("--multirun", "--config-dir", "--help")
RENAMED = {f"{section}.keep_at": f"{section}.snapshot_at" for section in ("pretrain", "sft")}  # old name -> new name


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns a hint such as ``Did you mean lesa?`` with a trailing space, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {close[0]}? " if close else ""


# ------------------------------------------------------------------------------------- experiments


def list_choices(group: str, folders: Iterable[Path]) -> list[str]:
    """Lists the names of the files of a group, such as ``experiment``, in some configuration directories."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def no_experiment(folders: list[Path]) -> UserError:
    """Returns the error for a command without an experiment. It lists the experiments."""
    names = list_choices("experiment", folders)
    return UserError(
        setting="+experiment",
        value="(not given)",
        rule="every run needs an experiment, one of " + ", ".join(names),
        remedy="For example, run: python -m pipeline +experiment=quickstart",
    )


# ------------------------------------------------------------------------------------------- Hydra


def explain_hydra(error: Exception, overrides: list[str], folders: list[Path]) -> UserError:
    """Translates an error of Hydra or OmegaConf."""
    text = _first_message(error)
    if missing := re.search(r"Could not (?:find|load) '(\w+)/([^']+)'", text):
        group, name = missing.groups()
        given = [item.partition("=")[2] for item in overrides if item.lstrip("+").startswith(f"{group}=")]
        return _unknown_choice(group, given[-1] if given else name, folders)
    if unknown := re.search(r"Key '([^']+)' is not in struct|Could not override '([^']+)'", text):
        full = re.search(r"full_key: (\S+)", text)
        key = full.group(1) if full else next(part for part in unknown.groups() if part)
        if key in RENAMED:
            values = [item.partition("=")[2] for item in overrides if item.partition("=")[0] == key]
            return _renamed(key, values[-1] if values else "...")
        if key.startswith("data.") and key in known_keys():
            return _within_null(key)
        return _unknown_key(key)
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = ambiguous.group(1).partition("=")
        remedy = f"Add --multirun for a sweep over these values, or quote a list: {key}=[{value}]"
        return UserError(setting=key, value=value, rule="several values request a sweep", remedy=remedy)
    if "Cannot merge" in text and (file := re.search(r"In '([^']+)'", text)):
        return _list_and_mapping(file[1])
    if "InterpolationKeyError" in type(error).__name__ or "Interpolation key" in text:
        return _unknown_variant(text, overrides)
    return _not_a_section(overrides, folders) or UserError(
        setting="command line",
        value=" ".join(overrides),
        rule=text.splitlines()[0].rstrip("."),
        remedy="See conf/config.yaml for the available settings.",
    )


def _first_message(error: BaseException) -> str:
    """Returns the message of an error, or of its cause if it has none itself."""
    while not str(error).strip() and error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__


def _not_a_section(overrides: list[str], folders: list[Path]) -> UserError | None:
    """Returns the error for the first override that gives one value or a list to a group or another section."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if choices := list_choices(key, folders) if key else []:
            if value not in choices:
                return _unknown_choice(key, value, folders)
        elif not value.startswith("{") and (section := _section_rule(key)):
            return UserError(setting=key, value=value, rule=section[0], remedy=section[1])
    return None


def _section_rule(key: str) -> tuple[str, str] | None:
    """Returns the rule and the remedy for one value in place of a section, or None if ``key`` is not a section."""
    section = re.sub(r"\.\d+", "", key) + "."  # an item of a list has the settings of all of them
    inner = [name.removeprefix(section) for name in known_keys() if name.startswith(section)]
    names = [name for name in inner if "." not in name]
    if not names:
        return None
    return f"it is a section with the settings {', '.join(names)}", f"Set one of them, as in {key}.{names[0]}=..."


def _unknown_choice(group: str, name: str, folders: list[Path]) -> UserError:
    options = list_choices(group, folders)
    setting = "+experiment" if group == "experiment" else group
    path = {"model": f"model=hub model.path={name}", "data": f"data=files data.corpus.path={name}"}.get(group)
    if path and "/" in name:
        return UserError(setting=group, value=name, rule="it selects a file in conf, not a path", remedy=f"Set {path}")
    return UserError(
        setting=setting,
        value=name,
        rule=f"there is no such {'method' if group == 'expand' else group}; choose from " + ", ".join(options),
        remedy=did_you_mean(name, options) + f"Set {setting}=NAME to one of these.",
    )


def badly_quoted(override: str) -> UserError:
    """Returns the error for an override that Hydra cannot parse, with the quotes that it needs."""
    key, _, value = override.partition("=")
    return UserError(
        setting=key,
        value=value,
        rule="values with '=', '~', ',', or brackets must be quoted twice, for the shell and for Hydra",
        remedy=f"""Write '{key}="{value}"'.""",
    )


def is_utf8(text: str) -> bool:
    """Whether an argument of the command is UTF-8. Python represents its other bytes as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def not_utf8(argument: str) -> UserError:
    """Returns the error for an argument that is not UTF-8, such as a file name that is in Latin-1."""
    key, _, value = argument.rpartition("=")
    return UserError(
        setting=key or "command line",
        value=HIDDEN if contains_secret(argument) else value,
        rule="it is not UTF-8, in which settings are written to files",
        remedy="Rename the file or directory, or set LC_ALL=C.UTF-8 if the name looks right.",
    )


def unknown_option(argument: str) -> UserError:
    """Returns the error for an argument that begins with ``-`` and is no option. Its value may be a secret."""
    name = argument.partition("=")[0]
    return UserError(
        setting=HIDDEN if contains_secret(name) else name,
        value=HIDDEN,
        rule="there is no such option",
        remedy=did_you_mean(name, COMMAND_OPTIONS) + "See --help for the options. Settings are given as key=value.",
    )


def not_given(key: str) -> UserError:
    """Returns the error for a setting without a value."""
    key = re.sub(r"\[(\d+)\]", r".\1", key)  # a list item as it is written on the command line
    remedy = f"Add {key}=... to the command."
    if key.startswith("data.instructions."):
        remedy += " Without conversations, set data.instructions=null, which leaves out instruction tuning."
    return UserError(setting=key, value="(not given)", rule="it must be set", remedy=remedy)


def not_a_number(overrides: list[str], folders: list[Path]) -> UserError:
    """Returns the error for an override that does not name the item of a list, or the file of a group."""
    if (error := _not_a_section(overrides, folders)) is not None:
        return error
    lists = [item for item in overrides if item.startswith(("data.corpus.", "data.instructions."))]
    return UserError(
        setting=lists[0].partition("=")[0] if lists else "command line",
        value=lists[0].partition("=")[2] if lists else " ".join(overrides),
        rule="this is a list of several items, which are numbered from 0",
        remedy="Add the number of the item, such as data.corpus.0.path=...",
    )


def not_yaml(error: YAMLError) -> UserError:
    """Returns the error for a configuration file that is not valid YAML. The parser names file, line and column."""
    where = str(getattr(error, "problem_mark", "")).strip() or "a configuration file"
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    return UserError(
        setting="--config-dir", value=where, rule=f"this is not valid YAML: {problem}", remedy="Correct that line."
    )


def _unknown_key(key: str) -> UserError:
    rule, remedy = _no_such_setting(key, "See conf/config.yaml and the other files in conf/.")
    return UserError(setting=key, value="(unknown)", rule=rule, remedy=remedy)


def _no_such_setting(key: str, advice: str) -> tuple[str, str]:
    """Returns the rule and the remedy for an unknown setting, or one that only other expansion methods have."""
    if methods := _methods_with(key):
        rule = f"the chosen method has no such setting, only {', '.join(methods)}"
        return rule, f"Leave it out, or choose such a method, as with expand={methods[0]}."
    return "there is no such setting", did_you_mean(key, known_keys()) + advice


def _within_null(key: str) -> UserError:
    source = key.rpartition(".")[0]
    return UserError(
        setting=key,
        value="(no source)",
        rule=f"{source} is null, so that it has no settings",
        remedy=f"Set all settings of the source at once: '{source}={{kind: files, path: ..., ...}}' (docs/data.md).",
    )


def _list_and_mapping(file: str) -> UserError:
    return UserError(
        setting="+experiment" if file.startswith("experiment/") else "configuration file",
        value=file.removeprefix("experiment/"),
        rule="it has a list where the files that it is based on have a section, or the reverse, and Hydra cannot merge "
        "the two",
        remedy="For a list of data sources, write a file DIR/data/NAME.yaml like conf/data/replay.yaml, and select it "
        "in the experiment with 'override /data: NAME' (docs/data.md).",
    )


def _renamed(key: str, value: str) -> UserError:
    return UserError(
        setting=key,
        value=value,
        rule=f"this setting is now called {RENAMED[key]}",
        remedy=f"Set {RENAMED[key]}={value} instead.",
    )


def _unknown_variant(text: str, overrides: list[str]) -> UserError:
    chosen = next((item for item in overrides if item.startswith("expand.variant=")), "expand.variant=")
    return UserError(
        setting="expand.variant",
        value=chosen.partition("=")[2],
        rule="this method has no such preset; see 'variants' in its file in conf/expand",
        remedy="Choose one of that list, such as reference or paper.",
    )


# ----------------------------------------------------------------------------------------- pydantic


def validate_settings(values: Mapping[str, Any]) -> Settings:
    """Validates the composed settings.

    Raises:
        UserError: some are wrong. Setting and value are those of the first error; the rule lists all errors.
    """
    for key in RENAMED:
        section, name = key.split(".")
        if isinstance(given := values.get(section), Mapping) and name in given:
            raise _renamed(key, json.dumps(given[name]))
    try:
        return Settings.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise explain_validation(error) from error


def explain_validation(error: ValidationError, prefix: str = "") -> UserError:
    """Returns one error for all that pydantic found. ``prefix`` precedes the names of the settings."""
    faults = _merge(_fault(detail, prefix) for detail in error.errors())
    setting, value, rule, remedy = faults[0]
    others = "".join(f"; also {name} = {given}: {why}" for name, given, why, _ in faults[1:])
    return UserError(setting=setting, value=value, rule=rule + others, remedy=remedy)


_Fault = tuple[str, str, str, str]  # setting, value, rule, remedy


def _merge(faults: Iterable[_Fault]) -> list[_Fault]:
    """Merges the errors of each setting: pydantic reports one per member of a union."""
    merged: dict[str, _Fault] = {}
    for path, value, rule, remedy in faults:
        before = f"{merged[path][2]}, or " if path in merged else ""
        merged[path] = (path, value, before + rule, remedy)
    return list(merged.values())


def _path(location: tuple[int | str, ...]) -> str:
    """Returns the dotted name of a setting without the members of unions that pydantic inserts."""
    tried = re.compile(r"literal\[|list\[|dict\[|constrained-|function-")
    return ".".join(str(part) for part in location if not tried.match(str(part)))


def _fault(detail: ErrorDetails, prefix: str) -> _Fault:
    path = ".".join(part for part in (prefix, _path(detail["loc"])) if part)
    value = json.dumps(detail["input"]) if not isinstance(detail["input"], dict) else "{...}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    kind = detail["type"]
    if kind == "extra_forbidden":
        return path, value, *_no_such_setting(path, "Check its spelling.")
    if kind == "missing":
        return path, "(not given)", "it must be set", f"Add {path}=... to the command or the experiment."
    if kind in _CONTAINERS and (section := _section_rule(path)):
        return path, value, *section
    rule = _CONTAINERS.get(kind, message[0].lower() + message[1:])
    return path, value, rule, detail.get("ctx", {}).get("remedy", f"Set {path}=... accordingly.")


# pydantic's names of errors about lists and mappings, whose messages speak of arrays and objects.
_CONTAINERS = {
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), "it must be a list, such as [a,b]"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "it must be a mapping, such as {a: b}"),
}


def known_keys() -> list[str]:
    """Lists the dotted names of all settings."""
    of_methods = {name for method in METHODS for name in _fields_of(method)}
    return [*_keys_of(Settings, ""), *sorted(f"expand.{name}" for name in of_methods)]


def _methods_with(key: str) -> list[str]:
    """Lists the expansion methods that have a setting, if it is not one of all methods; none for any other key."""
    section, _, name = key.partition(".")
    if section != "expand":
        return []
    found = [method for method in METHODS if name in _fields_of(method)]
    return found if len(found) < len(METHODS) else []


def _fields_of(method: str) -> Collection[str]:
    methods: Any = import_module("pipeline.expansion.methods")  # by name, as in pipeline.config.expand
    fields: Collection[str] = methods.built_in_method(method).model_fields
    return fields


def _keys_of(section: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections_in(field.annotation):
            yield from _keys_of(inner, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterable[type[BaseModel]]:
    """Finds the section, or the items of a list of sections, that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
