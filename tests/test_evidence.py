"""``evidence.json`` claims what was measured and no more; what is made of it meets its schemas."""

from __future__ import annotations

import doctest
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from poprisk import Auditor, AuditResult, Canaries, PopRiskAdamW, audit
from poprisk.linalg import Estimate
from poprisk_lab.cli import app
from poprisk_lab.evidence import gather
from poprisk_lab.evidence import own as own_run
from poprisk_lab.evidence.documents import DOCUMENTS, FIGURES, card, croissant, cyclonedx
from poprisk_lab.evidence.gather import (
    SCHEMA,
    compare_evidence,
    measured,
    read_evidence,
    write_evidence,
)
from poprisk_lab.evidence.own import Score, fingerprint_of, run_evidence
from poprisk_lab.results import RunData
from poprisk_lab.runner import code_fingerprint
from poprisk_lab.store import RunDirectoryError
from poprisk_lab.verdict import judge
from test_audit_command import WRONG, N, blobs
from test_report import synthetic

SCHEMA_FILE = Path(__file__).parents[1] / "docs" / "reference" / "evidence.schema.json"


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def comparison(
    *, seeds: int = 3, estimates: list[dict[str, Any]] | None = None, **task: Any
) -> Any:
    """The evidence of a made-up comparison, and its data; an estimate a seed at the end."""
    data, _ = synthetic(seeds=seeds, data="00ff", **task)
    if estimates is not None:
        data.config["twin"] = True
        last = {r["seed"]: r for r in data.epochs if r["arm"] == "poprisk"}
        for row in data.epochs:
            if row["arm"] == "poprisk":
                row["estimate"] = {"value": 99.0, "standard_error": 9.0, "valid": True}
                row["estimate"]["comparable"] = True
        for seed, estimate in enumerate(estimates):
            last[seed]["estimate"] = {"comparable": True, **estimate}
    return compare_evidence(data, judge(data)), data


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The directories of an audit with planted labels, and of one without."""
    folder = tmp_path_factory.mktemp("evidence")
    table = blobs(folder / "t.csv", note="<i>|</i>")
    for name, plant in (("planted", 0.1), ("plain", 0)):
        options = ["--epochs", 40, "--plant", plant, "--out", folder / name]
        found = call("audit", table, "--label", "kind of thing", *options)
        assert found.exit_code == 0, found.output
    return folder / "planted", folder / "plain"


def documents(audited: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    """Evidence of every sort: complete, with a twin, of one seed, unfinished, of audits."""
    data, _ = synthetic(seeds=3, data="00ff")
    nothing = data._replace(epochs=[], ends={})
    twin = [{"value": 0.4 + s, "standard_error": 0.1, "valid": s != 1} for s in range(3)]
    return {
        "complete": comparison()[0],
        "twin": comparison(estimates=twin)[0],
        "one seed": comparison(seeds=1)[0],
        "unfinished": compare_evidence(nothing, judge(nothing)),
        "planted": read_evidence(audited[0]),
        "plain": read_evidence(audited[1]),
        "own": own(),
        "own, plain": run_evidence("mine", looked_on(plant=0), data={"x": "v1"}, seeds=3),
    }


def looked_on(*, plant: float = 0.1, kind: str = "classes") -> AuditResult:
    """What an auditor found in a run that is sure and right, of 400 labels two of which are not."""
    true = torch.arange(400) % 4
    given = true.clone()
    given[[3, 70]] = (given[[3, 70]] + 1) % 4
    auditor = Auditor(given, kind=kind, plant=plant)
    auditor.update(torch.arange(400), 6.0 * F.one_hot(true), auditor.targets)
    return auditor.result()


def own(**options: Any) -> dict[str, Any]:
    """The evidence of a run of one's own, with all that it may have."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    given: dict[str, Any] = {
        "data": {"x": torch.zeros(400, 5), "files": SCHEMA_FILE},
        "seeds": [0, 1],
        "source": "the archive",
        "model": model,
        "optimizer": PopRiskAdamW(model, lr=0.01, batch_size=40, dataset_size=400),
        "risk": Estimate(0.4, 0.1, True, "", 0.5),
        "score": Score("accuracy", 0.9, 0.02, test_examples=200),
        "rows": [(0, {"loss": 2.0}), (50, {"loss": math.nan, "signal/snr": 1.5})],
        "settings": {"epochs": 7},
        "sources": [__file__],
        "limits": ["Of one hospital only."],
    }
    return run_evidence("mine", looked_on(), **given | options)


def test_a_comparison_says_what_its_arm_reached() -> None:
    found, data = comparison()
    finals = [data.ends["poprisk", s]["final_metric"] for s in range(3)]
    score = found["performance"]
    assert found["subject"] == "PopRiskAdamW"
    assert score["value"] == pytest.approx(statistics.fmean(finals))
    assert score["standard_error"] == pytest.approx(statistics.stdev(finals) / math.sqrt(3))
    assert score["interval"][0] < score["value"] < score["interval"][1]
    assert score["valid"]
    memorized = [data.ends["poprisk", s]["final_memorized"] for s in range(3)]
    assert found["memorization"]["value"] == pytest.approx(statistics.fmean(memorized))
    labels = {arm["label"] for arm in found["controls"]["arms"]}
    assert {"AdamW, RMS-matched", "shuffled mask"} <= labels
    assert "PopRiskAdamW" not in labels
    assert found["skipped_steps"] == {"count": 0, "reason": ""}


def test_what_a_comparison_did_not_measure_is_null_with_a_reason() -> None:
    found, _ = comparison(noise_known=False)
    for key in ("risk", "wrong_labels", "memorization"):
        assert (found[key]["value"], found[key]["valid"]) == (None, False)
        assert found[key]["reason"]
    assert "--twin" in found["risk"]["reason"]
    assert "not known" in found["memorization"]["reason"]
    assert found["planted"]["count"] is None


def test_one_seed_leaves_no_valid_performance() -> None:
    score = comparison(seeds=1)[0]["performance"]
    assert score["value"] is not None
    assert (score["standard_error"], score["interval"], score["valid"]) == (None, None, False)
    assert score["reason"] == "1 seed leaves no interval"


def test_the_risk_is_that_of_the_last_evaluation_and_valid_only_if_all_are() -> None:
    good = [{"value": 0.4 + s, "standard_error": 0.1 * (s + 1), "valid": True} for s in range(3)]
    risk = comparison(estimates=good)[0]["risk"]
    assert risk["value"] == pytest.approx(1.4)
    assert risk["standard_error"] == pytest.approx(0.2)
    assert risk["valid"]
    risk = comparison(estimates=[*good[:2], {**good[2], "valid": False}])[0]["risk"]
    assert risk["value"] == pytest.approx(1.4)
    assert not risk["valid"]
    assert risk["reason"] == "the estimate of 1 of 3 seeds is not valid"
    risk = comparison(estimates=[*good[:2], {**good[2], "value": None}])[0]["risk"]
    assert risk["value"] is None


def test_skipped_steps_are_counted_and_said() -> None:
    _, data = comparison()
    data.ends["poprisk", 1]["skipped_steps"] = 7
    found = compare_evidence(data, judge(data))
    assert found["skipped_steps"]["count"] == 7
    assert any("not finite" in limit for limit in found["limits"])


def test_without_our_arm_the_best_adamw_is_the_subject_and_counts_no_skipped_steps() -> None:
    _, data = comparison()
    ends = {key: end for key, end in data.ends.items() if key[0] != "poprisk"}
    left = RunData(data.config, data.environment, data.epochs, ends)
    found = compare_evidence(left, judge(left))
    assert found["subject"] == judge(left).reference
    assert found["skipped_steps"]["count"] is None


def test_an_audit_says_what_it_measured(audited: tuple[Path, Path]) -> None:
    found = read_evidence(audited[0])
    share = found["wrong_labels"]
    assert share["value"] == pytest.approx(len(WRONG) / N, abs=0.04)
    assert 0 < share["standard_error"] < 0.1
    assert 0 < found["planted"]["count"] <= 0.1 * N + 1
    assert found["planted"]["share"] == found["planted"]["count"] / N
    assert found["planted"]["recall"]["value"] > 0.8
    assert found["memorization"]["value"] < 0.1
    for figure in (share, found["memorization"], found["planted"]["recall"]):
        assert figure["interval"][0] <= figure["value"] <= figure["interval"][1]
    assert found["data"]["labelled"] == found["data"]["examples"] == N
    assert found["skipped_steps"] == {"count": 0, "reason": ""}
    assert found["performance"]["value"] is found["risk"]["value"] is None
    assert found["code"]["fingerprint"] == found["environment"]["code"] == code_fingerprint()


def test_an_audit_without_planted_labels_certifies_nothing(audited: tuple[Path, Path]) -> None:
    found = read_evidence(audited[1])
    assert found["planted"]["count"] == 0
    assert found["planted"]["recall"]["reason"] == "no labels were planted"
    assert found["memorization"]["value"] is None
    assert not found["wrong_labels"]["valid"]
    assert any("planted" in limit for limit in found["limits"])


def test_a_run_of_ones_own_says_what_it_measured() -> None:
    found = own()
    result = looked_on()
    assert (found["kind"], found["name"], found["subject"]) == ("run", "mine", "PopRiskAdamW")
    assert found["wrong_labels"]["value"] == result.wrong_share.value == 2 / 400
    assert found["wrong_labels"]["valid"]
    assert found["memorization"]["value"] == result.memorization.value  # pyrefly: ignore
    assert "other wrong ones" in found["memorization"]["how"]
    count = int(
        (Auditor(torch.as_tensor(result.labels), plant=0.1).targets.numpy() != result.labels).sum()
    )
    assert found["planted"]["count"] == result.planted == count > 20
    assert found["planted"]["share"] == count / 400
    assert found["planted"]["recall"]["value"] == 1
    assert (found["risk"]["value"], found["risk"]["interval"]) == (0.4, [0.2, 0.6000000000000001])
    assert found["performance"]["interval"] == pytest.approx([0.86, 0.94])
    assert found["performance"]["how"] == "accuracy on test data, 200 examples"
    assert found["skipped_steps"] == {"count": 0, "reason": ""}
    assert found["settings"]["optimizer"]["lr"] == 0.01
    assert found["settings"]["epochs"] == 7
    assert found["model"]["parameters"] == 24
    assert found["model"]["sources"].keys() == {Path(__file__).name}
    assert found["data"]["examples"] == found["data"]["labelled"] == 400
    assert found["data"]["fingerprints"].keys() == {"x", "files", "labels"}
    assert found["monitor"] == {"rows": 2, "step": 50, "last": {"loss": None, "signal/snr": 1.5}}
    assert found["limits"] == ["Of one hospital only."]
    assert found["environment"]["code"] == code_fingerprint()


def test_what_else_was_used_is_no_training_example() -> None:
    data = {"x": torch.zeros(400, 5), "vocabulary": np.zeros(900), "labels": "v2"}
    found = own(data=data, seeds=np.int64(4))
    assert (found["data"]["examples"], found["seeds"]) == (400, [4])
    assert found["data"]["fingerprints"]["labels"] == "v2"
    json.dumps(found["seeds"])
    tokens = torch.full((9, 4), -100)
    tokens[:8] = torch.arange(32).reshape(8, 4) % 2  # none in the last row
    result = audit(F.one_hot(tokens.clamp_min(0), 2) * 6.0, None, tokens, kind="tokens")
    of_tokens = run_evidence("mine", result, data={"x": torch.zeros(9, 4)}, seeds=0)
    assert of_tokens["data"]["examples"] == 9
    assert of_tokens["data"]["labelled"] == 8


def test_what_a_run_of_ones_own_did_not_measure_is_null_with_a_reason() -> None:
    found = run_evidence("mine", looked_on(plant=0), data={"x": "v1"}, seeds=3)
    assert found["seeds"] == [3]
    assert found["subject"] is found["model"]["parameters"] is None
    assert found["data"]["fingerprints"]["x"] == "v1"
    for key in ("risk", "performance", "memorization"):
        assert (found[key]["value"], found[key]["valid"]) == (None, False)
        assert found[key]["reason"]
    assert found["planted"]["count"] == 0
    assert found["skipped_steps"]["count"] is None
    assert found["limits"][0].startswith("No labels were planted")
    assert "monitor" not in found
    score = own(score=Score("accuracy", 0.9))["performance"]
    assert (score["value"], score["valid"], score["interval"]) == (0.9, False, None)
    assert score["reason"] == "it has no standard error"


def test_looks_and_steps_that_do_not_count_are_said() -> None:
    y = torch.arange(400) % 4
    auditor = Auditor(y, plant=0.2)
    for outputs in (y, auditor.targets):
        auditor.update(torch.arange(400), 6.0 * F.one_hot(outputs), auditor.targets)
        auditor.end_look()
    optimizer = PopRiskAdamW(nn.Linear(5, 4), batch_size=40, dataset_size=400)
    optimizer.param_groups[0]["skipped_steps"] = 3
    found = run_evidence("m", auditor.result(), data={"x": "v1"}, seeds=0, optimizer=optimizer)
    assert found["limits"] == [
        "1 of 2 looks were believed.",
        "3 steps were skipped for gradients that were not finite.",
    ]


def test_how_memorization_was_measured_goes_by_the_kind_of_labels() -> None:
    two = torch.arange(400) % 2
    pairs = Auditor(two, kind="binary", plant=0.1)
    pairs.update(torch.arange(400), 12.0 * two - 6, pairs.targets)
    numbers = Auditor(torch.linspace(0, 1, 400), kind="regression", plant=0.1)
    numbers.update(torch.arange(400), torch.linspace(0, 1, 400), numbers.targets)
    for auditor, how in ((pairs, "those that stayed"), (numbers, "the noise added")):
        found = run_evidence("m", auditor.result(), data={"x": "v1"}, seeds=0)
        assert how in found["memorization"]["how"]
        assert found["task"] == auditor.items.kind

    def train(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
        return nn.Linear(5, 4)

    canaries = Canaries(torch.arange(400) % 4, fraction=0.1)
    folds = audit(train, torch.zeros(400, 5), canaries, folds=2)
    found = run_evidence("m", folds, data={"x": "v1"}, seeds=0)
    assert "did not see them" in found["wrong_labels"]["how"]


@pytest.mark.parametrize("module", [gather, own_run])
def test_examples_of_docstrings_are_exact(module: Any) -> None:
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch, "np": np})
    assert (failed, attempted > 0) == (0, True)


def test_fingerprints_tell_data_apart(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.txt").write_text("one")
    values: list[Any] = [x, x.reshape(2, 3), x.double(), x.bfloat16(), x + 1, np.zeros(0), folder]
    found = [fingerprint_of("x", value) for value in values]
    (folder / "a" / "1.txt").rename(folder / "a" / "2.txt")
    found.append(fingerprint_of("x", folder))
    (folder / "a" / "2.txt").write_text("two")
    found.append(fingerprint_of("x", folder))
    assert len({*found}) == len(found) == 9
    assert fingerprint_of("x", x.reshape(2, 3).T.contiguous().T) == found[1]
    assert fingerprint_of("x", x.numpy()) == found[0]


def test_trained_weights_change_the_fingerprint_of_weights_only() -> None:
    model = nn.Linear(5, 4)
    before = own(model=model)["model"]
    with torch.no_grad():
        model.weight[0, 0] += 1
    after = own(model=model)["model"]
    assert before["weights"] != after["weights"]
    assert before["fingerprint"] == after["fingerprint"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {}}, "data must hold what was trained on"),
        ({"data": {"x": [1, 2]}}, r"data\['x'\] must be a tensor, an array, .*but got list"),
        ({"data": {"x": np.array(["a", None])}}, r"data\['x'\] must be a tensor"),
        ({"data": {"x": ""}}, "is an empty text"),
        ({"data": {"x": __file__}}, r"data\['x'\], .*, is a file .*; pass pathlib.Path"),
        ({"data": torch.zeros(3)}, "data must be a dict"),
        ({"seeds": []}, "seeds must hold at least one"),
        ({"seeds": [0.5]}, "seeds must be an integer"),
        ({"risk": 0.4}, "risk must be an estimate"),
        ({"settings": {"x": torch.zeros(2)}}, "settings must be values of JSON"),
    ],
)
def test_a_bad_argument_of_run_evidence_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        own(**options)


def test_an_auditor_is_no_result() -> None:
    with pytest.raises(TypeError, match=r"result must be what Auditor.result\(\)"):
        run_evidence("m", Auditor(torch.arange(99) % 3), data={"x": "v1"}, seeds=0)  # pyrefly: ignore


def test_the_command_takes_a_file_of_evidence(tmp_path: Path) -> None:
    write_evidence(tmp_path / "new", own())
    file = (tmp_path / "new" / "evidence.json").rename(tmp_path / "mine.json")
    for to in DOCUMENTS:
        done = call("evidence", file, "--to", to)
        assert done.exit_code == 0, done.output
    text = (tmp_path / "README.md").read_text()
    assert "accuracy on test data, 200 examples" in text
    assert "Of one hospital only." in text
    assert (tmp_path / "bom.cdx.json").exists()
    (tmp_path / "none.json").write_text("[]")
    assert call("evidence", tmp_path / "none.json").exit_code == 2
    with pytest.raises(RunDirectoryError, match=f"there is no {tmp_path}/other.json"):
        read_evidence(tmp_path / "other.json")


def test_a_figure_that_is_missing_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="reason must say why the figure of 'by eye'"):
        measured(math.inf, how="by eye")
    assert measured(1.0, math.nan, how="by eye")["standard_error"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no evidence.json"),
        ("{", "is damaged"),
        ('{"schema": "poprisk-evidence/0"}', "is not of poprisk-evidence/1"),
        ("[]", "is not of poprisk-evidence/1"),
    ],
)
def test_what_is_no_evidence_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "evidence.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=message):
        read_evidence(tmp_path)
    assert call("evidence", tmp_path).exit_code == 2


def test_numbers_that_json_does_not_have_are_texts(tmp_path: Path) -> None:
    found, _ = comparison()
    write_evidence(tmp_path, {**found, "settings": {"a": [math.inf, 1.0], "b": math.nan}})
    text = (tmp_path / "evidence.json").read_text()
    read = json.loads(text, parse_constant=pytest.fail)
    assert read["settings"] == {"a": ["inf", 1.0], "b": "nan"}


def test_the_command_writes_each_document_and_overwrites_none(
    audited: tuple[Path, Path], tmp_path: Path
) -> None:
    for to, name in (("card", "README.md"), ("cyclonedx", "bom.cdx.json"), ("croissant", "")):
        done = call("evidence", audited[0], "--to", to, "--out", tmp_path)
        assert done.exit_code == 0, done.output
        assert (tmp_path / (name or "croissant.json")).exists()
    (tmp_path / "README.md").write_text("mine")
    again = call("evidence", audited[0], "--out", tmp_path)
    assert again.exit_code == 2
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "options",
    [["--to", "pdf"], ["--dataset", "digits"], ["--to", "croissant", "--dataset", "me/digits"]],
)
def test_wrong_options_are_refused(
    audited: tuple[Path, Path], tmp_path: Path, options: list[str]
) -> None:
    assert call("evidence", audited[0], "--out", tmp_path / "new", *options).exit_code == 2
    assert not (tmp_path / "new").exists()


def front_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_has_the_score_and_a_control(audited: tuple[Path, Path]) -> None:
    found, _ = comparison()
    found["performance"]["value"] = 1e-05  # a text to readers of YAML, as JSON writes it
    found["name"] = "dígits 😀 <b>|"
    texts = card(found, dataset="me/digits")
    (result,) = front_of(texts["README.md"])["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 1e-05
    assert result["dataset"]["name"] == found["name"]
    assert "&lt;b>\\|" in texts["README.md"]
    assert "shuffled mask" in texts["README.md"]
    (entry,) = yaml.safe_load(texts[".eval_results/poprisk.yaml"])
    assert entry["dataset"] == {"id": "me/digits", "task_id": found["name"]}
    assert entry["value"] == 1e-05


def test_a_score_that_is_not_valid_is_in_no_document(audited: tuple[Path, Path]) -> None:
    for name in ("one seed", "unfinished", "planted"):
        found = documents(audited)[name]
        texts = card(found, dataset="me/digits")
        assert [*texts] == ["README.md"]
        assert "model-index" not in front_of(texts["README.md"])
        bom = json.loads(cyclonedx(found)["bom.cdx.json"])
        parts = bom["metadata"]["component"]["modelCard"]
        metrics = {m["type"] for m in parts["quantitativeAnalysis"]["performanceMetrics"]}
        assert "accuracy" not in metrics
        limits = " ".join(parts["considerations"]["technicalLimitations"])
        assert FIGURES["performance"].capitalize() in limits


def test_the_same_evidence_is_the_same_document() -> None:
    found, _ = comparison()
    for document in DOCUMENTS.values():
        assert document(found) == document(json.loads(json.dumps(found)))
    other = {**found, "name": "other"}
    serial = re.compile("urn:uuid:[0-9a-f-]{36}")
    a, b = (serial.findall(cyclonedx(e)["bom.cdx.json"]) for e in (found, other))
    assert a != b


def test_the_data_set_says_what_was_found_of_its_labels(audited: tuple[Path, Path]) -> None:
    found = json.loads(croissant(read_evidence(audited[0]))["croissant.json"])
    assert found["rai:dataAnnotationAnalysis"][0].startswith("Share of wrong labels: 0.")
    assert "were planted wrong" in found["rai:dataPreprocessingProtocol"][0]
    plain = json.loads(croissant(read_evidence(audited[1]))["croissant.json"])
    assert not {"rai:dataAnnotationAnalysis", "rai:dataPreprocessingProtocol"} & plain.keys()


# --- published schemas, of which the packages are in .venv-extras ---------------------------------


def test_evidence_meets_its_schema(audited: tuple[Path, Path]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert schema["properties"]["schema"]["const"] == SCHEMA
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    found = documents(audited)
    for name, evidence in found.items():
        assert [e.message for e in validator.iter_errors(evidence)] == [], name
    one = found["complete"]
    wrongs: tuple[dict[str, Any], ...] = (
        {**one, "risk": {**one["risk"], "reason": ""}},
        {**one, "risk": {**one["risk"], "valid": True}},
        {**one, "more": 1},
        {**one, "skipped_steps": {"count": None, "reason": ""}},
        {**one, "controls": {**one["controls"], "arms": list[Any]()}},
    )
    for wrong in wrongs:
        assert not validator.is_valid(wrong)


def test_the_bill_of_materials_meets_cyclonedx(audited: tuple[Path, Path]) -> None:
    versions = pytest.importorskip("cyclonedx.schema").SchemaVersion
    json_validation = pytest.importorskip("cyclonedx.validation.json")
    validator = json_validation.JsonStrictValidator(versions.V1_7)
    for name, evidence in documents(audited).items():
        assert validator.validate_str(cyclonedx(evidence)["bom.cdx.json"]) is None, name
    bom = json.loads(cyclonedx(comparison()[0])["bom.cdx.json"])
    bom["metadata"]["component"]["modelCard"]["limits"] = []
    assert validator.validate_str(json.dumps(bom)) is not None


def test_the_hub_reads_the_card(audited: tuple[Path, Path]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    for name, evidence in documents(audited).items():
        texts = card(evidence, dataset="me/digits")
        found = hub.ModelCard(texts["README.md"])
        assert found.data.tags == ["poprisk", evidence["task"]]
        if evidence["performance"]["valid"]:
            (result,) = found.data.eval_results
            assert result.metric_value == evidence["performance"]["value"], name
            (entry,) = hub.parse_eval_result_entries(
                yaml.safe_load(texts[".eval_results/poprisk.yaml"])
            )
            assert entry.value == evidence["performance"]["value"]
        else:
            assert found.data.eval_results is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning:rdflib")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlcroissant")
def test_croissant_reads_the_data_set(audited: tuple[Path, Path]) -> None:
    mlc = pytest.importorskip("mlcroissant")
    for evidence in documents(audited).values():
        found = mlc.Dataset(jsonld=json.loads(croissant(evidence)["croissant.json"]))
        issues = found.metadata.ctx.issues
        assert not issues.errors
        told = {re.sub(r".*[/]", "", str(issue)).split('"')[0] for issue in issues.warnings}
        assert told == {"citeAs", "datePublished", "license", "version"}  # which no run knows
        assert found.metadata.machine_annotation_tools == [
            f"poprisk {evidence['code']['written_by']}"
        ]
        assert len(found.metadata.data_limitations) >= 1
