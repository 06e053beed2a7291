"""What a multiprocessor of each architecture holds at once, and what it does in a cycle.

Of NVIDIA: "Compute capabilities" and "Arithmetic instructions" in the CUDA programming guide; how
registers and shared memory are handed out, from the occupancy calculator of CUDA. Matrix rates are
those of the data sheets over multiprocessors and boost clock: A100 312 TFLOPS (108, 1.41 GHz), RTX
3090 71 (82, 1.695), RTX 4090 165 (128, 2.52), H100 989 (132, 1.83), B200 2250 (148, 1.85), RTX 5090
209.5 (170, 2.41), MI300X 1307 (304, 2.1), for bf16 with fp32 sums, and not sparse. Of AMD: the
instruction set of MI300 and LLVM's guide to its AMDGPU backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .machine_code import Instruction, counted


@dataclass(frozen=True)
class Multiprocessor:
    """A streaming multiprocessor, or on AMD a compute unit; both have four schedulers.

    Attributes:
        warps, blocks: that it holds at most.
        shared: bytes of shared memory of all its blocks.
        shared_per_block: the most that one may use.
        matrix_flops: bf16 and fp16 operations a cycle, with fp32 sums.
        vector_flops: fp32 operations a cycle outside of the matrix unit.
        shared_reserved: bytes that each block takes beside its own.
        shared_unit: shared memory is handed out in this many bytes.
        registers: of 32 bits for each lane of a scheduler's warps, all together.
        register_unit: registers are handed out to a warp in this many for each lane.
        warp_unit: warps get their registers in groups of so many.
        special_cycles: that an exponential of a scheduler's warp keeps its unit busy.
        vector_cycles: the same of the fp32 lanes and what they do.
        special_in_vector: whether the fp32 lanes do exponentials, too.
        tensor_columns: of tensor memory, where tcgen05 sums.
    """

    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    matrix_flops: int
    vector_flops: int
    shared_reserved: int = 1024
    shared_unit: int = 128
    registers: int = 512
    register_unit: int = 8
    warp_unit: int = 4
    special_cycles: int = 8
    vector_cycles: int = 1
    special_in_vector: bool = False
    tensor_columns: int = 0

    def blocks_at_once(
        self, num_warps: int, registers: int, shared: int, tensor_columns: int = 0
    ) -> int:
        """How many blocks of a kernel run on it side by side; 0 where not even one does.

        Args:
            num_warps: of a block.
            registers: of a thread.
            shared: bytes of a block.
            tensor_columns: of a block.
        """
        each = math.ceil(max(registers, 1) / self.register_unit) * self.register_unit
        # Of the four schedulers, each with its own registers.
        warps = min(self.warps, 4 * (self.registers // each))
        limits = [self.blocks, warps // self.warp_unit * self.warp_unit // num_warps]
        taken = math.ceil(shared / self.shared_unit) * self.shared_unit + self.shared_reserved
        if shared > self.shared_per_block:
            return 0
        if taken:
            limits.append(self.shared // taken)
        if tensor_columns:
            limits.append(self.tensor_columns // tensor_columns)
        return min(limits)

    def cycles(self, loop: list[Instruction], num_warps: int, flops: int, half: bool) -> dict:
        """Cycles that one pass of a block through a loop keeps each unit busy at least.

        Args:
            loop: its instructions, as a warp runs them.
            num_warps: of a block.
            flops: of a block's matrix products in one pass.
            half: whether they are of 16-bit numbers.
        """
        n = counted(loop)
        per_scheduler = num_warps / 4
        rate = self.matrix_flops if half else self.vector_flops
        special, vector = n["special"] * self.special_cycles, n["vector"] * self.vector_cycles
        if self.special_in_vector:
            vector += special - n["special"] * self.vector_cycles
        return {
            "issue": n["instructions"] * per_scheduler,
            "special": special * per_scheduler,
            "vector": vector * per_scheduler,
            "matrix": flops / rate,
        }


_KIB = 1024
_HOPPER = dict(warps=64, blocks=32, shared=228 * _KIB, shared_per_block=227 * _KIB)
# A wave of 64 takes four passes over 16 lanes, sixteen for an exponential.
_WAVES = dict(
    shared_reserved=0, shared_unit=512, warp_unit=1, special_cycles=16, vector_cycles=4,
    special_in_vector=True,
)  # fmt: skip
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * _KIB, 163 * _KIB, 2048, 128, vector_cycles=2),
    "sm_86": Multiprocessor(48, 16, 100 * _KIB, 99 * _KIB, 512, 256),
    "sm_89": Multiprocessor(48, 24, 100 * _KIB, 99 * _KIB, 512, 256),
    "sm_90": Multiprocessor(**_HOPPER, matrix_flops=4096, vector_flops=256),
    "sm_100": Multiprocessor(**_HOPPER, matrix_flops=8192, vector_flops=256, tensor_columns=512),
    "sm_120": Multiprocessor(48, 24, 100 * _KIB, 99 * _KIB, 512, 256),
    "gfx942": Multiprocessor(32, 32, 64 * _KIB, 64 * _KIB, 2048, 256, **_WAVES),
}
