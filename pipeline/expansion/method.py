"""The base classes of expansion methods, and the workspace that a method receives.

A method is one module with one subclass of ``InsertionMethod`` (or ``Method``), and one YAML file in ``conf/expand/``
with the values of its settings. The subclass holds everything that is particular to the method, for example:

    class ScaledCopy(InsertionMethod):
        '''Copies of the lower neighbor with scaled outputs.'''

        title = "scaled copying"
        source = "control: the lower neighbor with scaled outputs"
        factor: PositiveFloat

        def new_tensors(self, base, plan, work):
            for layer, tensor, value in copies(base, plan):
                yield NewTensor(layer, tensor, value * self.factor if tensor.role.side == "output" else value)

The driver imports every method's module to validate settings, so such a module imports torch only inside functions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from pipeline.config import Expand
from pipeline.config.section import Fraction, Positive, Section
from pipeline.errors import UserError, first_few
from pipeline.expansion.layer_plan import LayerPlan, gaps_of, insertion_plan
from pipeline.files import sha256_text
from pipeline.models.families import LayerTensor, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_NEW_PER_BASE_LAYER = 4  # catches typing errors; the methods themselves have no such limit
# Scratch tensors larger than this are on disk, smaller ones in the memory of the device that computes.
SCRATCH_ON_DISK_BYTES = 1_000_000_000  # of the host
SCRATCH_ON_DISK_SHARE = 0.5  # of a GPU

NamedPosition = Literal["top", "middle", "bottom", "interleaved"]
RankedPosition = Literal["least_important", "most_similar"]  # after a ranking of the layers on a probe text
RANKED_POSITIONS: tuple[str, ...] = get_args(RankedPosition)
NAMED_POSITIONS: tuple[str, ...] = (*get_args(NamedPosition), *RANKED_POSITIONS)
LayerWeights = Mapping[LayerTensor, "Tensor"]  # a layer of the base reads a tensor from disk when it is looked up
Scratch = Callable[[tuple[int, ...], "torch.device"], "Tensor"]  # an uninitialized float32 tensor of that shape


class NewTensor(NamedTuple):
    """One tensor of one new layer."""

    layer: int  # index in the new model
    tensor: LayerTensor
    value: Tensor


class Method(Expand):
    """An expansion method: the base class of all methods. Its fields are the method's settings.

    Attributes:
        title: the method's name in reports.
        source: the publication, or what the method is a control for.
        color: of the method in plots; None for any free color. Built-in methods use the palette of Okabe and Ito,
            which readers with any color vision can tell apart.
        trains: what ``pretrain.trainable=auto`` means for models expanded by this method.
        draws_random_numbers: whether the new layers depend on ``seed``. Only then is the seed in the artifact's key,
            and can ``new_tensors`` read ``work.seed``.
        uses_gpu: whether there is linear algebra worth moving to a GPU. Tensors of other methods stay on the CPU.
        min_base_layers: the smallest number of layers that a base may have.
        like_layers: which layers of the base must have the same tensors: all, those that a new layer is made from, or
            none, for methods that copy.
        needs_attention_and_mlp: whether every layer must be one attention block and one MLP. Layers of other families
            may contain state-space or convolution blocks.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    color: ClassVar[str | None] = None
    trains: ClassVar[Literal["new_layers", "all"]] = "new_layers"
    draws_random_numbers: ClassVar[bool] = False
    uses_gpu: ClassVar[bool] = False
    min_base_layers: ClassVar[int] = 1
    like_layers: ClassVar[Literal["all", "sources", "none"]] = "all"
    needs_attention_and_mlp: ClassVar[bool] = False

    def with_gaps(self, gaps: Sequence[int]) -> Method:
        """Returns the settings with the gaps that a ranking gave. Only for methods with a ``ranked_position``."""
        raise NotImplementedError

    def possible_gaps(self, base: Shape) -> list[int]:
        """Returns the gaps in which the method can make a layer."""
        last = len(base.layers) - 1  # a layer above it is made from it alone
        return [*base.gaps_between_like_layers, last] if self.like_layers == "sources" else [*range(last + 1)]

    @property
    def scales_outputs(self) -> bool:
        """Whether it changes what new layers add to the residual stream by a factor, which some models do not allow."""
        return self.keeps_logits

    @abstractmethod
    def place(self, num_base_layers: int) -> LayerPlan:
        """Returns the layers of the new model for a base of this depth.

        Raises:
            UserError: the settings do not fit a base of this depth.
        """

    @abstractmethod
    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields every tensor of every new layer once, in any order.

        Tensors of the base come as they are stored. Arithmetic should be done in float32 or better. Values are rounded
        to the dtype of the base when they are written.
        """

    def matched_layers(self, num_base_layers: int) -> tuple[int, ...]:
        """Returns the layers of the base that ``pretrain.trainable=matched`` trains, for methods that add none.

        Raises:
            UserError: the settings name none.
        """
        return ()

    def scratch_bytes(self, base: Shape, gpu_memory: int | None = None) -> int:
        """Returns the disk space in bytes that ``work.scratch`` needs while a base of this shape is expanded.

        Args:
            gpu_memory: all of the GPU on which the method computes, in bytes; None for the host.
        """
        return 0

    def gpu_bytes(self, base: Shape, gpu_memory: int) -> int | None:
        """Estimates the peak memory in bytes on a GPU that has ``gpu_memory``; None where no estimate exists."""
        return None

    def check(self, num_base_layers: int) -> None:
        """Checks that the method can expand a base of this depth. Reads no file.

        Raises:
            UserError: the method cannot expand this base.
        """
        self.place(num_base_layers)
        if num_base_layers < self.min_base_layers:
            raise UserError(
                setting="expand.method",
                value=self.method,
                rule=f"it needs a base of at least {self.min_base_layers} layers, and this one has {num_base_layers}",
                remedy="Choose another method or a deeper base.",
            )

    def check_layers(self, base: Shape) -> None:
        """Checks that the method can make layers like those of the base.

        Raises:
            UserError: it cannot.
        """
        new_layers = self.place(len(base.layers)).new_layers
        if not new_layers:
            return
        if self.scales_outputs and base.not_silenced:
            raise self._unfit(
                f"it zeroes or scales the outputs of new layers, which is not possible in this model: "
                f"{base.not_silenced}",
                "Choose a method or settings that leave outputs as they are.",
            )
        if self.needs_attention_and_mlp and (
            odd := [i for i, layer in enumerate(base.layers) if not layer.is_standard]
        ):
            raise self._unfit(
                f"it is defined for layers of one attention block and one MLP, which layer {odd[0]} is not",
                "Choose a method that copies layers.",
            )
        if self.like_layers == "all":
            for index, layer in enumerate(base.layers):
                if layer.tensors != base.layers[0].tensors:
                    raise self._unlike(0, index, base, "Choose a method that copies layers.")
        if self.like_layers == "sources" and self.ranked_position is None:
            for lower, upper in (planned.base for planned in new_layers if len(planned.base) > 1):
                if base.layers[lower].tensors != base.layers[upper].tensors:
                    gaps = base.gaps_between_like_layers
                    positions = f"Set expand.position to gaps among {gaps}, or choose" if gaps else "Choose"
                    raise self._unlike(lower, upper, base, f"{positions} a method that copies layers.")

    def _unlike(self, one: int, other: int, base: Shape, remedy: str) -> UserError:
        tensors = [base.layers[index].tensors for index in (one, other)]
        names = sorted(name for name in {**tensors[0], **tensors[1]} if tensors[0].get(name) != tensors[1].get(name))
        return self._unfit(
            f"it makes a layer from layers {one} and {other}, which differ in {first_few(names)}", remedy
        )

    def _unfit(self, rule: str, remedy: str) -> UserError:
        return UserError(setting="expand.method", value=self.method, rule=rule, remedy=remedy)


class Insertion(Section):
    """How many layers are inserted, and where."""

    new_layers: Positive
    position: NamedPosition | RankedPosition | list[int]  # a list: the gap of every new layer

    def gaps(self, num_base_layers: int) -> tuple[int, ...]:
        """Returns the gap of every new layer of a base of this depth, in ascending order.

        For a position that needs a ranking of the layers, these are evenly spread gaps, for estimates.

        Raises:
            UserError: the base has no such gaps, or there are too many new layers for it.
        """
        most = MAX_NEW_PER_BASE_LAYER * num_base_layers
        if self.new_layers > most:
            raise UserError(
                setting="expand.new_layers",
                value=self.new_layers,
                rule=f"a base of {num_base_layers} layers takes at most {MAX_NEW_PER_BASE_LAYER} new layers for each "
                f"of its own, {most} in total",
                remedy=f"Set expand.new_layers={most} or less.",
            )
        position = "interleaved" if self.position in RANKED_POSITIONS else self.position
        return gaps_of(position, self.new_layers, num_base_layers)


class InsertionMethod(Insertion, Method):
    """A method that inserts new layers between those of the base, at ``expand.position``."""

    def place(self, num_base_layers: int) -> LayerPlan:
        """Returns the base's layers with new ones in the gaps that ``position`` names."""
        return insertion_plan(self.gaps(num_base_layers), num_base_layers)

    @property
    def ranked_position(self) -> str | None:
        """The position, if it follows from a ranking of the layers."""
        return str(self.position) if self.position in RANKED_POSITIONS else None

    def with_gaps(self, gaps: Sequence[int]) -> InsertionMethod:
        """Returns the settings with the gaps that a ranking gave."""
        return self.model_copy(update={"position": list(gaps)})


class ZeroInitMethod(InsertionMethod):
    """An insertion method whose new layers can start with zeroed outputs, as in LLaMA Pro."""

    zero_init: bool  # zero the outputs, which keeps the logits

    @property
    def keeps_logits(self) -> bool:
        """Only with zeroed outputs."""
        return self.zero_init

    def zeroed(self, tensors: Iterable[NewTensor]) -> Iterator[NewTensor]:
        """Yields finished tensors, with zeroed outputs if ``zero_init``.

        This is the last step of a method: new layers that others are made from need their outputs.
        """
        for made in tensors:
            yield made._replace(value=silenced(made.tensor, made.value)) if self.zero_init else made


class CopyingMethod(Method):
    """A method whose new layers are copies of base layers that add ``output_scale`` times as much to their input.

    A method that inserts such copies lists ``InsertionMethod`` first among its base classes: of fields with the same
    name, pydantic takes those of the first, and ``new_layers`` and ``position`` have no types here.
    """

    like_layers = "none"

    output_scale: Fraction  # 1: exact copies; 0: copies that add nothing until they are trained

    @property
    def keeps_logits(self) -> bool:
        """Only with zeroed outputs."""
        return self.output_scale == 0

    @property
    def scales_outputs(self) -> bool:
        """Unless the copies are exact."""
        return self.output_scale != 1

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the copies, bit for bit apart from scaled outputs."""
        for made in copies(base, plan):
            yield made._replace(value=with_output_scale(made.tensor, made.value, self.output_scale))


def own_placement(position: Any, recorded: str, refusal: str) -> Any:
    """Validates ``expand.position`` of a method that places its layers itself.

    Args:
        position: the setting. A named position, which an experiment may set for all methods, means nothing here.
        recorded: what is recorded instead of a named position.
        refusal: the message about a list of gaps.

    Raises:
        ValueError: the position is a list of gaps.
    """
    if isinstance(position, list):
        raise ValueError(refusal)
    return recorded if position in NAMED_POSITIONS else position


def method_of(settings: Expand) -> Method:
    """Narrows the type of validated ``expand`` settings, which are always a method (see ``pipeline.config.expand``)."""
    assert isinstance(settings, Method)
    return settings


# ----------------------------------------------------------------------------------------- workspace


def seed_for(seed: int, *subject: object) -> int:
    """Returns a seed that depends on the run's seed and one subject only, such as the name of a tensor."""
    return int(sha256_text(" ".join(map(str, (seed, *subject))))[:14], 16)  # seven bytes


def is_on_disk(size: int, gpu_memory: int | None) -> bool:
    """Returns whether a scratch tensor of so many bytes is on disk, which changes no number.

    Args:
        size: of the tensor.
        gpu_memory: all of the GPU that computes, in bytes; None for the host.
    """
    return size > (SCRATCH_ON_DISK_BYTES if gpu_memory is None else SCRATCH_ON_DISK_SHARE * gpu_memory)


def in_memory(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns an uninitialized float32 tensor in memory, whatever its size."""
    import torch

    return torch.empty(shape, device=device)


def _ignore_note(note: str, **numbers: float) -> None:
    pass


def _save_nothing() -> None:
    pass


@dataclass(frozen=True)
class Workspace:
    """What a method is given to work with: the seed, scratch space, progress, records, and earlier attempts' results.

    Attributes:
        note: shows a line of text and named numbers in the progress bar.
        made: (index in the new model, tensor) of everything that an interrupted attempt has already written. A method
            may skip these as long as its other results do not depend on that.
        save: saves what has been yielded so far, with ``records``, so that it survives an interruption. For results
            that are expensive to recompute; everything is saved every few seconds anyway.
        scratch: allocates uninitialized float32 tensors, on disk where they are large. These are tensors of the CPU,
            whatever the device.
        config: the base's config.json, with the defaults of its config class.
        records: facts for the manifest, by subject.
        warnings: what a user of the expanded model should know.
        declared_seed: the run's seed; None for a method that does not declare ``draws_random_numbers``.
    """

    note: Callable[..., None] = _ignore_note
    made: Collection[tuple[int, LayerTensor]] = ()
    save: Callable[[], None] = _save_nothing
    scratch: Scratch = in_memory
    config: Mapping[str, Any] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    declared_seed: int | None = None

    @property
    def seed(self) -> int:
        """The run's seed, for the method's own generators.

        Raises:
            RuntimeError: the method does not declare that it draws random numbers.
        """
        if self.declared_seed is None:
            raise RuntimeError("a method that reads the seed must set draws_random_numbers = True")
        return self.declared_seed

    def generator(self, *subject: object) -> torch.Generator:
        """Returns a generator of the CPU for one subject, such as a tensor of a layer.

        It depends on the run's seed and the subject only, so that an interrupted expansion draws the same numbers in
        another order.
        """
        import torch

        return torch.Generator().manual_seed(seed_for(self.seed, *subject))

    def record(self, subject: str, **facts: Any) -> None:
        """Records JSON values about a subject such as ``layer 16 self_attn.q_proj``."""
        self.records[subject] = facts


# -------------------------------------------------------------------- building blocks for methods


def silenced(tensor: LayerTensor, value: Tensor) -> Tensor:
    """Returns the value, or what makes its block add exactly zero to the residual stream (see ``Role.silent``)."""
    return with_output_scale(tensor, value, 0.0)


def with_output_scale(tensor: LayerTensor, value: Tensor, scale: float) -> Tensor:
    """Returns the value for a block that adds ``scale`` times as much to the residual stream.

    Output projections with their biases, or the scales of norms that follow them, are multiplied (see ``Role.silent``)
    in float32. All other values, and every value at a scale of 1, are returned as they are.
    """
    import torch

    silent = tensor.role.silent
    if silent is None or scale == 1:
        return value
    return silent + scale * (value.float() - silent) if scale else torch.full_like(value, silent)


def copies(base: Sequence[LayerWeights], plan: LayerPlan) -> Iterator[NewTensor]:
    """Yields every new layer as an exact copy of its lower base neighbor."""
    for planned in plan.new_layers:
        for tensor, value in base[planned.base[0]].items():
            yield NewTensor(planned.layer, tensor, value)


def from_neighbors(
    base: Sequence[LayerWeights],
    plan: LayerPlan,
    work: Workspace,
    make: Callable[[int, LayerWeights, LayerWeights], LayerWeights],
) -> Iterator[NewTensor]:
    """Yields complete new layers, each made from the two it lies between.

    Layers that an earlier attempt has written are skipped unless another layer is made from them.

    Args:
        make: (index in the new model, lower layer, upper layer) -> the layer between them.
    """
    made: dict[int, LayerWeights] = {}

    def layer_at(index: int) -> LayerWeights:
        return made[index] if index in made else base[plan.layers[index].base[0]]

    for planned, needed in plan.making_steps():
        lower, upper = planned.made_from
        if planned.layer not in needed and all(
            (planned.layer, tensor) in work.made for tensor in base[planned.base[0]]
        ):
            continue
        made[planned.layer] = make(planned.layer, layer_at(lower), layer_at(upper))
        for tensor, value in made[planned.layer].items():
            yield NewTensor(planned.layer, tensor, value)
        # Keep only the layers that later ones are made from.
        made = {index: layer for index, layer in made.items() if index in needed}
