"""The report of a study: results.json, report.md, the same text as report.html, and plots."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from pipeline.config.secrets import HIDDEN, contains_secret
from pipeline.files import write_json, write_text
from pipeline.report.markup import Table, bold, bullets, code, escape, image, render, table
from pipeline.report.metrics import scientific, signed, with_error
from pipeline.report.significance import LEVEL
from pipeline.study.loading import named_study
from pipeline.study.progress import Budget, Loss, StudyProgress
from pipeline.study.results import Comparison, any_run, base_losses, compare, to_json
from pipeline.study.statistics import Mean

BUDGET_TITLES: dict[Budget, str] = {"tokens": "Equal tokens", "flops": "Equal FLOPs", "seconds": "Equal seconds"}
PARETO, RATES = "pareto.png", "rates.png"
TABLE_LEGEND = (
    "± is one standard error over seeds. Differences to the reference are paired by seed: ▲ better, ▼ worse, ≈ not "
    "significant. p is that of the two-sided paired t test after Holm's correction for the comparisons of its column. "
    "“Over text” is one standard error of the same difference over the blocks of the text, paired by block."
)
PARETO_CAPTION = (
    "Held-out loss at equal tokens by what it costs: training FLOPs{forgetting}. Numbers as in the table; the gray "
    "line is the Pareto front."
)
FORGETTING_CAPTION = ", and the loss on the forgetting text"
RATES_CAPTION = "Validation loss of the last rung by learning rate, above that of the chosen rate (circled)."


def write_study_report(progress: StudyProgress, arguments: Sequence[str], out: Path) -> Path:
    """Writes the report on all contenders that are finished, and returns the path of report.md.

    Args:
        progress: the study.
        arguments: the command line, to repeat the study.
        out: the report's directory.
    """
    # What is done with the study does not belong to its settings.
    arguments = [HIDDEN if contains_secret(item) else item for item in arguments if not item.startswith("action=")]
    out.mkdir(parents=True, exist_ok=True)
    comparisons = [compare(progress, budget) for budget in progress.budgets]
    write_json(out / "results.json", {**to_json(progress, comparisons), "arguments": arguments})
    figures = _draw(progress, comparisons[0], out)
    text = _compose(progress, comparisons, figures, arguments)
    write_text(out / "report.md", text)
    write_text(out / "report.html", render(text, f"study {progress.study.name}", out))
    return out / "report.md"


def _compose(
    progress: StudyProgress, comparisons: Sequence[Comparison], figures: Mapping[str, str], arguments: Sequence[str]
) -> str:
    blocks = [
        f"# Study {escape(progress.study.name)}",
        f"> {_headline(progress, comparisons[0])}",
        "## Protocol",
        bullets(_protocol(progress)),
        TABLE_LEGEND,
    ]
    for comparison in comparisons:
        if comparison.outcomes:
            blocks += [f"## {BUDGET_TITLES[comparison.budget]}", table(_loss_table(progress, comparison))]
            blocks += [bullets(_notes(progress, comparison))]
    blocks += [image(PARETO, figures[PARETO])] if PARETO in figures else []
    blocks += ["## Which differences are significant", bullets(_counting(progress, comparisons))]
    blocks += ["## Tuned learning rates", table(_rate_table(progress))]
    blocks += [image(RATES, figures[RATES])] if RATES in figures else []
    blocks += ["## What these numbers do not show", bullets(_caveats(progress, comparisons))]
    blocks += ["## Reproduction", code(_command(arguments), "bash")]
    blocks += ["The study's settings, as its file and `study.` on this command line set them:"]
    blocks += [code(yaml.safe_dump(progress.study.model_dump(mode="json"), sort_keys=False).rstrip(), "yaml")]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _command(arguments: Sequence[str]) -> str:
    """Returns the command that repeats the study."""
    names = [name for item in arguments if (name := named_study(item)) is not None]
    return shlex.join(["scripts/study", *names, *(item for item in arguments if named_study(item) is None)])


# ------------------------------------------------------------------------------------------- text


def _headline(progress: StudyProgress, tokens: Comparison) -> str:
    reference, means = progress.study.reference, tokens.means["held_out"]
    known = [name for name in tokens.ranked if math.isfinite(means[name].value)]
    without = {
        "Diverged": [name for name in tokens.ranked if name not in known],
        "Not finished yet": [name for name in progress.study.contenders if name not in tokens.outcomes],
    }
    missing = "".join(f" {why}: {', '.join(map(escape, names))}." for why, names in without.items() if names)
    if not known:
        return f"No contender has a loss to compare.{missing}"
    best = known[0]
    found = tokens.differences["held_out"]
    better = [name for name, each in found.items() if each.counts(LEVEL) and each.mean.value < 0]
    worse = [name for name, each in found.items() if each.counts(LEVEL) and each.mean.value > 0]
    loss = with_error("loss", means[best].value, means[best].stderr)
    if len(known) == 1:
        return (
            f"At equal tokens, {bold(escape(best))} has a held-out loss of {loss}. There is nothing to compare it with "
            f"yet.{missing}"
        )
    lowest = f"At equal tokens, {bold(escape(best))} has the lowest held-out loss ({loss})."
    if not found:
        return f"{lowest} The reference, {escape(reference)}, has no loss to compare it with.{missing}"
    return (
        f"{lowest} Compared with {escape(reference)}: {len(better)} better, {len(worse)} worse, "
        f"{len(found) - len(better) - len(worse)} not significantly different.{missing}"
    )


def _protocol(progress: StudyProgress) -> Iterator[str]:
    study, steps = progress.study, progress.trials.token_steps[progress.study.reference]
    yield (
        f"{len(study.contenders)} contenders; the reference, chosen in advance, is {escape(study.reference)}. Final "
        f"runs have {progress.trials.final_tokens} ({steps:,} steps for the reference) and seeds "
        f"{', '.join(map(str, study.seeds))}."
    )
    yield (
        f"Learning rates were selected by the validation loss alone, by successive halving on "
        f"{', '.join(f'{rung:.3g}' for rung in study.tune.rungs)} times the tokens, with tuning seeds "
        f"{', '.join(map(str, study.tune.seeds))}, which no final run uses. Every run has a complete schedule."
    )
    if study.equal_flops:
        yield "At equal FLOPs, a contender takes as many steps as cost what the reference spends at equal tokens."
    if study.equal_seconds:
        yield (
            "At equal seconds, likewise with the median seconds per step of the contender's fastest run. A loss "
            "between those of two runs of different lengths is interpolated linearly in the logarithm of the steps; "
            "none is extrapolated by more than 5 % of the steps."
        )


def _counting(progress: StudyProgress, comparisons: Sequence[Comparison]) -> Iterator[str]:
    total = sum(len(by_name) for comparison in comparisons for by_name in comparison.differences.values())
    for comparison in comparisons:
        for loss, by_name in comparison.differences.items():
            if by_name:
                counting = [
                    f"{escape(name)} {signed('loss', each.mean.value, each.mean.stderr)}"
                    for name, each in sorted(by_name.items(), key=lambda item: item[1].mean.value)
                    if each.counts(LEVEL)
                ]
                where = f"{BUDGET_TITLES[comparison.budget]}, {loss.replace('_', '-')} loss"
                yield (
                    f"{where}: {len(counting)} of {len(by_name)} differences "
                    f"to {escape(progress.study.reference)} are significant{': ' if counting else '.'}"
                    f"{'; '.join(counting)}"
                )
    for comparison in comparisons:
        doubtful = [
            f"{escape(name)} ({loss.replace('_', '-')} loss)"
            for loss, by_name in comparison.differences.items()
            for name, each in by_name.items()
            if each.counts(LEVEL) and abs(each.mean.value) < 2 * comparison.text_errors[loss].get(name, 0.0)
        ]
        if doubtful:
            yield (
                f"{BUDGET_TITLES[comparison.budget]}: smaller than two standard errors over text, so that other text "
                f"of the same kind may show no difference: {', '.join(doubtful)}."
            )
    yield (
        f"The report makes {total} comparisons. Holm's correction holds the probability of any false one at "
        f"{LEVEL:.0%} within each loss at each budget, not over all of them together."
    )


def _notes(progress: StudyProgress, comparison: Comparison) -> Iterator[str]:
    interpolated = [name for name, outcomes in comparison.outcomes.items() if outcomes[0].interpolated]
    if interpolated:
        yield f"Interpolated between runs of two lengths: {', '.join(map(escape, interpolated))}."
    near = [
        f"{escape(name)} ({outcomes[0].measured[0][0]} steps for {outcomes[0].steps})"
        for name, outcomes in comparison.outcomes.items()
        if not outcomes[0].interpolated and outcomes[0].measured[0][0] != outcomes[0].steps
    ]
    if near:
        yield f"From runs of a length within 5 %: {', '.join(near)}."
    counts = {
        name: sum(any(run.diverged for _, run in outcome.measured) for outcome in outcomes)
        for name, outcomes in comparison.outcomes.items()
    }
    seeds = len(progress.study.seeds)
    diverged = [f"{escape(name)} ({count} of {seeds} seeds)" for name, count in counts.items() if count]
    if diverged:
        yield f"Diverged, and therefore not compared: {', '.join(diverged)}."


def _caveats(progress: StudyProgress, comparisons: Sequence[Comparison]) -> Iterator[str]:
    study = progress.study
    yield (
        f"Standard errors are over {len(study.seeds)} seeds, which vary the order and choice of the training blocks "
        "and random initializations. They say nothing about other corpora, base models or budgets. Errors over text "
        "are not part of the test. They treat blocks as independent, which those of one document are not."
    )
    yield "With few seeds, a real difference is often not significant, which is not evidence of equality."
    if study.tune.rungs[-1] < 1:
        yield (
            f"Rates were tuned on at most {study.tune.rungs[-1]:g} times the tokens. The best rate of a longer run may "
            "differ, as may that of runs at equal FLOPs or seconds."
        )
    edges = [name for name in study.contenders if progress.tuned(name).at_edge]
    if edges:
        yield (
            f"The best rate of {', '.join(map(escape, edges))} is at the edge of the grid, because tune.max_new_rates "
            "was reached. Such a contender could be better than shown."
        )
    if any(comparison.budget == "seconds" for comparison in comparisons):
        yield "Seconds are those of one machine, and depend on its load and on implementations."


# ------------------------------------------------------------------------------------------- tables


def _loss_table(progress: StudyProgress, comparison: Comparison) -> Table:
    base = base_losses(progress)
    forgetting = bool(comparison.means["forgetting"])
    columns = ["#", "contender", "rate", "trained", "before", "held-out loss", "− reference", "p", "over text"]
    columns += ["forgetting loss", "− reference", "p", "over text"] if forgetting else []
    columns += ["− base"] if forgetting and "forgetting_loss" in base else []
    columns += ["steps", "FLOPs", "s/step"]
    rows, numbers = [], _numbers(progress)
    for name in comparison.ranked:
        outcomes = comparison.outcomes[name]
        run = any_run(outcomes)
        row = [str(numbers[name]), escape(name), f"{progress.tuned(name).rate:g}"]
        row += ["—" if run.diverged else f"{run.trained_parameters / 1e6:.1f}M"]
        row += [f"{run.before['loss']:.3f}" if run.before else "—"]
        row += _cells(progress, comparison, "held_out", name)
        if forgetting:
            row += _cells(progress, comparison, "forgetting", name)
            if "forgetting_loss" in base:
                row.append(_change(comparison.means["forgetting"].get(name), base["forgetting_loss"]))
        steps = outcomes[0].steps
        cost = ["—", "—"]
        if not run.diverged:
            cost = [scientific(run.flops / run.steps * steps), f"{run.seconds_per_step:.3g}"]
        row += [f"{steps:,}", *cost]
        rows.append(row)
    return Table(columns, rows, text_columns=2)


def _numbers(progress: StudyProgress) -> dict[str, int]:
    """Returns the number of every contender in tables and plots."""
    return {name: number for number, name in enumerate(progress.study.contenders, 1)}


def _cells(progress: StudyProgress, comparison: Comparison, name_of_loss: Loss, contender: str) -> list[str]:
    mean = comparison.means[name_of_loss].get(contender)
    difference = comparison.differences[name_of_loss].get(contender)
    text_error = comparison.text_errors[name_of_loss].get(contender)
    if mean is None:
        return ["—", "", "", ""]
    if math.isinf(mean.value):
        return ["diverged", "", "", ""]
    loss = with_error("loss", mean.value, mean.stderr)
    if difference is None:
        return [loss, "reference" if contender == progress.study.reference else "", "", ""]
    sign = "≈" if not difference.counts(LEVEL) else "▲" if difference.mean.value < 0 else "▼"
    return [
        loss,
        f"{signed('loss', difference.mean.value, difference.mean.stderr)} {sign}",
        f"{difference.adjusted:.2g}",
        "—" if text_error is None else f"± {text_error:.3f}",
    ]


def _change(mean: Mean | None, base: float) -> str:
    return "—" if mean is None or math.isinf(mean.value) else signed("loss", mean.value - base, mean.stderr)


def _rate_table(progress: StudyProgress) -> Table:
    """Shows every rate of the last rung that has one, with the chosen one in bold."""
    study, rows = progress.study, []
    for name in study.contenders:
        tuned = progress.tuned(name)
        for rung, share in enumerate(study.tune.rungs):
            losses = [(rate, progress.validation_loss(name, rung, rate)) for rate in tuned.rates]
            cells = [
                _rate_cell(rate, loss, not tuned.pending and rate == tuned.rate)
                for rate, loss in losses
                if loss is not None
            ]
            edge = "at the edge" if tuned.at_edge else "not tuned yet" if tuned.pending else "between worse ones"
            last = rung == len(study.tune.rungs) - 1
            rows.append([escape(name), f"{share:g}", ", ".join(cells), edge if last else ""])
    return Table(["contender", "tokens", "rate: validation loss", "chosen rate"], rows, text_columns=4)


def _rate_cell(rate: float, loss: float, chosen: bool) -> str:
    text = f"{rate:g}: {'diverged' if math.isinf(loss) else f'{loss:.4f}'}"
    return bold(text) if chosen else text


# ------------------------------------------------------------------------------------------- plots


def _draw(progress: StudyProgress, tokens: Comparison, out: Path) -> dict[str, str]:
    """Draws the figures, and returns their captions by file."""
    # Imported here because matplotlib takes a second.
    from pipeline.report.study_plots import Mark, Panel, draw_pareto, draw_rates

    numbers = _numbers(progress)
    held_out, forgetting = tokens.means["held_out"], tokens.means["forgetting"]
    finite = [name for name, mean in held_out.items() if math.isfinite(mean.value)]
    drawn = {}
    if finite:
        flops = {name: any_run(tokens.outcomes[name]).flops for name in finite}
        panels = [
            Panel("by training FLOPs", "training FLOPs", [
                Mark(numbers[name], flops[name], held_out[name].value, 0.0, held_out[name].stderr) for name in finite
            ], counts_flops=True),
        ]  # fmt: skip
        both = [name for name in finite if name in forgetting and math.isfinite(forgetting[name].value)]
        if both:
            panels.append(Panel("by forgetting", "loss on the forgetting text (nats per token)", [
                Mark(numbers[name], forgetting[name].value, held_out[name].value, forgetting[name].stderr,
                     held_out[name].stderr)
                for name in both
            ]))  # fmt: skip
        draw_pareto(panels, out / PARETO)
        drawn[PARETO] = PARETO_CAPTION.format(forgetting=FORGETTING_CAPTION if both else "")
    chosen = {
        name: tuned.rate
        for name in progress.study.contenders
        if not (tuned := progress.tuned(name)).pending and tuned.rate is not None
    }
    last = len(progress.study.tune.rungs) - 1
    losses = {
        name: {
            rate: loss
            for rate in progress.tuned(name).rates
            if (loss := progress.validation_loss(name, last, rate)) is not None and math.isfinite(loss)
        }
        for name in chosen
    }
    shown = {name: by_rate for name, by_rate in losses.items() if chosen[name] in by_rate}
    if shown:
        draw_rates(shown, chosen, numbers, out / RATES)
        drawn[RATES] = RATES_CAPTION
    return drawn
