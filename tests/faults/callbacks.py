"""Faults of the callbacks, of the mixin and of how batches are read: schedules, seeds, states, and what is measured of whom."""

from __future__ import annotations

from faults.fault import Fault

DEFENSE = "tests/callbacks/test_defense.py::"
MONITOR = "tests/callbacks/test_monitor.py::"
SCHEDULE = "tests/callbacks/test_monitor_schedule.py::"
DETECTION = "tests/callbacks/test_detection_monitor.py::"
MIXIN = "tests/test_mixin.py::"
INTERRUPTED = "tests/long_runs/test_interrupted.py::"

FAULTS = [
    # ---------------------------------------------------------------------------------------- schedules
    Fault(
        "measures are taken one batch off the logging step",
        "callbacks/schedule.py",
        "return not (automatic and trainer.fit_loop._should_accumulate())",
        "return not (automatic and trainer.fit_loop._should_accumulate()) and batches_begun(trainer) % 3 == 1",
        (f"{DEFENSE}TestLogging::test_measurements_are_those_of_the_batch_that_is_logged",),
    ),
    Fault(
        "the warm-up begins at nothing",
        "callbacks/schedule.py",
        "min(1.0, batches / max(warmup_epochs * epoch, 1.0))",
        "min(1.0, (batches - 1) / max(warmup_epochs * epoch, 1.0))",
        (f"{DEFENSE}TestLoss::test_eps_grows_over_the_warmup",),
    ),
    Fault(
        "all ranks draw the same noise",
        "callbacks/schedule.py",
        "seeded_generator(device, seed, batch, trainer.global_rank)",
        "seeded_generator(device, seed, batch)",
        (f"{DEFENSE}TestResuming::test_noise_differs_by_batch_rank_and_seed",),
    ),
    Fault(
        "all dataloaders get the same noise",
        "callbacks/schedule.py",
        "seeded_generator(device, seed, dataloader_idx, batch_idx,",
        "seeded_generator(device, seed, batch_idx,",
        (f"{MONITOR}test_noise_differs_between_batches_dataloaders_and_ranks_but_not_between_epochs",),
    ),
    Fault(
        "epochs between measurements are one too many",
        "callbacks/schedule.py",
        "0 < trainer.current_epoch - last < every_n_epochs",
        "0 < trainer.current_epoch - last <= every_n_epochs",
        (f"{SCHEDULE}test_skipped_epochs_log_the_last_value_again",),
    ),
    # -------------------------------------------------------------------------------------- the defence
    Fault(
        "the step sees the other branch",
        "callbacks/defense.py",
        "contextlib.nullcontext(batch) if sees_clean else site.perturbed(values)",
        "contextlib.nullcontext(batch)",
        (f"{DEFENSE}TestLoss::test_equals_the_formula[pgd-at]",),
    ),
    Fault(
        "the logged eps is the final one",
        "defenses/defense.py",
        '"eps": settings.radius * recipe.eps',
        '"eps": recipe.eps',
        (
            f"{DEFENSE}TestLoss::test_warmup_is_logged_under_accumulation",
            f"{DEFENSE}TestLoss::test_eps_grows_over_the_warmup",
        ),
    ),
    Fault(
        "what was learned is not loaded",
        "callbacks/defense.py",
        "self._defense.load_state_dict(self._learned)",
        "pass",
        (f"{DEFENSE}TestResuming::test_a_resumed_run_ends_with_the_same_weights[udr]",),
    ),
    Fault(
        "an exception leaves the step wrapped",
        "callbacks/defense.py",
        'does not call ``teardown``)."""\n        self._restore()',
        'does not call ``teardown``)."""\n        pass',
        (f"{DEFENSE}TestLeavesAlone::test_an_exception_leaves_the_module_unwrapped_and_its_modes",),
    ),
    Fault(
        "a step of the instance's own is lost",
        "callbacks/interception.py",
        'self.host.__dict__["training_step"] = self._previous',
        'del self.host.__dict__["training_step"]',
        (f"{DEFENSE}TestLeavesAlone::test_a_previous_instance_attribute_is_restored",),
    ),
    Fault(
        "interceptors nest the other way round",
        "callbacks/interception.py",
        "for interceptor in self._interceptors:",
        "for interceptor in reversed(self._interceptors):",
        ("tests/callbacks/test_interception.py",),
    ),
    # --------------------------------------------------------------------------------- interrupted runs
    Fault(
        "a batch that is run again counts twice, and trains the critic twice",
        "defenses/defense.py",
        "return self._before[0]",
        "pass",
        (f"{INTERRUPTED}test_after_an_exception[critic-training step]",),
    ),
    Fault(
        "perturbed weights are in the checkpoint",
        "callbacks/restoration.py",
        'self.defense.perturbation.undo_in(checkpoint["state_dict"])',
        "pass",
        (f"{INTERRUPTED}test_requeued_by_a_signal_in_the_batch[trades+awp-before backward]",),
    ),
    Fault(
        "a checkpoint at the end of a batch is of before it",
        "callbacks/schedule.py",
        "batches_begun(trainer) == begun and progress.processed < progress.ready",
        "batches_begun(trainer) == begun and progress.completed < progress.ready",
        (f"{INTERRUPTED}test_requeued_by_a_signal_after_the_batch",),
    ),
    Fault(
        "an interrupted validation is not begun anew",
        "callbacks/evaluation/base.py",
        "            validation_begins(checkpoint)",
        "            pass",
        (f"{INTERRUPTED}test_requeued_by_a_signal_after_the_batch",),
    ),
    Fault(
        "a validation that has ended is begun anew",
        "callbacks/evaluation/base.py",
        "add_dataloader_idx=False)\n        self._validates = False",
        "add_dataloader_idx=False)",
        (f"{INTERRUPTED}test_checkpoints_of_a_validation_that_has_ended",),
    ),
    Fault(
        "the warm-up jumps with the number of batches in an epoch",
        "defenses/defense.py",
        "if before != length:",
        "if False:",
        ("tests/long_runs/test_batch_sizes.py::test_the_warmup_goes_on_where_it_stood",),
    ),
    # -------------------------------------------------------------------------------------- the monitors
    Fault(
        "the epoch of the last measurement is not loaded",
        "callbacks/evaluation/base.py",
        'self._last, self._epoch = dict(state_dict["last"]), state_dict["epoch"]',
        'self._last = dict(state_dict["last"])',
        (f"{SCHEDULE}test_checkpoint_and_early_stopping_never_miss_a_key_also_after_resuming",),
    ),
    Fault(
        "a batch too many is measured",
        "callbacks/evaluation/base.py",
        "batch_idx >= self.max_batches",
        "batch_idx > self.max_batches",
        (f"{MONITOR}test_max_batches_is_for_each_dataloader",),
    ),
    Fault(
        "attacks run in another precision than the trainer's",
        "callbacks/evaluation/base.py",
        ", torch.no_grad(), trainer.precision_plugin.forward_context():",
        ", torch.no_grad():",
        ("tests/callbacks/test_monitor_environments.py::test_attacks_run_the_model_in_the_trainers_precision",),
    ),
    Fault(
        "every batch begins anew which samples are judged",
        "callbacks/detection.py",
        "device=inputs.device) + measures.samples)",
        "device=inputs.device))",
        (f"{DETECTION}test_the_size_of_the_batches_does_not_matter",),
    ),
    Fault(
        "attacks that failed are to be detected too",
        "callbacks/detection.py",
        "result.attacked & (predicted != result.labels)",
        "result.attacked",
        (f"{DETECTION}test_values_under_inference_mode",),
    ),
    Fault(
        "detectors learn from one rank alone",
        "callbacks/detection.py",
        "torch.cat(gather_all_tensors(flat)).reshape(-1, max(int(width), 1))",
        "flat.reshape(-1, max(int(width), 1))",
        ("tests/callbacks/test_ddp.py::test_two_processes",),
    ),
    Fault(
        "pictures are drawn in model units",
        "callbacks/examples.py",
        "side_by_side(self.threat.to_data(clean.float()), self.threat.to_data(attacked.float()), self.threat)",
        "side_by_side(clean.float(), attacked.float(), self.threat)",
        ("tests/callbacks/test_examples_logger.py",),
    ),
    Fault(
        "pictures have the epoch for a step",
        "callbacks/evaluation/pictures.py",
        "step = logged_step(trainer)",
        "step = trainer.current_epoch",
        ("tests/callbacks/test_loggers.py::test_pictures_are_logged_at_the_step_of_the_metrics",),
    ),
    # ---------------------------------------------------------------------------------------- the mixin
    Fault(
        "the mixin's seed is ignored",
        "mixin.py",
        "step_settings(trainer, seed, inputs.device,",
        "step_settings(trainer, 0, inputs.device,",
        (f"{MIXIN}test_the_seed_decides_the_noise",),
    ),
    Fault(
        "a trainer's ranks do not know of each other",
        "callbacks/schedule.py",
        "Ranks.current() if trainer.world_size > 1 else ALONE",
        "ALONE",
        ("tests/callbacks/test_ddp.py::test_two_processes",),
    ),
    Fault(
        "ranks with different numbers of batches are not noticed",
        "callbacks/schedule.py",
        "if len(set(numbers)) > 1:",
        "if False:",
        ("tests/ranks/test_wrappers.py::test_unequal_batches_are_named_before_the_first",),
    ),
    Fault(
        "the mixin saves nothing of what it learned",
        "mixin.py",
        "checkpoint[_CHECKPOINT_KEY] = self.defense.state_dict()",
        "checkpoint[_CHECKPOINT_KEY] = {}",
        (f"{MIXIN}test_what_was_learned_is_in_the_checkpoint",),
    ),
    Fault(
        "the mixin's own task loss is ignored",
        "mixin.py",
        "forward=forward, task_loss=self.task_loss)",
        "forward=forward)",
        (f"{MIXIN}test_a_task_loss_of_its_own",),
    ),
    Fault(
        "the mixin has no warm-up",
        "mixin.py",
        "radius, measure = _radius(defense, trainer),",
        "radius, measure = 1.0,",
        (f"{MIXIN}test_trains_as_the_callback_does[pgd-at-False]",),
    ),
    # ------------------------------------------------------------------------------------------ batches
    Fault(
        "labels are looked for where inputs are",
        "modules/batches.py",
        "return True, (1,)",
        "return True, (0,)",
        ("tests/modules/test_batches.py::test_read_and_replace",),
    ),
    Fault(
        "the user's batch is changed",
        "modules/paths.py",
        "changed = copy.copy(batch)",
        "changed = batch",
        ("tests/modules/test_batches.py::test_read_and_replace",),
    ),
    Fault(
        "a position one past the end is taken for one",
        "modules/paths.py",
        "-len(batch) <= key < len(batch)",
        "-len(batch) <= key <= len(batch)",
        ("tests/modules/test_batches.py::test_errors_list_what_is_there",),
    ),
]
