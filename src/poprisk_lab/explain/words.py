"""An explanation in one headline, warnings, and a table of its figures."""

from __future__ import annotations

from typing import Any

from poprisk_lab.plots import Table

CARE, DISTRUST = 1e-2, 0.1
"""Closure errors from which on a picture is to be taken with care, and not to be trusted."""


def headline(found: dict[str, Any]) -> str:
    """What label noise cost in each run; without one, how many directions training used."""
    if found["arms"]:
        return " ".join(_cost_of_noise(arm, found["task"]) for arm in found["arms"])
    dense = found["dense"]
    if dense is None:
        return "This run could not be analysed."
    used, total = channel_of(dense)
    if used == total:
        return f"Training used all {total} directions; none stayed in the soft reservoir."
    return f"Training used {used} of {total} directions; the others stayed in the soft reservoir."


def _cost_of_noise(arm: dict[str, Any], task: dict[str, Any]) -> str:
    last, metric = arm["rows"][-1], task["metric"]
    now, without = (show(last[k], percent=metric["percent"]) for k in ("metric", "without_noise"))
    sign = 1 if metric.get("higher_is_better", True) else -1
    noise = f"With {arm['optimizer']}, the label noise that got through"
    if now == without:
        return f"{noise} costs nothing: test {metric['name']} is {now} with it and without it."
    if sign * (last["without_noise"] - last["metric"]) < 0:
        return (
            f"{noise} does no harm: test {metric['name']} is {now}, and would be {without} "
            "without it."
        )
    return f"{noise} costs: test {metric['name']} would be {without} instead of {now}."


def channel_of(dense: dict[str, Any]) -> tuple[int, int]:
    """Directions in the channel, and all of them."""
    return dense["spectrum"]["channel"], len(dense["spectrum"]["relative"])


def warnings(found: dict[str, Any]) -> list[str]:
    """Closure errors that are too large, with what they mean."""
    errors = {arm["optimizer"]: arm["closure"]["query"] for arm in found["arms"]}
    if found["dense"] is not None:
        errors["the small run"] = max(found["dense"]["closure"].values())
        if found["dense"]["cells"] is not None:
            errors["the four cells"] = found["dense"]["cells"]["closure"]
    return [
        f"Closure error of {name} {small(error)}: "
        + ("do not trust it." if error >= DISTRUST else "take it with care.")
        for name, error in errors.items()
        if error >= CARE
    ]


def table(found: dict[str, Any]) -> Table:
    """Every figure of an explanation, a row each."""
    rows = [row for arm in found["arms"] for row in _arm_rows(arm, found["task"])]
    if found["dense"] is not None:
        rows += _dense_rows(found["dense"], found["task"]["train_examples"])
    return Table(["figure", "value"], rows)


def _arm_rows(arm: dict[str, Any], task: dict[str, Any]) -> list[list[str]]:
    """How a run on the whole task ended."""
    name, metric, rows = arm["optimizer"], task["metric"], arm["rows"]
    last, middle = rows[-1], rows[len(rows) // 2]
    now, early = (row["noise"] / max(row["signal"], 1e-300) for row in (last, middle))
    ends = {key: show(last[key], percent=metric["percent"]) for key in ("metric", "without_noise")}
    return [
        [f"{name}: epochs (steps), examples",
         f"{last['epoch']:.3g} ({last['step']:,}), {task['train_examples']:,}"],
        [f"{name}: test {metric['name']}", ends["metric"]],
        [f"{name}: test {metric['name']} without the label noise", ends["without_noise"]],
        [f"{name}: movement by label noise over that by signal (half-way)",
         f"{now:.0%} ({early:.0%})"],
        [f"{name}: closure error", small(arm["closure"]["query"])],
    ]  # fmt: skip


def _dense_rows(dense: dict[str, Any], n: int) -> list[list[str]]:
    """What the operators of the small run say."""
    used, total = channel_of(dense)
    s, c, d = dense["spectrum"], dense["coupling"], dense["drift"]
    (_, a0, b0), (_, a1, b1) = dense["residual"][0], dense["residual"][-1]
    smaller = "".join(f", {k}={v}" for k, v in dense.get("smaller", {}).items())
    rows = {
        "small run: training examples": f"{dense['n']:,} of {n:,}",
        "small run: steps, weights": f"{dense['steps']:,}, {dense['parameters']:,}{smaller}",
        f"directions in the channel (above {s['tol']:g} of the largest)": f"{used} of {total}",
        "directions that did most of the work": f"{s['dissipation_dimension']:.3g}",
        "squared residual left": f"{(a1 + b1) / max(a0 + b0, 1e-300):.0%}",
        "of it in the channel": f"{a1 / max(a1 + b1, 1e-300):.0%}",
        "test movement from the path, error (correlation)": _prediction(c, ""),
        "test movement with the kernel frozen, error (correlation)": _prediction(c, "frozen_"),
    }
    if dense["cells"] is not None:
        last = dense["cells"]["rows"][-1]
        rows |= {
            "movement by signal, through the channel": f"{last['learned_signal']:.3g}",
            "movement by label noise, through the channel": f"{last['harmful_noise']:.3g}",
            "movement by what lies in the reservoir":
                f"{last['trapped_signal'] + last['benign_noise']:.2g}",
            "closure error of the four cells": small(dense["cells"]["closure"]),
        }  # fmt: skip
    over = d["drift"][-1] / max(d["diffusion"][-1], 1e-300)
    rows |= {
        "power of T in the drift (theory: 1)": _exponent(d["drift_exponent"]),
        "power of T in the diffusion (theory: 0.5)": _exponent(d["diffusion_exponent"]),
        "drift over diffusion at the end": f"{over:.1f}",
        "kernel drift, peak": f"{max(v for _, v in dense['kernel_drift']):.2g}",
        "kernel drift, end": f"{dense['kernel_drift'][-1][1]:.2g}",
    }
    return [[name, value] for name, value in rows.items()]


def _prediction(coupling: dict[str, Any], kind: str) -> str:
    return f"{small(coupling[kind + 'error'])} ({coupling[kind + 'correlation']:.4f})"


def show(value: float, *, percent: bool) -> str:
    """A metric as text."""
    return f"{value:.1%}" if percent else f"{value:.3g}"


def small(value: float) -> str:
    """A relative error as text."""
    return f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"


def _exponent(fitted: list[float]) -> str:
    value, low, high = fitted
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
