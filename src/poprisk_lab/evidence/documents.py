"""What others read: a model card, a bill of materials, a data set's description."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from poprisk_lab.evidence.gather import FILE, Evidence

FIGURES = {
    "performance": "performance on test data",
    "risk": "estimated risk",
    "wrong_labels": "share of wrong labels",
    "memorization": "memorization",
}
"""Measured figures, and what people call them."""
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    **{
        name: f"cr:{name}"
        for name in (
            "citeAs column equivalentProperty extract field fileProperty fileObject fileSet format "
            "includes isLiveDataset jsonPath key md5 parentField path recordSet references regex "
            "repeated replace samplingRate separator source subField transform"
        ).split()
    },
    "data": {"@id": "cr:data", "@type": "@json"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
}
"""Croissant 1.0's own, whole: readers warn of another."""


def card(evidence: Evidence, *, dataset: str = "") -> dict[str, str]:
    """A model card for the Hugging Face Hub: texts by file name.

    Args:
        evidence: of a run.
        dataset: of the Hub, ``OWNER/NAME``; it brings a file in ``.eval_results``, where the Hub
            looks for scores on its data sets.
    """
    name, score = evidence["name"], evidence["performance"]
    front: dict[str, Any] = {"library_name": "pytorch", "tags": ["poprisk", evidence["task"]]}
    if dataset:
        front["datasets"] = [dataset]
    if score["valid"]:
        result = {
            "task": {"type": "other", "name": evidence["task"]},
            "dataset": {"type": dataset or name, "name": name},
            "metrics": [{"type": score["metric"], "value": score["value"], "name": score["how"]}],
        }
        front["model-index"] = [{"name": evidence["subject"], "results": [result]}]
    lines = [f"{key}: {_yaml(value)}" for key, value in front.items()]
    found = {"README.md": "\n".join(["---", *lines, "---", "", *_body(evidence), ""])}
    if dataset and score["valid"]:
        entry = {
            "dataset": {"id": dataset, "task_id": name},
            "value": score["value"],
            "notes": score["how"],
        }
        found[".eval_results/poprisk.yaml"] = f"- {_yaml(entry)}\n"
    return found


def cyclonedx(evidence: Evidence) -> dict[str, str]:
    """A bill of materials with a model card, CycloneDX 1.7: texts by file name."""
    data = evidence["data"]
    used = [
        {"type": "library", "name": name, "version": str(evidence["environment"][name])}
        for name in ("torch", "numpy", "scikit-learn")
        if name in evidence["environment"]
    ]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": evidence["name"],
        "description": f"trained by {evidence['subject']}" if evidence["subject"] else "unfinished",
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": evidence["task"],
                "datasets": [
                    {
                        "type": "dataset",
                        "name": evidence["name"],
                        "description": f"{data['examples']} training examples",
                        "contents": {
                            "properties": _properties("fingerprint", data["fingerprints"])
                        },
                    }
                ],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    _metric(key, evidence) for key in FIGURES if evidence[key]["valid"]
                ]
            },
            "considerations": {"technicalLimitations": [*evidence["limits"], *unknown(evidence)]},
            "properties": _properties(
                "poprisk",
                {
                    "schema": evidence["schema"],
                    "code": evidence["code"]["fingerprint"],
                    "seeds": evidence["seeds"],
                    "skipped_steps": evidence["skipped_steps"]["count"],
                    "planted": evidence["planted"]["count"],
                },
            ),
        },
    }
    # Of what is in it, so that the same evidence is the same document.
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(evidence, sort_keys=True))
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": serial.urn,
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {
                        "type": "application",
                        "name": "poprisk",
                        "version": evidence["code"]["written_by"],
                    }
                ]
            },
            "component": model,
        },
        "components": used,
    }
    return {"bom.cdx.json": json.dumps(bom, indent=2) + "\n"}


def croissant(evidence: Evidence) -> dict[str, str]:
    """The data set in Croissant with its RAI fields, JSON-LD: texts by file name."""
    data, planted = evidence["data"], evidence["planted"]
    missing = data["examples"] - data["labelled"]
    # The vocabulary has no names for these, so that they are sentences of a fixed form.
    fields: dict[str, Any] = {
        "rai:dataCollectionMissingData": f"{missing} of {data['examples']} examples have no label.",
        "rai:machineAnnotationTools": [f"poprisk {evidence['code']['written_by']}"],
        "rai:dataLimitations": [*evidence["limits"], *unknown(evidence)],
    }
    if evidence["wrong_labels"]["valid"]:
        fields["rai:dataAnnotationAnalysis"] = [_sentence("wrong_labels", evidence)]
    if planted["count"]:
        fields["rai:dataPreprocessingProtocol"] = [
            f"{planted['count']} labels ({planted['share']:.1%}) were planted wrong for training."
        ]
    found = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": [
            "http://mlcommons.org/croissant/1.0",
            "http://mlcommons.org/croissant/RAI/1.0",
        ],
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", evidence["name"]),
        "description": f"{data['examples']} training examples for {evidence['task']}; {FILE} of "
        f"poprisk {evidence['code']['written_by']}.",
        **fields,
    }
    return {"croissant.json": json.dumps(found, indent=2) + "\n"}


DOCUMENTS = {"card": card, "cyclonedx": cyclonedx, "croissant": croissant}
"""What ``poprisk evidence --to`` takes."""


def unknown(evidence: Evidence) -> list[str]:
    """What was not measured, or may not be believed, with the reason."""
    return [
        f"{words[0].upper()}{words[1:]}: {'not valid' if found['value'] is not None else 'unknown'}"
        f" ({found['reason']})."
        for key, words in FIGURES.items()
        if not (found := evidence[key])["valid"]
    ]


def _metric(key: str, evidence: Evidence) -> dict[str, Any]:
    found = evidence[key]
    kind = evidence["performance"]["metric"] if key == "performance" else FIGURES[key]
    metric = {"type": kind, "value": f"{found['value']:.6g}", "slice": found["how"]}
    if found["interval"] is not None:
        low, high = found["interval"]
        metric["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
    return metric


def _properties(prefix: str, values: Mapping[str, Any]) -> list[dict[str, str]]:
    known = {k: v for k, v in values.items() if v is not None}
    return [
        {"name": f"{prefix}:{k}", "value": v if isinstance(v, str) else json.dumps(v)}
        for k, v in known.items()
    ]


def _sentence(key: str, evidence: Evidence) -> str:
    found = evidence[key]
    error = found["standard_error"]
    around = "" if error is None else f" ± {error:.2g}"
    return f"{FIGURES[key].capitalize()}: {found['value']:.4g}{around} ({found['how']})."


def _body(evidence: Evidence) -> list[str]:
    """The text of a card: figures, controls, limits."""
    rows = []
    for key, words in FIGURES.items():
        found = evidence[key]
        value = "–" if found["value"] is None else f"{found['value']:.4g}"
        error = found["standard_error"]
        value += "" if error is None else f" ± {error:.2g}"
        rows.append([words, value, found["how"] if found["valid"] else found["reason"]])
    data, code = evidence["data"], evidence["code"]
    about = {
        "trained by": evidence["subject"] or "–",
        "training examples": data["examples"],
        "data": ", ".join(f"{k} {v}" for k, v in data["fingerprints"].items()),
        "code": f"poprisk {code['version'] or '–'}, {code['fingerprint'] or 'not recorded'}",
        "seeds": ", ".join(map(str, evidence["seeds"])),
        "skipped steps": _or_reason(evidence["skipped_steps"]),
        "labels planted wrong": _or_reason(evidence["planted"]),
    }
    controls = [
        [arm["label"], "–" if arm["final"] is None else f"{arm['final']:.4g}", arm["seeds"]]
        for arm in evidence["controls"]["arms"]
    ]
    limits = [*evidence["limits"], *unknown(evidence)]
    return [
        f"# {_text(evidence['name'])}",
        "",
        *_table(["", "value", "how"], rows),
        *_table(["", ""], [[k, v] for k, v in about.items()]),
        *(_table(["control", "final metric", "seeds"], controls) if controls else []),
        *(["## Known limits", "", *(f"- {_text(limit)}" for limit in limits)] if limits else []),
    ]


def _or_reason(found: Evidence) -> str:
    return str(found["reason"] if found["count"] is None else found["count"])


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(_text(str(cell)) for cell in line)} |" for line in lines] + [""]


def _text(value: str) -> str:
    """Text that is neither markup nor the end of a cell."""
    text = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|\[\]`*_\\])", r"\\\1", text)


def _yaml(value: Any) -> str:
    """YAML on one line: JSON, but that 1e-05 is a text to many readers of YAML and 1.0e-05 none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(k)}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    return json.dumps(value, ensure_ascii=False)  # its surrogate pairs are no YAML
