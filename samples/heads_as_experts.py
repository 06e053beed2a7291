"""Processor seconds of mixture of heads next to all heads, by tokens, heads that are on, and route.

    python samples/heads_as_experts.py -o docs/heads-as-experts.json

The arms take turns on one thread: the inner method in all heads (where that is dense, PyTorch's
attention, too), and mixtures around it with a random router, which takes every head about as often.
Router, weights and the making of lists are in the time. Results are checked against the formula
first, at the smallest size. What the file holds already is not measured again, so a run that is
killed goes on.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dittfast.attention import method_attention
from dittfast.environment import versions
from dittfast.files import write_json
from dittfast.measure.bench import Workload, layout_for
from dittfast.measure.check import check_attention
from dittfast.measure.timing import interleaved_seconds, percentiles
from dittfast.methods import Dense, Local, MixtureOfHeads

HEADS = 4  # of 64 channels; the first is shared
# What the heads run, and at how many tokens.
INNER = {
    "dense": (Dense(block_size=64), (4096, 8192)),
    "local": (Local(window=16), (4096, 8192, 16384)),
}
ARMS = {"half": (1, "block"), "three quarters": (2, "block"), "half, by token": (1, "token")}


def measure(inner: str, tokens: int, rounds: int) -> dict:
    """One row: seconds of each arm, and medians over rounds of its ratio to all heads."""
    method, work = INNER[inner][0], Workload(layout_for(tokens), heads=HEADS)
    layout, hidden = work.layout, work.hidden_states()
    q, k, v, grad = work.inputs()
    draw = torch.Generator().manual_seed(0)
    functions = {"all heads": arm(method, layout, q, k, v)}
    amounts = {"all heads": method.keep(layout, q.device).density}
    if method.dense:
        dense = torch.nn.functional.scaled_dot_product_attention
        functions["PyTorch"] = lambda: dense(q, k, v)
    for label, (routed, route) in ARMS.items():
        mixture = MixtureOfHeads(method, 1, routed, route)
        if tokens == 4096:
            check_attention(mixture, layout, q, k, v, grad, hidden_states=hidden)
        own = mixture.parameters(HEADS, work.head_dim, hidden.shape[2])
        own = {n: torch.randn(x.shape, generator=draw) / x.shape[1] ** 0.5 for n, x in own.items()}
        functions[label] = arm(mixture, layout, q, k, v, hidden_states=hidden, **own)
        kept = mixture.keep(layout, q.device)
        amounts[label] = mixture.amount(layout, HEADS, work.head_dim, kept).density
    seconds = interleaved_seconds(functions, rounds, "cpu", clock=time.process_time)
    ratios = {
        name: percentiles(a / b for a, b in zip(times, seconds["all heads"]))["p50"]
        for name, times in seconds.items()
    }
    medians = {name: percentiles(times)["p50"] for name, times in seconds.items()}
    return {"density": amounts, "seconds": medians, "to_all_heads": ratios, "rounds": rounds}


def arm(method, layout, q, k, v, **given):
    kept = method.keep(layout, q.device)
    return lambda: method_attention(method, layout, q, k, v, kept=kept, **given)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each arm")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = {"rows": {}}
    if args.output.exists():
        data = json.loads(args.output.read_text(encoding="utf-8"))
    for inner, (_, sizes) in INNER.items():
        for tokens in sizes:
            key = f"{inner}, {tokens}"
            if key not in data["rows"]:
                data["rows"][key] = measure(inner, tokens, args.rounds)
                print(key, json.dumps(data["rows"][key]), flush=True)
                settings = {"heads": HEADS, "head_dim": 64, "dtype": "float32", "threads": 1}
                write_json(args.output, data | settings | {"versions": versions()})


if __name__ == "__main__":
    main()
