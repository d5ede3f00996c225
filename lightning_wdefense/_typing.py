"""Types that say one thing to a type checker and less to jsonargparse, which builds parsers from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# jsonargparse takes a callable that returns instances of a class for a factory of that class. It would then refuse losses and costs that
# are callable objects (class_path:) or functions without a return annotation.
if TYPE_CHECKING:
    from torch import Tensor

    TensorResult = Tensor
else:
    TensorResult = Any
