"""Gloo processes on a CPU that share one layer's attention, for tests/test_parallel.py.

Without diffusers: the layer is called as its attention processor would. Usage: RANK PORT RING
ULYSSES CASE...
"""

import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from patterns import Band, HeadBand

from dittfast.attention import method_attention
from dittfast.layout import Context, Grid, Layout
from dittfast.methods import Local, Neighborhood, Radial
from dittfast.pipelines import parallel
from dittfast.pipelines.exchange import share_lengths, token_shares
from dittfast.pipelines.layer import AttentionCore, LayerRun, PlannedLayout

HEADS = 3
REFERENCES = Layout((Context(5), Grid(1, 9, 7), Grid(1, 4, 4)))
CASES = {
    "local": (Local(window=3), Layout.image(13, 11, text=5, text_lengths=[4])),
    "mask": (Neighborhood(window=3), Layout.video(3, 7, 5)),  # where the model masks keys as well
    "radial": (Radial(block_size=16, decay_factor=0.5), Layout.video(6, 5, 7)),
    "heads": (HeadBand(width=0, heads=HEADS), REFERENCES),
    "apart": (Band(width=0), Layout.video(4, 4, 4)),
}
DTYPES = {"radial": torch.float64, "mask": torch.bfloat16}


def connect(rank: int, port: int, ring: int, ulysses: int):
    """What diffusers' ContextParallelConfig holds once a model has taken it."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=ring * ulysses)
    names = ("ring", "ulysses")
    mesh = dist.device_mesh.init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=names)
    return SimpleNamespace(
        ring_degree=ring,
        ulysses_degree=ulysses,
        _ring_mesh=mesh["ring"],
        _ulysses_mesh=mesh["ulysses"],
        _flattened_mesh=mesh[names]._flatten(),
    )


def compare(name: str, config) -> list[float]:
    """Errors of output, dq, dk and dv against one process, over their size and precision."""
    method, layout = CASES[name]
    dtype, num_tokens = DTYPES.get(name, torch.float32), layout.num_tokens
    place, device = parallel.Place.of(config), torch.device("cpu")
    torch.manual_seed(0)
    whole = [torch.randn(2, num_tokens, HEADS, 16).to(dtype) for _ in range(4)]
    mask = weight = None
    if name == "mask":
        mask = torch.rand(2, 1, 1, num_tokens) < 0.8
        weight = torch.zeros(2, 1, num_tokens).masked_fill(~mask[:, 0], -torch.inf)
    leaves = [x.clone().requires_grad_() for x in whole[:3]]
    heads_first = [x.transpose(1, 2) for x in leaves]
    expected = method_attention(method, layout, *heads_first, kv_log_weight=weight).transpose(1, 2)
    expected = expected, *torch.autograd.grad(expected, leaves, whole[3])

    own = token_shares(layout, place.everybody.count)[place.everybody.own]
    planned = PlannedLayout(method, layout, method.keep(layout, device))
    running = parallel.ParallelRun(LayerRun(AttentionCore(method, ((planned,),), "auto")))
    leaves = [x[:, own].clone().requires_grad_() for x in whole[:3]]
    call = dict(zip(("query", "key", "value"), leaves), scale=None)
    call["attn_mask"] = None if mask is None else mask[..., own]
    lengths = share_lengths(layout, place.everybody.count)
    out = parallel._shared(running, (planned,), lengths, place, call)
    found = out, *torch.autograd.grad(out, leaves, whole[3][:, own])
    with torch.no_grad():
        assert torch.equal(parallel._shared(running, (planned,), lengths, place, call), out)
    assert running.reached
    sized = [(a.detach(), b.detach()[:, own]) for a, b in zip(found, expected)]
    return [float((a - b).norm() / b.norm()) / torch.finfo(dtype).eps for a, b in sized]


def main(rank: int, port: int, ring: int, ulysses: int, *cases: str) -> None:
    config = connect(rank, port, ring, ulysses)
    for name in cases:
        print("RESULT", name, *(f"{x:.2f}" for x in compare(name, config)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), *sys.argv[5:])
