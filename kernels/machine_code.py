"""Machine code as text, NVIDIA's SASS and AMD's: its loops, and what their instructions are.

Only what a disassembler prints is read. Loops are natural loops of the control flow, found by
dominators, because compilers put the retries of a wait behind the end of a kernel: a jump backwards
alone is no loop.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field

_SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_SASS_LABEL = re.compile(r"^(\.\w+):")
_SASS_TARGET = re.compile(r"`\((\.\w+)\)")
_AMD = re.compile(r"^\s+([a-z]\w*)([^;]*)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_ASYNC = re.compile(r"LDGSTS|UTMALDG|UBLKCP|(buffer|global)_load_.*\blds\b|global_load_lds")
_SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_f")
_MATRIX = re.compile(r"[HIQO]MMA|[HIQ]GMMA|UTC\w*MMA|v_mfma")
_VECTOR = re.compile(r"F(FMA|ADD|MUL)2?\b|v_(?!mfma)")
_FMA = re.compile(r"FFMA|v_(pk_)?fmac?_f32")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: opcode and operands, without the predicate.
        target: the label it may jump to.
        falls_through: whether the next instruction may follow.
        labels: those that stand before it.
    """

    text: str
    target: str | None = None
    falls_through: bool = True
    labels: tuple[str, ...] = ()

    @property
    def opcode(self) -> str:
        return self.text.split(maxsplit=1)[0]

    @property
    def is_matrix(self) -> bool:
        return bool(_MATRIX.match(self.opcode))

    @property
    def is_async_load(self) -> bool:
        """From global to shared memory, around the registers."""
        return bool(_ASYNC.match(self.text))

    @property
    def is_special(self) -> bool:
        """An exponential, a reciprocal and their like, for which there are few lanes."""
        return bool(_SPECIAL.match(self.opcode))

    @property
    def is_vector(self) -> bool:
        """What the fp32 lanes do: NVIDIA's fp32 sums and products, all of AMD's vector work."""
        return bool(_VECTOR.match(self.opcode))

    @property
    def flops(self) -> int | None:
        """Operations of one warp in a matrix instruction or fused multiply-add, otherwise 0.

        None where the shape is in no opcode: tcgen05 reads it from a descriptor.
        """
        if found := re.match(r"HMMA\.(16)(8)(8|16)\b", self.opcode):
            m, n, k = map(int, found.groups())
            return 2 * m * n * k
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.opcode):
            m, n, k = map(int, found.groups())
            return 2 * m * n * k // 4  # four warps do one together
        if found := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", self.opcode):
            m, n, k = map(int, found.groups())
            return 2 * m * n * k
        if _MATRIX.match(self.opcode):
            return None
        if not _FMA.match(self.opcode):
            return 0
        lanes = 64 if self.opcode.startswith("v_") else 32
        return 2 * lanes * (2 if "2" in self.opcode[:5] or "pk" in self.opcode else 1)


def disassemble(cubin: bytes) -> str:
    """SASS of a compiled kernel, by the nvdisasm that comes with Triton."""
    from triton import knobs

    descriptor, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(path)


def read_sass(text: str) -> list[Instruction]:
    """The instructions of a kernel in what ``nvdisasm -c`` prints."""
    code, labels = [], []
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels.append(label[1])
        elif found := _SASS.match(line):
            predicated = found[1].startswith("@")
            body = found[1].split(maxsplit=1)[1] if predicated else found[1]
            conditional = predicated or re.match(r"BRA\S* !?U?P\d", body)
            target = _SASS_TARGET.search(body) if body.startswith("BRA") else None
            ends = re.match(r"(BRA|EXIT|RET|BRX)\b", body) and not conditional
            code.append(Instruction(body, target and target[1], not ends, tuple(labels)))
            labels = []
    return code


def read_amdgcn(text: str) -> list[Instruction]:
    """The instructions of a kernel in the assembly that LLVM writes."""
    code, labels = [], []
    for line in text.split(".Lfunc_end", 1)[0].splitlines():
        if label := _AMD_LABEL.match(line):
            labels.append(label[1])
        elif (found := _AMD.match(line)) and not line.lstrip().startswith("."):
            opcode, operands = found[1], found[2].strip()
            target = operands if re.match(r"s_c?branch", opcode) else None
            ends = opcode in ("s_branch", "s_endpgm")
            code.append(Instruction(f"{opcode} {operands}", target, not ends, tuple(labels)))
            labels = []
    return code


@dataclass
class _Block:
    code: list[Instruction]
    after: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)


def _blocks(code: list[Instruction]) -> list[_Block]:
    starts = {0}
    for n, one in enumerate(code):
        if one.labels:
            starts.add(n)
        if one.target or not one.falls_through:
            starts.add(n + 1)
    starts = sorted(n for n in starts if n < len(code))
    blocks = [_Block(code[a:b]) for a, b in zip(starts, [*starts[1:], len(code)])]
    number = {label: n for n, block in enumerate(blocks) for label in block.code[0].labels}
    for n, block in enumerate(blocks):
        last = block.code[-1]
        after = [number[last.target]] if last.target in number else []
        if last.falls_through and n + 1 < len(blocks):
            after.append(n + 1)
        block.after = after
        for m in after:
            blocks[m].before.append(n)
    return blocks


def _dominators(blocks: list[_Block]) -> dict[int, set[int]]:
    """Of each block that can be reached, the blocks on every way to it."""
    reached, todo = [], [0]
    while todo:
        n = todo.pop()
        if n not in reached:
            reached.append(n)
            todo += blocks[n].after
    found = {n: set(reached) for n in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in reached[1:]:
            ways = [found[m] for m in blocks[n].before if m in found]
            new = set.intersection(*ways) | {n}
            changed |= new != found[n]
            found[n] = new
    return found


def matrix_loops(code: list[Instruction], multiplies=lambda one: one.is_matrix):
    """Bodies of the innermost loops that multiply matrices, in the order of the code.

    Loops within them that do not, such as a wait's, are left out: how often they run is not known.

    Args:
        code: of one kernel.
        multiplies: tells the instructions that make a loop one of these.
    """
    blocks = _blocks(code)
    dominators = _dominators(blocks)
    loops: dict[int, set[int]] = {}
    for n, over in dominators.items():
        for head in set(blocks[n].after) & over:
            body, todo = loops.setdefault(head, {head}), [n]
            while todo:
                m = todo.pop()
                if m not in body:
                    body.add(m)
                    todo += [x for x in blocks[m].before if x in dominators]
    works = {n for n, block in enumerate(blocks) if any(map(multiplies, block.code))}
    inside = {
        head: [b for h, b in loops.items() if h != head and h in loops[head]] for head in loops
    }
    found = []
    for head, body in sorted(loops.items()):
        if body & works and not any(inner & works for inner in inside[head]):
            own = sorted(body.difference(*inside[head]))
            found.append([one for n in own for one in blocks[n].code])
    return found


def counted(loop: Iterable[Instruction]) -> dict[str, int]:
    """How many instructions of a loop there are, in all and of the kinds that matter."""
    loop = list(loop)
    return {
        "instructions": len(loop),
        "matrix": sum(one.is_matrix for one in loop),
        "async_loads": sum(one.is_async_load for one in loop),
        "special": sum(one.is_special for one in loop),
        "vector": sum(one.is_vector for one in loop),
    }
