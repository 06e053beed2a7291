"""Training with methods that plan from q and k never waits for the device after the first pass.

There need be no GPU: on one, every operation below that reads a tensor's values would make the CPU
wait for it. The path is that of a GPU, the Triton backend, whose launches are left out.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dittfast.attention import method_attention
from dittfast.block_lists import transpose_lists
from dittfast.kernels import triton_backend
from dittfast.layout import Layout
from dittfast.methods import SLA, VSA, LogLinear, Rectified, Sol, TopK
from dittfast.testing import attention_inputs

ALWAYS_WAIT = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero"),
    *("_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "argwhere"),
    *("histc", "_assert_async", "sparse_mask", "to_sparse"),
}
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "equal"}


def waits(function, args, kwargs) -> bool:
    name = function.overloadpacket.__name__
    if name in ALWAYS_WAIT:
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        dtypes = [x.dtype for x in args[1] if x is not None]
        return torch.bool in dtypes or torch.uint8 in dtypes
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return False


class Operations(TorchDispatchMode):
    """Notes each operation that waits; does not look inside dittfast's own ops."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if waits(function, args, kwargs or {}):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes each method of a tensor that hands its values to Python."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched():
    found = []
    with Operations(found), Reads(found):
        yield found


def test_the_watch_sees_every_kind_of_wait():
    x, mask = torch.arange(4), torch.tensor([True, False, True, False])
    for read in (
        lambda: x[mask],
        lambda: x.nonzero(),
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool(mask.any()),
        lambda: int(x.max()),
        lambda: torch.bincount(x),
        lambda: torch.repeat_interleave(x, x),
        lambda: x.clone().masked_select(mask),
        lambda: x.clone().__setitem__(mask, x[:2]),
        lambda: x.cpu(),
        lambda: x.unique(),
    ):
        with watched() as found:
            read()
        assert found, read
    with watched() as found:
        x[torch.tensor([1, 2])].sort()
        torch.where(mask, x, 0).cumsum(0)
    assert not found


LAYOUTS = [
    Layout.image(10, 12, text=12, text_first=False),
    Layout.image(10, 12, text=12, text_lengths=[12, 5]),
    Layout.image(11, 12),
]
METHODS = [
    LogLinear(block_size=8, topk=2),
    LogLinear(block_size=8, topk=2, text_queries="sparse"),
    Rectified(block_size=16, topk=2),
    Rectified(block_size=16, topk=2, top_p=0, rectify=False),
    Sol(block_size=16),
    Sol(block_size=16, tail="query"),
    VSA(topk=2, cube=(1, 4, 4)),
    SLA(TopK(block_size=16, topk=2)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.key)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_no_wait_in_a_training_step(method, layout, monkeypatch):
    launched = []
    monkeypatch.setattr(triton_backend.Call, "launch", lambda call: launched.append(call.kernel))
    q, k, v, grad = attention_inputs(2, 2, layout.num_tokens, 16)
    own = method.parameters(2, 16)

    def step():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = method_attention(method, layout, *leaves, backend="triton", **own)
        return torch.autograd.grad(out, leaves, grad)

    step()
    launched.clear()
    with watched() as found:
        step()
    assert not found
    assert len(launched) == 4  # forward, delta, dq, dkv: the step was a whole one


@pytest.mark.parametrize("transposed", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: m.name)
def test_no_wait_inside_the_ops(method, transposed, monkeypatch):
    """Compiled code leaves the transposed lists to the backward op."""
    launched = []
    monkeypatch.setattr(triton_backend.Call, "launch", lambda call: launched.append(call.kernel))
    layout = LAYOUTS[0]
    q, k, v, grad = attention_inputs(2, 2, layout.num_tokens, 16)
    plan = method.plan(layout, q, k, v)
    near = method.extend(layout, k, v)
    if transposed:
        plan.transpose()
    with watched() as found:
        tensors = plan.tensors()
        out, lse = triton_backend.forward(q, *near, tensors, 0.25)
        triton_backend.backward(grad, None, q, *near, out, lse, tensors, 0.25)
    assert not found and len(launched) == 4
    assert (tensors.q_indices is not None) == transposed


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: m.name)
def test_named_runs_transpose_like_looked_up_ones(method):
    layout = LAYOUTS[0]
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 16)
    plan = method.plan(layout, q, k, v)
    lists = plan.kv_indices, plan.kv_num_blocks, plan.kv_num_full_blocks
    looked_up = transpose_lists(*lists, plan.kv_blocks.count)
    total = int(looked_up.q_num_blocks.sum())
    assert total == int(plan.kv_num_blocks.sum())
    for ours, theirs in zip(plan.transpose(), looked_up):
        assert torch.equal(ours[:total], theirs[:total])
