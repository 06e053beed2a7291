"""Published rates of GPUs and attention kernels, with their sources. None of them is ours."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rate:
    """How fast a kernel computes attention, forward, bf16, head dim 128, long sequences.

    Attributes:
        tflops: useful operations, 4 for each pair, query and channel, in 1e12 a second.
        source: where it was published.
        sparse: measured on block lists; otherwise on dense attention, which an engine with block
            lists at best keeps up with.
    """

    tflops: float
    source: str
    sparse: bool = False


@dataclass(frozen=True)
class Ratio:
    """Where only that was published: an engine's rate over that of a dense kernel."""

    value: float
    dense: str
    source: str


@dataclass(frozen=True)
class Gpu:
    """A GPU and what was published of it.

    Attributes:
        peak_tflops: dense bf16 with fp32 sums.
        memory: terabytes a second.
        link: gigabytes a second from one GPU to the others of its node, one way.
        network: the same to other nodes, for each GPU.
        per_node: GPUs of a node.
        dense: dense kernels by name; the best is what people use.
        engines: what runs block lists, by the name of the backend.
        source: of the first five.
        architecture: as backends name it.
        ratios: of engines whose own rate was not published.
    """

    name: str
    peak_tflops: float
    memory: float
    link: float
    network: float
    per_node: int
    dense: dict[str, Rate]
    engines: dict[str, Rate]
    source: str
    architecture: str
    ratios: dict[str, Ratio] = field(default_factory=dict)

    @property
    def best(self) -> tuple[str, Rate] | None:
        """The fastest dense kernel that was published; None where none was."""
        return max(self.dense.items(), key=lambda x: x[1].tflops, default=None)


_FA3 = "FlashAttention-3, arXiv:2407.08608, figure of forward speed, head dim 128, 16k, H100 SXM5"
_FA4 = "FlashAttention-4, abstract: up to 1613 TFLOPs/s on B200, 1.3 x cuDNN 9.13 and 2.7 x Triton"
_FLEX = "PyTorch blog on FlexAttention: 0.9 of FlashAttention-2 forward; that from " + _FA3
_VSA = "flashinfer-ai/flashinfer issue 4554: 900 to 960 on GB200, 0.60 to 0.65 of FlashAttention-4"
_5090 = "gau-nernst, Speed-of-light Flash Attention for 5090 in CUDA C++: RTX 5090 at 400 W"
_MI300X = "midiareshadi.github.io, attn-dsl-bench: AITER is 18 to 62 % faster than Triton on MI300X"
_SXM = "NVIDIA data sheets of H100, H200 and HGX B200; 400 Gb/s of network for each GPU assumed"
_PCIE = (
    "NVIDIA white papers on Ada and RTX Blackwell; PCIe x16 between GPUs, and 100 Gb/s of network "
    "for eight assumed"
)
_LINKS = (
    "AMD Instinct MI300X data sheet; seven links of 64 GB/s one way, 400 Gb/s of network assumed"
)

_HOPPER_DENSE = {
    "FlashAttention-2": Rate(370, _FA3),
    "cuDNN": Rate(595, _FA3),
    "FlashAttention-3": Rate(648, _FA3),
}
_HOPPER_ENGINES = {
    "triton": Rate(395, _FA3),
    "flex": Rate(333, _FLEX),
    "cudnn": Rate(595, _FA3),
}
_BLACKWELL_DENSE = {
    "cuDNN": Rate(1241, _FA4),
    "FlashAttention-4": Rate(1613, _FA4),
}
_BLACKWELL_ENGINES = {
    "triton": Rate(597, _FA4),
    "flash4": Rate(1488, _VSA, sparse=True),
    "cudnn": Rate(930, _VSA, sparse=True),
}
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 989, 3.35, 450, 50, 8, _HOPPER_DENSE, _HOPPER_ENGINES, _SXM, "sm_90"),
        Gpu("H200", 989, 4.8, 450, 50, 8, _HOPPER_DENSE, _HOPPER_ENGINES, _SXM, "sm_90"),
        Gpu("B200", 2250, 8.0, 900, 50, 8, _BLACKWELL_DENSE, _BLACKWELL_ENGINES, _SXM, "sm_100"),
        Gpu("RTX 4090", 165, 1.01, 32, 1.56, 8, {}, {}, _PCIE, "sm_89"),
        Gpu(
            "RTX 5090", 209.5, 1.79, 64, 1.56, 8,
            {"FlashAttention-2": Rate(190.6, _5090), "cuDNN": Rate(203.6, _5090)},
            {}, _PCIE, "sm_120",
        ),
        Gpu(
            "MI300X", 1307, 5.3, 448, 50, 8, {}, {},
            _LINKS, "gfx942", {"triton": Ratio(0.62, "AITER", _MI300X)},
        ),
    )
}  # fmt: skip


def gpu_of(name: str) -> Gpu:
    """The GPU of that name, however it is written.

    Raises:
        ValueError: an unknown one; the known are listed.
    """
    plain = lambda text: "".join(text.lower().split()).replace("-", "")  # noqa: E731
    for known in GPUS.values():
        if plain(known.name) == plain(name):
            return known
    raise ValueError(f"no rates of the GPU {name!r}; known are {', '.join(GPUS)}")
