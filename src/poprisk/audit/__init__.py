"""Which labels are wrong, from one run that hardly follows them."""

from poprisk.audit.auditor import Auditor
from poprisk.audit.looks import Look
from poprisk.audit.rate import Rate
from poprisk.audit.result import AuditResult, SecondRound
from poprisk.audit.trained import audit

__all__ = ["AuditResult", "Auditor", "Look", "Rate", "SecondRound", "audit"]
