"""Weights, gradients and optimiser states spread over the processes (FSDP2, fully_shard)."""

from __future__ import annotations

import sys

import torch


def shard(model: torch.nn.Module, blocks: list[str], device: torch.device) -> None:
    """Shard a transformer in place: each block gathers its weights when it runs.

    Its parameters become DTensors, new objects under their old names. Weights are given up after
    every pass, so a change of the shards is seen by the next one.

    Args:
        model: the transformer; the same values in every process.
        blocks: names of its modules that are gathered one at a time.
        device: what this process computes on.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    for name in blocks:
        fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(x: torch.Tensor) -> bool:
    """Whether x is a DTensor."""
    # Where nobody has imported DTensor there is none; importing it here would take a second.
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def _cut(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x``, which every process has already, sharded as ``like`` is; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    x = x.to(like.device)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def local(x: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies in this process, sharing its storage; all of a plain one."""
    x = x.detach()
    return x.to_local() if is_sharded(x) else x


def whole(x: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """All of a tensor, on the CPU. The processes call this together.

    Args:
        like: the parameter whose local part ``x`` is; None where x itself may be sharded.
    """
    if like is not None and is_sharded(like) and not is_sharded(x):
        from torch.distributed.tensor import DTensor

        x = DTensor.from_local(
            x, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    x = x.detach()
    return (x.full_tensor() if is_sharded(x) else x).cpu()


def part(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of ``x``, cut as the parameter ``like`` is; ``x`` itself if it is not.

    Args:
        x: the same values in every process, in the whole shape of ``like``.
    """
    return _cut(x, like).to_local() if is_sharded(like) else x


def whole_state(state: dict) -> dict:
    """An optimiser's state dict without shards. The processes call this together."""
    return {
        "param_groups": state["param_groups"],
        "state": {
            index: {k: whole(x) if is_sharded(x) else x for k, x in values.items()}
            for index, values in state["state"].items()
        },
    }


def sharded_state(state: dict, parameters: list[torch.Tensor]) -> dict:
    """The inverse of :func:`whole_state`, for the parameters as they are sharded now."""

    def cut(x, like):
        if not is_sharded(like) or not torch.is_tensor(x) or x.shape != like.shape:
            return x
        return _cut(x, like)

    return {
        "param_groups": state["param_groups"],
        "state": {
            index: {k: cut(x, parameters[index]) for k, x in values.items()}
            for index, values in state["state"].items()
        },
    }
