"""Run a study of the risk estimates: python -m poprisk_lab.studies.risk NAME [--quick]."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from poprisk_lab.studies.record import do_study
from poprisk_lab.studies.risk import STUDIES


def main(name: str, *, quick: bool, workers: int, runs: Path = Path("runs")) -> None:
    """Do what is left of a study, print its report, and put a full one on record."""
    do_study(STUDIES[name], quick=quick, workers=workers, runs=runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    main(**vars(parser.parse_args()))
