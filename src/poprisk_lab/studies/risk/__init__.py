"""How good the risk estimates are, on problems whose true risk is known.

``python -m poprisk_lab.studies.risk stopping`` runs one of them and puts it on record.
"""

from __future__ import annotations

from poprisk_lab.studies.risk import canaries, fresh, selection, stopping
from poprisk_lab.study import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name.removeprefix("risk-"): module.STUDY
    for module in (stopping, selection, fresh, canaries)
}
