"""The order of a Wasserstein distance."""


def check_order(p: float) -> float:
    """Return the order as a float.

    Raises:
        ValueError: if it is below 1 or NaN.
    """
    p = float(p)
    if not p >= 1:
        raise ValueError(f"`p`, the order of the Wasserstein distance, should be from 1 to inf, got {p}.")
    return p
