"""What an audit found: a verdict of each check, and all of them together."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lightning_wdefense.attacks.threat import ThreatModel

Verdict = Literal["pass", "warn", "fail", "skipped"]
"""What a check says. ``"skipped"``: it does not apply to this model or these attacks, or needs what was not given."""


@dataclass(frozen=True)
class Finding:
    """What one check of an audit found.

    Attributes:
        check: name of the check, such as ``"zero-gradients"``.
        verdict: ``"pass"``, ``"warn"``, ``"fail"`` or ``"skipped"``.
        figure: what was measured, in words with numbers: ``"no gradient for 38.0% of 200 samples"``.
        meaning: a sentence that says what the figure means.
        advice: what to do; empty if there is nothing to do.
        value: the figure as a number, if it is one number.
        accuracy: with checks that attack, the accuracy in [0, 1] that this check's attack alone leaves.
    """

    check: str
    verdict: Verdict
    figure: str
    meaning: str
    advice: str = ""
    value: float | None = None
    accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"verdict must be one of {get_args(Verdict)}, got {self.verdict!r}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Finding:
        """A finding from its plain values."""
        numbers = {name: None if values[name] is None else float(values[name]) for name in ("value", "accuracy")}
        return cls(**values | numbers)


@dataclass(frozen=True, repr=False)
class AuditReport:
    """What :func:`~lightning_wdefense.audit.audit` found. Printed, it is a table with what to do below it.

    Attributes:
        findings: what each check found, in the order in which they ran.
        threat: the threat model.
        attacks: names of the attacks that the claim rests on.
        samples: number of samples that were audited.
        clean_acc: accuracy on clean inputs, in [0, 1].
        robust_acc: the claim: accuracy in [0, 1] under the attacks that the audit was given.
        audited_acc: accuracy in [0, 1] that is left under these attacks and everything that the checks found.
        seconds: how long the audit took.

    Example:
        >>> finding = Finding("logits", "fail", "100.0% of 2 samples", "The outputs are probabilities.", "Return logits.")
        >>> report = AuditReport((finding,), ThreatModel(eps=0.1), ("pgd",), 2, 1.0, 1.0, 0.5, 0.1)
        >>> report.verdict, report.failed
        ('fail', ('logits',))
    """

    findings: tuple[Finding, ...]
    threat: ThreatModel
    attacks: tuple[str, ...]
    samples: int
    clean_acc: float
    robust_acc: float
    audited_acc: float
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all checks; those that were skipped do not count."""
        found = {finding.verdict for finding in self.findings}
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(finding.check for finding in self.findings if finding.verdict == "fail")

    def __getitem__(self, check: str) -> Finding:
        """What a check found.

        Raises:
            KeyError: if there is no such check; the message names all.
        """
        found = {finding.check: finding for finding in self.findings}
        if check not in found:
            raise KeyError(f"There is no check {check!r}. Checks: {', '.join(found)}.")
        return found[check]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AuditReport:
        """A report from what :meth:`to_dict` gave, or from its JSON, where numbers that are not finite are texts."""
        given = {key: value for key, value in values.items() if key != "verdict"}
        given |= {name: float(given[name]) for name in ("clean_acc", "robust_acc", "audited_acc", "seconds")}
        given["findings"] = tuple(Finding.from_dict(finding) for finding in given["findings"])
        given["threat"], given["attacks"] = ThreatModel(**given["threat"]), tuple(given["attacks"])
        return cls(**given)

    def __repr__(self) -> str:
        """The findings as a table, and below it what to do."""
        width = max((len(finding.check) for finding in self.findings), default=0)
        rows = [
            f"Audit on {self.samples} samples, {self.threat.norm}, eps {self.threat.eps:.4g}: {self.verdict}",
            f"clean {self.clean_acc:.1%}, under {', '.join(self.attacks)} {self.robust_acc:.1%}, under all that the audit tried "
            f"{self.audited_acc:.1%}",
        ]
        rows += [f"{finding.verdict:7}  {finding.check:{width}}  {finding.figure}" for finding in self.findings]
        for finding in self.findings:
            if finding.verdict in ("warn", "fail"):
                text = f"{finding.check}: {finding.meaning} {finding.advice}".strip()
                rows += ["", textwrap.fill(text, 120)]
        return "\n".join(rows)
