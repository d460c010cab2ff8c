"""The command line: compare, advise, audit, explain, reproduce, report, evidence, bench, tasks.

A command imports what it runs when it is called: help, completion and refusals wait for no torch.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from poprisk_lab.claims import WORDS

if TYPE_CHECKING:
    from poprisk_lab.audit.command import Finished
    from poprisk_lab.comparison import Comparison
    from poprisk_lab.plots import Table
    from poprisk_lab.results import RunData
    from poprisk_lab.store import Store
    from poprisk_lab.studies import Claim
    from poprisk_lab.studies.record import Judged
    from poprisk_lab.studies.run import ClaimDirectory

app = typer.Typer(
    help="Train on population risk: a noise gate for AdamW, with its controls.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
DEFAULT_SEEDS = 3
MOST_FOLDS = 20
SHOWN = 4
"""Trainings that a message names."""
PLACES = ("local", "slurm", "ray")
"""What `poprisk compare --on` takes."""
CLAIM_NAMES = [*WORDS, "all"]
"""What `poprisk reproduce` takes."""
INTERRUPTED = (
    "stopped; repeat the command to go on: what has ended is kept, and a training that was under "
    "way as it was at its last checkpoint, one every 20 seconds."
)


def _option(help: str, *names: str) -> Any:
    """An option with its help, and its names where they are not the parameter's."""
    return typer.Option(*names, help=help)


TaskSource = Annotated[str, typer.Argument(help="Built-in task, or path/to/file.py:function.")]
Setting = Annotated[
    list[str] | None, _option("Argument of the task's function, as in noise=0.2.", "--set")
]
Workers = Annotated[int | None, _option("Processes; one per core if left out.")]
Fresh = Annotated[bool, _option("Start over: delete what the run directory holds.", "--fresh")]
Trace = Annotated[bool, _option("Print the whole traceback of an error.", "--traceback")]


def _complete(incomplete: str) -> list[str]:
    return [name for name in CLAIM_NAMES if name.startswith(incomplete)]


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"poprisk {metadata.version('poprisk')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train on population risk: a noise gate for AdamW, with its controls."""


@app.command("compare")
def compare_command(
    task: TaskSource,
    seeds: Annotated[int, _option("How many seeds.")] = DEFAULT_SEEDS,
    full: Annotated[bool, _option("All arms, not just the telling ones.", "--full")] = False,
    out: Annotated[Path | None, _option("Run directory; runs/TASK if left out.")] = None,
    epochs: Annotated[int | None, _option("Passes over the data, if not the task's.")] = None,
    setting: Setting = None,
    workers: Workers = None,
    device: Annotated[str, _option("Where to train.")] = "cpu",
    twin: Annotated[
        bool, _option("Estimate every arm's risk without validation data.", "--twin")
    ] = False,
    shard: Annotated[
        str | None, _option("I/N: the I-th of N shares alone; other processes do the others.")
    ] = None,
    only: Annotated[
        list[str] | None, _option("METHOD:SEED, that training alone; may be repeated.")
    ] = None,
    on: Annotated[
        str, _option("Where to train: local, slurm (an array of jobs) or ray (a cluster's tasks).")
    ] = "local",
    slurm: Annotated[
        list[str] | None, _option("KEY=VALUE for submitit, as in slurm_partition=gpu.")
    ] = None,
    ray: Annotated[
        list[str] | None, _option("KEY=VALUE for Ray's tasks, as in num_gpus=1.")
    ] = None,
    fresh: Fresh = False,
    trace: Trace = False,
) -> None:
    """Train every arm on every seed of TASK and say which generalizes; resumes when repeated."""
    _check_positive(seeds=seeds, epochs=epochs, workers=workers)
    settings = dict(_parse_setting(text) for text in setting or [])
    of_cluster = _check_cluster(on, slurm=slurm, ray=ray)
    if fresh and (shard is not None or only):
        _fail("--fresh deletes what other shards have done; leave --shard and --only out with it.")
    if shard is not None and only:
        _fail("--shard and --only both choose trainings; leave one of them out.")
    with _errors(trace=trace, resumable=True):
        from poprisk_lab.arms import default_arms
        from poprisk_lab.clusters import chosen, pool_on
        from poprisk_lab.comparison import (
            Comparison,
            as_begun,
            begin,
            run_directory,
            train,
            trials_of,
        )
        from poprisk_lab.display import ProgressDisplay
        from poprisk_lab.pool import warm_up_workers
        from poprisk_lab.runner import cores
        from poprisk_lab.study import left

        if on == "local":
            warm_up_workers()
        comparison = Comparison(
            task=task,
            arms=default_arms(full=full),
            seeds=list(range(seeds)),
            settings=settings,
            epochs=epochs,
            full=full,
            device=device,
            workers=workers or cores(),
            twin=twin,
        )
        name = _default_name(comparison)
        directory = run_directory(out or Path("runs") / name)
        whole, comparison = comparison, as_begun(comparison, directory, fresh=fresh)
        mine = chosen(trials_of(comparison), shard=shard, only=only or [])
        pool = None if on == "local" else pool_on(on, workers, of_cluster)
        data = begin(comparison, directory, fresh=fresh)
        there = data._replace(ends={k: v for k, v in data.ends.items() if k[1] in comparison.seeds})
        _say_what_begins(comparison, directory, data, "" if on == "local" else on)
        _say_what_is_there(comparison, data, len(there.ends))
        if new := [arm.label for arm in whole.arms if arm not in comparison.arms]:
            _say(f"begun by an earlier version, without {', '.join(new)}; --fresh starts over")
        older = Path("runs") / f"{name}-{seeds}-seeds"  # how versions before named it
        if out is None and seeds != DEFAULT_SEEDS and run_directory(older).exists():
            _say(f"{older} is of an earlier version; --out {older} goes on there")
        with ProgressDisplay(console, comparison, there) as display:
            train(comparison, directory, display, trials=mine, pool=pool)
        missing = [trial.label for trial in left(trials_of(comparison), directory)]
        if missing:
            _say_what_is_left(missing, directory)
        else:
            _conclude(directory)


@app.command("advise")
def advise_command(
    task: TaskSource,
    seeds: Annotated[
        int, _option("How many seeds to measure: others than those of compare.")
    ] = DEFAULT_SEEDS,
    setting: Setting = None,
    as_json: Annotated[bool, _option("Print one JSON object and nothing else.", "--json")] = False,
    trace: Trace = False,
) -> None:
    """Say, from a few cheap measurements, whether to expect a gain over AdamW on TASK."""
    _check_positive(seeds=seeds)
    settings = dict(_parse_setting(text) for text in setting or [])
    with _errors(trace=trace):
        from poprisk_lab.advise import advise, words
        from poprisk_lab.display import data_table

        if as_json:
            print(json.dumps(advise(task, seeds=seeds, settings=settings).as_json(), indent=2))
            return
        with console.status("measuring"):
            found = advise(task, seeds=seeds, settings=settings)
        console.print(data_table(words.table(found)))
        console.print(data_table(words.record(found)))
        for warning in words.warnings(found):
            _say(warning, style="yellow")
        _say(f"\n{words.headline(found)}", style="bold")
        _say(f"Begin with: {words.setting(found)}")


@app.command("audit")
def audit_command(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="Table (.csv, .tsv, .jsonl, .parquet), folder with one folder of images a class, "
            "array (.npy), built-in task, or path/to/file.py:function."
        ),
    ],
    label: Annotated[str | None, _option("The column of labels.")] = None,
    text: Annotated[str | None, _option("The column of texts to learn from.")] = None,
    labels: Annotated[
        Path | None, _option("File with the labels of an array, in its order.")
    ] = None,
    kind: Annotated[
        str | None, _option("classes or regression; by the labels if left out.")
    ] = None,
    epochs: Annotated[int | None, _option("Passes over the data; by rule.")] = None,
    lr: Annotated[float | None, _option("Learning rate; 0.001 if left out.")] = None,
    plant: Annotated[
        float,
        _option("Share of labels planted wrong, which certify the result; 0: none."),
    ] = 0.05,
    structure: Annotated[bool, _option("Look for a pattern in how labels are wrong.")] = True,
    folds: Annotated[
        int | None,
        _option(
            "Train that many times, each without a part of the data, which the predictions "
            "are of: for hard data, of which one training knows too little to be sure."
        ),
    ] = None,
    size: Annotated[int | None, _option("Of images, in pixels.")] = None,
    seed: Annotated[int, _option("Of weights, order and planted labels.")] = 0,
    device: Annotated[str | None, _option("Where to train; a GPU if there is one.")] = None,
    threads: Annotated[int | None, _option("Of the training; by rule if left out.")] = None,
    apply: Annotated[
        Path | None,
        _option(
            "marked.csv from the page, suspects.csv to take every suggestion, or labels.csv to "
            "fill missing labels, too: write the corrected table (CSV)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        _option("Directory, runs/audit-SOURCE if left out; with --apply, the new table."),
    ] = None,
    fresh: Fresh = False,
    trace: Trace = False,
) -> None:
    """Find wrong labels in a file by one training; resumes when repeated."""
    _check_positive(epochs=epochs, threads=threads, size=size)
    if not 0 <= plant <= 0.5:
        _fail(f"--plant must lie from 0 to 0.5, but got {plant:g}.")
    if lr is not None and not 0 < lr < float("inf"):
        _fail(f"--lr must be positive, but got {lr:g}.")
    if kind not in (None, "classes", "regression"):
        _fail(
            f"--kind must be classes or regression, but got {kind}; other kinds are audited where "
            "their model trains, by poprisk.Auditor(labels, kind=...)."
        )
    if folds is not None and not 2 <= folds <= MOST_FOLDS:
        _fail(f"--folds must lie from 2 to {MOST_FOLDS}, but got {folds}.")
    path = Path(source)
    if apply is not None:
        with _errors(trace=trace):
            from poprisk_lab.audit.apply import apply_marks

            new = out or path.with_name(f"{path.stem}-corrected{path.suffix}")
            with _writing(new):
                found = apply_marks(path, label, apply, new, kind=kind)
            _say(f"{found}: {new}")
        return
    names = (path.stem, path.name) if path.exists() else (source,)
    with _errors(trace=trace, resumable=True):
        import torch

        from poprisk_lab.audit import command
        from poprisk_lab.audit.plan import plan_for
        from poprisk_lab.audit.study import run_audit
        from poprisk_lab.display import PhaseDisplay
        from poprisk_lab.runner import check_device

        if device is not None:
            check_device(device)
        directory = out or command.directory_for(
            source,
            [f"audit-{_slug(name)}" for name in names],
            f"-{folds}-folds" if folds else "",
        )
        of_a_task = command.is_task(source)
        reading = {
            # As it is found from any other directory; of a task, its name.
            "source": source if of_a_task else str(path.absolute()),
            "label": label,
            "labels": None if labels is None else str(labels.absolute()),
            "text": text,
            "kind": kind,
            "side": size,
            "seed": seed,
            "apply": command.apply_command(source, label=label, labels=labels, kind=kind),
            "folds": _typed(context, folds=5, out=None if out is None else f"{out}-5-folds")
            if folds is None
            else "",
        }
        with console.status("reading"):
            task, examples = command.read_again({**reading, "source": source, "labels": labels})
        plan = plan_for(
            examples,
            directory,
            epochs=epochs,
            lr=lr,
            plant=plant,
            seed=seed,
            structure=structure,
            task=task,
            task_name=source if of_a_task else "",
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            threads=threads,
            folds=folds or 0,
        )
        store = command.start(examples, plan, source, reading, fresh=fresh)
        for note in examples.notes:
            _say(note)
        _say(f"Training: {plan}.")
        _say(f"record in {directory} (stop at any time, repeat the command to go on)")
        before = {trial.name: k * plan.recipe.epochs for k, trial in enumerate(plan.trials)}
        total = len(before) * plan.recipe.epochs
        with PhaseDisplay(console, lines=True) as display:
            judged = run_audit(
                examples,
                plan,
                store,
                lambda trial, row: display(
                    "epochs", before[trial.name] + row.get("epoch", plan.recipe.epochs), total
                ),
            )
        _conclude_audit(command.Finished(examples, store, judged))


def _conclude_audit(found: Finished) -> None:
    """Print what an audit found, and write its tables, its evidence and its page."""
    from poprisk_lab.audit import command, words
    from poprisk_lab.display import data_table
    from poprisk_lab.evidence.gather import audit_evidence, write_evidence
    from poprisk_lab.page.audit import write_audit

    examples, store, judged = found
    result, folds, directory = judged.result, found.command("folds"), store.path
    for notice in words.notices(result, folds):
        _say(notice, style="yellow")
    if len(result.suspects()):
        console.print(data_table(command.worst_table(examples, result)))
        _say(examples.counting)
    _say(f"\n{words.headline(result)}", style="bold")
    _say(" · ".join(words.details(examples, result)))
    # Last: what was found is printed though the disk be full.
    with _writing(directory, advice="; repeat the command once there is room"):
        command.write_tables(directory, examples, result)
        write_evidence(directory, audit_evidence(store, examples, result))
        write_audit(
            directory / "report.html",
            found.source,
            examples,
            judged,
            store,
            apply=found.command("apply"),
            folds=folds,
        )
    _say(f"Suspects: {directory / 'suspects.csv'}")
    _say(f"Page: {directory / 'report.html'}")


def _typed(context: typer.Context, **changes: Any) -> str:
    """The command as it was typed, with other values of some options."""
    words = ["poprisk", context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = changes.get(name, context.params[name] if _is_given(context, name) else None)
        if value is None or name in ("fresh", "trace"):
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command("explain")
def explain_command(
    context: typer.Context,
    task: TaskSource,
    query: Annotated[
        list[str] | None,
        _option(
            "Which training examples did this: a position in the test set, from 0; wrong, the "
            "first wrong predictions; test, the whole test loss; class=LABEL. May be repeated.",
            "--query",
        ),
    ] = None,
    optimizer: Annotated[str, _option("SGD, Adam, AdamW, RMSprop or PopRiskAdamW.")] = "AdamW",
    lr: Annotated[float, _option("Learning rate.")] = 1e-3,
    epochs: Annotated[
        int | None,
        _option(
            "Passes over the data; if left out the task's, at most 40, with --query at most 160 "
            "steps."
        ),
    ] = None,
    seed: Annotated[int, _option("Of data, initial weights and batches.")] = 0,
    seconds: Annotated[float, _option("That the dense operators may take.")] = 60.0,
    setting: Setting = None,
    out: Annotated[
        Path | None, _option("Directory; runs/explain-TASK or explain-TASK-query if left out.")
    ] = None,
    workers: Workers = None,
    fresh: Fresh = False,
    trace: Trace = False,
) -> None:
    """Say what a run of TASK learned and trapped, or which examples did it; resumes if repeated."""
    _check_positive(epochs=epochs, workers=workers)
    if not seconds > 0:
        _fail(f"--seconds must be positive, but got {seconds:g}.")
    settings = dict(_parse_setting(text) for text in setting or [])
    name = f"explain-{_slug(task.removesuffix('.py'))}"
    if query:
        if _is_given(context, "seconds"):
            _fail("--seconds is for the dense operators, which --query has none of; leave it out.")
        plan = task, settings, seed, optimizer, lr, epochs
        directory = out or Path("runs") / f"{name}-query"
        _explain_queries(plan, query, directory, workers=workers, fresh=fresh, trace=trace)
        return
    directory = out or Path("runs") / name
    page = directory / "report.html"
    with _errors(trace=trace, resumable=True):
        from poprisk_lab.display import PhaseDisplay, data_table
        from poprisk_lab.explain import EXPLANATION, ExplainPlan, explain
        from poprisk_lab.explain.words import headline, table, warnings
        from poprisk_lab.page.explanation import render
        from poprisk_lab.runner import cores
        from poprisk_lab.store import Store, replace_text, write_json

        store = Store(directory, EXPLANATION)
        plan = ExplainPlan(task, settings, seed, optimizer, lr, epochs, seconds)
        with PhaseDisplay(console, lines=True) as display:
            found = explain(plan, store, workers=workers or cores(), say=display, fresh=fresh)
        for notice in [*found["notices"], *warnings(found)]:
            _say(notice, style="yellow")
        console.print(data_table(table(found)))
        _say(f"\n{headline(found)}", style="bold")
        # Last: what was found is printed though the disk be full.
        with _writing(directory, advice="; choose another with --out"):
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "explanation.json", found)
            replace_text(page, render(found, store.environment()))
    _say(f"\nReport: {page}")


def _explain_queries(
    plan: tuple[Any, ...],
    texts: Sequence[str],
    directory: Path,
    *,
    workers: int | None,
    fresh: bool,
    trace: bool,
) -> None:
    """Say which training examples did what is asked, print it, and write its page and tables."""
    with _errors(trace=trace, resumable=True):
        from poprisk_lab.display import PhaseDisplay, data_table
        from poprisk_lab.explain import ExplainPlan
        from poprisk_lab.influence import EXPLANATION, answer, parse_query, words, write_influence
        from poprisk_lab.page.influence import render
        from poprisk_lab.runner import cores
        from poprisk_lab.store import Store, replace_text, write_json

        queries = [parse_query(text) for text in texts]
        store, made = Store(directory, EXPLANATION), ExplainPlan(*plan)
        with PhaseDisplay(console, lines=True) as display:
            found = answer(
                made, queries, store, workers=workers or cores(), say=display, fresh=fresh
            )
        for notice in [*words.warnings(found), *found["notices"]]:
            _say(notice, style="yellow")
        for asked in found["queries"]:
            title = f"{words.title(asked)} ({asked['quantity']} {words.number(asked['value'])})"
            console.print(data_table(words.influential(asked), title=title))
        summary = words.summary(found)
        console.print(data_table(summary))
        _say(summary.about)
        _say(f"\n{words.headline(found)}", style="bold")
        # Last: what was found is printed though the disk be full.
        page = directory / "report.html"
        with _writing(directory, advice="; choose another with --out"):
            task = made.task()
            write_influence(directory / "influence.csv", task, found)
            write_json(directory / "explanation.json", words.without_arrays(found))
            replace_text(page, render(found, task, store.environment()))
    _say(f"\nReport: {page}")


@app.command("reproduce")
def reproduce_command(
    claim: Annotated[
        str,
        typer.Argument(help=f"One of {', '.join(CLAIM_NAMES)}.", autocompletion=_complete),
    ],
    quick: Annotated[
        bool, _option("See that it runs, in minutes; it decides nothing.", "--quick")
    ] = False,
    summary: Annotated[
        bool, _option("Run nothing; a table of what is on record.", "--summary")
    ] = False,
    out: Annotated[Path | None, _option("Directory; runs/reproduce-CLAIM if left out.")] = None,
    workers: Workers = None,
    trace: Trace = False,
) -> None:
    """Run a claim of the paper with controls, and print a verdict; resumes when repeated."""
    _check_positive(workers=workers)
    with _errors(trace=trace, resumable=True):
        from poprisk_lab.runner import cores
        from poprisk_lab.studies.command import ALL, chosen, directory_of, summarize

        claims = chosen(claim)
        if not summary:
            for one in claims:
                directory = directory_of(one, quick=quick, out=out, alone=claim != ALL)
                _reproduce(one, directory, quick=quick, workers=workers or cores())
        if summary or claim == ALL:
            _summarize(summarize(claim, quick=quick, out=out), out or Path("runs"))


def _reproduce(claim: Claim, directory: ClaimDirectory, *, quick: bool, workers: int) -> None:
    from poprisk_lab.display import PhaseDisplay, data_table
    from poprisk_lab.page.claims import criteria_table, headline, notices, render_claim
    from poprisk_lab.store import replace_text
    from poprisk_lab.studies.command import run_claim

    _say(f"{claim.title}: {claim.statement}", style="bold")
    _say(f"record in {directory.path} (stop at any time, repeat the command to go on)")
    with PhaseDisplay(console) as display:

        def tell(name: str, done: int, total: int) -> None:
            display("trials", done, total)
            if not console.is_terminal:
                _say(f"[{done:3}/{total}] {name}")

        found = run_claim(claim, directory, quick=quick, workers=workers, on_trial=tell)
    for notice in notices(found):
        _say(notice, style="yellow")
    if found.report is not None:
        console.print(data_table(criteria_table(found.report.criteria)))
        _say(f"\nVerdict: {headline(found)}", style="bold")
    page = directory.path / "report.html"
    with _writing(page):
        replace_text(page, render_claim(found))
    _say(f"Report: {page}\n")


def _summarize(found: list[Judged], folder: Path) -> None:
    from poprisk_lab.display import summary_table
    from poprisk_lab.page.claims import render_summary
    from poprisk_lab.store import replace_text

    console.print(summary_table(found))
    page = folder / "claims.html"
    with _writing(page):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(page, render_summary(found))
    _say(f"Page: {page}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")], trace: Trace = False
) -> None:
    """Write report.html of a comparison or an audit again and print what it found."""
    with _errors(trace=trace):
        from poprisk_lab.audit.command import is_audit, reopen
        from poprisk_lab.comparison import run_directory

        if is_audit(run):
            _conclude_audit(reopen(run))
        else:
            _conclude(run_directory(run))


@app.command("evidence")
def evidence_command(
    run: Annotated[
        Path, typer.Argument(help="Run directory of a comparison or an audit, or an evidence.json.")
    ],
    to: Annotated[
        str,
        _option(
            "card: a model card for the Hugging Face Hub; cyclonedx: a bill of materials, "
            "CycloneDX 1.7; croissant: the data set with its RAI fields."
        ),
    ] = "card",
    dataset: Annotated[
        str, _option("The data set on the Hub, OWNER/NAME, for scores in .eval_results.")
    ] = "",
    out: Annotated[
        Path | None, _option("Directory to write in; that of the run if left out.")
    ] = None,
    trace: Trace = False,
) -> None:
    """Write what a run can prove in a form that others read."""
    with _errors(trace=trace):
        from poprisk_lab.evidence.documents import DOCUMENTS, card
        from poprisk_lab.evidence.gather import read_evidence
        from poprisk_lab.store import replace_text

        if to not in DOCUMENTS:
            _fail(f"--to must be {', '.join(DOCUMENTS)}, but got {to}.")
        if dataset and (to != "card" or not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset)):
            _fail(f"--dataset must be OWNER/NAME and goes with --to card, but got {dataset}.")
        found = read_evidence(run)
        texts = card(found, dataset=dataset) if to == "card" else DOCUMENTS[to](found)
        here = run.parent if run.is_file() else run
        files = {(out or here) / name: text for name, text in texts.items()}
        for path in files:
            if path.exists():
                _fail(f"{path} exists; delete it, or choose another directory with --out.")
        for path, text in files.items():
            with _writing(path, advice="; choose another directory with --out"):
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(path, text)
            _say(f"Written: {path}")


@app.command()
def tasks(trace: Trace = False) -> None:
    """List the built-in tasks."""
    with _errors(trace=trace):
        from rich.table import Table as Lines

        from poprisk_lab.tasks import BUILT_IN

        table = Lines.grid(padding=(0, 2))
        for name, function in BUILT_IN.items():
            table.add_row(f"[bold]{name}[/]", (function.__doc__ or "").splitlines()[0])
        console.print(table)


bench = typer.Typer(help="Measure side by side with torch, in one run.")
app.add_typer(bench, name="bench")
Threads = Annotated[int, _option("Threads torch may use.")]
Steps = Annotated[int, _option("Timed steps per optimizer.")]
Out = Annotated[Path | None, _option("Also write the results as JSON.")]
Growth = Annotated[bool, _option("Also growth with each size.")]


@bench.callback(invoke_without_command=True)
def bench_default(
    context: typer.Context,
    threads: Threads = 1,
    steps: Steps = 50,
    out: Out = None,
    trace: Trace = False,
) -> None:
    """Measure side by side with torch, in one run; alone, the same as `bench step`."""
    if context.invoked_subcommand is None:
        bench_step(threads, steps, out=out, trace=trace)


@bench.command("step")
def bench_step(
    threads: Threads = 1,
    steps: Steps = 50,
    growth: Growth = False,
    out: Out = None,
    trace: Trace = False,
) -> None:
    """Time one optimizer step beside torch's AdamW, and its state."""
    if threads < 1 or steps < 1:
        _fail("--threads and --steps must be at least 1.")
    with _errors(trace=trace):
        from poprisk_lab.bench.step import bench_cold_start, bench_steps, bench_table

        results = bench_steps(threads=threads, steps=steps, growth=growth)
        cold = bench_cold_start()
        _show_measured("one optimizer step", bench_table(results), threads, texts=2)
        compiling, cached = cold.compiling, cold.from_cache
        _say(f"first fused step: {compiling:.1f} s compiling, {cached:.2f} s from cache")
        more = {"cold_start_seconds": cold._asdict()}
        _write(out, results, more=more, threads=threads, steps=steps)


@bench.command("gated")
def bench_gated(
    threads: Threads = 1, steps: Steps = 50, out: Out = None, trace: Trace = False
) -> None:
    """Time gated optimizers' steps beside the steps that they wrap."""
    if threads < 1 or steps < 1:
        _fail("--threads and --steps must be at least 1.")
    with _errors(trace=trace):
        from poprisk_lab.bench.gated import bench_gated, gated_table

        results = bench_gated(threads=threads, steps=steps)
        _show_measured("one gated step", gated_table(results), threads, texts=3)
        _write(out, results, threads=threads, steps=steps)


@bench.command("kernel")
def bench_kernel(
    threads: Threads = 1,
    repeats: Annotated[int, _option("Timed repetitions of each kernel.")] = 3,
    growth: Growth = False,
    out: Out = None,
    trace: Trace = False,
) -> None:
    """Tangent kernels and second moments beside other libraries, as far as installed."""
    if threads < 1 or repeats < 1:
        _fail("--threads and --repeats must be at least 1.")
    with _errors(trace=trace):
        from poprisk_lab.bench.kernel import bench_kernels, kernel_table

        results = bench_kernels(threads=threads, repeats=repeats, growth=growth)
        what = "tangent kernels (all outputs) and second moments"
        _show_measured(what, kernel_table(results), threads, texts=3)
        _write(out, results, threads=threads, repeats=repeats)


def _show_measured(what: str, table: Table, threads: int, *, texts: int) -> None:
    from poprisk_lab.display import data_table

    title = f"{what} on the CPU, threads: {threads}"
    console.print(data_table(table, title=title, texts=texts))
    _say(table.about)


def _write(out: Path | None, results: Sequence[Any], **settings: Any) -> None:
    from poprisk_lab.bench import write_results

    if out is not None:
        with _writing(out):
            write_results(out, results, **settings)


def main() -> None:
    """Entry point of the ``poprisk`` command."""
    for stream in (sys.stdout, sys.stderr):
        # A Greek letter that the terminal cannot show must not end a run: Windows' is cp1252.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="poprisk")


def _conclude(directory: Store) -> None:
    from poprisk_lab.arms import OURS
    from poprisk_lab.display import data_table, verdict_table
    from poprisk_lab.evidence.gather import compare_evidence, write_evidence
    from poprisk_lab.page import render
    from poprisk_lab.page.notes import notices
    from poprisk_lab.page.table import leads_table
    from poprisk_lab.results import read_run
    from poprisk_lab.selection import twin_report
    from poprisk_lab.store import replace_text
    from poprisk_lab.verdict import judge
    from poprisk_lab.wording import scale_of

    data = read_run(directory)
    verdict = judge(data)
    if verdict.rows:
        scale = scale_of(data.config)
        title = f"{scale.name} on the test set"
        ours = [row.label for row in verdict.rows if row.family == OURS]
        rows = verdict_table(verdict, scale)
        console.print(data_table(rows, title=title, texts=1, bold=ours))
        console.print(data_table(leads_table(verdict, data.config)))
    for notice in [*notices(data), *verdict.warnings]:
        _say(notice, style="yellow")
    console.print(f"\n{verdict.headline}", style="bold", markup=False, highlight=False)
    twins = twin_report(data)
    if twins is not None:
        for table in (twins.table, twins.summary):
            console.print(data_table(table))
            console.print(table.about, markup=False, highlight=False)
    path = directory.path / "report.html"
    # Last: the verdict is printed though the disk be full.
    with _writing(path, advice=f"; `poprisk report {directory.path}` writes it once there is room"):
        replace_text(path, render(data, verdict))
        write_evidence(directory.path, compare_evidence(data, verdict))
    _say(f"\nReport: {path}")


def _say_what_begins(comparison: Comparison, directory: Store, data: RunData, cluster: str) -> None:
    """The task, and how much there is to train."""
    task, seeds = data.config["task"], len(comparison.seeds)
    _say(task["description"] or task["name"], style="bold")
    workers = f"{comparison.workers} worker{'s' * (comparison.workers > 1)}"
    where = f"trained on {cluster}" if cluster else workers
    _say(
        f"{len(comparison.arms)} arms, {seeds} seed{'s' * (seeds > 1)}, "
        f"{where}; record in {directory.path} (stop at any "
        "time, repeat the command to go on)"
    )
    if "last_batch" in task:
        _say(f"Batches of {task['batch_size']}: {task['last_batch']}.")


def _say_what_is_there(comparison: Comparison, data: RunData, done: int) -> None:
    """What a run directory holds already of this comparison, and beyond it."""
    total = len(comparison.arms) * len(comparison.seeds)
    if done == total:
        _say(f"all {total} trainings are there already")
    elif done:
        _say(f"{done} of {total} trainings are there already; going on with the rest")
    more = len(data.config["seeds"]) - len(comparison.seeds)
    if more:
        _say(f"the record holds {more} more seed{'s' * (more > 1)}, which count in the verdict")


def _say_what_is_left(missing: Sequence[str], directory: Store) -> None:
    """What other processes are to train before there is a verdict."""
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    _say(
        f"{len(missing)} training{'s' * (len(missing) > 1)} left for other processes "
        f"({'; '.join(missing[:SHOWN])}{more}); the last of them writes the page. Without --shard "
        f"and --only this command does them, and `poprisk report {directory.path}` writes the page "
        "of what is there."
    )


def _say(text: str, *, style: str = "") -> None:
    """Print text that is not markup, on one line however long."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _errors(*, trace: bool, resumable: bool = False) -> Iterator[None]:
    """Tell an error on one line of stderr, after its traceback if that is wanted, and exit.

    With 2 for what whoever called can mend, 1 for a training that failed and for an error that
    nobody foresaw, 130 for an interruption.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fail(INTERRUPTED if resumable else "stopped.", code=130)
    except ValueError as error:  # as TaskError, RunDirectoryError and NotAnalysable are
        _fail(str(error), error=error if trace else None)
    except Exception as error:
        from poprisk_lab.work import TrainingError

        if isinstance(error, TrainingError):
            _fail(str(error), code=1)
        _unexpected(error, trace=trace)


def _unexpected(error: Exception, *, trace: bool) -> NoReturn:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    where = f"{Path(last.filename).name}, line {last.lineno}, in {last.name}"
    more = "" if trace else "; --traceback prints all of it"
    _fail(f"unexpected {text} ({where}){more}.", code=1, error=error if trace else None)


@contextmanager
def _writing(path: Path, *, advice: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _fail(f"cannot write {path}: {error.strerror or error}{advice}.")


def _fail(message: str, *, code: int = 2, error: BaseException | None = None) -> NoReturn:
    """Say on one line of stderr what is wrong, after the traceback of an error, and exit."""
    if error is not None:  # that of a TaskError is of the process where the task failed
        lines = getattr(error, "trace", "") or "".join(traceback.format_exception(error))
        sys.stderr.write(lines)
    message = " ".join(message.split()) if code == 2 else message
    Console(stderr=True).print(f"poprisk: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _check_positive(**counts: int | None) -> None:
    """Refuse what is given and below 1, by the names of the options."""
    for name, value in counts.items():
        if value is not None and value < 1:
            _fail(f"--{name} must be at least 1, but got {value}.")


def _check_cluster(on: str, **settings: list[str] | None) -> dict[str, Any]:
    """The settings of the cluster to train on; refuse those of another, by its option."""
    if on not in PLACES:
        _fail(f"--on must be {', '.join(PLACES)}, but got {on}.")
    for option, given in settings.items():
        if given and option != on:
            _fail(f"--{option} goes with --on {option}, but --on is {on}.")
    given = settings.get(on) or []
    return dict(_parse_setting(text, f"--{on}", "cpus_per_task=2") for text in given)


def _parse_setting(text: str, option: str = "--set", example: str = "noise=0.2") -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        _fail(f"{option} takes name=value, as in {option} {example}, but got {text!r}.")
    for convert in (int, float):
        try:
            return name, convert(value)
        except ValueError:
            continue
    return name, value


def _default_name(comparison: Comparison) -> str:
    """A directory name that differs wherever the configuration does; more seeds extend a run."""
    parts = [_slug(comparison.source.removesuffix(".py"))]
    parts += [f"{key}-{value}" for key, value in comparison.settings.items()]
    parts += [f"{comparison.epochs}-epochs"] if comparison.epochs else []
    parts += ["full"] if comparison.full else []
    parts += ["twin"] if comparison.twin else []
    return _slug("-".join(parts))


def _slug(text: str) -> str:
    """``text`` as a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")
