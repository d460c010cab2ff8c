"""From a run directory to ``evidence.json``: what was measured, how, and what was not, and why."""

from __future__ import annotations

import json
import math
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

from poprisk.audit import AuditResult
from poprisk.audit.rate import Rate
from poprisk.intervals import Interval
from poprisk_lab.audit.examples import AuditExamples
from poprisk_lab.audit.plan import plan_of
from poprisk_lab.audit.words import notices as audit_notices
from poprisk_lab.page.notes import notices
from poprisk_lab.results import RunData
from poprisk_lab.store import RunDirectoryError, Store, end_of, write_json
from poprisk_lab.verdict import Row, Verdict

SCHEMA = "poprisk-evidence/1"
FILE = "evidence.json"
OURS = "poprisk"
"""The arm whose evidence a comparison is."""
Evidence = dict[str, Any]
"""JSON values, as ``docs/reference/evidence.schema.json`` says."""


def measured(
    value: float | None,
    standard_error: float | None = None,
    *,
    how: str,
    interval: tuple[float, float] | None = None,
    valid: bool = True,
    reason: str = "",
) -> Evidence:
    """One figure. What is no finite number is none, and is never valid.

    Raises:
        ValueError: if a figure is missing or not valid, and no reason is given.

    Example:
        >>> measured(float("nan"), how="by eye", reason="nobody looked")["value"] is None
        True
    """
    found = _finite(value)
    valid = valid and found is not None
    if not valid and not reason:
        raise ValueError(f"reason must say why the figure of {how!r} is missing or not valid.")
    ends = None if interval is None else [*map(_finite, interval)]
    return {
        "value": found,
        "standard_error": None if found is None else _finite(standard_error),
        "interval": None if found is None or ends is None or None in ends else ends,
        "valid": valid,
        "reason": "" if valid else reason,
        "how": how,
    }


def compare_evidence(data: RunData, verdict: Verdict) -> Evidence:
    """The evidence of a comparison: of our arm, or of the best AdamW where that is missing."""
    config, task = data.config, data.config["task"]
    rows = [*verdict.rows, *verdict.other]
    mine = next((r for r in rows if OURS in r.arms), None)
    mine = mine or next((r for r in rows if r.label == verdict.reference), None)
    none = "no training of the arm is complete"
    metric = task["metric"]
    return {
        **head("compare", task["name"], data.environment),
        "subject": mine.label if mine else None,
        "task": "classification" if task.get("classification") else "regression",
        "data": {
            "source": task["source"],
            "examples": task["train_examples"],
            "labelled": task["train_examples"],
            "test_examples": task["test_examples"],
            "fingerprints": {"all": task["data"]},
        },
        "model": {
            "parameters": task["parameters"],
            "fingerprint": task.get("model"),
            "sources": task.get("sources", {}),
        },
        "seeds": config["seeds"],
        "settings": {
            "task": task["settings"],
            "epochs": task["epochs"],
            "batch_size": task["batch_size"],
            "device": config["device"],
            "optimizers": config.get("optimizers", {}),
        },
        "performance": {
            "metric": metric["name"],
            "higher_is_better": metric["higher_is_better"],
            **_mean(
                mine.final if mine else None,
                f"{metric['name']} on the test set after the last epoch, mean over seeds",
                none,
            ),
        },
        "risk": _risk(data, mine),
        "wrong_labels": measured(
            None, how="not measured", reason="a comparison does not estimate it; an audit does"
        ),
        "memorization": _mean(
            mine.memorized if mine else None,
            "share of the known label noise that predictions on the training set reproduce after "
            "the last epoch, mean over seeds",
            "which training labels are wrong is not known" if mine else none,
        ),
        "planted": {
            "count": None,
            "share": None,
            "recall": measured(None, how="not measured", reason="no labels were planted"),
            "reason": "a comparison plants no labels",
        },
        "controls": {
            "arms": [_control(row) for row in rows if row is not mine],
            "reason": "" if len(rows) > 1 else "no training of a control is complete",
        },
        "skipped_steps": _skipped(data, mine),
        "limits": [*notices(data), *verdict.warnings],
    }


def audit_evidence(store: Store, examples: AuditExamples, result: AuditResult) -> Evidence:
    """The evidence of an audit."""
    config, asked = store.config(), store.config()["audit"]
    names = [trial.name for trial in plan_of(store).trials]
    ends = [end_of(rows) or {} for rows in store.rows(names).values()]
    told = all("skipped_steps" in end for end in ends)
    data = config["data"]
    left = len(examples.left_out)
    return {
        **head("audit", Path(asked["source"]).name or asked["source"], store.environment()),
        "subject": "PopRiskAdamW",
        "task": "classification" if asked["kind"] == "classes" else asked["kind"],
        "data": {
            "source": asked["source"],
            "examples": data["examples"],
            "labelled": data["labelled"],
            "test_examples": 0,
            "fingerprints": {"inputs": data["inputs"], "targets": data["targets"]},
            "reading": list(examples.notes),
        },
        "model": {
            "parameters": ends[0].get("parameters"),
            "fingerprint": None,
            "sources": {},
            "reason": (
                "no fingerprint: the settings, the data and the seed make the network again"
                if "parameters" in ends[0]
                else "a record of an earlier version has none"
            ),
        },
        "seeds": [asked["seed"]],
        "settings": {
            **config["recipe"],
            **{key: asked[key] for key in ("structure", "plant", "folds") if key in asked},
        },
        "performance": {
            "metric": None,
            "higher_is_better": None,
            **measured(None, how="not measured", reason="an audit holds out no test data"),
        },
        "risk": measured(
            None, how="not measured", reason="an audit from the command line runs without a twin"
        ),
        **audited(result),
        "controls": {
            "arms": [],
            "reason": "an audit compares no optimizers; planted labels control it",
        },
        "skipped_steps": {
            "count": sum(end["skipped_steps"] for end in ends) if told else None,
            "reason": "" if told else "a record of an earlier version has none",
        },
        "limits": [
            *audit_notices(result),
            *([f"{left} example{'s' * (left != 1)} could not be read."] if left else []),
        ],
    }


def audited(result: AuditResult) -> Evidence:
    """The figures of an audit: wrong labels, memorization, what was planted and found."""
    unplanted = "no labels were planted"
    by = "the run's own predictions" if result.cost == 0 else "predictions that did not see them"
    if result.kind == "regression":
        repeated = "how much of the noise added to planted targets predictions follow"
    elif result.predictions.shape[1] == 2:
        repeated = (
            "how much of the labels planted wrong predictions repeat beyond those that stayed"
        )
    else:
        repeated = "how much of the labels planted wrong predictions repeat beyond other wrong ones"
    return {
        "wrong_labels": _rate(
            result.wrong_share, f"share of given labels that are suspect by {by}"
        ),
        "memorization": _rate(result.memorization, repeated, missing=unplanted),
        "planted": {
            "count": result.planted,
            "share": result.planted / max(1, int(result.labelled.sum())),
            "recall": _rate(
                result.recall, "share of the labels planted wrong that are found", missing=unplanted
            ),
            "reason": "" if result.planted else unplanted,
        },
    }


def write_evidence(directory: str | Path, evidence: Evidence) -> None:
    """Write ``evidence.json``, atomically, in a directory that is made.

    Raises:
        OSError: if it cannot be written.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_json(Path(directory) / FILE, _as_json(evidence))


def read_evidence(run: Path) -> Evidence:
    """What a file of evidence holds, or ``evidence.json`` of a run directory.

    Raises:
        RunDirectoryError: if it is missing, damaged or of another version.
    """
    path = run if run.is_file() else run / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        missing = f"there is no {run}" if run.suffix == ".json" else f"{run} has no {FILE}"
        raise RunDirectoryError(f"{missing}; poprisk compare, audit and report write it.") from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}; write it again.") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RunDirectoryError(f"{path} is not of {SCHEMA}; write it again by this version.")
    return found


def _as_json(value: Any) -> Any:
    """Numbers of settings that JSON does not have as texts."""
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_json(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def head(kind: str, name: str, environment: dict[str, Any]) -> Evidence:
    """What every run has; the code is that which began it, as far as it was recorded."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "name": name,
        "code": {
            "written_by": metadata.version("poprisk"),
            "version": environment.get("poprisk"),
            "fingerprint": environment.get("code"),
        },
        "environment": environment,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _mean(found: Interval | None, how: str, reason: str) -> Evidence:
    """A mean over seeds; one seed has no error, and without an interval it is not valid."""
    if found is None or not found.values:
        return measured(None, how=how, reason=reason)
    n = len(found.values)
    error = statistics.stdev(found.values) / math.sqrt(n) if n > 1 else None
    few = "1 seed leaves no interval" if n == 1 else f"{n} seeds leave no interval"
    return measured(
        found.mean,
        error,
        how=how,
        interval=found[1:3],
        valid=found.known,
        reason="it was not a finite number in every seed" if n > 2 else few,
    )


def _rate(found: Rate | None, how: str, *, missing: str = "") -> Evidence:
    """A share; that of wrong labels is valid only if the whole result is, as an audit has it."""
    if found is None:
        return measured(None, how=how, reason=missing)
    # Memorization may be below 0, where the interval of a share ends.
    half = 2 * found.standard_error
    return measured(
        found.value,
        found.standard_error,
        how=how,
        interval=(found.value - half, found.value + half) if found.value < 0 else found.interval,
        valid=found.valid,
        reason=found.reason,
    )


def _risk(data: RunData, mine: Row | None) -> Evidence:
    """The twin's estimate at the last evaluation of each seed, averaged; the error of one run."""
    how = (
        "loss on fresh examples with labels as noisy as the training set's, estimated by a twin "
        "after the last epoch, mean over seeds; the standard error of one run"
    )
    if not data.config.get("twin"):
        return measured(None, how="not measured", reason="the comparison ran without --twin")
    arms = () if mine is None else mine.arms
    last = {r["seed"]: r["estimate"] for r in data.epochs if r["arm"] in arms and r.get("estimate")}
    ended = [last[s] for s in last if any((arm, s) in data.ends for arm in arms)]
    if not ended:
        return measured(None, how=how, reason="no complete training of the arm has a twin")
    if any(e["value"] is None or e["standard_error"] is None for e in ended):
        return measured(None, how=how, reason="an estimate was not a finite number")
    bad = sum(not e["valid"] for e in ended)
    return measured(
        statistics.fmean(e["value"] for e in ended),
        statistics.fmean(e["standard_error"] for e in ended),
        how=how,
        valid=not bad,
        reason=f"the estimate of {bad} of {len(ended)} seeds is not valid" if bad else "",
    )


def _control(row: Row) -> Evidence:
    return {
        "label": row.label,
        "family": row.family,
        "seeds": row.seeds,
        "final": _finite(row.final.mean),
        "memorized": None if row.memorized is None else _finite(row.memorized.mean),
    }


def _skipped(data: RunData, mine: Row | None) -> Evidence:
    """Steps that our optimizers left out; torch's own do not count them."""
    if mine is None or mine.family != OURS:
        return {"count": None, "reason": "the optimizer does not count them"}
    steps = [end["skipped_steps"] for (arm, _), end in data.ends.items() if arm in mine.arms]
    return {"count": sum(step or 0 for step in steps), "reason": ""}
