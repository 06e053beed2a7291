"""Transformer classes of diffusers without a layout reader, and why."""

from __future__ import annotations

from typing import NamedTuple


class Other(NamedTuple):
    """Why a class has no reader.

    Attributes:
        kind: in a word or two.
        why: in a sentence without a full stop, whose subject is the class.
        never: whether a described layout would not help either.
    """

    kind: str
    why: str
    never: bool = False


_SOUND = Other("no grid", "makes sound: a sequence without rows and columns")
_UNET = Other(
    "part of a U-Net", "is a part of U-Nets, which call it at several sizes in every step"
)
_LINEAR = Other(
    "linear attention",
    "has linear attention: it sums keys and values first, so there are no pairs of tokens to leave "
    "out",
    never=True,
)

OTHERS: dict[str, Other] = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": Other(
        "linear attention",
        "has linear attention, a recurrence over frames, in three of four layers, and computes the "
        "fourth's outside of diffusers' attention modules",
        never=True,
    ),
    "AnyFlowFARTransformer3DModel": Other(
        "flex attention",
        "attends causally from chunk to chunk, in one call of flex attention with a mask of its "
        "own; AnyFlowTransformer3DModel, which sees the whole video, is known",
        never=True,
    ),
    "Kandinsky6SRTransformer3DModel": Other(
        "flex attention",
        "runs its own sparse attention (NABLA), in flex attention over reordered tokens",
        never=True,
    ),
    "WanAnimate2Transformer3DModel": Other(
        "flex attention",
        "sees the video and kept keys of its reference in one call of flex attention with a mask "
        "of its own",
        never=True,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Other(
        "size not given",
        "gets packed tokens and ready-made rotary tables, and so does not know its own grid",
    ),
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "RFD4ProteinaTransformer": Other("no grid", "makes proteins: a sequence of residues"),
    "PriorTransformer": Other("no grid", "makes one embedding, of a few tokens"),
    "DreamLiteTransformer2DModel": _UNET,
    "Transformer2DModel": _UNET,
    "TransformerTemporalModel": _UNET,
}


def transformer_classes() -> list[str]:
    """Names of all transformer classes of the installed diffusers, sorted."""
    from diffusers.models import transformers
    from diffusers.models.modeling_utils import ModelMixin

    return sorted(
        name
        for name, value in vars(transformers).items()
        if isinstance(value, type) and issubclass(value, ModelMixin)
    )
