"""What docs/tasks.md says of a task is what the matrix of pipelines shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pipelines.table import PIPELINES

TASKS = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TASKS.splitlines()
    if line.startswith("|") and line.count("|") == 6 and not line.startswith(("|---", "| task"))
]
BY_NAME = {pipeline.name: pipeline for pipeline in PIPELINES}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_shown_by_its_pipelines(row):
    task, untouched, say, _, shown = row
    names = re.findall(r"`(\w+)`", shown)
    assert names
    for name in names:
        pipeline = BY_NAME[name]
        assert pipeline.task == task
        assert pipeline.refused is None
        if untouched == "yes":
            assert pipeline.arguments == {}
        elif pipeline.defended is None:
            (argument,) = pipeline.arguments
            assert f"{argument}=" in say


def test_every_task_of_the_matrix_has_a_row():
    assert {pipeline.task for pipeline in PIPELINES} - {row[0] for row in ROWS} == {"multi-task"}


def test_the_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TASKS, re.DOTALL)
    exec(compile(code, "docs/tasks.md", "exec"), {})
