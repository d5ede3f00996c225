"""Refuse trainer strategies that an attack cannot work with."""

from __future__ import annotations

from lightning_wdefense._compat import MisconfigurationException, Trainer, is_a

SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def check_strategy(trainer: Trainer, who: str) -> None:
    """Refuse strategies that shard the model's parameters: an attack needs the whole model on every rank.

    Args:
        trainer: the trainer.
        who: the name of the caller, for the error message.

    Raises:
        MisconfigurationException: for FSDP, DeepSpeed and model parallelism.
    """
    for strategy in SHARDED:
        if is_a(trainer.strategy, strategy):
            raise MisconfigurationException(
                f"{who} cannot attack a model whose parameters are sharded ({type(trainer.strategy).__name__}): use "
                "strategy='ddp', or one device."
            )
