"""The evidence of a run of one's own: of a loop that an auditor looked on at."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from poprisk._validate import check_range, check_type, plain
from poprisk.audit import AuditResult
from poprisk.jacobian import inner
from poprisk.protocols import Estimated
from poprisk_lab.comparison import structure_of
from poprisk_lab.evidence.gather import Evidence, audited, head, measured
from poprisk_lab.runner import environment
from poprisk_lab.tasks.sources import is_users_file, task_sources

LENGTH = 16
"""Hexadecimal digits of a fingerprint."""


class Score(NamedTuple):
    """What a model reached on test data.

    Attributes:
        metric: its name.
        value: of the metric.
        standard_error: of the value; without one nobody can judge it, and it is not valid.
        higher_is_better: whether it is.
        test_examples: that it is of.
        how: what it was measured on.
    """

    metric: str
    value: float
    standard_error: float | None = None
    higher_is_better: bool = True
    test_examples: int = 0
    how: str = "on test data"


def run_evidence(
    name: str,
    result: AuditResult,
    *,
    data: Mapping[str, Any],
    seeds: int | Sequence[int],
    source: str = "",
    model: nn.Module | None = None,
    optimizer: Any = None,
    risk: Estimated | None = None,
    score: Score | None = None,
    rows: Sequence[tuple[int, Mapping[str, float]]] = (),
    settings: Mapping[str, Any] | None = None,
    sources: Sequence[str | Path] | None = None,
    limits: Sequence[str] = (),
) -> Evidence:
    """What a run of one's own can prove; :func:`write_evidence` makes a file of it.

    Args:
        name: of the model or the run.
        result: of the audit that looked on.
        data: what was trained on, by name: tensors, arrays, and paths of files or folders are
            hashed; a text is taken for a fingerprint, as a data set's version. The labels that were
            audited are hashed besides.
        seeds: that repeat the run.
        source: where the data come from.
        model: as trained; it is counted and hashed, not kept.
        optimizer: its name, settings and skipped steps.
        risk: an estimate without test data, as of a :class:`poprisk.TwinRisk`.
        score: on test data.
        rows: of a :class:`poprisk.RiskMonitor`; the last of them is kept.
        settings: others that the run depends on, JSON values.
        sources: files of the code; the script that runs and what it imports if left out.
        limits: what a reader must know besides what the audit itself says.

    Raises:
        TypeError, ValueError: for a bad argument.
        OSError: if a file cannot be read.
    """
    check_type("result", result, AuditResult, "what Auditor.result() or audit() returned")
    check_type("data", data, Mapping, "a dict of what was trained on")
    if not data:
        raise ValueError("data must hold what was trained on, but is empty.")
    hashes = {key: fingerprint_of(f"data[{key!r}]", value) for key, value in data.items()}
    numbers = [seeds] if isinstance(seeds, (int, np.integer)) else [*seeds]
    if not numbers:
        raise ValueError("seeds must hold at least one, but is empty.")
    for seed in numbers:
        check_range("seeds", seed, 0)
    if risk is not None:
        check_type("risk", risk, Estimated, "an estimate, as TwinRisk.estimate() returns")
    skipped = getattr(optimizer, "skipped_steps", None)
    examples = [int(result.example.max()) + 1]
    if result.kind == "tokens":  # the last rows may have no token that is labelled
        examples += [
            len(v) for v in data.values() if isinstance(v, (Tensor, np.ndarray)) and v.ndim
        ]
    return {
        **head("run", name, environment(0)),
        "subject": None if optimizer is None else type(optimizer).__name__,
        "task": "classification" if result.kind == "classes" else result.kind,
        "data": {
            "source": source,
            "examples": max(examples),
            "labelled": len(np.unique(result.example[result.labelled])),
            "test_examples": 0 if score is None else score.test_examples,
            "fingerprints": {"labels": fingerprint_of("labels", result.labels), **hashes},
        },
        "model": {**_model(model), "sources": _sources(sources)},
        "seeds": [int(seed) for seed in numbers],
        "settings": {"optimizer": _settings(optimizer), **_as_settings(settings or {})},
        "performance": _performance(score),
        "risk": _risk(risk),
        **audited(result),
        "controls": {"arms": [], "reason": "a run of one's own trains one model"},
        "skipped_steps": {
            "count": None if skipped is None else int(skipped),
            "reason": "" if skipped is not None else "the optimizer does not count them",
        },
        **({"monitor": _last(rows)} if rows else {}),
        "limits": [*_notices(result, skipped), *limits],
    }


def fingerprint_of(name: str, value: Any) -> str:
    """A hash of numbers, of a file, or of all files of a folder; a text stands for itself.

    Raises:
        TypeError, ValueError: if it is none of these, an empty text or the name of a file.
        OSError: if a file cannot be read.

    Example:
        >>> fingerprint_of("x", np.zeros(2)) == fingerprint_of("x", torch.zeros(2).double())
        True
    """
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{name} must be a fingerprint, but is an empty text.")
        if os.path.exists(value):
            raise ValueError(
                f"{name}, {value!r}, is a file or a folder here; pass pathlib.Path({value!r}) to "
                "hash it, or another text as its fingerprint."
            )
        return value
    digest = hashlib.sha256()
    if isinstance(value, Path):
        files = (
            [value] if not value.is_dir() else sorted(p for p in value.rglob("*") if p.is_file())
        )
        for file in files:
            digest.update(f"{file.relative_to(value).as_posix()}\0".encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()[:LENGTH]
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        shape, kind = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        value = value.reshape(-1).view(torch.uint8).numpy()  # numpy has no bfloat16
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        shape, kind = value.shape, str(value.dtype)
    else:
        raise TypeError(
            f"{name} must be a tensor, an array, a pathlib.Path or the text of a fingerprint, but "
            f"got {type(value).__name__}."
        )
    digest.update(f"{kind} {shape}\0".encode())
    digest.update(np.ascontiguousarray(value).data.cast("B") if value.size else b"")
    return digest.hexdigest()[:LENGTH]


def _model(model: nn.Module | None) -> Evidence:
    if model is None:
        return {"parameters": None, "fingerprint": None}
    model = inner(model)
    weights = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            weights.update(f"{key} {fingerprint_of(key, value)}\n".encode())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": structure_of(model),
        "weights": weights.hexdigest()[:LENGTH],
    }


def _sources(files: Sequence[str | Path] | None) -> dict[str, str]:
    """Hashes of the user's code by file or module."""
    if files is None:
        script = getattr(sys.modules.get("__main__"), "__file__", None)
        if script is None or not is_users_file(script):
            return {}
        return {
            Path(script).name: fingerprint_of("script", Path(script)),
            **task_sources(Path(script)),
        }
    return {Path(file).name: fingerprint_of("sources", Path(file)) for file in files}


def _settings(optimizer: Any) -> dict[str, Any]:
    """Plain settings of an optimizer's first group."""
    groups = getattr(optimizer, "param_groups", None) or [{}]
    found = {key: plain(value) for key, value in groups[0].items() if key != "params"}
    return {k: v for k, v in found.items() if v is None or isinstance(v, (bool, int, float, str))}


def _as_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(settings)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings must be values of JSON, but {error}.") from None


def _performance(score: Score | None) -> Evidence:
    if score is None:
        none = measured(None, how="not measured", reason="no score on test data was given")
        return {"metric": None, "higher_is_better": None, **none}
    error = score.standard_error
    return {
        "metric": score.metric,
        "higher_is_better": score.higher_is_better,
        **measured(
            score.value,
            error,
            how=f"{score.metric} {score.how}, {score.test_examples} examples",
            interval=None if error is None else (score.value - 2 * error, score.value + 2 * error),
            valid=error is not None,
            reason="" if error is not None else "it has no standard error",
        ),
    }


def _risk(risk: Estimated | None) -> Evidence:
    if risk is None:
        return measured(None, how="not measured", reason="no estimate of risk was given")
    half = 2 * risk.standard_error
    return measured(
        risk.value,
        risk.standard_error,
        how=f"expected loss on fresh examples, by {type(risk).__name__}",
        interval=(risk.value - half, risk.value + half),
        valid=risk.valid,
        reason=risk.reason or "it was not a finite number",
    )


def _last(rows: Sequence[tuple[int, Mapping[str, float]]]) -> Evidence:
    step, row = rows[-1]
    last = {key: measured(value, how=key, reason="-")["value"] for key, value in row.items()}
    return {"rows": len(rows), "step": step, "last": last}


def _notices(result: AuditResult, skipped: int | None) -> list[str]:
    """What the run itself warns of."""
    heard = sum(look.believed for look in result.looks)
    without = int((~result.labelled).sum())
    found = [
        (not result.valid, f"{result.reason[:1].upper()}{result.reason[1:]}."),
        (heard < len(result.looks), f"{heard} of {len(result.looks)} looks were believed."),
        (without > 0, f"{without} of {len(result)} labels are missing; they were predicted."),
        (bool(skipped), f"{skipped} steps were skipped for gradients that were not finite."),
    ]
    return [text for told, text in found if told]
