"""Directories that an older version wrote: a finished comparison and two half-finished runs.

They were made by the code of commit 0b2e8e6, from before the laboratory was a package of its own::

    python -m poprisk compare task.py:tiny --seeds 3 --workers 1 --out runs/whole
    PROOF_HOLD=count python -m poprisk compare task.py:tiny --seeds 3 --workers 1 --out runs/half
    python -m poprisk reproduce CLAIM --quick --workers 1 --out runs/claim

in ``tests/proofs/data``. They are not frozen anew: old records stay old.
"""
