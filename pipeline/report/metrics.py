"""The interpretation and formatting of metrics: which direction is better, units, errors and names."""

from __future__ import annotations

import math
import re

_SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "mc1", "mc2"})
_LOWER_IS_BETTER = frozenset({"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "loss"})
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
_RATIO_SCALE = frozenset({"perplexity", "word_perplexity", "byte_perplexity"})  # exponentials of what is averaged
LARGE = 1e6  # numbers from here on have an exponent
TARGET_NAMES = {"load": "base", "expand": "expanded", "pretrain": "pre-trained", "sft": "tuned"}
TASK_NAMES = {
    "held_out_text": "held-out corpus text",
    "python_docs_mcq": "multiple-choice questions about the standard library",
    "minimal_pairs": "general-English minimal pairs",
    "held_out_loss": "held-out blocks of the corpus",
    "held_out_instruction_loss": "held-out conversations",
}
_PREFERRED = (*PERPLEXITIES, "acc", "exact_match", "acc_norm")
# The tasks that the Open LLM Leaderboard, by which LLaMA Pro and others are compared, scores by acc_norm.
_SCORED_BY_ACC_NORM = frozenset({"arc_challenge", "hellaswag"})


def task_name(task: str) -> str:
    """Returns ``held-out corpus text``, with ``of data.corpus.1`` for one of several sources."""
    name, _, source = task.partition("/")
    if name not in TASK_NAMES:
        return task
    return f"{TASK_NAMES[name]} of {source}" if source else TASK_NAMES[name]


def target_name(target: str) -> str:
    """Returns ``pre-trained``, or ``pre-trained, 20 %`` for a snapshot."""
    stage, _, share = target.rstrip("%").partition("@")
    return f"{TARGET_NAMES[stage]}, {share} %" if share else TARGET_NAMES[stage]


def base_metric(metric: str) -> str:
    """Returns a metric's name without lm-eval's filter: ``exact_match`` for ``exact_match (strict-match)``."""
    return metric.partition(" (")[0]


def is_share(metric: str) -> bool:
    """Returns whether a metric is a fraction of documents, which is printed in percent."""
    name = base_metric(metric)
    return name in _SHARES or re.fullmatch(r"pass(@|_at_)\d+", name) is not None


def is_ratio_scale(metric: str) -> bool:
    """Returns whether a metric is a perplexity. Logarithms of perplexities are compared and have symmetric errors."""
    return base_metric(metric) in _RATIO_SCALE


def direction(metric: str, higher_is_better: bool | None = None) -> int:
    """Returns +1 if higher is better, -1 if lower is better, 0 if neither the task nor this module knows.

    Args:
        metric: its name.
        higher_is_better: what the task declares.
    """
    if higher_is_better is not None:
        return 1 if higher_is_better else -1
    if is_share(metric):
        return 1
    return -1 if base_metric(metric) in _LOWER_IS_BETTER else 0


def preferred(metrics: list[str], task: str = "") -> str:
    """Returns the main metric of a task, which sentences and plots use."""
    order = ("acc_norm", *_PREFERRED) if task in _SCORED_BY_ACC_NORM else _PREFERRED
    names = [base_metric(metric) for metric in metrics]
    return metrics[min(range(len(names)), key=lambda i: order.index(names[i]) if names[i] in order else len(order))]


def number(metric: str, value: float) -> str:
    """Formats a value: shares in percent with one decimal, other metrics with four significant digits."""
    return f"{100 * value:.1f} %" if is_share(metric) else significant(value)


def interval(metric: str, value: float, stderr: float | None, factor: float = 1.0) -> tuple[float, float]:
    """Returns how far an interval of ``factor`` standard errors extends below and above a value.

    It is symmetric for all metrics but perplexities, whose logarithms have symmetric intervals.
    """
    error = factor * (stderr or 0.0)
    if not is_ratio_scale(metric) or value <= 0:
        return error, error
    return value * -math.expm1(-error / value), value * math.expm1(error / value)


def with_error(metric: str, value: float, stderr: float | None) -> str:
    """Formats a value and one standard error: ``81.2 ± 1.1 %``, ``0.902 ± 0.012``; ``26.6 +1.5 −1.4`` for perplexities.

    Errors have two leading digits. Large numbers have an exponent: ``3.000e+10 +2.1e+08 −2.0e+08``.
    """
    if stderr is None:
        return number(metric, value)
    if is_share(metric):
        return f"{100 * value:.1f} ± {100 * stderr:.1f} %"
    decimals = max(0, 1 - math.floor(math.log10(stderr))) if stderr > 0 else 2
    form, form_of_errors = _forms(max(abs(value), stderr), decimals)
    below, above = (format(error, form_of_errors) for error in interval(metric, value, stderr))
    error = f"± {above}" if below == above else f"+{above} −{below}"
    return f"{value:{form}} {error}"


def _forms(largest: float, decimals: int) -> tuple[str, str]:
    """Returns how to format a value and its errors, the largest of which is given."""
    return (".3e", ".1e") if largest >= LARGE else (f",.{decimals}f",) * 2


def signed(metric: str, value: float, stderr: float | None) -> str:
    """Formats a difference: ``−0.5 ± 2.1 points`` for shares, otherwise with the decimals of its error."""
    if is_share(metric):
        error = "" if stderr is None else f" ± {100 * stderr:.1f}"
        return f"{100 * value:+.1f}{error} points".replace("-", "−")
    if stderr is None or stderr == 0:
        text = significant(value)
    else:
        decimals = max(0, 1 - math.floor(math.log10(stderr)))
        text = f"{value:,.{decimals}f} ± {stderr:,.{decimals}f}"
    return f"+{text}" if value >= 0 else text.replace("-", "−")


def relative_change(log_ratio: float, stderr: float | None) -> str:
    """Formats the logarithm of a ratio and one standard error: ``−12.3 +0.9 −0.8 %``, or ``−12.3 %`` without error."""
    value = 100 * math.expm1(log_ratio)
    if stderr is None:
        return f"{value:+{_forms(value, 1)[0]}} %".replace("-", "−")
    below, above = (abs(100 * math.expm1(log_ratio + error) - value) for error in (-stderr, stderr))
    decimals = max(1, 1 - math.floor(math.log10(above))) if above > 0 else 1
    form, form_of_errors = _forms(max(value, above), decimals)
    errors = [format(error, form_of_errors) for error in (above, below)]
    text = f"± {errors[0]}" if errors[0] == errors[1] else f"+{errors[0]} -{errors[1]}"
    return f"{value:+{form}} {text} %".replace("-", "−")


def significant(value: float) -> str:
    """Formats four significant digits, without an exponent below a million."""
    return f"{value:,.0f}" if 1000 <= abs(value) < LARGE else f"{value:#.4g}".removesuffix(".")


def duration(seconds: float) -> str:
    """Formats seconds as ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float) -> str:
    """Formats tokens or parameters as ``81,920``, ``28.3 M``, ``8.03 B``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def memory(bytes_: float) -> str:
    """Formats bytes as ``1.52 GiB``."""
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.0f} MiB"


def scientific(value: float) -> str:
    """Formats FLOPs as ``1.3×10¹⁴``."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
