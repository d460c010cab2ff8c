"""Freeze what the code computes now.

    python tests/proofs/freeze.py [records]

Look at the difference before you commit it: it is what the change does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it

from proofs import records
from proofs.frozen import write


def freeze_records() -> None:
    for name in records.NAMES:
        write(f"records/{name}", records.judged_record(name))


PARTS: dict[str, Callable[[], None]] = {"records": freeze_records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="all, if none is named")
    part = parser.parse_args().part
    for name in [part] if part else PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
