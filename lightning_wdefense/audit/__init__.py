"""Is a robustness claim to be believed? Checks of the model and of the attacks, and reports for people."""

from lightning_wdefense.audit.audit import audit
from lightning_wdefense.audit.findings import AuditReport, Finding, Verdict

__all__ = ["AuditReport", "Finding", "Verdict", "audit"]
