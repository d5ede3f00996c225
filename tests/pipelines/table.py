"""The matrix: a pipeline joins by one line in a file of zoo/."""

from __future__ import annotations

import importlib

FILES = [
    "classification",
    "batches",
    "tabular",
    "dense",
    "sequences",
    "tokens",
    "unsupervised",
    "similarity",
    "teachers",
    "control",
    "libraries",
    "refused",
]
PIPELINES = [pipeline for file in FILES for pipeline in importlib.import_module(f"pipelines.zoo.{file}").PIPELINES]
