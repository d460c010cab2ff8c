"""Run a study of the risk estimates: python -m poprisk_lab.studies.risk NAME [--quick]."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from poprisk_lab.store import write_json
from poprisk_lab.studies.record import FOLDER
from poprisk_lab.studies.risk import STUDIES
from poprisk_lab.studies.run import ClaimDirectory


def main(name: str, *, quick: bool, workers: int, runs: Path = Path("runs")) -> None:
    """Do what is left of a study, print its report, and put a full one on record."""
    study = STUDIES[name]
    directory = ClaimDirectory(runs / (study.name + "-quick" * quick), study)
    directory.create(quick=quick, workers=workers)
    directory.work(workers=workers, on_trial=lambda *told: print(*told, flush=True))
    progress = directory.read()
    content = {"environment": progress.environment, **study.report(progress.done)}
    print(json.dumps(content, indent=1))
    if not quick:
        write_json(FOLDER / f"{study.name}.json", content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    main(**vars(parser.parse_args()))
