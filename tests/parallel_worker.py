"""Two gloo processes on a CPU, for tests/test_parallel.py: one sequence, shared between them."""

import copy
import os
import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from patterns import Band

import dittfast
from dittfast.pipelines.measure.parity import TINY
from dittfast.plan import Plan


class HeadBand(Band):
    """Blocks see ``width`` blocks to either side in head 0 and one more in every further head."""

    name = "head_band"

    def plan(self, layout, q=None, k=None, v=None):
        blocks = layout.blocks(16)
        at = torch.arange(blocks.count)
        heads = torch.arange(2)[:, None, None]
        mask = (at[:, None] - at).abs() <= self.width + heads
        return Plan.from_block_mask(mask, blocks, blocks)


def even_inputs(name, model, inputs):
    """Text and image lengths that two ranks can share."""
    batch = 1
    if name == "wan":
        return {**inputs, "hidden_states": torch.randn(batch, 4, 4, 10, 14)} | {
            key: inputs[key][:batch] for key in ("timestep", "encoder_hidden_states")
        }
    ids = torch.zeros(10, 8, 3)
    ids[..., 1], ids[..., 2] = torch.arange(10)[:, None], torch.arange(8)
    changed = {k: v[:batch] for k, v in inputs.items() if torch.is_tensor(v) and "ids" not in k}
    changed["hidden_states"] = torch.randn(batch, 80, 16)
    changed["encoder_hidden_states"] = torch.randn(batch, 6, 32)
    if name == "flux":
        changed |= {"img_ids": ids.view(-1, 3), "txt_ids": torch.zeros(6, 3)}
    else:
        changed["img_shapes"] = [[(1, 10, 8)]]
        changed["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]]).bool()
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


def error(a, b):
    return float((a - b).norm() / b.norm())


def main(rank: int, port: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from diffusers import ContextParallelConfig

    # diffusers asks an accelerator how many devices there are.
    torch.accelerator.device_count = lambda: 1
    for name in ("wan", "flux", "qwen-image"):
        torch.manual_seed(0)
        model, inputs = TINY[name].build()
        inputs = even_inputs(name, model, inputs)
        options = dict(backend="cpu", min_tokens=0)
        alone = copy.deepcopy(model)
        dittfast.enable(alone, HeadBand(width=1), **options)
        expected, expected_grads = gradients(alone, inputs)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
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
    main(int(sys.argv[1]), int(sys.argv[2]))
