"""Goes through every causal language model of transformers, and reports which can be expanded.

    scripts/families                   # all families, which takes some minutes
    scripts/families gpt2 falcon       # these
    scripts/families --write           # all, and writes the table into docs/families.md

Of every family a tiny random model is built whose tensors all differ from their defaults. It goes through the load and
expand stages, and the result through plain transformers, see ``check_family``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from pipeline.artifacts.task import Metrics
from pipeline.config import AnyExpand, Model
from pipeline.errors import UserError, one_line
from pipeline.files import read_json
from pipeline.models.config_json import depth_name
from pipeline.models.families import family_for
from pipeline.models.family_inference.small import small_model
from pipeline.stages import expand, load
from tests.stages.one_task import make_task

DOCS = Path(__file__).resolve().parent.parent / "docs" / "families.md"
WIDTH = 120  # of the lines of the documentation
BEGIN, END = "<!-- scripts/families writes this table -->", "<!-- end of the table -->"
DEPTH = 4
# Entries that the default config of a family lacks or has with values that its own model rejects, and depths at which
# all kinds of its layers occur.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v32": {"first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "glm_moe_dsa": {"first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 8},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 8},
    "nemotron_h": {"num_hidden_layers": None},
    "zamba2": {"num_hidden_layers": 12},
}
TOKENS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))  # longer than the windows


@dataclass(frozen=True)
class Coverage:
    """What was found about a family.

    Attributes:
        how: ``row``, ``inferred`` or ``refused``.
        note: what is special about it, or why it is refused.
        kinds: the number of kinds of layers.
    """

    family: str
    how: str
    note: str = ""
    kinds: int = 1


class FailedError(Exception):
    """An expanded model is not what it should be."""


def tiny_model(family: str) -> PreTrainedModel:
    """Builds a tiny random model of a family of transformers, whatever its default config.

    Raises:
        NoSmallModelError: none can be built and run.
    """
    changes = CHANGES.get(family, {})
    config_class: Any = CONFIG_MAPPING[family]
    defaults = config_class() if family != "gemma4_assistant" else config_class(hidden_size_per_layer_input=0)
    name = depth_name(defaults.to_dict())
    depth = {} if name is None or changes.get("num_hidden_layers", 0) is None else {name: DEPTH}
    given = {**depth, **{name: value for name, value in changes.items() if value is not None}}
    config = config_class(**given)
    return small_model(config, parameters=sys.maxsize)


def check_family(family: str, work: Path, tokenizer: Any, settings: Callable[..., AnyExpand]) -> Coverage:
    """Loads and expands a tiny model of a family, and checks the result with plain transformers.

    Checked are: complete loading, finite logits, tied embeddings, per-layer config entries, decoding with a cache,
    unchanged logits where new layers can be silenced, and one step of training that reaches all new layers.

    Args:
        family: a ``model_type`` of transformers.
        work: an empty directory.
        tokenizer: of at most 384 tokens.
        settings: ``settings("llama_pro", new_layers=2)`` returns a method's settings.

    Raises:
        FailedError: the expanded model is wrong.
    """
    try:
        model = tiny_model(family)
    except Exception as error:  # noqa: BLE001 - default configs of some families cannot be built
        return Coverage(family, "refused", f"no small model: {one_line(error)[:120]}")
    base = work / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    source = Model(
        path=str(base),
        revision=None,
        gguf_file=None,
        package=None,
        dtype="float32",
        dequantize=False,
        trust_remote_code=False,
        shape=None,
    )
    loaded, out = work / "load", work / "expand"
    try:
        row = family_for(read_json(base / "config.json"))
        how = "row" if row.inference is None else "inferred"
        silenced = row.inference is None or not row.inference.not_silenced
        metrics = [load.run(make_task("load", source, loaded))]
        metrics.append(_expand(loaded, out, "llama_pro" if silenced else "copy", settings))
    except UserError as error:
        return Coverage(family, "refused", error.rule.rpartition("cannot be inferred from its modules: ")[2])
    said = [each.get("family", "row") for each in metrics]
    _require(said == [how, how], f"the manifests of load and expand say {' and '.join(said)}")
    check_expanded(loaded, out, keeps_logits=silenced)
    if row.inference is None:
        return Coverage(family, how)
    notes = (
        "" if silenced else "new layers cannot keep the logits",
        "not trained" if row.inference.not_trained else "",
    )
    return Coverage(family, how, "; ".join(filter(None, notes)), len(row.inference.kinds))


def _expand(loaded: Path, out: Path, method: str, settings: Callable[..., AnyExpand]) -> Metrics:
    """Adds two layers at the first position that the config can express."""
    *others, last = ("interleaved", "top", "bottom")
    for position in others:
        try:
            return expand.run(
                make_task("expand", settings(method, new_layers=2, position=position), out, {"load": loaded})
            )
        except UserError as error:
            if error.setting != "expand.position":
                raise
    return expand.run(make_task("expand", settings(method, new_layers=2, position=last), out, {"load": loaded}))


def check_expanded(base: Path, path: Path, keeps_logits: bool) -> None:
    """Checks an expanded model with plain transformers. The expand stage has compared its decoding with a cache.

    Raises:
        FailedError: it is wrong.
    """
    original, deeper = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (base, path))
    with torch.no_grad():
        before, after = (model(TOKENS, use_cache=False).logits for model in (original, deeper))
    _require(bool(after.isfinite().all()), "its logits are not finite")
    _require(not keeps_logits or torch.allclose(before, after, rtol=1e-5, atol=1e-5), "its logits differ")
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (original, deeper)]
    _require(tied[0] == tied[1], "its embeddings are not tied as in the base")
    layers = read_json(path / "expansion.json")["layers"]
    sources = [layer["from"][0] for layer in layers]
    configs = [AutoConfig.from_pretrained(each).to_dict() for each in (base, path)]
    for name, value in configs[0].items():
        if name in ("layer_types", "no_rope_layers", "mlp_layer_types") and value:
            _require(configs[1][name] == [value[source] for source in sources], f"{name} is wrong")
    row = family_for(read_json(path / "config.json"))
    new = {layer["layer"] for layer in layers if layer["new"]}
    inside = "model.language_model.", "language_model.model."  # in memory, and in the names of a row
    parameters = {name.replace(*inside): p for name, p in deeper.named_parameters()}
    trained = {name: p for name, p in parameters.items() if row.layer_of(name) in new}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-4)
    loss = deeper(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    moving = {row.layer_of(name) for name, p in trained.items() if p.grad is not None and p.grad.any()}
    _require(moving == new, f"a step of training does not reach layers {sorted(new - moving)}")
    optimizer.step()
    with torch.no_grad():
        _require(bool(deeper(TOKENS, labels=TOKENS, use_cache=False).loss.isfinite()), "a step of training diverges")


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise FailedError(fault)


# ------------------------------------------------------------------------------------------------- table


def coverage_of(families: Sequence[str]) -> Iterator[Coverage]:
    """Checks families one by one."""
    from tests.tiny_inputs import expand_settings, make_tokenizer

    tokenizer = make_tokenizer()
    for family in families:
        work = Path(tempfile.mkdtemp(prefix=f"family-{family}-"))
        try:
            yield check_family(family, work, tokenizer, expand_settings)
        except Exception as error:  # noqa: BLE001 - a fault of the pipeline is reported, and the others are still checked
            yield Coverage(family, "failed", f"{type(error).__name__}: {one_line(error)[:300]}")
        finally:
            shutil.rmtree(work)


def table(found: Sequence[Coverage]) -> str:
    """Returns the Markdown table of all families, and a line with their numbers."""
    groups: Mapping[str, str] = {
        "row": "have a row",
        "inferred": "are inferred",
        "refused": "are refused",
        "failed": "fail",
    }
    counts = {how: sum(each.how == how for each in found) for how in groups}
    summary = ", ".join(f"{counts[how]} {text}" for how, text in groups.items() if counts[how])
    lines = [f"Of {len(found)} families, {summary}.", "", "| family | | |", "|---|---|---|"]
    for each in found:
        kinds = f"{each.kinds} kinds of layers" if each.kinds > 1 else ""
        note = "; ".join(filter(None, (kinds, each.note.replace("|", "/"))))
        lines.append(_row(each.family, each.how, note))
    return "\n".join(lines)


def _row(family: str, how: str, note: str) -> str:
    """Returns a row of at most ``WIDTH`` characters, for which a long note is cut after a word."""
    start, end = f"| {family} | {how} | ", " |"
    return f"{start}{textwrap.shorten(note, WIDTH - len(start + end), placeholder=' …')}{end}"


def main() -> None:
    """Parses the command line and prints one line per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help="write the table into docs/families.md")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = []
    for each in coverage_of(arguments.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        print(f"{each.family:24} {each.how:9} {each.note}  ({time.process_time():.0f} s)", flush=True)
        found.append(each)
    if arguments.write:
        text = DOCS.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        DOCS.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
