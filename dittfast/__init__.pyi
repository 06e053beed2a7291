# What type checkers and editors see of the names that __init__.py resolves on first use.
from dittfast import functional as functional
from dittfast import methods as methods
from dittfast.attention import attend as attend
from dittfast.attention import register_backend as register_backend
from dittfast.distill.artifacts import load_adapter as load_adapter
from dittfast.distill.artifacts import merge as merge
from dittfast.distill.artifacts import unload_adapter as unload_adapter
from dittfast.distill.artifacts import unmerge as unmerge
from dittfast.kernels.capabilities import Capabilities as Capabilities
from dittfast.layout import Layout as Layout
from dittfast.methods.head_guidance import HeadGuidance as HeadGuidance
from dittfast.mixture import Mixture as Mixture
from dittfast.mixture import Rule as Rule
from dittfast.pipelines.adapter import disable as disable
from dittfast.pipelines.adapter import enable as enable
from dittfast.pipelines.description import describe as describe
from dittfast.pipelines.guidance.guider import HeadGuider as HeadGuider
from dittfast.pipelines.guidance.plain import guide as guide
from dittfast.pipelines.guidance.plain import unguide as unguide
from dittfast.pipelines.headhunter.hunt import hunt as hunt
from dittfast.pipelines.processors import AgentAttnProcessor as AgentAttnProcessor
from dittfast.pipelines.processors import HeadGuidanceAttnProcessor as HeadGuidanceAttnProcessor
from dittfast.pipelines.processors import LinearAttnProcessor as LinearAttnProcessor
from dittfast.pipelines.processors import LocalAttnProcessor as LocalAttnProcessor
from dittfast.pipelines.processors import LogLinearAttnProcessor as LogLinearAttnProcessor
from dittfast.pipelines.processors import (
    MixtureOfHeadsAttnProcessor as MixtureOfHeadsAttnProcessor,
)
from dittfast.pipelines.processors import NeighborhoodAttnProcessor as NeighborhoodAttnProcessor
from dittfast.pipelines.processors import RadialAttnProcessor as RadialAttnProcessor
from dittfast.pipelines.processors import ReattentionAttnProcessor as ReattentionAttnProcessor
from dittfast.pipelines.processors import RectifiedAttnProcessor as RectifiedAttnProcessor
from dittfast.pipelines.processors import SLAAttnProcessor as SLAAttnProcessor
from dittfast.pipelines.processors import SolAttnProcessor as SolAttnProcessor
from dittfast.pipelines.processors import TopKAttnProcessor as TopKAttnProcessor
from dittfast.pipelines.processors import VSAAttnProcessor as VSAAttnProcessor
from dittfast.pipelines.runs.high_resolution import (
    generate_high_resolution as generate_high_resolution,
)
from dittfast.pipelines.runs.sample import sample as sample
from dittfast.plan import Plan as Plan
from dittfast.schedule import Schedule as Schedule

__version__: str
__all__: list[str]
