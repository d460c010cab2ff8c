"""What the measurements say, one sentence each, by rules written here."""

from __future__ import annotations

from typing import Any

HARDLY, LEARNED = 0.1, 0.5
"""Relative drift of the kernel below which features are said to hardly change, and from which on
they are said to be learned."""


def headline(found: dict[str, Any]) -> str:
    """The most telling sentence."""
    arms = found["arms"]
    if arms:
        return noise_sentence(arms[0], found["task"])
    dense = found["dense"]
    if dense is None:
        return "This run could not be analysed."
    used, total = channel_of(dense)
    if used == total:
        return f"Training used all {total} directions; none stayed in the soft reservoir."
    return f"Training used {used} of {total} directions; the others stayed in the soft reservoir."


def channel_of(dense: dict[str, Any]) -> tuple[int, int]:
    """Directions in the channel, and all of them."""
    return dense["spectrum"]["channel"], len(dense["spectrum"]["relative"])


def size_sentences(found: dict[str, Any]) -> list[str]:
    """How large the runs were that were explained."""
    task, said = found["task"], list[str]()
    n = task["train_examples"]
    if found["arms"]:
        last = found["arms"][0]["rows"][-1]
        said.append(
            f"Signal and noise are told apart in runs of {last['epoch']:.3g} epochs "
            f"({last['step']:,} steps) on all {n:,} training examples."
        )
    dense = found["dense"]
    if dense is not None:
        smaller = "".join(f", {k}={v}" for k, v in dense.get("smaller", {}).items())
        said.append(
            f"The operators are those of a small run of its own: {dense['n']:,} of {n:,} training "
            f"examples, {dense['steps']:,} steps, {dense['parameters']:,} weights{smaller}."
        )
    return said


def noise_sentence(arm: dict[str, Any], task: dict[str, Any]) -> str:
    """What the metric would be without the label noise that got through."""
    last, metric = arm["rows"][-1], task["metric"]
    now, without = (show(last[k], percent=metric["percent"]) for k in ("metric", "without_noise"))
    sign = 1 if metric.get("higher_is_better", True) else -1
    name = arm["optimizer"]
    if now == without:
        return (
            f"With {name}, the label noise that got through costs nothing: test {metric['name']} "
            f"is {now} with it and without it."
        )
    if sign * (last["without_noise"] - last["metric"]) < 0:
        return (
            f"With {name}, the label noise that got through does no harm: test {metric['name']} is "
            f"{now}, and would be {without} without it."
        )
    return (
        f"With {name}, without the label noise that got through, test {metric['name']} "
        f"would be {without} instead of {now}."
    )


def cells_sentence(arm: dict[str, Any]) -> str:
    """How signal and noise moved the test outputs."""
    rows = arm["rows"]
    last, middle = rows[-1], rows[len(rows) // 2]
    part = last["noise"] / max(last["signal"], 1e-300)
    early = middle["noise"] / max(middle["signal"], 1e-300)
    trend = "rising" if part > 1.05 * early else "falling" if part < early / 1.05 else "level"
    return (
        f"{arm['optimizer']}: label noise moves the test outputs {part:.0%} as much as the signal "
        f"does ({early:.0%} half-way, so it is {trend}); "
        f"{closure_words(arm['closure']['query'])}."
    )


def spectrum_sentence(dense: dict[str, Any]) -> str:
    """How many directions training used."""
    s = dense["spectrum"]
    used, total = channel_of(dense)
    if used == total:
        return (
            f"All {total} directions lie in the channel (above {s['tol']:g} of the largest), so "
            f"the soft reservoir is empty; {s['dissipation_dimension']:.3g} directions did most of "
            "the work."
        )
    return (
        f"{s['channel']} of {total} directions lie in the channel (above {s['tol']:g} of the "
        f"largest), {total - s['channel']} in the soft reservoir, which training hardly moved and "
        f"test points hardly see; {s['dissipation_dimension']:.3g} directions did most of the work."
    )


def residual_sentence(dense: dict[str, Any]) -> str:
    """What is left of the residual, and where."""
    (_, a0, b0), (_, a1, b1) = dense["residual"][0], dense["residual"][-1]
    left = (a1 + b1) / max(a0 + b0, 1e-300)
    inside = a1 / max(a1 + b1, 1e-300)
    used, total = channel_of(dense)
    if used == total:
        return (
            f"{left:.0%} of the squared residual is left after training; all of it lies in the "
            "channel and can still be fitted."
        )
    return (
        f"{left:.0%} of the squared residual is left after training; {inside:.0%} of that lies in "
        "the channel and can still be fitted, the rest is trapped."
    )


def coupling_sentence(dense: dict[str, Any]) -> str:
    """How the coupling did beside the frozen kernel."""
    c = dense["coupling"]
    return (
        f"From the training outputs alone the operators predict the test movement with an error of "
        f"{show_small(c['error'])} (correlation {c['correlation']:.4f}); the kernel frozen at the "
        f"start errs by {show_small(c['frozen_error'])} ({c['frozen_correlation']:.3f})."
    )


def four_sentence(dense: dict[str, Any]) -> str:
    """The four cells of the small run."""
    cells = dense["cells"]
    last = cells["rows"][-1]
    used, total = channel_of(dense)
    trapped = last["trapped_signal"] + last["benign_noise"]
    rest = "nothing lies in the reservoir"
    if used < total:
        rest = f"what lies in the reservoir moved it by {trapped:.2g}"
    return (
        "In the small run the signal moved a test output by "
        f"{last['learned_signal']:.3g} and label noise by {last['harmful_noise']:.3g} "
        f"(root mean square), through the channel; {rest}; "
        f"{closure_words(cells['closure'])}."
    )


def drift_sentence(dense: dict[str, Any]) -> str:
    """Exponents of drift and diffusion."""
    d = dense["drift"]
    drift, diffusion = (_exponent(d[f"{name}_exponent"]) for name in ("drift", "diffusion"))
    ratio = d["drift"][-1] / max(d["diffusion"][-1], 1e-300)
    return (
        f"In the first {d['times'][-1]} steps of plain SGD, drift, which all batches agree on, "
        f"grows like T^{drift}, and diffusion, which is chance, like T^{diffusion} (theory: 1 and "
        f"0.5 while the mean gradient stays as it is); drift ends {ratio:.1f} times as large."
    )


def kernel_sentence(dense: dict[str, Any]) -> str:
    """How far the features moved."""
    peak = max(v for _, v in dense["kernel_drift"])
    end = dense["kernel_drift"][-1][1]
    kind = "features hardly changed" if peak < HARDLY else "features changed in part"
    kind = "features were learned" if peak >= LEARNED else kind
    return (
        f"The kernel moved by {peak:.2g} times its size at most and ended {end:.2g} away: {kind}."
    )


def closure_words(error: float) -> str:
    """A closure error in words."""
    trust = (
        "trust it" if error < 1e-2 else "take it with care" if error < 0.1 else "do not trust it"
    )
    return f"closure error {show_small(error)}: {trust}"


def show(value: float, *, percent: bool) -> str:
    """A metric as text."""
    return f"{value:.1%}" if percent else f"{value:.3g}"


def show_small(value: float) -> str:
    """A relative error as text."""
    return f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"


def _exponent(fitted: list[float]) -> str:
    value, low, high = fitted
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
