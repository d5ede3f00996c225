"""Views of models that draw random numbers, and of models whose surface is rough."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense.attacks.norms import random_uniform
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.audit.views.base import View
from lightning_wdefense.modules.state.random_state import RandomState


class Averaged(View):
    """The mean of the probabilities over draws of the model's noise, as logits: expectation over transformation (EoT).

    Args:
        inner: the model, as a view.
        draws: number of draws of each call.

    References:
        Athalye, Engstrom, Ilyas, Kwok, "Synthesizing robust adversarial examples", 2018.
    """

    def __init__(self, inner: View, draws: int) -> None:
        super().__init__(inner)
        self.draws = draws

    def __call__(self, inputs: Tensor) -> Tensor:
        """The logits ``(N, K)`` of the mean."""
        return _mean([self.inner(inputs) for _ in range(self.draws)])


class FixedNoise(View):
    """The model with the same random numbers at every call, which an attacker cannot know in advance.

    Args:
        inner: the model, as a view.
        seed: seed of the random numbers.
    """

    def __init__(self, inner: View, seed: int) -> None:
        super().__init__(inner)
        self.seed = seed
        self.accepts_partial_batches = False  # or a sample would get the numbers of another one

    def __call__(self, inputs: Tensor) -> Tensor:
        """The logits ``(N, K)``."""
        before = RandomState(inputs.device)
        try:
            torch.manual_seed(self.seed)
            random.seed(self.seed)
            np.random.seed(self.seed % 2**32)
            return self.inner(inputs)
        finally:
            before.restore()


class Blurred(View):
    """The mean over uniform noise around the inputs: its gradients show the slope of a surface that is rough, or has steps.

    Args:
        inner: the model, as a view.
        threat: converts the noise to model units.
        radius: largest change of a value, in data units.
        draws: number of noisy copies of each call.
        seed: seed of the noise.

    References:
        Tramer, Carlini, Brendel, Madry, "On adaptive attacks to adversarial example defenses", 2020 (of k-winners-take-all).
    """

    def __init__(self, inner: View, threat: ThreatModel, radius: float, draws: int, seed: int) -> None:
        super().__init__(inner)
        self.threat, self.radius, self.draws, self.seed = threat, radius, draws, seed
        self._generator: torch.Generator | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The logits ``(N, K)`` of the mean."""
        if self._generator is None:
            self._generator = torch.Generator(inputs.device).manual_seed(self.seed)
        data = self.threat.to_data(inputs)
        noisy = (data + (2 * random_uniform(data, self._generator) - 1) * self.radius for _ in range(self.draws))
        return _mean([self.inner(self.threat.to_model(each)) for each in noisy])


class Rescaled(View):
    """The logits of each sample divided by their spread: the loss of a confident model has gradients again."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """The logits ``(N, K)``."""
        logits = self.inner(inputs)
        spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
        return logits / spread.clamp_min(torch.finfo(logits.dtype).tiny) * math.log(1e4)


def _mean(logits: list[Tensor]) -> Tensor:
    """Logits of the mean of the probabilities."""
    return torch.stack([F.log_softmax(each, 1) for each in logits]).logsumexp(0) - math.log(len(logits))
