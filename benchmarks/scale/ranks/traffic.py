"""What ``gather=True`` sends and computes, by arithmetic, for numbers of ranks that nobody here has."""

from __future__ import annotations

from typing import NamedTuple

FLOAT, LABEL = 4, 8
"""Bytes of a feature and of a label."""


class Cost(NamedTuple):
    """What one discrepancy costs each rank.

    Attributes:
        gathered: bytes of features and labels that it receives.
        whole_entries: entries of the cost matrix that it holds, if it solves the whole problem.
        whole_operations: floating-point operations, then.
        shared_entries: entries that it holds, if the ranks share the rows.
        shared_operations: operations, then.
        shared_traffic: bytes that it receives in the iterations, then.
    """

    gathered: int
    whole_entries: int
    whole_operations: int
    shared_entries: int
    shared_operations: int
    shared_traffic: int


def cost(ranks: int, samples: int, features: int, iterations: int) -> Cost:
    """The cost of transport between the clean and the adversarial features of all ranks (one problem, as in class-transport).

    Args:
        ranks: number of ranks.
        samples: number of samples of each rank.
        features: number of features.
        iterations: number of Sinkhorn iterations.
    """
    total = ranks * samples
    others = total - samples
    # Two operations for each feature of a pair, and for each pair in the two products of an iteration.
    by_pair = 2 * features + 4 * iterations
    # A ring's all-reduce of the column sums sends each number about twice, an all-gather of the row sums once.
    in_an_iteration = FLOAT * (2 * total * (ranks - 1) // ranks + others)
    return Cost(
        gathered=others * (2 * features * FLOAT + LABEL),
        whole_entries=total**2,
        whole_operations=total**2 * by_pair,
        shared_entries=samples * total,
        # The gradient in the second cloud needs the rank's own columns as well.
        shared_operations=samples * total * (by_pair + 2 * features),
        shared_traffic=iterations * in_an_iteration,
    )
