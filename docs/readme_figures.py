"""Figures of README and pages from the records: python docs/readme_figures.py lists stale ones.

Each piece of text below is made from a record in ``benchmarks/results`` or from the claims' results
and must stand on its page word for word; a test sees to it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from poprisk_lab.arms import DEFAULT_ADAMW
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.record import FOLDER, on_record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = {
    "digits-noise-0.6-10-seeds": "`digits`, 60% wrong labels",
    "digits-10-seeds": "`digits`, 40%",
    "digits-noise-0.2-10-seeds": "`digits`, 20%",
    "digits-cnn-10-seeds": "`digits-cnn`, 40%",
    "digits-clean-10-seeds": "`digits-clean`",
    "sparse-regression-10-seeds": "`sparse-regression`, error",
    "diabetes-10-seeds": "`diabetes`, error",
    "dense-regression-10-seeds": "`dense-regression`, error",
}
TRAININGS = {
    "transformer, AdamW": "repeats 25%, transformer, AdamW",
    "transformer, SGD": "repeats 25%, transformer, SGD",
    "digits 20% wrong, SGD": "digits 20%, MLP, SGD",
    "digits 20% wrong, AdamW, eps 1e-3": "digits 20%, MLP, AdamW eps 1e-3",
    "digits 20% wrong, AdamW, eps 1e-6": "digits 20%, MLP, AdamW",
    "regression, AdamW": "ridges, MLP, AdamW",
    "regression, SGD": "ridges, MLP, SGD",
}
ESTIMATES = (
    *("followed", "MAGIC (bergson)", "held", "gradients at the end"),
    *("EKFAC (kronfluence)", "TRAK (traker)"),
)
IN_README = [
    *("`digits`, 40%", "`digits-clean`", "`sparse-regression`, error"),
    *("`diabetes`, error", "`dense-regression`, error"),
]
SAME = f"AdamW, lr {DEFAULT_ADAMW['lr']:g}, decay {DEFAULT_ADAMW['weight_decay']:g}"
LARGE, MANY = ("1 × 10M", "12 × 768² + 4 × 768×3072"), ("100 × 10k", "400 × 1k")


def record(name: str) -> Any:
    """A record of ``benchmarks/results``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def pages() -> dict[str, str]:
    """The pages that hold figures, by path."""
    found = dict.fromkeys(page for page, _ in pieces())
    return {page: (ROOT / page).read_text(encoding="utf-8") for page in found}


def pieces() -> list[tuple[str, str]]:
    """Pages and texts on them that hold figures; spaces stand for any white space."""
    found = {
        "README.md": [_comparison(label) for label in IN_README] + _count(),
        "docs/explanation/when.md": [*map(_comparison, TASKS.values()), *_digits()],
        "docs/explanation/exact-or-estimate.md": _stopping(),
        "docs/how-to/report.md": _explained(),
        "docs/how-to/fast.md": [*_monitor(), *_speed()],
        "docs/reference/monitor.md": [*_alerts(), *_coverage()],
        "docs/how-to/reproduce.md": _claims(),
        "docs/how-to/audit.md": _audit(),
        "docs/how-to/attribute.md": _influence(),
        "docs/how-to/cells.md": _scale(),
    }
    return [(page, piece) for page, texts in found.items() for piece in texts]


def stale(texts: dict[str, str]) -> list[tuple[str, str]]:
    """The pieces that do not stand on their pages."""
    plain = {page: _plain(text) for page, text in texts.items()}
    return [(page, piece) for page, piece in pieces() if _plain(piece) not in plain[page]]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("*", ""))


def _explained() -> list[str]:
    arms = record("explain-digits")["arms"]
    adamw, ours = (arms[name] for name in ("AdamW", "PopRiskAdamW"))
    return [
        f"With {name}, the label noise that got through costs: test accuracy would be "
        f"{arm['without_noise']:.1%} instead of {arm['metric']:.1%}."
        for name, arm in (("AdamW", adamw), ("PopRiskAdamW", ours))
    ]


def _comparison(label: str) -> str:
    (name,) = (name for name, shown in TASKS.items() if shown == label)
    return _table_row(record("comparisons")[name], label)


def _table_row(run: dict[str, Any], label: str) -> str:
    rows = {row["label"]: row for row in run["rows"]}
    ours, best = rows["PopRiskAdamW"], rows[run["reference"]]
    metric, rate = run["task"]["metric"], float(re.findall(r"lr ([\d.e-]+)", best["label"])[0])
    percent, base = metric["percent"], best["final"][0]
    sign = 1 if metric["higher_is_better"] else -1
    unit = 100.0 if percent else 100.0 / base
    mean, *ends = (sign * unit * v for v in ours["difference"])
    small = percent or abs(mean) < 10
    digits, mark = (1, "" if percent else "%") if small else (0, "%")
    gain, low, high = (f"{v:+.{digits}f}" for v in (mean, *sorted(ends)))
    shown = [_value(row["final"][0], percent, base) for row in (ours, rows[SAME], best)]
    return (
        f"| {label} | {shown[0]} | {shown[1]} | {shown[2]}, {_rate(rate)} | "
        f"{gain}{mark} [{low}, {high}]"
    )


def _rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def _value(value: float, percent: bool, base: float) -> str:
    if percent:
        return f"{value:.1%}"
    return f"{value:.2f}" if base < 1 else f"{value:.1f}"


def _digits() -> list[str]:
    rows = {row["label"]: row for row in record("comparisons")["digits-10-seeds"]["rows"]}
    grid = [
        row["final"][0]
        for label, row in rows.items()
        if re.fullmatch(r"AdamW, lr [\d.]+, decay [\d.]+", label)
    ]
    ours, same, matched = (
        rows[name]["final"][0] for name in ("PopRiskAdamW", SAME, "AdamW, RMS-matched")
    )
    return [
        f"On `digits` AdamW ends anywhere from {min(grid):.1%} to {max(grid):.1%}.",
        f"AdamW given the same update sizes ends at {matched:.1%}. The rest, "
        f"{100 * (ours - matched):.1f} points of {100 * (ours - same):.1f}, is which weights move.",
    ]


def _stopping() -> list[str]:
    found = json.loads((FOLDER / "risk-stopping.json").read_text(encoding="utf-8"))
    regrets = [problem["regret"] for problem in found["problems"].values()]
    n, mean = len(regrets), sum(regrets) / len(regrets)
    error = (sum((r - mean) ** 2 for r in regrets) / (n - 1) / n) ** 0.5
    whole = found["all"]
    return [
        f"stopping by the twin costs {whole['regret']:.1%} ± {error:.1%} more risk than the best "
        "moment in hindsight; stopping by a held-out fifth, "
        f"{whole['regret of a held-out fifth']:.1%}.",
        f"Up to that moment the estimate is off by {whole['level error up to the best point']:.1%} "
        "on average.",
        f"the flag turns off {whole['flag off there']:.0%}, and {1 - whole['flag on there']:.0%} "
        "of those within 15% with them.",
    ]


def _monitor() -> list[str]:
    results = record("monitor")["results"]
    added = [100 * result["added"] for result in results]
    cheap = [100 * result["cheap"]["added"] for result in results]
    return [
        f"({min(added):.0f} to {max(added):.0f}% of a step's time)",
        f"({min(cheap):.1f} to {max(cheap):.1f}%)",
    ]


def _alerts() -> list[str]:
    results = record("alerts")["results"]
    healthy = [row for row in results if row["expected"] is None]
    runs, raised = (sum(row[key] for row in healthy) for key in ("seeds", "with_others"))
    rows = [
        f"Of {runs} runs in which all is well ({len(healthy)} kinds), {raised} raised an alert."
    ]
    for row in results:
        if row["expected"] is not None:
            found = sorted(step for step in row["first"] if step is not None)
            when = f"{found[len(found) // 2]}" if found else ""
            told = f"{len(found)} of {row['seeds']}"
            rows.append(
                f"| {row['case']} | {row['expected']} | {told} | {when} | {row['with_others']} |"
            )
    return rows


def _coverage() -> list[str]:
    results = record("coverage")["results"]

    def held(parts: str, *, noise: bool) -> str:
        shares = [
            100 * row["holds"]
            for row in results
            if row["parts"] == parts and not (noise and row["share"])
        ]
        return f"{min(shares):.0f} to {max(shares):.0f}%"

    return [
        f"{how}: {held(how, noise=False)} of the windows, {held(how, noise=True)} on pure noise"
        for how in ("whole batches", "parts of two")
    ]


def _count() -> list[str]:
    told = list(verdicts().values())
    kinds = ("reproduced", "partly reproduced", "not reproduced")
    whole, partly, not_at_all = map(told.count, kinds)
    left = len(told) - whole - partly - not_at_all
    later = f", {left} not run yet" if left else ""
    return [
        f"{len(told)} claims, {whole} of them reproduced, {partly} in part, {not_at_all} not{later}"
    ]


def _claims() -> list[str]:
    report = on_record(CLAIMS["grokking"]).report
    assert report is not None
    found = {criterion.name: criterion.estimate for criterion in report.criteria}
    same, batches, tuned = (
        found[f"times fewer steps than AdamW{where}"]
        for where in (
            " at the same settings, full batch",
            " at the same settings, batches of 512",
            ", both tuned on another seed",
        )
    )
    return [
        f"needs {same.mean:.1f} times fewer steps (at least {same.low:.1f}) than AdamW at the same "
        "settings",
        f"with batches of 512 {batches.mean:.1f} [{batches.low:.1f}, {batches.high:.1f}]",
        f"over {len(tuned.values)} seeds, {tuned.mean:.2f} [{tuned.low:.2f}, {tuned.high:.2f}]",
    ]


def _audit() -> list[str]:
    report = on_record(CLAIMS["audit"]).report
    assert report is not None
    found = {criterion.name: criterion.estimate for criterion in report.criteria}

    def at(name: str) -> str:
        (one,) = (e for key, e in found.items() if key.removesuffix(" (control)") == name)
        return f"{100 * one.mean:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]"

    better, ranked = "F1 gained on cleanlab's better set, ", "average precision gained on"
    share = "estimated share of wrong labels: mean distance from the true one"
    sure = "the same distance of the share where ours does not say that it is unsure"
    return [
        f"{at(f'{ranked} cleanlab on 5 folds, mean over data and noise')} points better than "
        "cleanlab's on 5 folds",
        f"{at(f'{ranked} 10 folds, a loss of a point allowed')} better than on 10",
        f"{at('F1 of the suspects gained on the better of cleanlab' + chr(39) + 's sets, 5 folds')}"
        " points of F1",
        f"{at(better + '30% between pairs of classes')} between pairs of classes",
        f"{at(better + '40% at random')} at 40% at random",
        f"{at(better + '20% by a weak model')} where a weak model errs",
        f"{at(share)} points from the true one",
        f"{at(sure)} where the audit does not call itself unsure",
        f"{at(f'{ranked}: 10 folds, our score')}",
    ]


def _influence() -> list[str]:
    found = json.loads((FOLDER / "attribution.json").read_text(encoding="utf-8"))
    settings = {label: found["settings"][name] for label, name in TRAININGS.items()}
    apart = [max(of["distance from followed"]["MAGIC (bergson)"]) for of in settings.values()]
    return [
        f"over {found['subsets']} random halves",
        *(_influence_row(label, of) for label, of in settings.items()),
        f"at most {max(apart):.1e}",
    ]


def _influence_row(label: str, of: dict[str, Any]) -> str:
    first, *others = (of["scores"][name] for name in ESTIMATES)
    mean, low, high = (_share(first[part]) for part in ("mean", "low", "high"))
    means = " | ".join(_share(other["mean"]) for other in others)
    ratios = [row["predicted"] / row["measured"] for row in of["left out"]["10"]]
    return (
        f"| {label} | {mean} [{low}, {high}] | {means} | {sum(of['valid'])} | "
        f"{min(ratios):.2f} to {max(ratios):.2f} |"
    )


def _scale() -> list[str]:
    found = json.loads((FOLDER / "scale.json").read_text(encoding="utf-8"))
    return [_size(size, of) for size, of in found["sizes"].items()]


def _size(size: str, of: dict[str, Any]) -> str:
    end = {name: value["mean"] for name, value in of["at the end"].items()}
    parts = {t["part"]: t["trainings"] for t in reversed(of["trials"]) if "trainings" in t}
    influence = parts["influence"]["replay"] - 1 + parts["influence"]["attribute, with its check"]
    return " | ".join([
        f"| {size}",
        *(f"{end[name]:.2f}" for name in ("loss", "loss, trained on right targets")),
        f"{end['wrong targets fitted']:.0%}",
        *(f"{end[f'push of the {p}, other texts over own']:.2f}" for p in ("signal", "noise")),
        *(f"{end[f'{part} left']:.0%}" for part in ("signal", "noise")),
        f"{end['closure of other texts']:.1%}",
        f"{parts['all']['followed']:.1f}, {parts['noise']['followed']:.1f}, {influence:.1f} |",
    ])  # fmt: skip


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def verdicts() -> dict[str, str]:
    """The verdict on record of every claim."""
    return {name: on_record(claim).verdict for name, claim in CLAIMS.items()}


def _speed() -> list[str]:
    rows = [
        (row["parameters"], row["optimizer"], row["ratio"])
        for threads in (1, 2)
        for row in record(f"step-cpu-{threads}-threads")["results"]
    ]

    def span(sizes: tuple[str, ...], optimizer: str, digits: int = 2) -> str:
        found = [r for size, name, r in rows if size in sizes and name == optimizer]
        return " to ".join(f"{v:.{digits}f}".removesuffix(".0") for v in (min(found), max(found)))

    fused, second = "PopRiskAdamW fused", "PopRiskAdamW fused, second-moment"
    return [
        f"it takes {span(LARGE, fused)} times the time of AdamW's fused step "
        f'({span(LARGE, second)} with `variance="second-moment"`), and {span(MANY, fused)} times '
        f"on many small ones ({span(MANY, second)})",
        f"AdamW's own foreach step takes {span((*LARGE, *MANY), 'AdamW foreach', 1)} times.",
    ]


if __name__ == "__main__":
    missing = [f"{page}: {piece}" for page, piece in stale(pages())]
    print("\n".join(missing) or "all figures are those on record")
    sys.exit(bool(missing))
