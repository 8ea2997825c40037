"""The interpretation and formatting of metrics: which direction is better, units, errors and names."""

from __future__ import annotations

import math

SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "mc1", "mc2"})
LOWER_IS_BETTER = frozenset({"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "loss"})
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
TARGET_NAMES = {"load": "base", "expand": "expanded", "pretrain": "pre-trained", "sft": "tuned"}
TASK_NAMES = {
    "held_out_text": "held-out corpus text",
    "python_docs_mcq": "multiple-choice questions about the standard library",
    "minimal_pairs": "general-English minimal pairs",
    "held_out_loss": "held-out blocks of the corpus",
    "held_out_instruction_loss": "held-out conversations",
}
_PREFERRED = (*PERPLEXITIES, "acc", "exact_match", "acc_norm")


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


def direction(metric: str) -> int:
    """Returns +1 if higher is better, -1 if lower is better, 0 if the metric is not known here."""
    if metric in SHARES:
        return 1
    return -1 if metric in LOWER_IS_BETTER else 0


def preferred(metrics: list[str]) -> str:
    """Returns the main metric of a task, which sentences and plots use."""
    return min(metrics, key=lambda metric: _PREFERRED.index(metric) if metric in _PREFERRED else len(_PREFERRED))


def number(metric: str, value: float) -> str:
    """Formats a value: shares in percent with one decimal, other metrics with four significant digits."""
    return f"{100 * value:.1f} %" if metric in SHARES else significant(value)


def with_error(metric: str, value: float, stderr: float | None) -> str:
    """Formats a value and one standard error, such as ``81.2 ± 1.1 %``, or ``26.61 ± 0.40`` with two leading digits."""
    if stderr is None:
        return number(metric, value)
    if metric in SHARES:
        return f"{100 * value:.1f} ± {100 * stderr:.1f} %"
    decimals = max(0, 1 - math.floor(math.log10(stderr))) if stderr > 0 else 2
    return f"{value:,.{decimals}f} ± {stderr:,.{decimals}f}"


def signed(metric: str, value: float, stderr: float | None) -> str:
    """Formats a difference: ``−0.5 ± 2.1 points`` for shares, otherwise with the decimals of its error."""
    if metric in SHARES:
        error = "" if stderr is None else f" ± {100 * stderr:.1f}"
        return f"{100 * value:+.1f}{error} points".replace("-", "−")
    text = significant(value) if stderr is None else with_error(metric, value, stderr)
    return f"+{text}" if value >= 0 else text.replace("-", "−")


def significant(value: float) -> str:
    """Formats four significant digits, without an exponent below a million."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:#.4g}".removesuffix(".")


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
