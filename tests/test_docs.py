"""What docs/tasks.md says of a task is what the matrix of pipelines shows, and the code of pages runs."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot
from pipelines.runs import require
from pipelines.table import PIPELINES
from pipelines.test_defended import defended
from support.modules import batch, classifier

matplotlib.use("Agg")

TASKS = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
BY_NAME = {pipeline.name: pipeline for pipeline in PIPELINES}


def rows(columns: int) -> list[list[str]]:
    """The rows of the page's table with so many columns, without its head."""
    lines = [line for line in TASKS.splitlines() if line.startswith("|") and line.count("|") == columns + 1]
    _, rule, *found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rule) == {"---"}
    return found


def names(cell: str) -> list[str]:
    """The pipelines that a cell names."""
    return re.findall(r"`(\w+)`", cell)


ROWS, REFUSALS = rows(5), rows(3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_shown_by_its_pipelines(row):
    task, untouched, say, _, shown = row
    assert names(shown)
    assert untouched in ("yes", "no")
    for name in names(shown):
        pipeline = BY_NAME[name]
        assert pipeline.task == task.split(" (")[0]
        assert pipeline.refused is None
        if untouched == "yes":
            assert pipeline.arguments == {}
            assert pipeline.defended is None
        elif pipeline.defended is None:
            (argument,) = pipeline.arguments
            assert f"{argument}=" in say
            if argument == "inputs":
                written = re.search(r"`inputs=(.*?)`", say)[1]
                assert eval(written) == pipeline.arguments["inputs"]
        else:
            assert "mixin" in say


def test_every_task_of_the_matrix_has_a_row():
    assert {pipeline.task for pipeline in PIPELINES} == {row[0].split(" (")[0] for row in ROWS}


def test_no_pipeline_that_needs_a_word_is_hidden():
    shown = {name for row in ROWS if row[1] == "no" for name in names(row[-1])}
    assert shown == {
        pipeline.name
        for pipeline in PIPELINES
        if pipeline.refused is None and (pipeline.arguments or pipeline.defended)
    }


def test_every_refusal_of_the_matrix_has_a_row():
    shown = [name for row in REFUSALS for name in names(row[-1])]
    assert sorted(shown) == sorted(pipeline.name for pipeline in PIPELINES if pipeline.refused is not None)


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[-1].strip("`"))
def test_a_refusal_says_what_the_page_says(row):
    _, says, shown = row
    (name,), (said,) = names(shown), re.findall('"(.*)"', says)
    require(BY_NAME[name])
    with pytest.raises(Exception, match=re.escape(said)):
        defended(BY_NAME[name], "pgd-at")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TASKS, re.DOTALL))
def test_the_code_runs(code):
    exec(compile(code, "docs/tasks.md", "exec"), {})


def test_the_code_of_the_distributional_page_runs():
    """Its blocks go on from each other, with a model and a loader of the reader's."""
    page = (Path(__file__).parents[1] / "docs" / "distributional.md").read_text()
    images, labels = batch(1, 4, 4, n=12)
    names = {"model": classifier(1, 4, 4), "loader": [(images[:8], labels[:8]), (images[8:], labels[8:])]}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code.replace("samples=1000", "samples=100"), "docs/distributional.md", "exec"), names)
    upper, lower = (names[name].compute().accuracies for name in ("metric", "lower"))
    assert upper.shape == lower.shape == (3,)
    assert names["sensitivity"].compute() > 0
    pyplot.close("all")


def test_all_code_is_python():
    for code in re.findall(r"```py\w*\n(.*?)```", TASKS, re.DOTALL):
        compile(code, "docs/tasks.md", "exec")


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_the_matrix_is_counted(page):
    text = " ".join((Path(__file__).parents[1] / page).read_text().split())
    there = [pipeline for pipeline in PIPELINES if pipeline.needs is None]
    refused = sum(pipeline.refused is not None for pipeline in there)
    said = sum(pipeline.refused is None and bool(pipeline.arguments or pipeline.defended) for pipeline in there)
    untouched = len(there) - refused - said
    counts = re.search(
        r"(\d+) (?:small pipelines of (\d+) tasks|work untouched).*? (\d+) after one argument.*? (\d+) are refused",
        text,
    )
    assert [int(counts[group]) for group in (1, 3, 4)] == [untouched, said, refused]
    assert counts[2] is None or int(counts[2]) == len({pipeline.task for pipeline in PIPELINES})
