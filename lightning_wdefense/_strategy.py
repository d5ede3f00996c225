"""What the strategies of a Trainer that shard the model's parameters allow."""

from __future__ import annotations

from lightning_wdefense._compat import MisconfigurationException, Trainer, is_a

REFUSED = {
    "FSDPStrategy": "FSDP1 keeps the parameters in flat tensors that are whole only inside its own forward pass, and cannot take gradients with "
    "respect to inputs alone. Use FSDP2, ModelParallelStrategy(tensor_parallel_size=1) with fully_shard() in configure_model",
    "DeepSpeedStrategy": "DeepSpeed's engine takes gradients only in its own backward(), and an attack needs gradients with respect to inputs "
    "alone. Use FSDP2, ModelParallelStrategy(tensor_parallel_size=1) with fully_shard() in configure_model",
}
"""Strategies that an attack cannot work with, and why."""


def check_strategy(trainer: Trainer, who: str, *, on_all_ranks: bool = True) -> None:
    """Refuse strategies that an attack cannot work with.

    DDP works, and so does FSDP2 (``ModelParallelStrategy`` without tensor parallelism): gradients with respect to inputs flow
    through a sharded forward pass.

    Args:
        trainer: the trainer.
        who: the name of the caller, for the error message.
        on_all_ranks: whether the caller runs the model on all ranks alike, as a sharded model needs.

    Raises:
        MisconfigurationException: for FSDP1, DeepSpeed and tensor parallelism, and for FSDP2 if the caller does not run the model on all
            ranks; the message gives the reason.
    """
    for name, reason in REFUSED.items():
        if is_a(trainer.strategy, name):
            raise MisconfigurationException(
                f"{who} cannot attack a model under {type(trainer.strategy).__name__}: {reason}, or strategy='ddp'."
            )
    if is_a(trainer.strategy, "ModelParallelStrategy"):
        if not on_all_ranks:
            raise MisconfigurationException(
                f"{who} runs the model on one rank only, but a model that FSDP2 shards runs on all ranks together: leave it out, or use "
                "strategy='ddp'."
            )
        parallel = trainer.strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
        if parallel > 1:
            raise MisconfigurationException(
                f"{who} cannot attack a model under tensor parallelism (tensor_parallel_size={parallel}): the ranks of such a group share each "
                "sample, but every rank would draw attack noise of its own. Use tensor_parallel_size=1 (FSDP2), or strategy='ddp'."
            )
