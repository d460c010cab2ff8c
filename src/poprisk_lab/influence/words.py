"""Which examples did it, in a headline, warnings and tables."""

from __future__ import annotations

from typing import Any

from poprisk.attribution.influence import AGREES, CHECKED
from poprisk_lab.influence.measure import TOP
from poprisk_lab.plots import Table

TERMINAL_ROWS = 5
ADVICE = "A smoother training helps: fewer --epochs, or a smaller --lr."
HELD = "A run of one of torch's optimizers, as --optimizer AdamW, is gone back through exactly."


def headline(found: dict[str, Any]) -> str:
    """What the first answer that can be believed says."""
    queries = found["queries"]
    good = [q for q in queries if q["valid"]]
    if not good:
        return (
            "This number is not to be believed."
            if len(queries) == 1
            else "None of these answers can be believed."
        )
    first = next((q for q in good if q["kind"] != "prediction"), good[0])
    if first["kind"] == "prediction":
        return _of_prediction(first)
    if found["labels"]["wrong"] and first["raising"]:
        return _of_wrong_labels(first, found["labels"])
    return _of_loss(first)


def _of_wrong_labels(query: dict[str, Any], labels: dict[str, int]) -> str:
    top = query["raising"]
    wrong, share = sum(e["wrong"] for e in top), labels["wrong"] / labels["examples"]
    of = "" if query["kind"] == "test" else f" for {title(query)[0].lower()}{title(query)[1:]}"
    return (
        f"Of the {len(top)} most harmful training examples{of}, {wrong} have a wrong label; of "
        f"all, {share:.0%} have."
    )


def _of_prediction(query: dict[str, Any]) -> str:
    without, prediction = query["without"], query["prediction"]
    what = f"test example {query['which']}"
    if without is None or without["measured"] is None:
        return f"No training example pushed the prediction of {what} there."
    count = f"the {len(without['examples'])} training examples that pushed most"
    if prediction is None:
        return (
            f"Trained without {count}, the {query['quantity']} of {what} is "
            f"{number(without['measured'])} instead of {number(query['value'])}."
        )
    says, predicted = without["says"], prediction["predicted"]
    if says != predicted:
        return f"Trained without {count}, {what} is predicted {says}, not {predicted}."
    return (
        f"Trained without {count}, {what} is still predicted {predicted}, by a margin of "
        f"{number(without['measured'])} instead of {number(query['value'])}."
    )


def _of_loss(query: dict[str, Any]) -> str:
    without = query["without"]
    if without is None or without["measured"] is None:
        return f"No training example raised the {query['quantity']}."
    return (
        f"Trained without the {len(without['examples'])} most harmful examples, the "
        f"{query['quantity']} is {number(without['measured'])} instead of "
        f"{number(query['value'])}."
    )


def warnings(found: dict[str, Any]) -> list[str]:
    """Which answers are not to be believed and why, and what would help."""
    bad = [q for q in found["queries"] if not q["valid"]]
    said = [f"{title(q)}: not to be believed, since {q['reason']}." for q in bad]
    if found["plan"]["optimizer"] == "PopRiskAdamW" and bad:
        return [*said, HELD]
    return [*said, ADVICE] if bad else said


def title(query: dict[str, Any]) -> str:
    """A query and what the network says, as a heading."""
    if query["kind"] == "test":
        return "The whole test set"
    if query["kind"] == "class":
        return f"Test examples of class {query['which']}"
    what, prediction = f"Test example {query['which']}", query["prediction"]
    if prediction is not None:
        known = f", label {prediction['label']}" if prediction["label"] >= 0 else ""
        return f"{what}: predicted {prediction['predicted']}{known}"
    if query["output"] is not None:
        return f"{what}: output {number(query['output'])}, target {number(query['target'])}"
    return what


def subject(query: dict[str, Any]) -> str:
    """What a query measures, and of what."""
    of = f"test example {query['which']}: " if query["kind"] == "prediction" else ""
    return f"{of}{query['quantity']}"


def sides(query: dict[str, Any]) -> tuple[str, str]:
    """What the examples did that raised the query, and those that lowered it."""
    if query["kind"] == "prediction":
        return "pushed it there", "pulled it back"
    return "most harmful", "most useful"


def summary(found: dict[str, Any]) -> Table:
    """A row for each query: its value, what it is without some examples, whether to believe it."""
    known = found["labels"]["wrong"] is not None
    head = ["measured", "value", f"without {TOP}", "by influence"]
    wrong = f"Wrong labels: among these {TOP}. " if known else ""
    return Table(
        [*head, *["wrong labels"] * known, "valid", "cost"],
        [_summary_row(query, known=known) for query in found["queries"]],
        f"Without {TOP}: trained again without the examples that raised it most, and what it is "
        f"then by their influence. {wrong}Valid: trained again without the {CHECKED:.0%} of the "
        f"examples that influenced it most, it changed as by influence, within {AGREES:.0%} (in "
        "brackets: by so much of that). Cost: in trainings.",
    )


def _summary_row(query: dict[str, Any], *, known: bool) -> list[str]:
    without, raising = query["without"] or {}, query["raising"]
    wrong = f"{sum(bool(e['wrong']) for e in raising)} of {len(raising)}"
    return [
        subject(query),
        number(query["value"]),
        number(without.get("measured")),
        number(without.get("predicted")),
        *([wrong] if known else []),
        f"{'yes' if query['valid'] else 'no'} ({agreement(query)})",
        "n/a" if query["trainings"] is None else f"{query['trainings']:.1f}",
    ]


def agreement(query: dict[str, Any]) -> str:
    """The change that came over that by influence."""
    found = query["agreement"]
    return "n/a" if found is None else f"{found:.2f}"


def outline(query: dict[str, Any]) -> list[str]:
    """An answer in a few words each."""
    without = query["without"]
    found = [f"{query['quantity']}: {number(query['value'])}"]
    if without is not None:
        measured, predicted = number(without["measured"]), number(without["predicted"])
        k = len(without["examples"])
        found.append(
            f"trained again without the {k} that raised it most: {measured} (by influence "
            f"{predicted})"
        )
        if without["says"] is not None:
            found.append(f"predicted then: {without['says']}")
    said = "valid" if query["valid"] else "not valid"
    return [*found, f"{said}, agreement {agreement(query)}"]


def influential(query: dict[str, Any]) -> Table:
    """The first examples of both sides, for a terminal."""
    up, down = (query[side][:TERMINAL_ROWS] for side in ("raising", "lowering"))
    rows = [[*_cells(up, i), *_cells(down, i)] for i in range(max(len(up), len(down)))]
    first, second = sides(query)
    return Table([first, "influence", second, "influence"], rows)


def _cells(examples: list[dict[str, Any]], i: int) -> list[str]:
    if i >= len(examples):
        return ["", ""]
    one = examples[i]
    return [f"{one['example']}: {label(one)}", influence(one["influence"])]


def label(example: dict[str, Any]) -> str:
    """The label or target that was trained on, and the right one where it is wrong."""
    if example["label"] is None:
        return "n/a"
    given = example["label"]
    given = str(given) if isinstance(given, int) else number(given)
    return f"{given}, right {example['right']}" if example["wrong"] else given


def classes(query: dict[str, Any]) -> Table:
    """Influence summed by the label that was trained on, the most harmful first."""
    rows = sorted(query["classes"], key=lambda row: -row["influence"])
    known = bool(rows) and "wrong" in rows[0]
    head = ["label", "examples", "influence"]
    return Table(
        [*head, "wrong labels", "influence of these"] if known else head,
        [
            [
                str(row["label"]),
                f"{row['examples']:,}",
                influence(row["influence"]),
                *([f"{row['wrong']:,}", influence(row["by_wrong"])] if known else []),
            ]
            for row in rows
        ],
        "Training examples by their label, their influence summed."
        + " Wrong labels among them are counted and summed alone, too." * known,
    )


def depths(query: dict[str, Any], labels: dict[str, Any]) -> Table:
    """How many of the most harmful examples have a wrong label; empty for a single prediction."""
    if not query["depths"] or query["kind"] == "prediction":
        return Table([], [])
    share = labels["wrong"] / labels["examples"]
    return Table(
        ["most harmful examples", "wrong labels among them", "by chance"],
        [[f"{k:,}", f"{w:,} ({w / k:.0%})", f"{k * share:.0f}"] for k, w in query["depths"]],
        f"The task knows {labels['wrong']:,} of its {labels['examples']:,} labels to be wrong; "
        "the training and its influence did not.",
    )


def without_arrays(found: dict[str, Any]) -> dict[str, Any]:
    """The same without the influence of every example."""
    queries = [{k: v for k, v in q.items() if k != "influence"} for q in found["queries"]]
    return {**found, "queries": queries}


def number(value: float | None) -> str:
    """Three digits."""
    return "n/a" if value is None else f"{value:.3g}"


def influence(value: float) -> str:
    """With its sign."""
    return f"{value:+#.3g}".rstrip(".")
