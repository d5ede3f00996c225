"""Faults of scores, detectors and two-sample tests: signs, neighbours, bandwidths."""

from __future__ import annotations

from faults.fault import Fault

VALUES = "tests/detection/test_values.py::"
CONTRACT = "tests/detection/test_contract.py::"
TWO_SAMPLE = "tests/detection/test_two_sample.py::"

FAULTS = [
    Fault(
        "the critic's score rises towards the clean side",
        "detection/critic.py",
        "return -values",
        "return values",
        (f"{VALUES}test_critic",),
    ),
    Fault(
        "the energy has the wrong sign",
        "detection/logits.py",
        "return -float32_or_better(logits_of(logits)).logsumexp(1)",
        "return float32_or_better(logits_of(logits)).logsumexp(1)",
        (f"{VALUES}test_max_softmax_and_energy",),
    ),
    Fault(
        "the nearest neighbour is taken for the k-th",
        "detection/neighbors.py",
        "self.k)[:, -1]",
        "self.k)[:, 0]",
        (f"{VALUES}test_knn",),
    ),
    Fault(
        "growth is a sum",
        "detection/neighbors.py",
        "(logs[:, -1:] - logs).mean(1)",
        "(logs[:, -1:] - logs).sum(1)",
        (f"{VALUES}test_lid_of_a_uniform_cube_is_its_dimension",),
    ),
    Fault(
        "Scott's rule forgets the dimension",
        "detection/kernel_density.py",
        "samples ** (-1 / (width + 4))",
        "samples ** (-1 / 5)",
        (f"{VALUES}test_kernel_density",),
    ),
    Fault(
        "the farthest class counts",
        "detection/mahalanobis.py",
        "for mean in fitted.means]).amin(0)",
        "for mean in fitted.means]).amax(0)",
        (f"{VALUES}test_mahalanobis",),
    ),
    Fault(
        "whitening divides by variances",
        "detection/mahalanobis.py",
        "directions / scale.sqrt()",
        "directions / scale",
        (f"{VALUES}test_mahalanobis_of_gaussians_is_chi_squared",),
    ),
    Fault(
        "so many bits make one level too many",
        "detection/feature_squeezing.py",
        "(high - low) / (2**bits - 1)",
        "(high - low) / 2**bits",
        (f"{VALUES}test_bit_depth",),
    ),
    Fault(
        "rounding stops the gradient",
        "detection/feature_squeezing.py",
        "return data + (rounded - data).detach() if data.requires_grad else rounded",
        "return rounded",
        (f"{VALUES}test_bit_depth",),
    ),
    Fault(
        "squeezing shows the model data units",
        "detection/feature_squeezing.py",
        "self.threat.to_model(data).to(dtype, copy=True)",
        "data.to(dtype, copy=True)",
        (f"{VALUES}test_feature_squeezing_in_the_units_of_the_model",),
    ),
    Fault(
        "a detector keeps the caller's memory",
        "detection/base.py",
        "self.fit_layer(layer.detach().clone(), labels)",
        "self.fit_layer(layer.detach(), labels)",
        (f"{CONTRACT}test_keeps_a_copy_of_its_own",),
    ),
    Fault(
        "the p-value leaves ties out",
        "detection/two_sample.py",
        "values >= values[0] - tolerance",
        "values > values[0] + tolerance",
        (f"{TWO_SAMPLE}test_equal_samples_are_no_evidence",),
    ),
    Fault(
        "relabellings ignore the seed",
        "detection/two_sample.py",
        "torch.Generator().manual_seed(seed)",
        "torch.Generator().manual_seed(0)",
        (f"{TWO_SAMPLE}test_seed_decides_and_the_global_state_does_not",),
    ),
]
