"""Learning rates of single tensors and of parts of fused ones, as multiples of the scheduled rate. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.models.families import Family, Place, Role
from pipeline.models.families.parameters import Config


@dataclass(frozen=True)
class PartMultiple:
    """The multiple of one part of a fused tensor.

    Attributes:
        role: the name of the part's role.
        place: where the part is.
    """

    role: str
    place: Place
    multiple: float


Multiple = float | tuple[PartMultiple, ...]  # of a whole tensor, or of every part of it


def requested_multiples(
    section: str,
    train: Train,
    family: Family,
    config: Config,
    layers: Mapping[str, int | None],
    trained: Collection[str],
    new: Collection[int],
) -> dict[str, Multiple]:
    """Returns the multiples of the trained tensors to which ``base_learning_rate`` or ``role_learning_rates`` applies.

    Args:
        section: the section of the settings, for messages.
        train: the settings.
        family: the model's family.
        config: the content of config.json.
        layers: the decoder layer of every parameter, None outside of them.
        trained: the names of those that train.
        new: the layers that learn at ``learning_rate``.

    Raises:
        UserError: no trained tensor has one of the roles, or learns at ``base_learning_rate``.
    """
    from_base = {name for name in trained if layers[name] not in new}
    if train.base_learning_rate is not None and not from_base:
        raise UserError(
            setting=f"{section}.base_learning_rate",
            value=train.base_learning_rate,
            rule="only new layers train, or those matched in their place, whose rate is learning_rate",
            remedy=f"Set {section}.trainable=all, or remove the setting.",
        )
    roles = {name: family.parts(name, config) for name in layers}
    _refuse_unused_roles(section, train, roles, trained)
    base = 1.0 if train.base_learning_rate is None else train.base_learning_rate / train.learning_rate
    found: dict[str, Multiple] = {}
    for name in trained:
        whole, by_role = (base if name in from_base else 1.0), train.role_learning_rates
        parts = [
            PartMultiple(role.name, place or Place(name), whole * by_role.get(role.name, 1.0))
            for role, place in roles[name]
        ]
        if len({part.multiple for part in parts}) > 1:
            found[name] = tuple(parts)
        elif any(part.role in by_role for part in parts):
            found[name] = parts[0].multiple
        elif whole != 1.0:
            found[name] = whole
    return found


def _refuse_unused_roles(
    section: str,
    train: Train,
    roles: Mapping[str, Collection[tuple[Role, Place | None]]],
    trained: Collection[str],
) -> None:
    unused = set(train.role_learning_rates) - {role.name for name in trained for role, _ in roles[name]}
    if not unused:
        return
    known = sorted({role.name for parts in roles.values() for role, _ in parts})
    raise UserError(
        setting=f"{section}.role_learning_rates",
        value=", ".join(sorted(unused)),
        rule=f"no trained parameter has this role; the model's roles are {', '.join(known)}",
        remedy="Name the role of a trained parameter, or remove the setting.",
    )
