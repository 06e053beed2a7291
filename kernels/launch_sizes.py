"""Launch sizes of the Triton kernels, by architecture, dtype and head dim.

The table is made so that kernels spill no registers and need no more shared memory than their
architecture has, which ``dittfast bench kernels --static`` checks without a GPU. Sizes are the
largest of those tried that fit; nobody has timed them on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class KernelConfig(NamedTuple):
    """Tile sizes and launch options of one kernel.

    Attributes:
        block_m, block_n: rows of a query tile and of a key tile.
        num_warps, num_stages: threads per program, and loads in flight.
        rule_tile: rows of a walked tile in partial blocks, where the token rule takes registers
            too; at most as many as in full blocks.
        max_registers: registers per thread, on NVIDIA only. Left to itself (0) the assembler
            sometimes spills a few bytes to fit one more program on a multiprocessor.
        rule_registers: the same where the plan has a token rule; None: ``max_registers``.
        matrix_rows: rows of the matrix instruction, on AMD only; 0 leaves them to the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    rule_tile: int = 32
    max_registers: int = 0
    rule_registers: int | None = None
    matrix_rows: int = 0

    def options(self, has_rule: bool) -> dict[str, int]:
        """Compiler options, as a launch takes them, for plans with or without a token rule."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        own_limit = has_rule and self.rule_registers is not None
        limit = self.rule_registers if own_limit else self.max_registers
        if limit:
            options["maxnreg"] = limit
        if self.matrix_rows:
            options["matrix_instr_nonkdim"] = self.matrix_rows
        return options


class LaunchConfig(NamedTuple):
    """Sizes of all kernels for one device, dtype and head dim."""

    forward: KernelConfig
    delta: KernelConfig
    dq: KernelConfig
    dkv: KernelConfig


# By head dim: forward, dq and dkv, each (block_m, block_n, num_warps, num_stages, rule_tile, ...).
_AMPERE_HALF = {
    64: ((128, 64, 8, 3, 32), (128, 32, 8, 3, 32), (32, 128, 8, 3, 16)),
    128: ((128, 64, 8, 2, 16), (128, 32, 8, 3, 16), (64, 64, 8, 2, 32)),
    256: ((64, 64, 8, 2, 32), (64, 32, 8, 2, 32), (32, 32, 8, 2, 16, 255)),
}
_NVIDIA_SINGLE = {
    64: ((64, 32, 8, 2, 16), (64, 32, 8, 2, 16, 255), (32, 64, 8, 2, 16, 255)),
    128: ((32, 32, 8, 2, 16), (32, 16, 4, 2, 16, 255), (16, 64, 8, 2, 16)),
    256: ((32, 16, 8, 1, 16, 255), (16, 16, 8, 1, 16, 120), (16, 32, 8, 1, 16)),
}
_HOPPER_SINGLE = {
    64: _NVIDIA_SINGLE[64],
    128: ((32, 16, 8, 2, 16, 255), (16, 16, 8, 1, 16, 96, 0), (16, 32, 8, 2, 16)),
}
# Consumer GPUs, whose shared memory is small.
_CONSUMER_HALF = {
    64: _AMPERE_HALF[64],
    128: ((128, 64, 8, 2, 16), (128, 32, 8, 2, 16), (64, 64, 8, 2, 32)),
    256: ((64, 32, 8, 2, 16), (64, 32, 8, 1, 16), (32, 32, 8, 2, 16, 255)),
}
# By architecture and bytes per value.
_TABLE = {
    ("sm_80", 2): _AMPERE_HALF,
    ("sm_86", 2): _CONSUMER_HALF,
    ("sm_120", 2): {
        **_CONSUMER_HALF,
        64: ((128, 64, 8, 3, 32), (128, 32, 8, 3, 16), (32, 64, 8, 3, 16)),
    },
    ("sm_90", 2): {
        64: ((128, 128, 8, 2, 32), (128, 64, 8, 3, 32), (64, 128, 8, 2, 16)),
        # Padded to 128, with a mask for the channels that are not there.
        112: ((128, 64, 8, 3, 16), (128, 64, 8, 2, 32), (32, 64, 8, 2, 32)),
        128: ((128, 64, 8, 3, 32), (128, 64, 8, 2, 32), (32, 64, 8, 2, 32)),
        256: ((64, 32, 8, 3, 16), (64, 64, 8, 2, 16), (32, 32, 8, 2, 32, 255)),
    },
    ("sm_100", 2): {
        64: ((128, 128, 8, 2, 16), (128, 128, 8, 2, 64), (64, 128, 8, 3, 32)),
        128: ((128, 64, 8, 2, 32), (128, 64, 8, 2, 32, 255), (64, 128, 8, 2, 32)),
        256: ((64, 64, 8, 2, 32), (128, 32, 8, 2, 32), (32, 64, 8, 2, 32)),
    },
    ("gfx942", 2): {
        # Padded to 64, with a mask for the channels that are not there; likewise at 112 above.
        48: ((128, 64, 4, 2, 16), (128, 64, 4, 2, 32), (64, 128, 4, 2, 32)),
        64: ((128, 64, 4, 2, 32), (128, 64, 4, 2, 32), (64, 128, 4, 2, 32)),
        128: ((128, 64, 4, 2, 32), (128, 32, 4, 2, 32), (32, 128, 4, 2, 16)),
        256: ((128, 32, 4, 1, 16), (64, 32, 4, 2, 16), (32, 64, 4, 1, 16)),
    },
    ("sm_80", 4): _NVIDIA_SINGLE,
    ("sm_86", 4): {
        64: ((64, 32, 8, 2, 16, 128, 0), *_NVIDIA_SINGLE[64][1:]),
        128: ((32, 16, 8, 2, 16, 255), (32, 16, 4, 2, 16, 255), (16, 64, 8, 2, 16)),
        256: ((32, 16, 8, 1, 16, 255), (16, 16, 16, 1, 16, 96, 0), (16, 32, 8, 1, 16)),
    },
    ("sm_90", 4): {
        **_HOPPER_SINGLE,
        256: ((32, 16, 8, 1, 16, 255), (16, 16, 8, 1, 16, 128), (16, 32, 8, 1, 16, 192, 0)),
    },
    ("sm_100", 4): {
        **_HOPPER_SINGLE,
        256: ((32, 16, 8, 1, 16, 255), (32, 16, 16, 1, 16, 112, 0), (16, 32, 8, 1, 16)),
    },
    ("sm_120", 4): {
        **_HOPPER_SINGLE,
        256: ((32, 16, 8, 1, 16, 255), (32, 16, 16, 1, 16, 128, 0), (16, 32, 8, 1, 16)),
    },
    ("gfx942", 4): {
        64: ((64, 32, 4, 1, 16), (64, 32, 4, 1, 16), (32, 64, 4, 1, 16)),
        128: ((64, 32, 4, 1, 16), (64, 32, 4, 1, 16), (32, 64, 4, 1, 16)),
        256: ((64, 16, 4, 1, 16), (64, 16, 4, 1, 16), (16, 32, 4, 1, 16)),
    },
}


# Which row a device takes.
_ROWS = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 7): "sm_86",
    (8, 9): "sm_86",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 0): "sm_120",
    (12, 1): "sm_120",
    "gfx90a": "gfx942",
    "gfx942": "gfx942",
}

# As dittfast.kernels.capabilities names them.
ARCHITECTURES = tuple(c if isinstance(c, str) else "sm_{}{}".format(*c) for c in _ROWS)


def not_supported_reason(capability: tuple[int, int] | str) -> str | None:
    """Why no launch sizes fit a device; None where some do."""
    if capability in _ROWS:
        return None
    name = lambda c: c if isinstance(c, str) else f"{c[0]}.{c[1]}"  # noqa: E731
    return (
        f"no launch sizes are known to fit compute capability {name(capability)} (they are for "
        f"{', '.join(map(name, _ROWS))}). "
        "Use backend='cpu' with CPU tensors, or backend='reference' for small sizes"
    )


def architecture_class(capability: tuple[int, int] | str) -> str:
    """The row of the table for a device.

    Raises:
        ValueError: none fits.
    """
    reason = not_supported_reason(capability)
    if reason:
        raise ValueError(reason)
    return _ROWS[capability]


# Kernels whose loops get shorter when walked tiles are fetched by tensor descriptors, which the
# hardware knows from Hopper on; docs/kernels.md has the numbers. Consumer Blackwell could, too, but
# its loops wait for the matrix unit.
_DESCRIPTORS = {"sm_90": ("forward", "dq"), "sm_100": ("forward", "dq", "dkv")}


def takes_descriptors(capability: tuple[int, int] | str, dtype: torch.dtype, kernel: str) -> bool:
    """Whether a kernel fetches what it walks by descriptors, where these can tell it."""
    kernels = _DESCRIPTORS.get(architecture_class(capability), ())
    return dtype.itemsize == 2 and kernel in kernels


def launch_config(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | str
) -> LaunchConfig:
    """Launch sizes of the kernels; head dims between those of the table take the next larger.

    Args:
        head_dim: up to 256.
        capability: (major, minor) on NVIDIA, the architecture's name on AMD.

    Raises:
        ValueError: no launch sizes fit the device.
    """
    name = architecture_class(capability)
    rows = _TABLE[name, dtype.itemsize]
    size = min(size for size in rows if size >= head_dim)
    forward, dq, dkv = (KernelConfig(*numbers) for numbers in rows[size])
    # Delta holds a tile of two tensors in registers and shares nothing between its threads.
    held = 16 if (size, dtype.itemsize) == (256, 4) else min(64, 8192 // size)
    delta = KernelConfig(block_m=held, block_n=0, num_warps=4, num_stages=2)
    config = LaunchConfig(forward, delta, dq, dkv)
    if name == "gfx942":
        # The compiler's choice, 32 rows, would have several warps compute the same ones.
        config = LaunchConfig(*(kernel._replace(matrix_rows=16) for kernel in config))
    return config
