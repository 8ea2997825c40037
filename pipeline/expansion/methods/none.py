"""No expansion: a control that shows what continued training alone achieves.

With ``pretrain.trainable=matched``, as many layers of the base train as other methods would add, where they would add
them. The layers are recorded in ``expansion.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.config.section import NotInKey, NotInKeyIf
from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan, insertion_plan, matched_layers
from pipeline.expansion.method import RANKED_POSITIONS, Insertion, LayerWeights, Method, NewTensor, Workspace


class NoExpansion(Method):
    """The base as it is. All of it trains by default."""

    title = "no expansion"
    source = "control: the base as it is"
    color = "#7a7a7a"
    like_layers = "none"
    trains = "all"

    new_layers: Literal[0]
    position: None

    # The experiment's new_layers and position, which other methods of a comparison obey. They have defaults because
    # only an experiment sets them.
    would_add: Annotated[dict[str, Any], NotInKey] = Field(default_factory=dict)
    records_matched: Annotated[bool, NotInKeyIf(False)] = False  # a training stage has trainable=matched

    @model_validator(mode="before")
    @classmethod
    def _ignore_placement(cls, values: Any) -> Any:
        """Records an experiment's new_layers and position, which mean nothing here, as 0 and None."""
        if not isinstance(values, dict):
            return values
        asked = {name: values.get(name) for name in ("new_layers", "position")}
        return {"would_add": asked, **values, "new_layers": 0, "position": None}

    def with_matched_layers(self) -> NoExpansion:
        """Returns settings whose artifact records the layers that ``trainable=matched`` trains."""
        return self.model_copy(update={"records_matched": True})

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter the key. Where layers would be added is one only if that is recorded."""
        settings = super().key_settings()
        return {**settings, "would_add": self.would_add} if self.records_matched else settings

    @property
    def ranked_position(self) -> str | None:
        """Where layers would be added, if that follows from a ranking of the layers and is recorded."""
        position = self.would_add.get("position")
        return position if self.records_matched and position in RANKED_POSITIONS else None

    def with_gaps(self, gaps: Sequence[int]) -> NoExpansion:
        """Returns the settings with the gaps that a ranking gave."""
        return self.model_copy(update={"would_add": {**self.would_add, "position": list(gaps)}})

    def matched_layers(self, num_base_layers: int) -> tuple[int, ...]:
        """Returns the layers below the gaps in which other methods would insert layers, if they are to be recorded."""
        if not self.records_matched:
            return ()
        try:
            insertion = Insertion.model_validate(self.would_add)
        except ValidationError as error:
            (name, *_) = error.errors()[0]["loc"]
            raise UserError(
                setting=f"expand.{name}",
                value=self.would_add.get(str(name)),
                rule="trainable=matched trains the layers of the base at which other methods would add some, and this "
                "setting names none",
                remedy="Set expand.new_layers=8 and expand.position=top, for example, as for the other methods.",
            ) from error
        return matched_layers(insertion.gaps(num_base_layers), num_base_layers)

    @property
    def keeps_logits(self) -> bool:
        """Always: nothing changes."""
        return True

    def place(self, num_base_layers: int) -> LayerPlan:
        """Returns the base's layers."""
        return insertion_plan((), num_base_layers)

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields nothing."""
        return iter(())
