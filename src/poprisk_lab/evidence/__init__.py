"""What a run can prove, as one file, and the documents that are made from it.

:func:`poprisk_lab.evidence.own.run_evidence` is for loops of one's own.
"""
