"""Prints docstrings and signatures of the public standard library as JSON.

Run as a script (``python -I -S -B stdlib_harvest.py``), because importing every module has side effects, and because
installed packages patch some modules. In isolation, the output depends only on the CPython build. This module does not
import anything from this project. Each entry is ``{"name", "kind", "module", "signature", "doc"}``, in a fixed order.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# Modules with side effects on import, GUIs, tests, deprecated names, and platform-specific modules whose public
# interface is ``os`` and ``os.path``.
SKIPPED = frozenset(
    "antigravity distutils ensurepip genericpath idlelib lib2to3 msilib msvcrt nt ntpath nturl2path ossaudiodev posix "
    "posixpath pydoc_data sre_compile sre_constants sre_parse this tkinter turtle turtledemo winreg winsound".split()
)
PACKAGES_WITHOUT_SUBMODULES = frozenset({"encodings"})  # a hundred codecs with the same documentation
EXTRA = ("os.path",)  # an alias of posixpath or ntpath, which are skipped

# Modules that implement or mirror another one, and belong to its family.
ALIASES = {
    "posix": "os", "nt": "os", "posixpath": "os", "ntpath": "os", "genericpath": "os",
    "sre": "re", "pyio": "io", "pydecimal": "decimal", "pydatetime": "datetime", "cmath": "math", "cProfile": "profile",
    "opcode": "dis", "imp": "importlib", "frozen_importlib": "importlib", "frozen_importlib_external": "importlib",
    "zipimport": "importlib", "pyexpat": "xml", "elementtree": "xml",
}  # fmt: skip

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object in memory, different in every process


def module_family(module: str) -> str:
    """Returns the public top-level module that a module belongs to: ``json`` for ``_json`` and ``json.decoder``."""
    top = module.partition(".")[0].lstrip("_")
    return ALIASES.get(top, top)


def public_modules() -> list[str]:
    """Returns the names of all public top-level modules. This build may lack some of them."""
    tops = sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED)
    return [*tops, *EXTRA]


def main() -> None:
    """Prints all entries. Anything that the modules themselves print is discarded."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    families = {module_family(name) for name in public_modules()}
    seen: set[int] = set()
    entries = [entry for module in _import_all() for entry in _entries_of(module, families, seen)]
    json.dump(entries, output)
    output.close()


def _import_all() -> Iterator[ModuleType]:
    for name in public_modules():
        module = _import(name)
        if module is None:
            continue
        yield module
        if name not in PACKAGES_WITHOUT_SUBMODULES:
            yield from _submodules(module)


def _import(name: str) -> ModuleType | None:
    """Returns the module, or None if this build or platform lacks it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _submodules(package: ModuleType) -> Iterator[ModuleType]:
    for info in sorted(pkgutil.iter_modules(getattr(package, "__path__", ())), key=lambda info: info.name):
        if info.name.startswith("_") or info.name in ("test", "tests", "idle_test"):
            continue
        module = _import(f"{package.__name__}.{info.name}")
        if module is not None:
            yield module
            yield from _submodules(module)


def _entries_of(module: ModuleType, families: set[str], seen: set[int]) -> Iterator[dict[str, Any]]:
    """Yields the module itself, then its functions, then its classes with their members."""
    name = "os.path" if module is sys.modules["os.path"] else module.__name__
    yield _entry(name, "module", name, module)
    exported = getattr(module, "__all__", None) or vars(module)
    found = [(key, getattr(module, key, None)) for key in sorted(set(exported)) if not key.startswith("_")]
    own = [(key, value) for key, value in found if _is_documented(value) and _belongs(value, name, families)]
    # False sorts before True, so functions come before classes.
    for key, value in sorted(own, key=lambda pair: inspect.isclass(pair[1])):
        if id(value) in seen:  # the same object under another name
            continue
        seen.add(id(value))
        if inspect.isclass(value):
            yield from _class_entries(f"{name}.{key}", name, value)
        else:
            yield _entry(f"{name}.{key}", "function", name, value)


def _is_documented(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value)


def _belongs(value: Any, module: str, families: set[str]) -> bool:
    """Returns whether an exported object is defined in the module's family, or outside all public modules."""
    home = module_family(getattr(value, "__module__", None) or module)
    return home == module_family(module) or home not in families


def _class_entries(name: str, module: str, cls: type) -> Iterator[dict[str, Any]]:
    yield _entry(name, "class", module, cls)
    for key, member in sorted(vars(cls).items()):
        if key.startswith("_") and key != "__init__":
            continue
        member = getattr(member, "__func__", member)  # unwraps static and class methods
        if inspect.isroutine(member) or inspect.isdatadescriptor(member):
            yield _entry(f"{name}.{key}", "method" if inspect.isroutine(member) else "attribute", module, member)


def _entry(name: str, kind: str, module: str, value: Any) -> dict[str, Any]:
    doc = value.__doc__ if isinstance(value.__doc__, str) else ""
    callable_ = kind in ("function", "class", "method")
    return {
        "name": name.removeprefix("builtins."),
        "kind": kind,
        "module": module,
        "signature": _signature(value) if callable_ else None,
        "doc": ADDRESS.sub("", inspect.cleandoc(doc)),
    }


def _signature(value: Any) -> str | None:
    """Returns the signature as printed by pydoc, with environment-dependent defaults as ``...``, or None if unknown."""
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError, AttributeError):  # some defaults of curses exist only while a screen is open
        return None
    formatted = [parameter.replace(default=_Default(parameter.default)) for parameter in signature.parameters.values()]
    return ADDRESS.sub("", str(signature.replace(parameters=formatted)))


class _Default:
    """A default value that prints as a literal, a name or ``...``, and reveals nothing about the environment."""

    def __new__(cls, default: Any) -> Any:
        # `empty` is recognized by identity, so it must not be replaced.
        return default if default is inspect.Parameter.empty else super().__new__(cls)

    def __init__(self, default: Any) -> None:
        self._text = _format_default(default)

    def __repr__(self) -> str:
        return self._text


def _format_default(default: Any) -> str:
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    if type(default) in (type(None), bool, int, float, bytes):
        return repr(default)
    if type(default) is str:
        return "..." if os.path.isabs(default) else repr(default)  # absolute paths depend on the installation
    if type(default) in (tuple, list, dict) and not default:
        return repr(default)
    if type(default) is tuple:
        return f"({', '.join(map(_format_default, default))}{',' if len(default) == 1 else ''})"
    if inspect.isclass(default) or inspect.isroutine(default):
        return default.__name__ if default.__name__.isidentifier() else "..."
    return "..."


if __name__ == "__main__":
    main()
