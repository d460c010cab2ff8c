"""Freeze what the code computes now.

    python tests/proofs/freeze.py [records | trajectories | api]
    ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE python tests/proofs/freeze.py trajectories

Look at the difference before you commit it: it is what the change does. The digests of trajectories
are frozen for each machine beside those of others, unless the numbers have changed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it

import torch

from proofs import records, trajectories
from proofs.api import public_api
from proofs.frozen import DATA, differences, read, write


def freeze_records() -> None:
    for name in records.NAMES:
        write(f"records/{name}", records.judged_record(name))


def freeze_trajectories() -> None:
    """Digests of this machine, and projections if they have changed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # of skipped steps
    found = {
        name: {str(d): trajectories.trajectory(name, d) for d in case.dtypes}
        for name, case in trajectories.CASES.items()
    }
    digests = {n: {d: t.digest for d, t in ts.items()} for n, ts in found.items()}
    projections = {n: trajectories.exact_projections(ts) for n, ts in found.items()}
    here, others = trajectories.machine(), list[dict[str, object]]()
    path = DATA / "trajectories.json"
    if path.exists():
        before = read("trajectories")
        apart = differences(projections, before["projections"], rtol=trajectories.RTOL)
        if not any(apart):
            projections = before["projections"]
            others = [entry for entry in before["digests"] if entry["machine"] != here]
    entry = {"machine": here, "weights": digests}
    write("trajectories", {"digests": [*others, entry], "projections": projections})


def freeze_api() -> None:
    (DATA / "api.txt").write_text(public_api(), encoding="utf-8")


PARTS: dict[str, Callable[[], None]] = {
    "records": freeze_records,
    "trajectories": freeze_trajectories,
    "api": freeze_api,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="all, if none is named")
    part = parser.parse_args().part
    for name in [part] if part else PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
