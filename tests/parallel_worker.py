"""Gloo processes on a CPU, for tests/test_parallel.py: one sequence, shared between them.

Usage: RANK PORT RING ULYSSES ANYTHING MODEL...; with ANYTHING 1 the lengths do not divide.
"""

import copy
import os
import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from patterns import HeadBand

import dittfast
from dittfast.pipelines.measure.parity import TINY


def inputs_of(name, inputs, anything):
    """Text and image lengths that two or four ranks can share evenly, or cannot."""
    batch, text, height = 1, 5 if anything else 8, 11 if anything else 12
    if name == "wan":
        return {**inputs, "hidden_states": torch.randn(batch, 4, 4 - anything, 10, 14)} | {
            key: inputs[key][:batch] for key in ("timestep", "encoder_hidden_states")
        }
    ids = torch.zeros(height, 7, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(7)
    changed = {k: v[:batch] for k, v in inputs.items() if torch.is_tensor(v) and "ids" not in k}
    changed["hidden_states"] = torch.randn(batch, height * 7, 16)
    changed["encoder_hidden_states"] = torch.randn(batch, text, 32)
    if name == "flux":
        changed |= {"img_ids": ids.view(-1, 3), "txt_ids": torch.zeros(text, 3)}
    else:
        changed["img_shapes"] = [[(1, height, 7)]]
        changed["encoder_hidden_states_mask"] = torch.arange(text)[None] < text - 2
    return {**inputs, **changed}


def gradients(model, inputs, shared=False):
    model.zero_grad()
    out = model(**inputs)[0]
    out.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if "to_q" in n}
    if shared:
        for grad in found.values():
            dist.all_reduce(grad)
    return out.detach(), found


def compiled(name, model, inputs, expected, rank):
    """Repeated blocks with fullgraph give the same; a pass with gradients is refused."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    outs, graphs = [], []
    for _ in range(2):
        with torch.no_grad():
            outs.append(model(**inputs)[0])
        graphs.append(counter.frame_count)
    assert torch.equal(*outs) and graphs[0] == graphs[1] > 0
    if rank == 0:
        print(f"COMPILED {name} {error(outs[0], expected):.2e}", flush=True)
    with pytest.raises(ValueError, match="under context parallelism has no gradients"):
        model(**inputs)
    torch._dynamo.reset()


def gather_uneven(tensor, dim, group):
    """For diffusers, whose all_gather of tensors that differ in size gloo refuses."""
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor.detach(), group=group)
    return torch.cat(parts, dim)


def error(a, b):
    return float((a - b).norm() / b.norm())


def main(rank: int, port: int, ring: int, ulysses: int, anything: int, *names: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    degrees = {"ring_degree": ring, "ulysses_degree": ulysses}
    if anything:
        degrees["ring_anything" if ring > 1 else "ulysses_anything"] = True
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(ring * ulysses), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=ring * ulysses)
    import diffusers.hooks.context_parallel
    from diffusers import ContextParallelConfig

    diffusers.hooks.context_parallel._all_gather_anything = gather_uneven
    # diffusers asks an accelerator how many devices there are.
    torch.accelerator.device_count = lambda: 1
    shape, dims = (ring, ulysses), ("ring", "ulysses")
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=dims)
    for name in names:
        torch.manual_seed(0)
        model, inputs = TINY[name].build()
        inputs = inputs_of(name, inputs, anything)
        options = dict(backend="cpu", min_tokens=0)
        alone = copy.deepcopy(model)
        dittfast.enable(alone, HeadBand(width=1), **options)
        expected, expected_grads = gradients(alone, inputs)
        model.enable_parallelism(config=ContextParallelConfig(**degrees, mesh=mesh))
        dittfast.enable(model, HeadBand(width=1), **options)
        out, grads = gradients(model, inputs, shared=True)
        wrong = max(error(grads[n], expected_grads[n]) for n in grads)
        dense = gradients(copy.deepcopy(alone), inputs)[0]
        if rank == 0:
            print(f"RESULT {name} {error(out, expected):.2e} {wrong:.2e}", flush=True)
        assert error(dense, expected) < 1e-5
        compiled(name, model, inputs, expected, rank)
        dittfast.disable(model)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:6]), *sys.argv[6:])
