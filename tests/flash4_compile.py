"""Compiles FlashAttention-4's kernels with our CuTe functions for a GPU that need not be here.

    FLASH_ATTENTION_ARCH=sm_90 CUTE_DSL_ARCH=sm_90a FLASH_ATTENTION_NUM_SMS=132 \\
        python tests/flash4_compile.py NUMBER

with its wheels on PYTHONPATH and NUMBER one of the plans of ``test_flash4.plans``. Nothing runs:
the tensors are fake.
"""

import itertools
import os
import sys

import test_flash4
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dittfast.kernels import flash4_backend


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


def compile_plan(number: int, architecture: str) -> None:
    """Both passes of one plan."""
    from flash_attn.cute import interface

    flash4_backend.architecture_of = lambda device: architecture
    plan = next(itertools.islice(test_flash4.plans(architecture), number, None))
    for backward in (False, True):
        q, k = (torch.empty(2, 2, n, 64, dtype=torch.bfloat16) for n in (300, 260))
        problem = flash4_backend._problem(q, k, plan.tensors(), backward)
        state = problem.state.mT if backward else problem.state
        lists = flash4_backend._lists(state, problem.blocks)
        q, k = (
            flash4_backend._heads_last(x, one)
            for x, one in ((q, problem.queries), (k, problem.keys))
        )
        with FakeTensorMode():
            mods = dict(problem.mods)
            if mods["aux_tensors"] is not None:
                mods["aux_tensors"] = [_fake(x) for x in mods["aux_tensors"]]
            lists = lists._replace(
                **{n: _fake(x) for n, x in lists._asdict().items() if torch.is_tensor(x)}
            )
            q, k = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (q, k))
            given = dict(softmax_scale=0.1, block_sparse_tensors=lists, **mods)
            if not backward:
                interface.flash_attn_func(q, k, torch.empty_like(k), return_lse=True, **given)
                continue
            out, lse = torch.empty_like(q), torch.empty(2, 2, q.shape[1], device="cuda")
            interface._flash_attn_bwd(
                q, k, torch.empty_like(k), out, torch.empty_like(out), lse,
                score_mod_bwd=problem.score_mod_bwd, dlse=torch.empty_like(lse), **given,
            )  # fmt: skip


if __name__ == "__main__":
    compile_plan(int(sys.argv[1]), os.environ["FLASH_ATTENTION_ARCH"])
    print("compiled")
