"""Rules for the routers and experts of new layers: ``python -m scripts.benchmarks.routers``.

Trains a small mixture (Qwen3's, with experts in every layer) from scratch on CPython's documentation, expands it by
every rule, and trains the new layers of every expanded model, or all layers, for the same steps on the same tokens. The
seed determines the initial weights and which blocks are trained on. The rules:

    copied        a new layer is a copy of the lower neighbor, router included
    averaged      the mean of the two neighbors, or of their aligned neurons and heads, or their fusion by optimal
                  transport. An expert is made from the two experts of the same index, as is its row of the router
    matched       as averaged, but from experts that belong together: the upper layer's experts are first put into the
                  order in which they resemble the lower one's the most (the sum over pairs of the cosine of their rows
                  of the router and that of their weights, with neurons in the best order; an exact assignment). The
                  experts of a layer have no order, so the base computes what it did
    lower router  experts are averaged, or matched and averaged, and the router is the lower neighbor's

The table has the held-out loss after surgery and after training, in nats per token, the latter also relative to the
first rule's, and of the new layers: the busiest expert's and the idlest expert's assignments relative to an even
distribution, and the entropy of the router relative to the largest. Cells are means over seeds with the standard
deviation, differences with the standard error over pairs of the same seed, loads as first step -> last steps.

Expected before the first run: after surgery, averages of unmatched experts are the worst and copies the best of the
rules that change the logits; matching improves averages a little, since experts of different layers that were trained
from scratch have little in common; after training, all rules that zero the outputs differ by less than the seeds. What
was measured is in docs/benchmarks.md.

The default takes about 40 minutes on one core: three seeds of one training from scratch (4 minutes) and of eleven
expanded models (50 seconds each). An interrupted study continues with the same command. ``--tiny`` checks that the
program works.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from pipeline.data import python_docs
from pipeline.expansion.alignment import best_order
from pipeline.files import read_json
from pipeline.models.reading import copy_side_files
from pipeline.stages import expand, load
from scripts.benchmarks.machine import machine
from scripts.benchmarks.tasks import (
    corpus_settings,
    expand_settings,
    expand_task,
    pretrain_settings,
    quickstart,
    run_stage,
    stage_task,
)

WEIGHTS = "model.safetensors"
ROUTER = "model.layers.{}.mlp.gate.weight"
EXPERTS = "model.layers.{}.mlp.experts."
LAST_STEPS = 10  # over which loads and entropies are averaged
OTHER_OPTIONS = ("directory", "seeds", "rules", "trainable", "tiny")  # no model depends on them, or its name says it
MEASURES = ("expert_load_max", "expert_load_min", "router_entropy")


@dataclass(frozen=True)
class Rule:
    """How new layers are made.

    Attributes:
        method: of expansion, with ``changes`` of its settings.
        matched: whether the experts of the base are put into a common order before.
        lower_router: whether the router is that of the lower neighbor, whatever the method makes of the others.
    """

    name: str
    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    matched: bool = False
    lower_router: bool = False


RULES = (
    Rule("copied", "copy"),
    Rule("averaged", "average"),
    Rule("averaged, lower router", "average", lower_router=True),
    Rule("matched and averaged", "average", matched=True),
    Rule("matched and averaged, lower router", "average", matched=True, lower_router=True),
    Rule("aligned and averaged", "aligned_average"),
    Rule("matched, aligned and averaged", "aligned_average", matched=True),
    Rule("copied, outputs zero", "llama_pro"),
    Rule("averaged, outputs zero", "average", {"zero_init": True}),
    Rule("fused (OpT-DeUS)", "opt_deus"),
    Rule("matched and fused", "opt_deus", matched=True),
)


@dataclass(frozen=True)
class Result:
    """What one expanded model of one seed gives: held-out losses, and MEASURES in the first and the last steps."""

    after_surgery: float
    after_training: float
    first: tuple[float, ...]
    last: tuple[float, ...]


class Study:
    """All models of one size. What an earlier call with the same sizes has finished is reused."""

    def __init__(self, options: argparse.Namespace) -> None:
        sizes = {name: value for name, value in vars(options).items() if name not in OTHER_OPTIONS}
        key = sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:8]
        self.options, self.work = options, options.directory.absolute() / key

    def base(self, seed: int, matched: bool = False) -> Path:
        """Returns the mixture trained from scratch, if asked with matched experts."""
        trained = self._once(f"base-{seed}", lambda out: self._train_base(seed, out))
        if not matched:
            return trained
        return self._once(f"matched-{seed}", lambda out: match_experts(trained, out))

    def result(self, rule: Rule, seed: int) -> Result:
        """Expands the base of a seed by a rule, and trains what comes of it."""
        name = f"{RULES.index(rule)}-{seed}"
        expanded = self._once(f"expanded-{name}", lambda out: self._expand(rule, seed, out))
        trained = self._once(
            f"trained-{self.options.trainable}-{name}",
            lambda out: self._pretrain(
                expanded, seed, out, steps=self.options.steps, trainable=self.options.trainable, learning_rate=1e-3
            ),
        )
        new = [layer["layer"] for layer in read_json(expanded / "expansion.json")["layers"] if layer["new"]]
        before, after = (entry["loss"] for entry in read_json(trained / "training.json")["held_out"])
        first, last = _measures(trained, new)
        return Result(before, after, first, last)

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        out, partial = self.work / name, self.work / f"{name}.partial"
        if not out.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            partial.rename(out)
        return out

    def _data(self) -> Path:
        random = self._once("random-0", lambda out: self._write_random(0, out))
        (documentation,) = quickstart().data.corpus
        settings = corpus_settings([documentation], self.options.sequence_length, held_out_fraction=0.1)
        return self._once(
            "data", lambda out: run_stage(stage_task("tokenize/corpus", settings, {"load": random}, out), out)
        )

    def _write_random(self, seed: int, out: Path) -> None:
        """Writes the untrained model by way of the load stage."""
        options, source = self.options, out / "source"
        tokenizer = train_tokenizer(options.vocabulary)
        config = Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=options.hidden, num_hidden_layers=options.layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=options.hidden // 4,
            intermediate_size=2 * options.hidden, moe_intermediate_size=options.hidden, num_experts=options.experts,
            num_experts_per_tok=2, max_position_embeddings=options.sequence_length, tie_word_embeddings=True,
            router_aux_loss_coef=0.01, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(source)
        tokenizer.save_pretrained(source)
        settings = quickstart("model=hub", f"model.path={source}", "model.dtype=float32").model
        load.run(stage_task("load", settings, {}, out))
        shutil.rmtree(source)

    def _train_base(self, seed: int, out: Path) -> None:
        random = self._once(f"random-{seed}", lambda out: self._write_random(seed, out))
        self._pretrain(random, seed, out, steps=self.options.base_steps, trainable="all", learning_rate=3e-3)

    def _pretrain(self, model: Path, seed: int, out: Path, **changes: Any) -> None:
        options = self.options
        settings = pretrain_settings(
            sequence_length=options.sequence_length, global_batch=8, micro_batch=8, precision="float32",
            evaluate_at=[0.0, 1.0], held_out_blocks=options.held_out_blocks, checkpoint_every_steps=10_000,
            activation_checkpointing=False, compile=False, **changes,
        )  # fmt: skip
        run_stage(stage_task("pretrain", settings, {"model": model, "data": self._data()}, out, seed), out)

    def _expand(self, rule: Rule, seed: int, out: Path) -> None:
        settings = expand_settings(
            rule.method, new_layers=self.options.layers // 2, position="interleaved", **rule.changes
        )
        expand.run(expand_task(settings, self.base(seed, rule.matched), out, seed))
        if rule.lower_router:
            _copy_lower_routers(out)


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE of the documentation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(python_docs.documents(held_out=False), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def match_experts(base: Path, out: Path) -> None:
    """Writes a model that computes the same, in which the experts of every layer resemble those of the layer below.

    Raises:
        AssertionError: it does not compute the same.
    """
    weights = load_file(base / WEIGHTS)
    for layer in range(1, read_json(base / "config.json")["num_hidden_layers"]):
        order = expert_order(weights, layer - 1, layer)
        prefix, router = EXPERTS.format(layer), ROUTER.format(layer)
        inside = {name: value for name, value in weights.items() if name.startswith(prefix)}
        for place, expert in enumerate(order):
            for name, value in inside.items():
                if name.startswith(f"{prefix}{expert}."):
                    weights[name.replace(f"{prefix}{expert}.", f"{prefix}{place}.")] = value
        weights[router] = weights[router][order].contiguous()
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(base / "config.json", out / "config.json")
    copy_side_files(base, out)
    tokens = torch.arange(64)[None]
    with torch.inference_mode():
        one, other = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (base, out))
    assert torch.allclose(one, other, atol=1e-3), "the order of experts changes what the model computes"


def expert_order(weights: dict[str, Tensor], lower: int, upper: int) -> list[int]:
    """Returns which expert of the upper layer comes at each place, so that it resembles the lower layer's there."""
    routers = [torch.nn.functional.normalize(weights[ROUTER.format(layer)], dim=1) for layer in (lower, upper)]
    below, above = ([_neurons(weights, layer, each) for each in range(len(routers[0]))] for layer in (lower, upper))
    alike = torch.tensor([[_cosine(one, other[best_order(one, other)]) for other in above] for one in below])
    _, order = linear_sum_assignment((routers[0] @ routers[1].T + alike).double().numpy(), maximize=True)
    return [int(expert) for expert in order]


def _neurons(weights: dict[str, Tensor], layer: int, expert: int) -> Tensor:
    """Returns all weights of every neuron of an expert ``[neurons, weights]``."""
    gate, up, down = (
        weights[f"{EXPERTS.format(layer)}{expert}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")
    )
    return torch.cat([gate, up, down.T], 1)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def _copy_lower_routers(model: Path) -> None:
    weights, layers = load_file(model / WEIGHTS), read_json(model / "expansion.json")["layers"]
    place = {layer["from"][0]: layer["layer"] for layer in layers if not layer["new"]}
    for layer in (layer for layer in layers if layer["new"]):
        weights[ROUTER.format(layer["layer"])] = weights[ROUTER.format(place[layer["from"][0]])].clone()
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})


def _measures(trained: Path, layers: Sequence[int]) -> list[tuple[float, ...]]:
    """Returns the means of MEASURES over layers in the first step, and in the last ones."""
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if f"{MEASURES[0]}/{layers[0]}" in line]
    return [
        tuple(
            statistics.mean(line[f"{measure}/{layer}"] for line in chosen for layer in layers) for measure in MEASURES
        )
        for chosen in (steps[:1], steps[-LAST_STEPS:])
    ]


def row(rule: Rule, results: Sequence[Result], reference: Sequence[Result]) -> str:
    """Returns a row of the table, with differences to the results of another rule for the same seeds."""
    losses = [_spread([getattr(each, name) for each in results]) for name in ("after_surgery", "after_training")]
    pairs = zip(results, reference, strict=True)
    losses.append(_difference([mine.after_training - other.after_training for mine, other in pairs]))
    loads = [
        f"{statistics.mean(each.first[i] for each in results):.2f} -> "
        f"{statistics.mean(each.last[i] for each in results):.2f}"
        for i in range(len(MEASURES))
    ]
    return f"| {' | '.join([rule.name, *losses, *loads])} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def _difference(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.4f}{error}" if any(values) else ""


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rules", nargs="+", choices=[rule.name for rule in RULES], help="by default all")
    parser.add_argument("--trainable", choices=("new_layers", "all"), default="new_layers")
    parser.add_argument("--layers", type=int, default=6, help="of the base; half as many are added, interleaved")
    parser.add_argument("--experts", type=int, default=8, help="per layer, of which two compute a token")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens; a step has 8 sequences")
    parser.add_argument("--base-steps", type=int, default=600, help="of training from scratch")
    parser.add_argument("--steps", type=int, default=100, help="after expansion")
    parser.add_argument("--held-out-blocks", type=int, default=64)
    parser.add_argument("--directory", type=Path, default=Path("benchmarks-routers"))
    parser.add_argument("--tiny", action="store_true", help="two layers, few steps, one seed, to check the program")
    options = parser.parse_args()
    if options.tiny:
        small = {"seeds": 1, "layers": 2, "experts": 4, "hidden": 32, "vocabulary": 512, "sequence_length": 64}
        vars(options).update(small, base_steps=4, steps=3, held_out_blocks=2)
    return options


def main() -> None:
    """Prints the table row by row."""
    options = parse()
    torch.set_flush_denormal(True)
    study, seeds = Study(options), range(options.seeds)
    before = [read_json(study.base(seed) / "training.json")["held_out"][-1]["loss"] for seed in seeds]
    print(f"{options.seeds} seeds, {options.trainable} trained; {machine('torch', 'transformers', 'deepspeed')}\n")
    rules = [rule for rule in RULES if options.rules is None or rule.name in options.rules]
    print(f"| rule | loss after surgery | after training | minus {rules[0].name} | busiest expert | idlest | entropy |")
    print(f"|---|---:|---:|---:|---:|---:|---:|\n| the base | {_spread(before)} | | | | | |", flush=True)
    reference = [study.result(rules[0], seed) for seed in seeds]
    for rule in rules:
        print(row(rule, [study.result(rule, seed) for seed in seeds], reference), flush=True)


if __name__ == "__main__":
    main()
