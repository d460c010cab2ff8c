"""Comparisons on Slurm and Ray: the numbers of this machine, whatever dies on the way."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from poprisk_lab import checkpoint
from poprisk_lab.arms import default_arms
from poprisk_lab.clusters import RayPool, SlurmPool
from poprisk_lab.comparison import Comparison, run_directory, train, trials_of
from poprisk_lab.pool import Pool
from poprisk_lab.results import RunData, read_run
from poprisk_lab.runner import environment
from poprisk_lab.store import Store
from poprisk_lab.work import TrainingError

HANGS = 1500
LOCAL = {"cluster": "local"}
ARMS = {arm.name: arm for arm in default_arms(full=False)}
FEW = [ARMS[name] for name in ("poprisk", "stopped-lr0.001-wd0.01", "rms-matched")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning"),
]


def needs(package: str) -> Any:
    """A package of an extra; the test is skipped by name without it."""
    return pytest.importorskip(package)


@pytest.fixture(autouse=True, scope="module")
def as_here() -> Iterator[None]:
    """The task sets how often it is checkpointed; nobody is told that Ray was used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "CHECKPOINT_SECONDS", checkpoint.CHECKPOINT_SECONDS)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trainings wait half-way while there is a file ``closed``."""
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def expected(gate: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The numbers of a local run."""
    directory = begun(tmp_path_factory.mktemp("local") / "run", gate)
    train(comparison(gate), directory, lambda row: None)
    return numbers(read_run(directory))


@pytest.fixture
def closed(gate: Path) -> Iterator[Path]:
    """The gate, closed at first."""
    for file in gate.iterdir():
        file.unlink()
    (gate / "closed").touch()
    yield gate
    (gate / "closed").unlink(missing_ok=True)


def comparison(gate: Path) -> Comparison:
    settings = {"folder": str(gate)}
    return Comparison(tiny.source("gated"), FEW, seeds=[0, 1], workers=1, settings=settings)


def begun(path: Path, gate: Path) -> Store:
    directory = run_directory(path)
    directory.create(comparison(gate).config(), environment(1))
    return directory


def numbers(data: RunData) -> tuple[Any, Any]:
    """All that was measured but for the time it took."""

    def timeless(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key != "seconds"}

    return [timeless(row) for row in data.epochs], {k: timeless(v) for k, v in data.ends.items()}


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def half_way(gate: Path) -> list[int]:
    """The processes that wait half-way."""
    return [int(file.name) for file in gate.iterdir() if file.name.isdigit()]


def lives(pid: int) -> bool:
    """Whether a process runs; one that was ended and not yet asked for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def when(condition: Callable[[], bool], then: Callable[[], object]) -> threading.Thread:
    """Do something beside the test, once."""

    def do() -> None:
        wait_until(condition)
        then()

    thread = threading.Thread(target=do)
    thread.start()
    return thread


def starts(directory: Store) -> list[int]:
    """The epochs that attempts began at."""
    rows = directory.rows(trial.name for trial in trials_of(comparison(Path())))
    return [r["epoch"] for found in rows.values() for r in found if r["event"] == "start"]


def trained(directory: Store, gate: Path, pool: Pool[Any]) -> list[str]:
    """Train on a pool; return the names of what ended, as they were told."""
    told = list[str]()

    def tell(row: dict[str, Any]) -> None:
        if row["event"] == "end":
            told.append(f"{row['arm']}-{row['seed']}")

    train(comparison(gate), directory, tell, pool=pool)
    return told


ALL = sorted(f"{arm.name}-{seed}" for arm in FEW for seed in (0, 1))


# --- Slurm, by the local executor of submitit -----------------------------------------------------


def test_jobs_find_what_local_processes_find(
    tmp_path: Path, gate: Path, expected: tuple[Any, Any]
) -> None:
    needs("submitit")
    (gate / "closed").unlink(missing_ok=True)
    directory = begun(tmp_path / "run", gate)
    assert sorted(trained(directory, gate, SlurmPool(2, LOCAL))) == ALL
    assert numbers(read_run(directory)) == expected
    assert len([*directory.jobs.glob("*_submitted.pkl")]) == 2


def test_each_chain_is_a_job_if_nothing_is_said(gate: Path) -> None:
    needs("submitit")
    shares = SlurmPool(None, LOCAL).shares(trials_of(comparison(gate)))
    assert [len(share) for share in shares] == [2, 1, 2, 1]
    assert len(SlurmPool(9, LOCAL).shares(trials_of(comparison(gate)))) == 4, "none is empty"


def test_a_job_that_dies_is_told_and_the_next_goes_on(
    tmp_path: Path, closed: Path, expected: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = needs("submitit")
    monkeypatch.setattr(submitit.LocalJob, "_results_timeout_s", 1)
    directory = begun(tmp_path / "run", closed)

    def kill_one() -> None:
        os.kill(half_way(closed)[0], signal.SIGKILL)
        (closed / "closed").unlink()

    killer = when(lambda: len(half_way(closed)) == 2, kill_one)
    with pytest.raises(TrainingError, match=r"job \d+ died \(.*repeat the command to go on. Its"):
        trained(directory, closed, SlurmPool(2, LOCAL))
    killer.join()
    assert 0 < len(read_run(directory).ends) < len(ALL), "the other job has ended its share"
    trained(directory, closed, SlurmPool(2, LOCAL))
    assert numbers(read_run(directory)) == expected
    assert max(starts(directory)) > 0, "it went on from the checkpoint"


def test_a_job_that_is_preempted_goes_on_in_the_same_command(
    tmp_path: Path, closed: Path, expected: tuple[Any, Any]
) -> None:
    needs("submitit")
    directory = begun(tmp_path / "run", closed)

    def preempt() -> None:
        os.kill(half_way(closed)[0], signal.SIGUSR2)  # what submitit has Slurm send
        (closed / "closed").unlink()

    preemption = when(lambda: len(half_way(closed)) == 1, preempt)
    assert sorted(trained(directory, closed, SlurmPool(1, LOCAL))) == ALL
    preemption.join()
    assert numbers(read_run(directory)) == expected
    assert max(starts(directory)) > 0


# --- Slurm, by programs that stand for its own ----------------------------------------------------

PROGRAMS = {
    "sbatch": """
        import os, re, subprocess, sys
        count = int(re.search(r"--array=0-(\\d+)", open(sys.argv[1]).read())[1]) + 1
        for k in range(count):
            slurm = {"JOB_ID": 70 + k, "ARRAY_JOB_ID": 7, "ARRAY_TASK_ID": k, "PROCID": 0}
            more = {f"SLURM_{key}": str(value) for key, value in slurm.items()}
            job = subprocess.Popen(["bash", sys.argv[1]], env={**os.environ, **more},
                                   stdout=open(f"{HERE}/log_{k}", "w"), stderr=subprocess.STDOUT,
                                   start_new_session=True)
            open(f"{HERE}/7_{k}", "w").write(str(job.pid))
        print("Submitted batch job 7")
        """,
    "srun": """
        import os, sys
        start = next(i for i, word in enumerate(sys.argv) if word.endswith("python"))
        os.execv(sys.argv[start], sys.argv[start:])
        """,
    "sacct": """
        import os
        print("JobID|State|NodeList")
        for name in sorted(n for n in os.listdir(HERE) if n.startswith("7_")):
            try:
                stat = open(f"/proc/{open(f'{HERE}/{name}').read()}/stat").read()
                alive = stat.rpartition(")")[2].split()[0] != "Z"
            except FileNotFoundError:
                alive = False
            print(f"{name}|{'RUNNING' if alive else 'COMPLETED'}|here")
        """,
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what Slurm's programs do for one array of jobs, whose processes it lists."""
    here = tmp_path / "slurm"
    here.mkdir()
    for name, text in PROGRAMS.items():
        program = f"#!{sys.executable}\nHERE = {str(here)!r}\n{textwrap.dedent(text)}"
        (here / name).write_text(program, encoding="utf-8")
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    return here


def leave(pool: SlurmPool) -> None: ...


class Gone(Exception):
    """What stands for the end of the command."""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_an_array_outlives_its_command_and_is_followed_by_the_next(
    tmp_path: Path,
    slurm: Path,
    closed: Path,
    expected: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs("submitit")
    directory = begun(tmp_path / "run", closed)
    with monkeypatch.context() as patch:
        patch.setattr(SlurmPool, "close", leave)  # as if killed

        def end(row: dict[str, Any]) -> None:
            raise Gone

        with pytest.raises(Gone):
            train(comparison(closed), directory, end, pool=SlurmPool(2, {}))
    script = (directory.jobs / "7_submission.sh").read_text(encoding="utf-8")
    assert "#SBATCH --array=0-1%2" in script
    assert "#SBATCH --time=60" in script
    opening = when(lambda: len(half_way(closed)) == 2, (closed / "closed").unlink)
    assert sorted(trained(directory, closed, SlurmPool(2, {}))) == ALL
    opening.join()
    assert len([*directory.jobs.glob("*_submitted.pkl")]) == 2, "no job was submitted again"
    assert numbers(read_run(directory)) == expected
    assert starts(directory) == [0] * len(ALL)


def test_what_submitit_refuses_is_one_line_before_anything_is_made(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("submitit")
    for settings, told in (
        ({"slurm_partitoin": "gpu"}, "Unknown argument 'partitoin'"),
        ({"timeout_min": "long"}, 'Parameter "timeout_min" expected type'),
        ({"cluster": "moon"}, "any executor named moon"),
    ):
        with pytest.raises(ValueError, match=r"^submitit refuses: [^\n]*$") as caught:
            SlurmPool(None, settings)
        assert told in str(caught.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match='submitit refuses: Could not detect "srun"'):
        SlurmPool(None, {})
    assert [p.name for p in tmp_path.iterdir()] == ["slurm"]


# --- Ray ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_node_of_ray_that_dies_loses_nothing(
    tmp_path: Path, closed: Path, expected: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("ray")
    utils = importlib.import_module("ray.cluster_utils")
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    directory = begun(tmp_path / "run", closed)
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)

        def kill_the_node() -> None:
            cluster.remove_node(node, allow_graceful=False)
            wait_until(lambda: not all(map(lives, half_way(closed))))
            (closed / "closed").unlink()

        killer = when(lambda: len(half_way(closed)) == 2, kill_the_node)
        assert sorted(trained(directory, closed, RayPool(None, {}))) == ALL
        killer.join()
    finally:
        cluster.shutdown()
    assert numbers(read_run(directory)) == expected
    attempts = {
        trial.name: directory.attempts(trial.name) for trial in trials_of(comparison(closed))
    }
    assert sorted(map(len, attempts.values())) == [1] * 5 + [2], "one was begun again"
    assert max(starts(directory)) > 0, "from its checkpoint"


def test_a_trial_that_fails_on_ray_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    needs("ray")
    directory = run_directory(tmp_path / "run")
    what = Comparison(tiny.source("fragile"), FEW, seeds=[0, 1], workers=1)
    directory.create(what.config(), environment(1))
    with pytest.raises(TrainingError, match=r"arm poprisk, seed 1 failed:\n") as e:
        train(what, directory, lambda row: None, pool=RayPool(2, {}))
    assert "ArithmeticError: the loss gave up" in str(e.value)
    assert "rms-matched" not in str(e.value), "what comes after it is not tried"
    assert set(read_run(directory).ends) == {(arm.name, 0) for arm in FEW}
    last = directory.attempts("poprisk-1")[-1].read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last) == {"event": "failed"}


def test_what_ray_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("ray")
    with pytest.raises(ValueError, match=r"^Ray refuses: [^\n]*num_moons[^\n]*$"):
        RayPool(None, {"num_moons": 1})
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ValueError, match=r"^Ray refuses: nothing answers at RAY_ADDRESS=127.0.0.1:1"
    ):
        RayPool(None, {})
