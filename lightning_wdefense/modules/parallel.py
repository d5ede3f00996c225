"""Models that are trained on several devices: wrapped by PyTorch or by Fabric, or sharded by FSDP2 (``fully_shard``); and the Trainer's strategies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_wdefense._compat import MisconfigurationException, Trainer, is_a
from lightning_wdefense._ranks import ALONE, Ranks, in_messages
from lightning_wdefense.modules.state.isolation import module_of

SHARDING = {
    "FullyShardedDataParallel": "FSDP1 keeps its parameters in flat tensors that are whole only inside its own forward pass, and cannot take "
    "gradients with respect to inputs alone; use FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel",
    "DeepSpeedEngine": "DeepSpeed's engine supports no gradients with respect to inputs alone; use DistributedDataParallel, or FSDP2",
}
"""Wrappers that an attack cannot work with, and why."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of data parallelism and of Fabric; a model that is not wrapped is returned.

    Raises:
        TypeError: for a wrapper that an attack cannot work with; the message gives the reason.
    """
    while True:
        for name, reason in SHARDING.items():
            if is_a(model, name):
                raise TypeError(f"A model that is wrapped by {name} cannot be attacked: {reason}.")
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


@contextlib.contextmanager
def bypassed(model: nn.Module | None) -> Iterator[None]:
    """Context in which calls of a wrapped model run the model inside, in the wrapper's precision and without communication.

    ``DistributedDataParallel`` prepares a backward pass and sends buffers in every forward pass, which must not happen in the passes of
    an attack. Fabric's wrapper refuses backward passes that it did not start.
    """
    if model is None or _inside(model) is None:
        yield
        return
    target, before = vars(model), vars(model).get("forward")
    target["forward"] = _direct(model, unwrapped(model))
    try:
        yield
    finally:
        if before is None:
            del target["forward"]
        else:
            target["forward"] = before


def synchronise_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, as ``DistributedDataParallel`` does in its forward pass, which an attack comes before.

    Otherwise the running statistics of BatchNorm, which an attack uses, would be those of each rank's own samples. Other models stay as
    they are.
    """
    inner: nn.Module | None = model
    while inner is not None and not is_a(inner, "DistributedDataParallel"):
        inner = _inside(inner)
    if inner is None or not inner.broadcast_buffers:
        return
    buffers = [buffer for buffer in inner.module.buffers() if buffer.numel()]  # type: ignore[union-attr]
    group = inner.process_group

    def of_rank_0(flat: Tensor) -> Tensor:
        dist.broadcast(flat, 0, group=group)  # type: ignore[arg-type]
        return flat

    with torch.no_grad():
        for buffer, value in zip(buffers, in_messages(buffers, of_rank_0), strict=True):
            buffer.copy_(value)


def precision_of(model: nn.Module) -> Any:
    """The precision plugin of a model that Fabric has set up; ``None`` for others, which run in the surrounding precision."""
    if is_a(model, "_FabricModule"):
        return model._strategy.precision  # type: ignore[union-attr]
    inner = _inside(model)
    return None if inner is None else precision_of(inner)


def _direct(model: nn.Module, inner: nn.Module) -> Callable[..., Any]:
    precision = precision_of(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if precision is None:
            return inner(*args, **kwargs)
        with precision.forward_context():
            return inner(*precision.convert_input(args), **precision.convert_input(kwargs))

    return forward


def _inside(model: nn.Module) -> nn.Module | None:
    """The module that a wrapper wraps; ``None`` for any other module. Compiled code is kept, unless what was compiled is a wrapper."""
    if is_a(model, "DistributedDataParallel") or is_a(model, "DataParallel"):
        return model.module  # type: ignore[return-value]
    if is_a(model, "_FabricModule"):
        return model._forward_module  # type: ignore[return-value]
    if is_a(model, "OptimizedModule"):
        original: nn.Module = model._orig_mod  # type: ignore[assignment]
        return None if _inside(original) is None else original
    return None


def is_sharded(model: Callable[..., Any]) -> bool:
    """Whether a model, or the module that a method belongs to, has parameters that ``fully_shard`` has sharded over the ranks."""
    module = module_of(model)
    return module is not None and any(is_a(submodule, "FSDPModule") for submodule in module.modules())


def out_of_step(attack: Any) -> str:
    """The part of an error message that says why an attack cannot run a sharded model, and what to do."""
    return (
        f"{type(attack).__name__} decides by itself how often it runs the model, but all ranks must run a sharded model equally often. Use an "
        "attack such as PGD, or measure on one device, with the weights gathered."
    )


def lockstep(model: Callable[..., Any]) -> Ranks:
    """The ranks that must run a model equally often: all for a sharded model, whose every pass takes all ranks, otherwise this one."""
    return Ranks.current() if is_sharded(model) else ALONE


REFUSED = {
    "FSDPStrategy": "FSDP1 keeps the parameters in flat tensors that are whole only inside its own forward pass, and cannot take gradients with "
    "respect to inputs alone. Use FSDP2, ModelParallelStrategy(tensor_parallel_size=1) with fully_shard() in configure_model",
    "DeepSpeedStrategy": "DeepSpeed's engine takes gradients only in its own backward(), and an attack needs gradients with respect to inputs "
    "alone. Use FSDP2, ModelParallelStrategy(tensor_parallel_size=1) with fully_shard() in configure_model",
}
"""Strategies that an attack cannot work with, and why."""


def check_strategy(trainer: Trainer, who: str, attacks: Iterable[Any] = (), *, on_all_ranks: bool = True) -> None:
    """Refuse strategies that an attack cannot work with.

    DDP works, and so does FSDP2 (``ModelParallelStrategy`` without tensor parallelism): gradients with respect to inputs flow
    through a sharded forward pass.

    Args:
        trainer: the trainer.
        who: the name of the caller, for the error message.
        attacks: the attacks that it runs.
        on_all_ranks: whether the caller runs the model on all ranks alike, as a sharded model needs.

    Raises:
        MisconfigurationException: for FSDP1, DeepSpeed and tensor parallelism, and for FSDP2 if the caller does not run the model on all
            ranks equally often; the message gives the reason.
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
        for attack in attacks:
            if not attack.runs_in_lockstep:
                raise MisconfigurationException(f"{who} cannot run under FSDP2: {out_of_step(attack)}")
        parallel = trainer.strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
        if parallel > 1:
            raise MisconfigurationException(
                f"{who} cannot attack a model under tensor parallelism (tensor_parallel_size={parallel}): the ranks of such a group share each "
                "sample, but every rank would draw attack noise of its own. Use tensor_parallel_size=1 (FSDP2), or strategy='ddp'."
            )
