"""Faults of evaluations that are interrupted, and of the command."""

from __future__ import annotations

from faults.fault import Fault

RESUME = "tests/evaluation/test_resume.py::"
COMMAND = "tests/cli/"

FAULTS = [
    Fault(
        "other data are not seen",
        "evaluation/resuming/work.py",
        "if digest != self._digests[index]:",
        "if False:",
        (f"{RESUME}test_other_data_are_refused",),
    ),
    Fault(
        "half a file takes the place of a whole one",
        "evaluation/resuming/work.py",
        "content), unfinished)",
        "content), self._path)",
        (f"{RESUME}test_half_a_file_never_takes_the_place_of_a_whole_one",),
    ),
    Fault(
        "a view brings all that it is a view of into the file",
        "evaluation/resuming/work.py",
        "return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()",
        "return tensor",
        (f"{RESUME}test_the_file_is_as_large_as_what_it_holds",),
    ),
    Fault(
        "buffers do not tell models apart",
        "evaluation/resuming/fingerprint.py",
        "(*model.named_parameters(), *model.named_buffers())",
        "model.named_parameters()",
        (f"{RESUME}test_another_evaluation_is_refused_and_the_file_stays",),
    ),
    Fault(
        "parts of batches are run in a resumed evaluation",
        "evaluation/evaluate.py",
        "self._samples, self._whole = kept.samples, kept.whole",
        "self._samples, self._whole = kept.samples, False",
        (f"{RESUME}test_a_model_that_needs_whole_batches_still_gets_them",),
    ),
    Fault(
        "code in a checkpoint is run unasked",
        "cli/loading/checkpoints.py",
        "weights_only=not trust",
        "weights_only=False",
        (f"{COMMAND}test_bad_input.py::test_of_an_evaluation",),
    ),
    Fault(
        "a model that is not robust enough passes",
        "cli/command.py",
        "return FAILED if RUNS[command](options) else FINE",
        "return RUNS[command](options) and FINE",
        (f"{COMMAND}test_audit_and_compare.py::test_a_robust_accuracy_that_is_asked_for",),
    ),
    Fault(
        "unfinished work is overwritten",
        "cli/runs.py",
        "if not before.finished:",
        "if False:",
        (f"{COMMAND}test_evaluate.py::test_work_that_is_not_finished_is_never_lost",),
    ),
    Fault(
        "a missing class shifts the labels of a folder",
        "cli/loading/images.py",
        "if classes != len(self.classes):",
        "if False:",
        (f"{COMMAND}test_bad_input.py::test_of_an_evaluation",),
    ),
]
