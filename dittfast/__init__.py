"""dittfast: faster diffusion transformers inside diffusers pipelines."""

from pathlib import Path as _Path

# The code folders kernels/, pipelines/, distill/, configs/ and samples/ stand beside this one in
# the repository and inside it once installed. From a checkout, let `dittfast.kernels` find them.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "setup.cfg").is_file():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

# Resolved on first use: `import dittfast` loads torch, and diffusers only when it is needed.
_EXPORTS = {
    "Layout": "dittfast.layout",
    "Plan": "dittfast.plan",
    "Schedule": "dittfast.schedule",
    "Rule": "dittfast.mixture",
    "Mixture": "dittfast.mixture",
    "attend": "dittfast.attention",
    "register_backend": "dittfast.attention",
    "Capabilities": "dittfast.kernels.capabilities",
    "enable": "dittfast.pipelines.adapter",
    "disable": "dittfast.pipelines.adapter",
    "describe": "dittfast.pipelines.description",
    "HeadGuidance": "dittfast.methods.head_guidance",
    "guide": "dittfast.pipelines.guidance.plain",
    "unguide": "dittfast.pipelines.guidance.plain",
    "HeadGuider": "dittfast.pipelines.guidance.guider",
    "hunt": "dittfast.pipelines.headhunter.hunt",
    "generate_high_resolution": "dittfast.pipelines.runs.high_resolution",
    "sample": "dittfast.pipelines.runs.sample",
    "load_adapter": "dittfast.distill.artifacts",
    "merge": "dittfast.distill.artifacts",
    "unmerge": "dittfast.distill.artifacts",
    "unload_adapter": "dittfast.distill.artifacts",
    "RadialAttnProcessor": "dittfast.pipelines.processors",
    "LocalAttnProcessor": "dittfast.pipelines.processors",
    "NeighborhoodAttnProcessor": "dittfast.pipelines.processors",
    "TopKAttnProcessor": "dittfast.pipelines.processors",
    "LogLinearAttnProcessor": "dittfast.pipelines.processors",
    "RectifiedAttnProcessor": "dittfast.pipelines.processors",
    "SolAttnProcessor": "dittfast.pipelines.processors",
    "VSAAttnProcessor": "dittfast.pipelines.processors",
    "ReattentionAttnProcessor": "dittfast.pipelines.processors",
    "LinearAttnProcessor": "dittfast.pipelines.processors",
    "AgentAttnProcessor": "dittfast.pipelines.processors",
    "SLAAttnProcessor": "dittfast.pipelines.processors",
    "MixtureOfHeadsAttnProcessor": "dittfast.pipelines.processors",
    "HeadGuidanceAttnProcessor": "dittfast.pipelines.processors",
}
_MODULES = ("functional", "methods")
__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str):
    from importlib import import_module

    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return import_module(f"dittfast.{name}")
    raise AttributeError(f"module 'dittfast' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
