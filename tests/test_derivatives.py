"""Derivatives of attend beyond backward(): forward mode, torch.func, checkpoints; what is refused.

The oracle is plain attention in fp64, differentiated by PyTorch.
"""

import gc
import subprocess
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from interpreter import PYTHON
from patterns import Band
from random_plans import even_blocks, ragged_blocks, random_plan, random_rule
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import dittfast
from dittfast import Layout, attend, methods
from dittfast.attention import method_attention
from dittfast.plan import Plan
from dittfast.testing import attention_inputs

BACKENDS = ["reference", "cpu"]
# jvp and forward_ad import what torch.compile needs, and warn about it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("quick_interpreter"),
]


def plain(mask, weight=None, scale=0.25):
    """Attention under a mask out of PyTorch's own functions; ``(out, lse)``."""

    def run(q, k, v):
        logits = q @ k.mT * scale
        if weight is not None:
            logits = logits + weight[..., None, :]
        seen = (mask & (logits != -torch.inf)).any(-1, keepdim=True)
        logits = torch.where(mask, logits, -torch.inf)
        logits = torch.where(seen, logits, 0.0)
        lse = torch.where(seen, logits.logsumexp(-1, keepdim=True), 0.0)
        p = torch.where(seen, (logits - lse).exp(), 0.0)
        return p @ v, lse[..., 0].masked_fill(~seen[..., 0], -torch.inf)

    return run


def example(dtype=torch.float64, **fields):
    q_blocks = ragged_blocks(23, 12, 1, shuffle=True)
    kv_blocks = ragged_blocks(37, 16, 2, shuffle=True)
    weight = torch.randn(1, 2, 37, generator=torch.Generator().manual_seed(5))
    weight[..., ::9] = -torch.inf
    plan = random_plan(
        q_blocks, kv_blocks, (2, 1), random_rule(23, 37), kv_log_weight=weight, **fields
    )
    point = attention_inputs(2, 2, 23, 16, 37, dtype)[:3]
    direction = attention_inputs(2, 2, 23, 16, 37, dtype, seed=1)[:3]
    return plan, weight, point, direction


def call(plan, backend, scale=0.25, **options):
    return lambda q, k, v: attend(
        q, k, v, plan, scale=scale, return_lse=True, backend=backend, **options
    )


def dual(function, point, direction):
    with forward_ad.dual_level():
        found = function(*map(forward_ad.make_dual, point, direction))
        return tuple(zip(*map(forward_ad.unpack_dual, found)))


MODES = {"jvp": lambda f, x, d: torch.func.jvp(f, tuple(x), tuple(d)), "forward_ad": dual}


@pytest.mark.parametrize(
    "mode, backend", [*((mode, name) for name in BACKENDS for mode in MODES), ("jvp", "triton")]
)
def test_forward_mode(mode, backend, nan_empty):
    dtype = torch.float32 if backend == "triton" else torch.float64
    plan, weight, point, direction = example(dtype)
    found, tangent = MODES[mode](call(plan, backend), point, direction)
    wide = [[x.double() for x in xs] for xs in (point, direction)]
    formula = plain(plan.to_dense_mask(), weight.double())
    exact, expected = torch.func.jvp(formula, *map(tuple, wide))
    for a, b in zip((*found, *tangent), (*exact, *expected)):
        tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(a.double(), b, **tolerance)
    assert float(expected[0].abs().max()) > 0.1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forward_mode_of_the_epilogue(backend):
    """Against central differences: the epilogue has no form in plain attention."""
    plan, _, point, direction = example()
    n = plan.q_blocks.count
    draw = torch.Generator().manual_seed(3)
    ends = [torch.rand(1, 2, n, generator=draw).double() + 0.5]
    ends.append(torch.randn(2, 1, n, 16, generator=draw).double())

    def run(q, k, v, out_scale, out_residual):
        epilogue = {"out_scale": out_scale, "out_residual": out_residual}
        changed = plan.with_lists(plan.kv_indices, plan.kv_num_full_blocks.clamp_min(1), **epilogue)
        return attend(q, k, v, changed, backend=backend)

    x, dx = [*point, *ends], [*direction, *(torch.randn_like(e) for e in ends)]
    _, found = torch.func.jvp(run, tuple(x), tuple(dx))
    step = 1e-5
    above, below = (run(*(a + s * b for a, b in zip(x, dx))) for s in (step, -step))
    torch.testing.assert_close(found, (above - below) / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("most", [1, 200_000])
def test_forward_mode_in_portions(most, monkeypatch):
    """Runs, long lists and short ones, added pair by pair and a few rows at a time."""
    from dittfast.kernels import tangent

    monkeypatch.setattr(tangent, "_VALUES", most)
    blocks = even_blocks(90, 8)
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.2
    mask.fill_diagonal_(True)
    plan = Plan.from_block_mask(mask, blocks, blocks)
    count = plan.kv_num_blocks.clone()
    indices = plan.kv_indices.clone()
    count[..., 3], indices[..., 3, :] = 12, 0
    plan = plan.replace(kv_indices=indices, kv_num_blocks=count, kv_num_full_blocks=count)
    mask[3] = True
    token = torch.arange(90) // 8
    point, direction = (
        attention_inputs(1, 2, 90, 8, dtype=torch.float64, seed=s)[:3] for s in (0, 1)
    )
    _, found = torch.func.jvp(call(plan, "cpu"), point, direction)
    _, expected = torch.func.jvp(plain(mask[token][:, token]), point, direction)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "method",
    [
        methods.Dense(block_size=16),
        methods.Local(3, downsample=2),
        methods.LogLinear(block_size=8, topk=3, levels=1),
        methods.Rectified(block_size=16, topk=3),
    ],
    ids=lambda method: method.name,
)
def test_forward_mode_of_methods(method):
    """Against central differences, small enough that no method chooses other blocks."""
    layout = Layout.image(9, 10, text=5)
    point, direction = (
        attention_inputs(1, 2, 95, 8, dtype=torch.float64, seed=s)[:3] for s in (0, 1)
    )
    run = lambda q, k, v: method_attention(method, layout, q, k, v)  # noqa: E731
    _, found = torch.func.jvp(run, point, direction)
    step = 1e-6
    above, below = (run(*(a + s * b for a, b in zip(point, direction))) for s in (step, -step))
    torch.testing.assert_close(found, (above - below) / (2 * step), rtol=1e-6, atol=1e-6)


def test_forward_mode_of_an_enabled_model():
    """A plan that keeps everything: the derivative of the stock model's own formula."""
    model, inputs = tiny.flux_transformer(1, 1), tiny.flux_inputs()
    model = model.double()
    inputs = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for n, x in inputs.items()
    }
    direction = torch.randn_like(inputs["hidden_states"])

    def run(hidden_states):
        return model(**inputs | {"hidden_states": hidden_states})[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out, expected = torch.func.jvp(run, (inputs["hidden_states"],), (direction,))
    dittfast.enable(model, Band(width=100))
    found_out, found = torch.func.jvp(run, (inputs["hidden_states"],), (direction,))
    # The model rounds its rotary tables to fp32 on both sides.
    torch.testing.assert_close(found_out, out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float(found.detach().abs().max()) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_on_a_forward_mode_target(backend):
    """MeanFlow's loss: the tangent is a target, the gradient goes through the value beside it."""
    plan, weight, point, direction = example()

    def gradient(function):
        leaves = [x.clone().requires_grad_() for x in point]
        (out, _), (target, _) = torch.func.jvp(function, tuple(leaves), tuple(direction))
        return torch.autograd.grad((out - target.detach()).square().sum(), leaves)

    formula = plain(plan.to_dense_mask(), weight.double())
    for a, b in zip(gradient(call(plan, backend)), gradient(formula)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_is_the_gradient(backend):
    plan, _, point, _ = example(torch.float32)

    def loss(*x):
        return call(plan, backend)(*x)[0].square().sum()

    leaves = [x.clone().requires_grad_() for x in point]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*point)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def loss_of(plan, backend):
    return lambda q, k, v: attend(q, k, v, plan, scale=0.25, backend=backend).square().sum()


def twice(loss, q, k, v):
    q = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(q, k, v), q, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), q)[0]


DERIVATIVES_OF_DERIVATIVES = {
    "double backward": twice,
    "grad of grad": lambda loss, q, k, v: torch.func.grad(
        lambda q: torch.func.grad(loss)(q, k, v).square().sum()
    )(q),
    "jvp of grad": lambda loss, q, k, v: torch.func.jvp(
        lambda q: torch.func.grad(loss)(q, k, v), (q,), (v[:, :, :23],)
    )[1],
}


@pytest.mark.parametrize("what", DERIVATIVES_OF_DERIVATIVES)
def test_second_derivatives_are_right_or_refused(what):
    plan, weight, point, _ = example()
    run = DERIVATIVES_OF_DERIVATIVES[what]
    formula = plain(plan.to_dense_mask(), weight.double())
    expected = run(lambda *x: formula(*x)[0].square().sum(), *point)
    torch.testing.assert_close(run(loss_of(plan, "reference"), *point), expected)
    with pytest.raises(RuntimeError, match="no second derivative on the cpu backend"):
        run(loss_of(plan, "cpu"), *point)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tangent_is_not_differentiated_in_silence(backend):
    plan, _, point, direction = example(torch.float32)

    def loss(q):
        f = lambda q: attend(q, *point[1:], plan, backend=backend)  # noqa: E731
        return torch.func.jvp(f, (q,), (direction[0],))[1].sum()

    with pytest.raises(RuntimeError, match="no second derivative on the"):
        torch.func.grad(loss)(point[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_the_gradient_alone_is_no_second_derivative(backend):
    plan, _, point, _ = example(torch.float32)
    leaves = [x.clone().requires_grad_() for x in point]
    with_graph = torch.autograd.grad(loss_of(plan, backend)(*leaves), leaves, create_graph=True)
    without = torch.autograd.grad(loss_of(plan, backend)(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(with_graph, without))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_refused_with_what_to_do(backend):
    plan, _, point, _ = example(torch.float32)
    many = [x[None].expand(3, *x.shape) for x in point]
    with pytest.raises(NotImplementedError, match="Put the mapped dimension into the batch"):
        torch.func.vmap(call(plan, backend))(*many)
    leaf = point[0].clone().requires_grad_()
    out = attend(leaf, *point[1:], plan, backend=backend)
    with pytest.raises(NotImplementedError, match="Put the mapped dimension into the batch"):
        torch.autograd.grad(out, leaf, torch.ones(2, *out.shape), is_grads_batched=True)


def test_a_log_weight_with_a_gradient_is_refused():
    plan, weight, point, _ = example()
    plan = plan.replace(kv_log_weight=None)
    with pytest.raises(ValueError, match=r"kv_log_weight carries a derivative.*detach"):
        call(plan, "cpu", kv_log_weight=weight.clone().requires_grad_())(*point)
    with torch.no_grad():
        call(plan, "cpu", kv_log_weight=weight.clone().requires_grad_())(*point)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="kv_log_weight carries"):
        moved = forward_ad.make_dual(weight, torch.ones_like(weight))
        call(plan, "cpu", kv_log_weight=moved)(*point)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(backend, reentrant):
    plan, _, point, direction = example(torch.float32)

    def gradients(run):
        leaves = [x.clone().requires_grad_() for x in point]
        out, lse = run(*leaves)
        loss = (out * direction[0]).sum() + lse[lse != -torch.inf].sum()
        loss.backward()
        return [x.grad for x in leaves]

    run = call(plan, backend)
    found = gradients(lambda *x: checkpoint(run, *x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(run)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_and_no_grad(backend):
    plan, _, point, _ = example(torch.float32)
    leaves = [x.clone().requires_grad_() for x in point]
    expected = call(plan, backend)(*leaves)
    assert expected[0].requires_grad and expected[1].requires_grad
    with torch.no_grad():
        without = call(plan, backend)(*leaves)
    with torch.inference_mode():
        inferred = call(plan, backend)(*(x.clone() for x in point))
    assert not without[0].requires_grad and inferred[0].is_inference()
    for found in (without, inferred):
        assert all(torch.equal(a.clone(), b.detach()) for a, b in zip(found, expected))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forward_mode_compiles_in_one_graph(backend):
    plan, _, point, direction = example(torch.float32)
    if backend == "cpu":
        call(plan, backend)(*point)  # makes the work list

    def run(q, dq):
        return torch.func.jvp(lambda q: call(plan, backend)(q, *point[1:]), (q,), (dq,))[1]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(point[0], direction[0]), run(point[0], direction[0])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_alive(backend):
    plan, _, point, _ = example(torch.float32)
    leaves = [x.clone().requires_grad_() for x in point]
    out, lse = call(plan, backend)(*leaves)
    seen = weakref.ref(out), weakref.ref(lse), *(weakref.ref(x) for x in leaves)
    gc.disable()
    try:
        del out, lse, leaves
        assert [ref() for ref in seen] == [None] * 5
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forward_allocates_the_output_once(backend):
    """Comparing the memory order with q's takes no second output."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from dittfast.kernels import op

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty_like.default and out.device.type != "meta":
                made.append(out.shape)
            return out

    ours = op.define_backend(
        f"watched_{backend}",
        lambda q, k, v, t, scale: (torch.zeros_like(q), torch.zeros(q.shape[:-1])),
        None,
    )
    q = torch.zeros(1, 2, 8, 16)
    t = Plan.full(8, block_size=4).tensors()
    with Watch():
        ours(q, q, q, t, 1.0)
    assert made == []


FIRST_CALL = """
import sys, time
import torch, dittfast
plan = dittfast.methods.Local(2).plan(dittfast.Layout.image(8, 8))
q = torch.randn(1, 1, 64, 16, requires_grad=True)
attend = dittfast.attend
start = time.process_time()
attend(q, q, q, plan, backend=sys.argv[1]).sum().backward()
print(time.process_time() - start, "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "cpu"])
def test_the_first_call_of_a_process_is_soon_done(backend):
    """It imports no compiler; 0.2 s of processor time, in the best of three processes."""
    root = Path(__file__).resolve().parent.parent
    code = f"import sys; sys.path.insert(0, {str(root)!r})" + FIRST_CALL
    for _ in range(3):
        done = subprocess.run(
            [*PYTHON, "-c", code, backend],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        seconds, has_compiler = done.stdout.split()
        assert has_compiler == "False"
        if float(seconds) < 0.2:
            return
    pytest.fail(f"the first attend took {seconds} s of processor time")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_backend_may_be_defined_again(backend):
    """As when a notebook's cell is run a second time."""
    from dittfast.kernels.op import define_backend

    q = torch.zeros(1, 1, 8, 16)
    t = Plan.full(8, block_size=8).tensors()
    for value in (1.0, 2.0):
        make = lambda q, k, v, t, s, x=value: (torch.full_like(q, x), q.new_zeros(q.shape[:-1]))  # noqa: E731
        again = define_backend("defined_again", make, None)
        assert float(again(q, q, q, t, 1.0)[0].mean()) == value
