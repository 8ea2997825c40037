"""Export of a finished training stage: the full model, and ``training.json`` with a summary of the run."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from deepspeed import DeepSpeedEngine
from torch import distributed

from pipeline.artifacts.store import ATTEMPTS_FILE
from pipeline.config import Split, Train
from pipeline.data.blocks import open_blocks
from pipeline.files import fsync_directory, read_json, seal, write_json
from pipeline.models.config_json import language_config
from pipeline.models.loading import IncompleteModelError, load_complete
from pipeline.models.reading import ModelDirectory
from pipeline.models.replacing import write_with_replaced
from pipeline.models.source import CHAT_TEMPLATE
from pipeline.training.batches import TokenIndices
from pipeline.training.checkpoint import Checkpoint, directory_name
from pipeline.training.engine import RankContext
from pipeline.training.freeze import ParameterRow
from pipeline.training.job import CHECKPOINTS, LOGS, TRAINING_FILE, TRAINING_SEAL
from pipeline.training.loop import SPIKE_DEVIATIONS, Progress
from pipeline.training.mfu import Peak
from pipeline.training.optimizer import AVERAGE
from pipeline.training.precision import Precision
from pipeline.training.routing import COLLAPSED_SHARE, COLLAPSED_STEPS
from pipeline.training.sequence_parallel import ALONE, SequenceGroup

CHECKED_LENGTH = 32  # tokens of the training data on which the exported model is compared with the trained one
CHECKED_TOKENS = 4  # of these, whose losses are compared
# Mean difference of a token's loss, by whether a dtype of 16 bits is involved. Kernels sum in different orders.
LOSS_TOLERANCE = {False: 1e-2, True: 0.5}
GENERATION_CONFIG_FILE = "generation_config.json"


def exported_key(settings: Train) -> Literal["weight", "ema"]:
    """Returns the key of the optimizer state that becomes the trained model: of the averages if there are any."""
    return "weight" if settings.ema_decay is None else AVERAGE


def export_trained_model(
    context: RankContext,
    engine: DeepSpeedEngine,
    table: list[ParameterRow],
    progress: Progress,
    peak: Peak,
    losses_of_averages: Mapping[Split, float],
) -> None:
    """Writes the trained model from the last checkpoint, verifies it, and then writes ``training.json``. Collective.

    Without ``save_model``, only ``training.json`` is written.

    Args:
        context: the rank's task, directories and device.
        engine: the engine, whose weights are those to be exported.
        table: the parameters.
        progress: of the finished training.
        peak: FLOP/s of all ranks.
        losses_of_averages: by split; empty if there are no averages or no losses are computed.

    Raises:
        IncompleteModelError: plain transformers does not compute what the engine computes from what was written.
    """
    memory = _peak_memory(context)
    engine.eval()
    ids = checked_ids(context.data_dir)
    losses = token_losses(engine, ids, context.device, context.sequence)
    if context.rank != 0:
        return
    if context.settings.save_model:
        trained = _last_checkpoint(context, progress).tensors(exported_key(context.settings))
        write_with_replaced(context.model_dir, context.task.out, trained)
        copy_chat_files(context.data_dir, context.task.out)
        check_export(context.task.out, ids, losses, context.precision)
    summary = _summary(context, table, progress, peak) | _averages(context.settings, losses_of_averages) | memory
    out = context.task.out
    fsync_directory(out)  # the driver removes the checkpoints as soon as training.json exists
    write_json(out / TRAINING_FILE, summary)
    seal(out / TRAINING_SEAL, _finished_files(out))


def _summary(context: RankContext, table: list[ParameterRow], progress: Progress, peak: Peak) -> dict[str, Any]:
    """Returns the content of ``training.json`` as far as it does not depend on averages and memory."""
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops,
        "seconds": progress.seconds,
        "world_size": context.ranks,
        "precision": context.precision,
        "zero_stage": context.settings.deepspeed.zero_stage,
        "trainable_parameters": sum(row.parameters for row in table if row.trained),
        "total_parameters": sum(row.parameters for row in table),
        "learning_rate_multiples": {r.name: r.learning_rate_multiple for r in table if r.learning_rate_multiple != 1},
        "final_loss": progress.loss,
        "held_out": progress.held_out,
        "mfu": progress.flops / progress.seconds / peak.rate,
        "peak_flops_per_second": {"rate": peak.rate, "source": peak.source},
        "checkpoints": {
            "saved": progress.saves,
            # If the run was killed after its last checkpoint, the seconds of that one are not included.
            "seconds": progress.save_seconds,
            "stall_seconds": progress.stall_seconds,
            "bytes": sum(path.stat().st_size for path in _last_checkpoint(context, progress).path.iterdir()),
        },
        "warnings": [*_spike_warnings(progress), *_collapse_warnings(progress)],
    }


def _last_checkpoint(context: RankContext, progress: Progress) -> Checkpoint:
    return Checkpoint(context.checkpoints / directory_name(progress.step))


def _finished_files(out: Path) -> Iterator[Path]:
    """Returns the files that do not change any more: the model, the snapshots and the log of metrics."""
    for path in out.rglob("*"):
        parts = path.relative_to(out).parts
        if path.is_file() and parts[0] not in (LOGS, CHECKPOINTS, ATTEMPTS_FILE) and not parts[-1].startswith("."):
            yield path


def checked_ids(data_dir: Path) -> torch.Tensor:
    """Returns the first tokens of the training data, ``[1, <= CHECKED_LENGTH]``.

    On tokens that no text contains in this order, losses are so large that rounding changes them by whole nats.
    """
    first = open_blocks(data_dir, "train")["input_ids"][:1, :CHECKED_LENGTH]
    return torch.from_numpy(first.astype("int64"))


def _checked_targets(ids: torch.Tensor) -> list[int]:
    """Returns the positions of the tokens whose losses are compared: the last one, and others at equal distances."""
    last = ids.shape[1] - 1
    return [*range(last, 0, -max(1, last // CHECKED_TOKENS))][:CHECKED_TOKENS]


@torch.no_grad()
def token_losses(
    model: Callable[..., torch.Tensor], ids: torch.Tensor, device: torch.device, sequence: SequenceGroup = ALONE
) -> torch.Tensor:
    """Returns the cross entropy of a few tokens, ``[targets]`` in float32 on the CPU. Collective at ZeRO 3.

    Args:
        model: an engine or module that computes ``SummedLoss``.
        ids: token ids ``[1, tokens]`` on the CPU.
        device: the model's device.
        sequence: the ranks that share sequences. Collective if there are several.
    """
    # Ranks get equally many tokens. Those after the last target change nothing.
    padded = torch.nn.functional.pad(ids, (0, -ids.shape[1] % sequence.ranks)).to(device)
    positions = torch.arange(padded.shape[1], device=device)[None]
    targets = [TokenIndices.of(padded, positions, positions == target) for target in _checked_targets(ids)]
    own, parts = sequence.part(padded), [indices.part(sequence, padded.shape[1]) for indices in targets]
    with torch.compiler.set_stance("force_eager"):  # compiling the layers for this length would take longer
        losses = torch.stack([model(own, positions, indices).float() for indices in parts])
    return sequence.sum(losses).cpu()


@torch.no_grad()
def check_export(directory: Path, ids: torch.Tensor, losses: torch.Tensor, precision: Precision) -> None:
    """Checks that a model which plain transformers loads computes the same as the one that was trained.

    Layers are read when they compute, since there may be no memory for a second copy of the model.

    Args:
        directory: the exported model.
        ids: token ids ``[1, tokens]``.
        losses: of the trained model, as returned by ``token_losses``.
        precision: the precision in which they were computed.

    Raises:
        IncompleteModelError: it does not.
    """
    dtypes = {spec.dtype for spec in ModelDirectory(directory).specs.values()}
    rounded = precision == "bfloat16" or dtypes != {torch.float32}
    with TemporaryDirectory(prefix=".check-", dir=directory) as folder:
        model = load_complete(directory, "auto", device_map={"": "disk"}, offload_folder=folder)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(ids, use_cache=False).logits[0].float()
    targets = torch.tensor(_checked_targets(ids))
    exported = torch.nn.functional.cross_entropy(logits[targets - 1], ids[0, targets], reduction="none")
    difference = float((exported - losses).abs().mean())
    if not difference <= LOSS_TOLERANCE[rounded]:
        raise IncompleteModelError(
            f"{directory} was written, but the loss of the model that transformers loads from it differs from that of "
            f"the trained model by {difference:.3g}"
        )


def _averages(settings: Train, losses: Mapping[Split, float]) -> dict[str, Any]:
    """Returns what ``training.json`` records of averages. ``held_out`` has the losses of the weights themselves."""
    if settings.ema_decay is None:
        return {}
    return {"ema": {"decay": settings.ema_decay, "held_out_loss": None, **{f"{s}_loss": losses[s] for s in losses}}}


def _spike_warnings(progress: Progress) -> list[str]:
    if not progress.spikes:
        return []
    steps = ", ".join(f"{spike['step']} ({spike['loss']:.3g})" for spike in progress.spikes)
    return [
        f"the loss spiked at {len(progress.spikes)} step(s), exceeding the mean by more than {SPIKE_DEVIATIONS:g} "
        f"standard deviations: {steps}"
    ]


def _collapse_warnings(progress: Progress) -> list[str]:
    if not progress.collapsed_routers:
        return []
    layers = ", ".join(f"{layer} (step {step})" for layer, step in progress.collapsed_routers.items())
    return [
        f"the routers of {len(progress.collapsed_routers)} layer(s) collapsed: in {COLLAPSED_STEPS} consecutive steps, "
        f"as few experts as a token is routed to got at least {COLLAPSED_SHARE:.0%} of all tokens in layers {layers}; "
        "a larger router_aux_loss spreads them"
    ]


def _peak_memory(context: RankContext) -> dict[str, int]:
    """Returns the peak host memory summed over ranks, and the largest peak of a GPU, in bytes."""
    host = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device=context.device)
    distributed.all_reduce(host)
    if context.device.type != "cuda":
        return {"peak_memory_bytes": int(host)}
    gpu = torch.tensor(torch.cuda.max_memory_allocated(context.device), device=context.device)
    distributed.all_reduce(gpu, op=distributed.ReduceOp.MAX)
    return {"peak_memory_bytes": int(host), "peak_gpu_memory_bytes": int(gpu)}


def copy_chat_files(data_dir: Path, model_dir: Path) -> None:
    """Adds the chat template and end-of-turn token of the training data to the model trained on it.

    Many base models stop only at their end-of-text token. For example, Qwen2.5 stops at ``<|endoftext|>`` while its
    turns end with ``<|im_end|>``, and would continue after every answer. Data without a template changes nothing.
    """
    template, end = data_dir / CHAT_TEMPLATE, read_json(data_dir / "dataset.json").get("end_of_turn")
    if template.is_file():
        shutil.copyfile(template, model_dir / CHAT_TEMPLATE)
    if end is not None:
        _add_stop_token(end, model_dir)


def _stop_of_model(config: Mapping[str, Any]) -> Any:
    own: Any = config.get("eos_token_id")
    return language_config(config).get("eos_token_id") if own is None else own


def _add_stop_token(token: int, model_dir: Path) -> None:
    path = model_dir / GENERATION_CONFIG_FILE
    config = read_json(path) if path.exists() else {}
    # transformers stops at the tokens of generation_config.json, and falls back to those of config.json.
    known = config.get("eos_token_id", _stop_of_model(read_json(model_dir / "config.json")))
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if token not in stops:
        write_json(path, {**config, "eos_token_id": [*stops, token]})
