"""What came out of ``benchmarks/bases.py``: python benchmarks/bases_report.py OUT.json.

Takes up the files of its shares first. Prints, as Markdown, the settings that were chosen, the
judgement level by level, gains with intervals over seeds, the controls, and the regressions.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bases import (
    CONTROLS,
    JUDGING,
    LEVELS,
    REGRESSIONS,
    SETTINGS,
    TASKS,
    TO_BEAT,
    Cell,
    Results,
    chosen,
    read,
)

from poprisk.intervals import Interval, t_interval
from poprisk_lab.store import write_json

OURS = "rotated gate"
Arm = tuple[str, int]


def join_shares(out: Path) -> None:
    """Put what shares of a stage have done into the file itself, and remove theirs."""
    shares = sorted(out.parent.glob(f"{out.stem}.*-of-*{out.suffix}"))
    if not shares:
        return
    content: dict[str, Any] = {}
    done = read(out)
    for share in shares:
        content = json.loads(share.read_text("utf-8"))
        done |= read(share)
    write_json(out, {**content, "results": [[*cell, found] for cell, found in done.items()]})
    for share in shares:
        share.unlink()


def described(arm: Arm) -> str:
    """An optimizer and its setting, as a table names it."""
    name, setting = arm
    if name in CONTROLS:
        return f"{name}, as chosen"
    values = (
        f"{key} {value:g}" if isinstance(value, float) else f"{value}"
        for key, value in SETTINGS[name][setting].items()
    )
    return f"{name}: {', '.join(values)}"


def judged_seeds(done: Results, arm: Arm, levels: Sequence[float] = LEVELS) -> list[int]:
    """The judging seeds on which every task was done at these levels."""
    return [
        seed
        for seed in JUDGING
        if all(Cell(*arm, task, level, seed) in done for task in TASKS for level in levels)
    ]


def level_means(done: Results, arm: Arm, level: float, seeds: Iterable[int]) -> list[float]:
    """Of each seed, the mean over tasks."""
    return [mean(done[Cell(*arm, task, level, seed)] for task in TASKS) for seed in seeds]


def gain(done: Results, ours: Arm, other: Arm, levels: Sequence[float] = LEVELS) -> Interval:
    """Of ours over another, paired by seed, in points of accuracy, mean over tasks and levels."""
    able = judged_seeds(done, ours, levels)
    seeds = [seed for seed in judged_seeds(done, other, levels) if seed in able]
    pairs = [[level_means(done, arm, level, seeds) for level in levels] for arm in (ours, other)]
    by_seed = [[mean(column) for column in zip(*rows, strict=True)] for rows in pairs]
    return t_interval(100 * (a - b) for a, b in zip(*by_seed, strict=True))


def written(interval: Interval) -> str:
    """A gain with its interval."""
    if not interval.known:
        return f"{interval.mean:+.1f}"
    return f"{interval.mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def judgement(done: Results, arms: Sequence[Arm], ours: Arm) -> Iterator[str]:
    """A row for each arm: accuracy by level and over all, and the gain of ours over it."""
    levels = " | ".join(f"{level:.0%}" for level in LEVELS)
    yield f"| | {levels} | all | gain of the first | seeds |"
    yield "|" + "---|" * (len(LEVELS) + 4)
    for arm in arms:
        seeds = judged_seeds(done, arm)
        if not seeds:
            continue
        means = [mean(level_means(done, arm, level, seeds)) for level in LEVELS]
        shown = " | ".join(f"{100 * m:.1f}" for m in [*means, mean(means)])
        over = "" if arm == ours else written(gain(done, ours, arm))
        yield f"| {described(arm)} | {shown} | {over} | {len(seeds)} |"


def hindsight(done: Results, arms: Sequence[Arm], ours: Arm) -> Iterator[str]:
    """Beside the best of some arms for each level, picked by the judging seeds themselves."""
    gaps: list[list[float]] = []
    seeds = judged_seeds(done, ours)
    for level in LEVELS if seeds else ():
        able = [arm for arm in arms if set(seeds) <= {*judged_seeds(done, arm, [level])}]
        best = max(able, key=lambda arm: mean(level_means(done, arm, level, seeds)))
        own, other = (level_means(done, arm, level, seeds) for arm in (ours, best))
        gaps.append([100 * (a - b) for a, b in zip(own, other, strict=True)])
        yield f"- {level:.0%}: {described(best)}, {written(t_interval(gaps[-1]))}"
    if gaps:
        yield f"- all: {written(t_interval(mean(column) for column in zip(*gaps, strict=True)))}"


def by_task(done: Results, ours: Arm, arms: Sequence[Arm]) -> Iterator[str]:
    """Accuracy of ours in each cell, and its distance to the best of each rival there."""
    arms = [arm for arm in arms if judged_seeds(done, arm) == list(JUDGING)]
    if {name for name, _ in arms} != {*TO_BEAT} or judged_seeds(done, ours) != list(JUDGING):
        return
    yield "| | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |"
    yield "|" + "---|" * (len(LEVELS) + 1)
    for task in TASKS:
        cells = []
        for level in LEVELS:

            def of(arm: Arm, task: str = task, level: float = level) -> float:
                return mean(done[Cell(*arm, task, level, seed)] for seed in JUDGING)

            best = [max(of(arm) for arm in arms if arm[0] == name) for name in TO_BEAT]
            own = of(ours)
            cells.append(f"{100 * own:.1f} ({', '.join(f'{100 * (own - b):+.1f}' for b in best)})")
        yield f"| {task} | {' | '.join(cells)} |"


def regression_rows(done: Results, gates: Sequence[Arm]) -> Iterator[str]:
    """Test error of AdamW's best setting by these seeds themselves, and of the gates over it."""
    yield "| | best AdamW | " + " | ".join(described(arm) for arm in gates) + " |"
    yield "|" + "---|" * (len(gates) + 2)
    adamw = [("AdamW", s) for s in range(len(SETTINGS["AdamW"]))]
    for task in REGRESSIONS:

        def errors(arm: Arm, task: str = task) -> list[float]:
            return [done[Cell(*arm, task, 0.0, seed)] for seed in JUDGING]

        best = min(adamw, key=lambda arm: mean(errors(arm)))
        row = [f"{mean(errors(best)):.3g} ({described(best)})"]
        for arm in gates:
            ratios = [math.log(a / b) for a, b in zip(errors(arm), errors(best), strict=True)]
            ratio = t_interval(ratios).mapped(math.exp)
            row.append(
                f"{mean(errors(arm)):.3g}: {ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            )
        yield f"| {task} | {' | '.join(row)} |"


def main(out: Path) -> None:
    """Print all that there is."""
    join_shares(out)
    done = read(out)
    picked = chosen(done)
    ours = (OURS, picked[OURS])
    print("Chosen:", *(f"- {described((name, s))}" for name, s in picked.items()), sep="\n")
    beaten = [(n, s) for n in TO_BEAT for s in range(len(SETTINGS[n]))]
    others = [(n, s) for n, s in picked.items() if n not in TO_BEAT]
    controls = [(n, ours[1]) for n in CONTROLS]
    arms = [ours, *beaten, *(arm for arm in others if arm != ours), *controls]
    print("", *judgement(done, arms, ours), sep="\n")
    print("\nBest of either for each level:", *hindsight(done, beaten, ours), sep="\n")
    print("", *by_task(done, ours, beaten), sep="\n")
    if all(Cell("AdamW", 0, task, 0.0, seed) in done for task in REGRESSIONS for seed in JUDGING):
        gates = [ours, ("coordinate gate", picked["coordinate gate"])]
        print("", *regression_rows(done, gates), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
