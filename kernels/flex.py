"""PyTorch's flex_attention as a backend, compiled.

Every plan goes through: ragged blocks are padded, the token rule is the ``mask_mod``, log weights
and padding are the ``score_mod``, and lists, rules and weights are arguments, so that another plan
of the same form needs no other graph. flex_attention is never run as it is: without a compiler it
looks at no list and returns dense attention.

On CPUs flex_attention has no backward pass and no log-sum-exp. Where somebody wants the latter, two
more passes find it (:func:`_lse_on_cpu`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dittfast.plan import METRICS, PlanTensors, TokenRule

from . import epilogue
from .capabilities import ANY, Capabilities, architecture_of
from .equal_blocks import Lists, in_slots, lists, side, slot_bias, to_tokens
from .op import define_backend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BOTH = dict(tail=True, grouped_heads=True, slow_start=True)
CAPABILITIES = (
    Capabilities(("cuda",), _DTYPES, head_dims=range(16, ANY.stop), **_BOTH),
    Capabilities(("cpu",), _DTYPES, backward=False, **_BOTH),
)
# Tiles of the backward pass; a block holds a whole number of them.
_MOST_TILE = 32


def machine_reasons(asked) -> list[str]:
    """Why flex_attention cannot be compiled on this machine; empty where it can."""
    if asked.device.type != "cpu":
        return []
    reasons = []
    if sys.platform == "darwin" or not torch.cpu._is_avx2_supported():
        reasons.append("flex_attention needs a CPU with AVX2, and no macOS")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        reasons.append("flex_attention needs a C++ compiler; install g++, or name one in CXX")
    return reasons


class Form(NamedTuple):
    """What a graph is compiled for; everything else is an argument of it.

    Attributes:
        blocks: tokens of a query block and of a key block.
        metric, sink_frames, place_bits: of the token rule; metric 0: there is none.
        scale: of the logits.
        bias: whether ``Extras.bias`` differs between batch rows, and between heads; (): no bias.
        grouped: whether k and v have fewer heads than q.
        with_lse: whether lse comes back.
        options: ``kernel_options`` as pairs.
        shapes: dtypes, heads, head dims, and which sizes are 1, of all tensors.
    """

    blocks: tuple[int, int]
    metric: int
    sink_frames: int
    place_bits: int
    scale: float
    bias: tuple[int, ...]
    grouped: bool
    with_lse: bool
    options: tuple[tuple[str, int | str], ...]
    shapes: tuple


class Extras(NamedTuple):
    """What score_mod and mask_mod read, in the order of slots; None where it is not needed.

    Attributes:
        bias: ``[B|1, H|1, slots]`` fp32 added to the logits of each key.
        sink, sink_logit: ``[slots]`` fp32, 1 for one key and 0 for the others, and
            ``[B, H, slots]`` fp32, that key's logit for each query.
        rule: the tensors of the token rule: limits, frames and places of queries and of keys, and
            last ones of queries.
    """

    bias: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    sink_logit: torch.Tensor | None = None
    rule: tuple[torch.Tensor | None, ...] = ()


def _traced(form: Form, flex_attention: Callable) -> Callable:
    """What is compiled for this form: ``(q, k, v, Lists, Extras) -> (out, lse or None)``."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    def run(q, k, v, given: Lists, extras: Extras):
        def score_mod(score, batch, head, q_at, kv_at):
            score = score + extras.bias[batch * form.bias[0], head * form.bias[1], kv_at]
            if extras.sink is not None:
                score = score + extras.sink[kv_at] * extras.sink_logit[batch, head, q_at]
            return score

        def mask_mod(batch, head, q_at, kv_at):
            *places, frame_last, place_last = extras.rule
            last = frame_last, place_last, form.place_bits
            rule = TokenRule(METRICS[form.metric - 1], *places, form.sink_frames, *last)
            return rule.keep(q_at, kv_at)

        mask = BlockMask.from_kv_blocks(
            *given,
            BLOCK_SIZE=form.blocks,
            mask_mod=mask_mod if form.metric else None,
            seq_lengths=(q.shape[2], k.shape[2]),
            # The backward pass walks the lists from the keys.
            compute_q_blocks=q.requires_grad or k.requires_grad or v.requires_grad,
        )
        result = flex_attention(
            q, k, v,
            score_mod=None if extras.bias is None else score_mod,
            block_mask=mask,
            scale=form.scale,
            enable_gqa=form.grouped,
            kernel_options=dict(form.options),
            return_aux=AuxRequest(lse=True) if form.with_lse else None,
        )  # fmt: skip
        return (result[0], result[1].lse) if form.with_lse else (result, None)

    return run


@functools.cache
def _compiled(form: Form) -> Callable:
    """flex_attention of this form, compiled; arguments and results as :func:`_traced`'s."""
    from torch.nn.attention.flex_attention import flex_attention

    traced = _traced(form, flex_attention)

    def run(*inputs):
        if not torch.compiler.is_compiling():
            raise RuntimeError(
                "flex_attention without torch.compile looks at no block list, and torch.compile is "
                "off (TORCHDYNAMO_DISABLE, torch.compiler.set_stance); use another backend"
            )
        return traced(*inputs)

    # Graphs are kept by code object, and only a few of each.
    run.__code__ = run.__code__.replace()
    # Open are the sizes that were marked so, and no others that happen to change.
    return torch.compile(run, fullgraph=True, dynamic=False)


class _Call:
    """One call of flex_attention under a plan: its tensors in slots, and the way back."""

    def __init__(self, q, k, v, t: PlanTensors, scale: float, whole_of: int = 0):
        self.t, self.scale, self.num_queries = t, scale, q.shape[2]
        self.blocks = _block(t.q_block_size), _block(t.kv_block_size)
        self.queries = side(t, "q", self.blocks[0])
        self.keys = side(t, "kv", self.blocks[1], whole_of)
        self.q, self.k, self.v = (
            _dense(x) if one is None else x.index_select(2, one.tokens)
            for x, one in ((q, self.queries), (k, self.keys), (v, self.keys))
        )
        self.lists = unpacked(t)

    def run(self, extras: Extras, with_lse: bool, flash: bool = False):
        """``(out, lse or None)`` in the order of slots."""
        # Sizes are marked as open on views: the tensors themselves may be the caller's.
        views = tuple(x.view_as(x) for x in (self.q, self.k, self.v, *self.lists))
        extras = Extras(*map(_rounded_up, extras[:3]), rule=tuple(map(_rounded_up, extras.rule)))
        form = Form(
            self.blocks,
            self.t.metric,
            self.t.sink_frames,
            self.t.place_bits,
            self.scale,
            () if extras.bias is None else tuple(int(n > 1) for n in extras.bias.shape[:2]),
            self.q.shape[1] != self.k.shape[1],
            with_lse,
            _kernel_options(self.blocks, flash),
            # PyTorch calls FlashAttention-4 with sizes that it knows.
            _shapes(views, (*extras[:3], *extras.rule), mark=not flash),
        )
        return _compiled(form)(*views[:3], Lists(*views[3:]), extras)

    def extras(self) -> Extras:
        """Log weights, padding and the token rule."""
        t, keys = self.t, self.keys
        bias = slot_bias(t.kv_log_weight, keys)
        if not t.metric:
            return Extras(bias)
        first = (in_slots(x, self.queries) for x in (t.q_frame, t.q_place))
        last = (in_slots(x, self.queries) for x in (t.q_frame_last, t.q_place_last))
        of_keys = (in_slots(x, keys) for x in (t.kv_frame, t.kv_place))
        return Extras(bias, rule=(t.limits, *first, *of_keys, *last))

    def by_token(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, slots, ...]`` in the order of tokens."""
        return to_tokens(x, self.queries, self.num_queries)


def _block(size: int) -> int:
    """The size of flex_attention's blocks for a plan's: few, so that few graphs are needed."""
    return max(16, 1 << (size - 1).bit_length()) if size <= 128 else -(-size // 128) * 128


def _dense(x: torch.Tensor) -> torch.Tensor:
    """``x`` in one of two orders of memory, heads before or after tokens; each has its graph."""
    return x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else x.contiguous()


def _rounded_up(x: torch.Tensor | None) -> torch.Tensor | None:
    """The last dimension repeats its last value up to a power of two.

    What score_mod and mask_mod read has fixed sizes: on CPUs, PyTorch 2.14 writes C++ that does not
    compile where those are left open. Frames beyond the last limit have the last one's.
    """
    if x is None or not x.numel():
        return x
    count = (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], count)], -1) if count else x.contiguous()


def _shapes(
    open_: tuple[torch.Tensor, ...], fixed: tuple[torch.Tensor | None, ...], mark: bool
) -> tuple:
    """What torch.compile holds fixed: all of ``fixed``, and of others heads and channels.

    Marks the other sizes as open. Those that are equal become one size there, and 1 stays 1.
    """
    classes: dict[int, int] = {1: 1}
    forms = []
    for x in (*open_, *fixed):
        if x is None:
            forms.append(None)
            continue
        wide = x.ndim == 4 and x.is_floating_point()
        static = range(x.ndim) if any(x is y for y in fixed) else (1, 3) if wide else (1,)
        if mark:
            for dim in set(range(x.ndim)).difference(static):
                torch._dynamo.maybe_mark_dynamic(x, dim)
        sizes = (
            -n if dim in static or not mark else classes.setdefault(n, 1 + len(classes))
            for dim, n in enumerate(x.shape)
        )
        order = sorted(range(x.ndim), key=lambda dim: (x.stride(dim), dim))
        forms.append((x.device, x.dtype, *sizes, *order, x.is_inference(), x.requires_grad))
    return tuple(forms)


def _kernel_options(blocks: tuple[int, int], flash: bool) -> tuple:
    if flash:
        return (("BACKEND", "FLASH"),)
    tile = min(_MOST_TILE, *blocks)
    names = "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"
    # The forward pass shrinks its own tiles to small blocks; the backward pass does not.
    return () if min(blocks) >= 128 else tuple((f"bwd_{name}", tile) for name in names)


def make_worklist(t: PlanTensors) -> torch.Tensor:
    """The lists with room for every key block, one behind the other."""
    return torch.cat([x.flatten() for x in lists(t)])


def unpacked(t: PlanTensors) -> Lists:
    """The lists of :func:`make_worklist`, made here where the plan does not bring them."""
    if t.worklist is None:
        return lists(t)
    counts = t.kv_num_blocks.shape
    shapes = (counts, (*counts, t.kv_starts.numel())) * 2
    parts = t.worklist.split([math.prod(shape) for shape in shapes])
    return Lists(*(x.view(shape) for x, shape in zip(parts, shapes)))


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`. Returns ``(out, lse)``."""
    call = _Call(q, k, v, t, scale)
    with torch.no_grad():
        flash = _takes_flash(q, call.blocks, backward=False)
        out, lse = call.run(call.extras(), _tells_lse(q.device), flash)
        if lse is not None:
            lse = call.by_token(lse)
        elif t.wants_lse:
            lse = _lse_on_cpu(q, k, t, scale)
        else:
            lse = q.new_full(q.shape[:-1], torch.nan, dtype=torch.float32)
    return epilogue.apply(call.by_token(out), t).to(q.dtype), lse


def _tells_lse(device: torch.device) -> bool:
    """Whether flex_attention returns lse there."""
    return device.type != "cpu"


def _lse_on_cpu(q, k, t: PlanTensors, scale: float) -> torch.Tensor:
    """``[B, H, num_queries]`` fp32, from softmaxes alone.

    The mean logit m of a row under its own softmax lies below lse, by at most the log of the
    number of keys. One more key, of logit m, then gets a share s from 1 / (keys + 1) to 1/2, and
    lse is m + log((1 - s) / s). A pass over keys instead of values finds m, a second one s.
    """
    q, k = q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    weight = k.new_zeros(1, 1, k.shape[2]) if t.kv_log_weight is None else t.kv_log_weight.float()
    weight = weight[..., None].expand(*k.shape[:3], 1)
    there = weight > -torch.inf
    values = torch.cat([k, weight.masked_fill(~there, 0), there.float()], -1)
    call = _Call(q, k, values, t, scale)
    means = call.by_token(call.run(call.extras(), with_lse=False)[0])
    mean = (q * means[..., :-2]).sum(-1) * scale + means[..., -2]
    share = _share_of_one_more(q, k, t, scale, mean)
    return torch.where(means[..., -1] > 0, mean + torch.log((1 - share) / share), -torch.inf)


def _share_of_one_more(q, k, t: PlanTensors, scale: float, logit: torch.Tensor) -> torch.Tensor:
    """``[B, H, num_queries]``: what the softmax gives a further key with the logits ``logit``."""
    call = _Call(q, k, k.new_zeros(*k.shape[:3], 1), t, scale, whole_of=k.shape[2])
    size, slots = call.blocks[1], call.k.shape[2]
    # A block of its own, behind the others, all hidden but its first slot.
    call.k, call.v = (F.pad(x, (0, 0, 0, size)) for x in (call.k, call.v))
    call.v[:, :, slots] = 1
    extras = call.extras()
    bias = k.new_zeros(1, 1, slots) if extras.bias is None else extras.bias
    bias = F.pad(F.pad(bias, (0, 1)), (0, size - 1), value=-torch.inf)
    sink = F.pad(k.new_ones(1), (slots, size - 1))
    logit = logit if call.queries is None else logit.index_select(2, call.queries.tokens)
    partial, partial_blocks, full, full_blocks = call.lists
    full_blocks = F.pad(full_blocks, (0, 1)).scatter(-1, full[..., None].long(), slots // size)
    call.lists = Lists(partial, F.pad(partial_blocks, (0, 1)), full + 1, full_blocks)
    share, _ = call.run(extras._replace(bias=bias, sink=sink, sink_logit=logit), with_lse=False)
    return call.by_token(share)[..., 0]


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k, v and, where the plan has them, of out_scale and out_residual.

    By autograd through flex_attention, whose forward pass runs again for it. Where ``out`` and
    ``lse`` are over more keys than it saw (a tail's), so are the gradients.
    """
    given = {"q": q, "k": k, "v": v, "out_scale": t.out_scale, "out_residual": t.out_residual}
    with _autograd():
        leaves = {n: x.detach().requires_grad_() for n, x in given.items() if x is not None}
        q, k, v, *_ = leaves.values()
        t = t._replace(**{n: x for n, x in leaves.items() if n not in "qkv"})
        call = _Call(q, k, v, t, scale)
        own, own_lse = call.run(call.extras(), True, _takes_flash(q, call.blocks, backward=True))
        own, own_lse = call.by_token(own), call.by_token(own_lse)
        if len(leaves) == 3:
            grad_out, grad_lse = _of_its_part(grad_out, grad_lse, out, lse, own, own_lse)
        outputs, grads = [epilogue.apply(own, t)], [grad_out]
        if grad_lse is not None:
            outputs, grads = [*outputs, own_lse], [*grads, grad_lse]
        grads = [g.to(x.dtype) for g, x in zip(grads, outputs)]
        gradients = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads)))
    return tuple(gradients.get(name) for name in given)


@torch.no_grad()
def _of_its_part(grad_out, grad_lse, out, lse, own, own_lse):
    """Gradients of ``own`` and its lse, which are a part of the softmax that gave out and lse.

    With r = exp(own_lse - lse), out is r own + (1 - r) others and lse is own_lse - log r.
    """
    share = torch.exp(own_lse - lse).masked_fill(own_lse == -torch.inf, 0)
    along = (grad_out.float() * (own.float() - out.float())).sum(-1)
    if grad_lse is not None:
        along = along + grad_lse
    return grad_out * share[..., None], along * share


@contextlib.contextmanager
def _autograd():
    """Inside, autograd records again: a backend's functions run below it."""
    keys = torch._C.DispatchKey
    below = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradOther, keys.ADInplaceOrView):
        below = below.remove(key)
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), below),
        torch.enable_grad(),
    ):
        yield


# Where flex_attention runs FlashAttention-4: architecture to what a query block is a multiple of,
# and the sizes of a key block. Head dims are multiples of 8 up to 128 on all.
_FLASH = {"sm_90": (128, (128,)), "sm_100": (256, (128, 256, 384, 512))}
_FLASH["sm_103"] = _FLASH["sm_110"] = _FLASH["sm_100"]


def _takes_flash(q: torch.Tensor, blocks: tuple[int, int], backward: bool) -> bool:
    """Whether FlashAttention-4 is here and takes this; its gradients differ from run to run."""
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return False
    q_block, kv_blocks = _FLASH.get(architecture_of(q.device), (0, ()))
    fits = bool(q_block) and blocks[0] % q_block == 0 and blocks[1] in kv_blocks
    if not fits or q.shape[-1] % 8 or q.shape[-1] > 128 or not _flash_installed():
        return False
    return not (backward and torch.are_deterministic_algorithms_enabled())


@functools.cache
def _flash_installed() -> bool:
    """Whether PyTorch knows FlashAttention-4 and it is installed; imports neither kernel."""
    from torch.nn.attention import flex_attention

    if "BACKEND" not in getattr(flex_attention.FlexKernelOptions, "__annotations__", ()):
        return False
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


attend = define_backend("flex", forward, backward)
