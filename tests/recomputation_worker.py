"""Two gloo processes on a CPU, for tests/test_recomputation.py: sharded weights, checkpointing."""

import os
import sys
import warnings

import test_recomputation as alone
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dittfast
from dittfast.pipelines.measure.parity import METHODS


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in alone.blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_gradients(model):
    return {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def compare(name, method, order):
    """Two sparse passes of different grids and a drawing, then one backward, on two ranks.

    Both ranks see the same data, so the average over them is what one process gets.
    """
    model, passes = alone.build(name), alone.passes_of(name, 3)
    with dittfast.enable(model, method, **alone.OPTIONS):
        expected = alone.separately(model, passes[:2])
    model = alone.build(name)
    if order == "shard-first":
        shard(model)
    dittfast.enable(model, method, **alone.OPTIONS)
    if order == "enable-first":
        shard(model)
    alone.checkpoint_with(model)
    losses = [alone.loss_of(model, x) for x in passes[:2]]
    with torch.no_grad():
        model(**passes[2])
    sum(losses).backward()
    alone.assert_gradients(whole_gradients(model), expected)
    # Sharding gives a module a class of its own, which disable must not take with it.
    kinds = {n: type(m).__mro__ for n, m in model.named_modules() if hasattr(m, "unshard")}
    dittfast.disable(model)
    assert kinds.keys() == {n for n, m in model.named_modules() if hasattr(m, "unshard")}
    model.zero_grad()
    alone.loss_of(model, passes[0]).backward()
    dense = alone.separately(alone.build(name), passes[:1])
    alone.assert_gradients(whole_gradients(model), dense)


def main(rank: int, port: int, order: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name in alone.MODELS:
        for method in ("local", "rectified"):
            compare(name, METHODS[method], order)
            if rank == 0:
                print(f"RESULT {name} {method}", flush=True)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
