#!/usr/bin/env bash
# flex_attention without torch.compile attends to blocks that the BlockMask does not list
#
# Versions: torch 2.14.1, CPU; seen on 2026-11-29
#
# A BlockMask made by from_kv_blocks, with lists of full blocks and no mask_mod, says by its lists
# alone what is seen. Compiled, flex_attention follows the lists. Called without torch.compile it
# returns plain dense attention: its eager path evaluates mask_mod only, and without one nothing
# is hidden. There is a warning about speed and none about the result. Who debugs a block-sparse
# model by leaving out torch.compile debugs another model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 256, 16) for _ in range(3))
none = torch.zeros(1, 1, 2, dtype=torch.int32)
one = torch.ones(1, 1, 2, dtype=torch.int32)
own_first = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
mask = BlockMask.from_kv_blocks(none, torch.zeros_like(own_first), one, own_first, BLOCK_SIZE=128)

halves = [(x[:, :, :128], x[:, :, 128:]) for x in (q, k, v)]
listed = torch.cat([scaled_dot_product_attention(*part) for part in zip(*halves)], dim=2)
dense = scaled_dot_product_attention(q, k, v)
eager = flex_attention(q, k, v, block_mask=mask)
compiled = torch.compile(flex_attention)(q, k, v, block_mask=mask)

for name, out in (("eager", eager), ("compiled", compiled)):
    print(f"{name}: {(out - listed).abs().max():.1e} from the listed blocks, {(out - dense).abs().max():.1e} from dense")
torch.testing.assert_close(compiled, listed)
torch.testing.assert_close(eager, dense)
assert (eager - listed).abs().max() > 0.1
PYTHON
