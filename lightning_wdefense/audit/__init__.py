"""Is a robustness claim to be believed? Checks of the model and of the attacks, and reports for people.

Import from here by name, ``from lightning_wdefense.audit import Report``: at the top level ``lightning_wdefense.audit`` is the function.
"""

from lightning_wdefense.audit.audit import audit
from lightning_wdefense.audit.findings import AuditReport, Finding, Verdict
from lightning_wdefense.audit.report.comparison import Comparison, Difference, compare
from lightning_wdefense.audit.report.paired import PairedDifference
from lightning_wdefense.audit.report.report import Report

__all__ = [
    "AuditReport",
    "Comparison",
    "Difference",
    "Finding",
    "PairedDifference",
    "Report",
    "Verdict",
    "audit",
    "compare",
]
