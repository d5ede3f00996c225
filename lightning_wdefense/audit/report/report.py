"""The report of one model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_wdefense.audit.findings import AuditReport
from lightning_wdefense.audit.report.contents import page_of
from lightning_wdefense.audit.report.environment import environment
from lightning_wdefense.audit.report.pages.html import html
from lightning_wdefense.audit.report.pages.markdown import markdown
from lightning_wdefense.audit.report.storage import plain, result_from_dict, result_to_dict, to_json, write_files
from lightning_wdefense.evaluation.result import EvaluationResult

FORMAT = 1
"""Version of the files' layout."""


@dataclass(frozen=True, eq=False)
class Report:
    """What was measured of a model, for readers: accuracies with intervals, attacks, classes, distances, the audit, pictures and settings.

    All but the result may be missing; what needs it is then left out.

    Args:
        name: name of the model.
        result: what :func:`~lightning_wdefense.evaluate` measured. ``evaluate(..., examples=4)`` adds pictures and the transport plan,
            ``epsilons=`` or ``distances=`` the accuracy curve.
        audit: what the audit found.
        cost: what the training cost: names with units, such as ``"training (s)"``, and numbers.
        settings: what somebody needs who repeats it, such as the seed, the data and the checkpoint. The names of the classes are
            shown if it has them as ``"class_names"``.
        environment: versions, hardware and date; by default those of now.

    Example:
        >>> import tempfile, torch
        >>> from lightning_wdefense import ThreatModel, evaluate
        >>> loader = [(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 1]))]
        >>> result = evaluate(torch.nn.Identity(), loader, ThreatModel(eps=0.2), features=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = Report("identity", result, settings={"seed": 0}).write(folder)
        ...     again = Report.load(paths[2])
        >>> [path.name for path in paths], again.result.robust_acc
        (['report.html', 'report.md', 'report.json'], 0.5)
    """

    name: str
    result: EvaluationResult
    audit: AuditReport | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=environment)

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``report.html``, ``report.md`` and ``report.json`` into a folder, and return their paths.

        The HTML file stands alone: it loads nothing and runs no script. If writing fails, reports that were there before are left as they
        were.
        """
        page = page_of(self.name, self.result, self.audit, self.cost, self.settings, self.environment)
        return write_files(
            folder,
            {"report.html": html(page), "report.md": markdown(page), "report.json": to_json(self.to_dict())},
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "format": FORMAT,
            "name": self.name,
            "environment": plain(self.environment),
            "settings": plain(self.settings),
            "cost": plain(self.cost),
            "audit": None if self.audit is None else plain(self.audit.to_dict()),
            **result_to_dict(self.result),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_dict` made plain values of.

        Raises:
            ValueError: if the values are not those of a report of this version.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else None
            raise ValueError(
                f"This is no report of format {FORMAT}, but of {found!r}: pass a report.json that Report.write wrote."
            )
        return cls(
            values["name"],
            result_from_dict(values),
            None if values["audit"] is None else AuditReport.from_dict(values["audit"]),
            {name: float(value) for name, value in values["cost"].items()},
            values["settings"],
            values["environment"],
        )

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report from the ``report.json`` that :meth:`write` wrote, or from the folder that it lies in.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no report.
        """
        file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            problem = f"the entry {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file} cannot be read as a report: {problem}") from error
