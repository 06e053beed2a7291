"""Tiny random transformers that get one packed sequence, and their inputs."""

from __future__ import annotations

import math

import torch

from .tiny_model import BATCH, HEADS, IMAGE, VIDEO, Tiny, image_ids, time


def _qwen21(draw, model, references=False) -> dict:
    # A slot is four tokens of an image: its grid has an even number of rows and columns.
    text, slots = draw.text, math.prod(draw.image) // 4
    mask = torch.zeros(BATCH, text, dtype=torch.bool)
    shapes = [draw.grid]
    if references:
        mask[:, 2:4] = True
        shapes = [(1, 2, 4), *shapes]
    tokens = sum(h * w for _, h, w in shapes)
    return dict(
        hidden_states=draw(BATCH, tokens, 8),
        encoder_hidden_states=draw(BATCH, text, 32),
        timestep=time(0.5),
        img_shapes=[shapes] * BATCH,
        img_mask=torch.cat([mask, mask.new_ones(BATCH, slots)], 1),
        encoder_hidden_states_mask=draw.text_mask(text, 2),
    )


def _ideogram4(draw, model, lengths=None) -> dict:
    """Texts shorter than the longest are padded in front."""
    lengths = torch.tensor(lengths or [draw.text] * BATCH)
    valid = torch.arange(draw.text) >= draw.text - lengths[:, None]
    image = math.prod(draw.image)
    tokens = draw.text + image
    places = torch.zeros(BATCH, tokens, 3, dtype=torch.long)
    places[:, : draw.text] = (valid.cumsum(1) - 1).clamp(min=0)[..., None]
    places[:, draw.text :] = image_ids(draw.image).long() + 1000
    drawn = torch.full((BATCH, image), 2)
    return dict(
        hidden_states=torch.cat([torch.zeros(BATCH, draw.text, 8), draw(BATCH, image, 8)], 1),
        timestep=time(0.5),
        encoder_hidden_states=draw(BATCH, tokens, 32),
        position_ids=places,
        segment_ids=torch.cat([valid.long() * 2 - 1, drawn - 1], 1),
        indicator=torch.cat([valid.long() * 3, drawn], 1),
    )


def _minimax_h3(draw, model) -> dict:
    audio, reference = 6, (2, 3)
    counts = [draw.text, math.prod(reference), audio, math.prod(draw.grid)]
    text_rows, reference_rows, audio_rows, video_rows = torch.arange(sum(counts)).split(counts)
    places = torch.zeros(int(video_rows[-1]) + 1, 3, dtype=torch.float64)
    places[text_rows, 0] = torch.arange(draw.text).double()
    places[reference_rows] = image_ids(reference).double() * 4 + torch.tensor([draw.text, 0, 0])
    places[audio_rows, 0] = draw.text + torch.arange(audio).double()
    grid = torch.cartesian_prod(*(torch.arange(n).double() for n in draw.grid))
    places[video_rows] = grid * torch.tensor([5.0, 4.0, 4.0]) + torch.tensor(
        [draw.text + 1.0, 0, 0]
    )
    tags = torch.ones(len(places), dtype=torch.long)
    tags[audio_rows], tags[text_rows] = 2, 0
    return dict(
        hidden_states=draw(1, len(reference_rows) + len(video_rows), 16),
        audio_hidden_states=draw(1, audio, 8),
        encoder_hidden_states=draw(1, draw.text, 32),
        timestep=torch.tensor([0.5, 0.0]),
        timestep_indices=torch.zeros(len(places), dtype=torch.long),
        token_tags=tags,
        position_ids=places,
        video_indices=torch.cat([reference_rows, video_rows]),
        audio_indices=audio_rows,
        text_indices=text_rows,
    )


def _cosmos3(draw, model) -> dict:
    frames, height, width = draw.grid
    tokens = frames * height * width
    noisy = torch.arange(1, frames)
    places = torch.arange(draw.text).expand(3, -1)
    grid = torch.cartesian_prod(*(torch.arange(n) for n in draw.grid)).T
    grid = grid + torch.tensor([[100], [0], [0]])
    rows = torch.arange(draw.text, draw.text + tokens)
    sound = torch.arange(draw.text + tokens, draw.text + tokens + 4)
    sound_places = (200 + torch.arange(4)).expand(3, -1)
    return dict(
        input_ids=torch.arange(draw.text),
        text_indexes=torch.arange(draw.text),
        position_ids=torch.cat([places, grid, sound_places], 1),
        und_len=draw.text,
        sequence_length=draw.text + tokens + 4,
        vision_tokens=[draw(1, 4, frames, 2 * height, 2 * width)],
        vision_token_shapes=[draw.grid],
        vision_sequence_indexes=rows,
        vision_mse_loss_indexes=rows[height * width :],
        vision_timesteps=torch.full((len(noisy) * height * width,), 500.0),
        vision_noisy_frame_indexes=[noisy],
        sound_tokens=[draw(6, 4)],
        sound_token_shapes=[(4, 1, 1)],
        sound_sequence_indexes=sound,
        sound_mse_loss_indexes=sound,
        sound_timesteps=torch.full((4,), 500.0),
        sound_noisy_frame_indexes=[torch.arange(4)],
    )


def _joyimage_plus(draw, model) -> dict:
    """The second row has no reference image, and is padded."""
    shapes = [[(1, *draw.image), (1, 3, 5)], [(1, *draw.image)]]
    return dict(
        hidden_states=draw(BATCH, math.prod(draw.image) + 15, 4, 1, 2, 2),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_hidden_states_mask=draw.text_mask(),
        shape_list=shapes,
    )


_QWEN21_GRID = (10, 8)
_QWEN21 = dict(
    **HEADS, in_channels=8, out_channels=8, num_layers=2, context_in_dim=32, mlp_ratio=2,
    axes_dims_rope=(4, 4, 8),
)  # fmt: skip
_IDEOGRAM4 = dict(
    **HEADS, in_channels=8, num_layers=2, intermediate_size=32, adaln_dim=16, llm_features_dim=32,
    mrope_section=(4, 2, 2),
)  # fmt: skip
_MINIMAX_H3 = dict(
    **HEADS, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=32, in_channels=4,
    audio_in_channels=8, text_dim=32, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=16,
    rope_freq_dim=2,
)  # fmt: skip
_COSMOS3 = dict(
    head_dim=16, hidden_size=32, intermediate_size=32, latent_channel=4, patch_latent_dim=16,
    num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, vocab_size=16,
    sound_gen=True, sound_dim=6, rope_axes_dim=[4, 2, 2],
)  # fmt: skip
_JOYIMAGE_PLUS = dict(
    in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=32, mlp_width_ratio=1.0,
    num_layers=2, rope_dim_list=[4, 4, 8],
)  # fmt: skip

TINY_PACKED: dict[str, Tiny] = {
    "qwen-image-2.1": Tiny(
        "QwenImage21Transformer2DModel", _QWEN21, _qwen21, (1, *_QWEN21_GRID), None
    ),
    "qwen-image-2.1-edit": Tiny(
        "QwenImage21Transformer2DModel",
        _QWEN21,
        lambda draw, model: _qwen21(draw, model, references=True),
        (1, *_QWEN21_GRID),
        None,
    ),
    "ideogram4": Tiny("Ideogram4Transformer2DModel", _IDEOGRAM4, _ideogram4, (1, *IMAGE), None),
    "minimax-h3": Tiny("MiniMaxH3Transformer3DModel", _MINIMAX_H3, _minimax_h3, VIDEO, None),
    "cosmos3": Tiny(
        "Cosmos3OmniTransformer", _COSMOS3, _cosmos3, VIDEO, ("vision_tokens", (2, 3, 4))
    ),
    "joyimage-edit-plus": Tiny(
        "JoyImageEditPlusTransformer3DModel", _JOYIMAGE_PLUS, _joyimage_plus, (1, *IMAGE), None
    ),
}
