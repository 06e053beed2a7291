"""Neighborhood plans against NATTEN's own functions, every option of small grids.

    python tests/natten_worker.py FOLDER 9 4x5 2x3x4

FOLDER holds an installed NATTEN. Queries of zero and values of the unit matrix make its output tell
which keys each token sees.
"""

import itertools
import math
import sys

import torch
from test_neighborhood import axis_options

from dittfast import Layout
from dittfast.methods import Neighborhood


def natten_mask(shape, window, stride, dilation, causal):
    """``[N, N]`` bool of what NATTEN's output is made of; None where it does not run."""
    import natten.functional

    tokens = math.prod(shape)
    width = max(8, 1 << (tokens - 1).bit_length())  # the head dims that it takes
    run = getattr(natten.functional, f"na{len(shape)}d")
    q = torch.zeros(1, *shape, 1, width)
    v = torch.eye(tokens, width).reshape(1, *shape, 1, width)
    options = dict(kernel_size=window, stride=stride, dilation=dilation, is_causal=causal)
    try:
        out = run(q, q, v, **options, backend="flex-fna")
    except NotImplementedError:
        return None
    out = out.reshape(tokens, width)[:, :tokens]
    kept = out > 0
    torch.testing.assert_close(out, kept / kept.sum(1, keepdim=True))
    return kept


def main(folder: str, *grids: str) -> None:
    sys.path.append(folder)
    agree = refused = 0
    for grid in grids:
        shape = tuple(int(n) for n in grid.split("x"))
        layout = Layout.video(*(1,) * (3 - len(shape)), *shape)
        # NATTEN takes no window of one token.
        axes = [[x for x in axis_options(n) if x[0] > 1] for n in shape]
        for options in itertools.product(*axes):
            options = tuple(zip(*options))
            expected = natten_mask(shape, *options)
            if expected is None:
                refused += 1
                continue
            ours = Neighborhood(*options).plan(layout).to_dense_mask()[0, 0]
            assert torch.equal(ours, expected), (shape, options)
            agree += 1
    print(f"{agree} agree, {refused} do not run in NATTEN")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(*sys.argv[1:])
