"""Numbers of the iterations that PyTorch, NumPy and Triton share. Exponents are in units of the temperature (dimensionless)."""

from __future__ import annotations

COOLING = 8.0
"""Ratio between a temperature of the annealing and the next one."""

WARMEST = 0.06
"""Share of the mean cost up to which, times ``COOLING``, a temperature is easy enough to start at."""

PATIENCE = 50
"""Iterations after which a first temperature at which the error is above ``ENTRY`` was too low to start at."""

REHEATINGS = 5
"""Higher temperatures that are tried then."""

WARM = 1.0
"""Relative marginal error of given potentials above which the annealing, from nothing, is the better start."""

ENTRY = 0.01
"""Relative marginal error at which a temperature above the final one is left; a worse start costs more than it saves."""

ABSORBED = 15.0
"""Largest exponent of the scaling; beyond it the kernel is made anew, before its entries underflow."""

FARTHEST = 50.0
"""Exponents beyond which a step was too long to be believed."""

LONGEST = 10.0
"""Longest step, an exponent, that is taken in the place of one that was too long."""

FLOOR = -69.0
"""Smallest exponent, ``log(1e-30)``: smaller entries carry no mass, and denormal numbers are 50 times slower."""

TINY = 1e-30
"""Smallest marginal that is told from none, in units of the mass."""

NOTHING = 1e-6
"""Root of the share of the weight that, where it is all that is transported, counts as nothing."""

MEMORY = 5
"""Steps that Anderson's extrapolation combines. More of them do not save iterations, and mislead at small blurs."""

RIDGE = 1e-6
"""Share by which the diagonal of its Gram matrix grows, so that float32 can solve with it."""

AVERAGING = 2 / 3
"""Step of the symmetric iteration: the error falls to a third or less, as the plan's eigenvalues are between 0 and 1."""

SELF_ACCURACY = 0.1
"""Tolerance of the transport of a measure to itself as a share of the other one's: it costs a pass or two."""
