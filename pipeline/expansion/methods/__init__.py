"""The expansion methods, one module each, and how a method is found by name.

The name of a module is the name of its method; there is no other list. A method from outside this repository is found
by the module that ``expand.module`` names.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from pipeline.config import METHODS
from pipeline.errors import UserError
from pipeline.expansion.method import Method
from pipeline.files import sha256_file, sha256_json

ENTRY_POINTS = "depth_growth.methods"  # the group in which an installed package can give its module a short name


def built_in_method(name: str) -> type[Method] | None:
    """Returns the class of one of this repository's methods, or None for any other name."""
    return _only_method(import_module(f"{__name__}.{name}")) if name in METHODS else None


def external_method(module: str) -> type[Method]:
    """Returns the class of the method in a module from outside this repository.

    Args:
        module: ``expand.module``, the name of an importable module or of an entry point in the group ``ENTRY_POINTS``.

    Raises:
        UserError: the module cannot be imported, or does not define exactly one complete method.
    """
    return _only_method(_imported(module))


def module_fingerprint(module: str) -> str:
    """Returns the SHA-256 of the source of ``expand.module``.

    The source is every Python file of the top-level package that the module belongs to, because a method may import its
    neighbors; for a module outside any package it is the module's own file.
    """
    top = import_module(_imported(module).__name__.partition(".")[0])
    if hasattr(top, "__path__"):
        files = {str(path.relative_to(folder)): path for folder in top.__path__ for path in Path(folder).rglob("*.py")}
    else:
        files = {top.__name__: Path(str(top.__file__))}
    return sha256_json({name: sha256_file(path) for name, path in files.items()})


def _imported(module: str) -> ModuleType:
    (name, *_) = [*(entry.module for entry in entry_points(group=ENTRY_POINTS, name=module)), module]
    try:
        return import_module(name)
    except Exception as error:  # importing runs the user's code, which can raise anything
        raise _unusable(
            module,
            f"it cannot be imported ({type(error).__name__}: {error})",
            "Check the name, and that the module is in the current directory, on PYTHONPATH or installed.",
        ) from error


def _only_method(module: ModuleType) -> type[Method]:
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        names = ", ".join(method.__name__ for method in found) or "none"
        raise _unusable(
            module.__name__,
            f"a method's module defines one class with place and new_tensors, derived from Method; this one: {names}",
            "See pipeline/expansion/method.py for an example.",
        )
    if missing := [name for name in ("title", "source") if not hasattr(found[0], name)]:
        raise _unusable(
            module.__name__,
            f"{found[0].__name__} does not set {' and '.join(missing)}",
            f"Add a line such as {missing[0]} = '...' to the class.",
        )
    return found[0]


def _unusable(module: str, rule: str, remedy: str) -> UserError:
    return UserError(setting="expand.module", value=module, rule=rule, remedy=remedy)
