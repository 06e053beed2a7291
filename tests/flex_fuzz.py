"""Random plans under compiled flex_attention against the dense oracle in fp64, lse included.

    python tests/flex_fuzz.py --state flex.json --seconds 600

Eight forms of 125 plans each. A form is compiled three times, once for the output and twice for
lse, however its lists, rules, weights and lengths change; more graphs are a fault. With --state
it goes on where it stopped; compiling takes a minute or two a form, a plan a second or less.
"""

import argparse
import itertools
import json
import sys
import traceback
from pathlib import Path
from time import perf_counter

import torch
from random_plans import random_plan, random_rule
from torch._dynamo.utils import counters

from dittfast import attend
from dittfast.files import write_json
from dittfast.kernels import flex
from dittfast.layout import make_blocks
from dittfast.testing import attention_inputs

PLANS = 125
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_KINDS = {"disc": ("disc", 1), "raster, grouped heads": ("raster", 2), "box": ("box", 1)}
_KINDS |= {"no rule, grouped heads": (None, 2)}
# By name: dtype, metric of the rule, query heads of each key head.
FORMS = {
    f"{dtype}, {kind}": (_DTYPES[dtype], *_KINDS[kind])
    for dtype, kind in itertools.product(_DTYPES, _KINDS)
}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compare(seed, dtype, metric, lse, size=1.0, groups=1):
    """One of the plans of a form, against the oracle.

    Args:
        groups: query heads of each key head.
    """
    draw = torch.Generator().manual_seed(seed)
    upto = lambda n: int(torch.randint(1, n + 1, (), generator=draw))  # noqa: E731
    # With one block more for lse, 32 key blocks would be of the next class of sizes.
    counts = [8 + upto(8), 16 + upto(15)]
    # Every block but one is short, so there is padding.
    lengths = [
        torch.randint(1, 17, (n,), generator=draw).index_fill_(0, torch.tensor(0), 16)
        for n in counts
    ]
    sides = []
    for x in lengths:
        x[0], x[1] = 16, 15  # of one size in every plan, and with padding
        order = torch.randperm(int(x.sum()), generator=draw) if upto(2) == 1 else None
        sides.append(make_blocks(x.cumsum(0) - x, x, order))
    total = [int(x.sum()) for x in lengths]
    rule = random_rule(*total, metric, seed=seed) if metric else None
    fields = {"out_scale": torch.rand(1, 1, counts[0]) + 0.5} if upto(3) == 1 else {}
    plan = random_plan(*sides, rule=rule, density=upto(9) / 9, seed=seed, **fields)
    weight = None
    if upto(2) == 1:
        weight = torch.randn(1, 1, total[1], generator=draw)
        weight[torch.rand(weight.shape, generator=draw) < 0.3] = -torch.inf
    heads = 2 * groups
    q, k, v, _ = attention_inputs(1, heads, total[0], 16, total[1], dtype, size, seed=seed)
    k, v = k[:, ::groups], v[:, ::groups]
    options = dict(kv_log_weight=weight, return_lse=True)
    exact, expected = attend(*(x.double() for x in (q, k, v)), plan, backend="reference", **options)
    found = attend(q, k, v, plan, backend="flex", **(options | {"return_lse": lse}))
    if lse:
        found, found_lse = found
        unseen = expected == -torch.inf
        assert torch.equal(found_lse == -torch.inf, unseen)
        torch.testing.assert_close(
            found_lse.masked_fill(unseen, 0).double(), expected.masked_fill(unseen, 0),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    # The kernel's exponential is good to 20 bits.
    limit = 32 * max(torch.finfo(dtype).eps, 2**-21) * float(exact.abs().max())
    error = float((found.double() - exact).abs().max())
    assert error <= limit, f"seed {seed}: {error:.2e} apart, {limit:.2e} allowed"


def forget_graphs() -> None:
    """Compile the next plan anew."""
    torch._dynamo.reset()
    flex._compiled.cache_clear()


def check(form: str, seed: int) -> None:
    """One plan of a form; AssertionError says what is wrong."""
    dtype, metric, groups = FORMS[form]
    compare(seed, dtype, metric, lse=True, size=1.0 if seed % 3 else 4.0, groups=groups)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, help="JSON to go on from, and to write to")
    parser.add_argument("--seconds", type=float, default=1e9, help="no plan begins after them")
    args = parser.parse_args()
    begin, state = perf_counter(), {name: {"plans": 0, "wrong": [], "graphs": []} for name in FORMS}
    if args.state and args.state.exists():
        state |= json.loads(args.state.read_text())
    for form, found in state.items():
        forget_graphs()
        before = graphs()
        started = found["plans"]
        while found["plans"] < PLANS and perf_counter() - begin < args.seconds:
            try:
                check(form, found["plans"])
            except Exception:
                found["wrong"].append(found["plans"])
                traceback.print_exc()
            found["plans"] += 1
            if args.state:
                write_json(args.state, state)
        if found["plans"] > started:
            found["graphs"].append(graphs() - before)
            print(f"{form}: {found}", flush=True)
            if args.state:
                write_json(args.state, state)
    wrong = [x for x in state.values() if x["wrong"] or any(n != 3 for n in x["graphs"])]
    print(f"{sum(x['plans'] for x in state.values())} plans, {len(wrong)} forms with faults")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
