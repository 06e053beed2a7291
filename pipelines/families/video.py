"""Layout readers of video transformers: from the arguments of ``forward`` to token positions.

Each takes ``(model, arguments by name)``. The comment says the order of the sequence at
``scaled_dot_product_attention``.
"""

from __future__ import annotations

import math

import torch

from dittfast.layout import Grid, Layout

from .sequences import Sequences, joint, last_grid, patches, text_lengths


def video(model, arguments: dict) -> Layout:
    # Wan, VACE, Cosmos: latents [B, C, F, H, W]; text is cross-attention.
    return Layout((patches(arguments["hidden_states"].shape[2:], model.config.patch_size),))


def skyreels(model, arguments: dict) -> Layout:
    if model.config.num_frame_per_block > 1:
        raise ValueError(
            f"this SkyReels-V2 has causal attention (num_frame_per_block = "
            f"{model.config.num_frame_per_block}): its mask differs between queries, and a plan "
            "would drop it. Use a checkpoint with num_frame_per_block = 1, or no dittfast"
        )
    return video(model, arguments)


def _grid(model, sizes) -> Grid:
    """Latents of models with ``patch_size_t``, which may be None."""
    config = model.config
    return patches(sizes, (config.get("patch_size_t") or 1, *[config.patch_size] * 2))


def allegro(model, arguments: dict) -> Layout:
    # The video alone.
    return Layout((_grid(model, arguments["hidden_states"].shape[2:]),))


def hunyuan_video(model, arguments: dict) -> Layout:
    # Video, then text (for image to video: image tokens and text), padded.
    grid = _grid(model, arguments["hidden_states"].shape[2:])
    return joint(grid, arguments["encoder_hidden_states"].shape[1])


def hunyuan_video15(model, arguments: dict) -> Layout:
    # Video, then image, glyph and text tokens, the valid ones of all three first.
    grid = _grid(model, arguments["hidden_states"].shape[2:])
    names = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")
    return joint(grid, sum(arguments[name].shape[1] for name in names))


def hunyuan_video15_mask(func, args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The model builds m mᵀ in every layer: 10 GB at 100,000 tokens. Keep m, expanded.

    Its rows are only read back by :func:`~dittfast.pipelines.layer.key_log_weight`, for grid
    tokens, where both agree.
    """
    if func not in (torch.Tensor.repeat, torch.Tensor.__and__):
        return None
    mask = args[0]
    if mask.dtype == torch.bool and mask.ndim == 4:
        if func is torch.Tensor.repeat and args[1:] == (1, 1, mask.shape[-1], 1):
            return mask.expand(-1, -1, mask.shape[-1], -1)
        if func is torch.Tensor.__and__ and mask.stride(-2) == 0:
            return mask
    return None


def mochi(model, arguments: dict) -> Sequences:
    # Video, then the valid text only. The batch rows attend one by one.
    frames, height, width = arguments["hidden_states"].shape[2:]
    grid = patches((frames, height, width), model.config.patch_size)
    rows = text_lengths(arguments["encoder_attention_mask"])
    return Sequences((tuple(joint(grid, n) for n in rows),))


def cogvideox(model, arguments: dict) -> Layout:
    # Text, then the video; latents are [B, F, C, H, W].
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    grid = _grid(model, (frames, height, width))
    return joint(arguments["encoder_hidden_states"].shape[1], grid)


def _packed(arguments: dict) -> tuple[Grid, int]:
    """The grid of packed latents ``[B, N, C]``, and the tokens of conditioning frames beside it."""
    grid = Grid(*(int(arguments[name]) for name in ("num_frames", "height", "width")))
    return grid, arguments["hidden_states"].shape[1] - grid.length


def ltx(model, arguments: dict) -> Layout:
    # Conditioning frames, then the video. Conditions may lie at any place and stride: context.
    if arguments.get("num_frames") is None and arguments.get("video_coords") is not None:
        grid = last_grid(arguments["video_coords"][0])
        conditions = arguments["hidden_states"].shape[1] - grid.length
    else:
        grid, conditions = _packed(arguments)
    return joint(conditions, grid)


def ltx2(model, arguments: dict) -> Layout:
    # The video, then keyframes and references; audio is a sequence of its own.
    grid, conditions = _packed(arguments)
    return joint(grid, conditions)


def kandinsky5(model, arguments: dict) -> Layout:
    # The video alone; latents are [B, F, H, W, C].
    if arguments.get("sparse_params") is not None:
        raise ValueError(
            "this Kandinsky 5 runs its own sparse attention (NABLA), which reorders the tokens; "
            "turn it off with pipe.transformer.register_to_config(attention_type='regular'), or "
            "use no dittfast"
        )
    return Layout((patches(arguments["hidden_states"].shape[1:4], model.config.patch_size),))


def anyflow(model, arguments: dict) -> Layout:
    # The video alone; latents are [B, F, C, H, W].
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    return Layout((patches((frames, height, width), model.config.patch_size),))


def easyanimate(model, arguments: dict) -> Layout:
    # Text of one or two encoders, then the video.
    names = ("encoder_hidden_states", "encoder_hidden_states_t5")
    text = sum(x.shape[1] for x in map(arguments.get, names) if x is not None)
    frames, height, width = arguments["hidden_states"].shape[2:]
    return joint(text, patches((frames, height, width), (1, *(model.config.patch_size,) * 2)))


def motif(model, arguments: dict) -> Sequences:
    # Video, then image embeddings and text, padded. The last layers see the video twice: as the
    # decoder has it, and as the encoder left it.
    grid = _grid(model, arguments["hidden_states"].shape[2:])
    names = ("image_embeds", "encoder_hidden_states")
    text = sum(x.shape[1] for x in map(arguments.get, names) if x is not None)
    main = (joint(grid, text),)
    return Sequences((main, (joint(grid, grid),)) if model.config.num_decoder_layers else (main,))


def _history(latents: torch.Tensor | None, cell: tuple[int, int, int]) -> int:
    """Tokens of earlier frames that are cut into padded cells this large."""
    if latents is None:
        return 0
    return math.prod(-(-n // c) for n, c in zip(latents.shape[2:], cell))


def framepack(model, arguments: dict) -> Sequences:
    # Earlier frames, the far ones in coarser cells; the video; image and text tokens. Alone in
    # its batch, a prompt loses its padding.
    grid = _grid(model, arguments["hidden_states"].shape[2:])
    cells = {
        "latents_history_4x": (4, 8, 8),
        "latents_history_2x": (2, 4, 4),
        "latents_clean": (1, 2, 2),
    }
    history = sum(_history(arguments.get(name), cell) for name, cell in cells.items())
    mask = arguments["encoder_attention_mask"]
    text = mask.shape[1] if len(mask) > 1 else text_lengths(mask)[0]
    return joint(history, grid, arguments["image_embeds"].shape[1] + text)


def helios(model, arguments: dict) -> Layout:
    # Earlier frames, the far ones in coarser cells; the video.
    patch = model.config.patch_size
    history = sum(
        _history(arguments.get(f"latents_history_{name}"), tuple(scale * p for p in patch))
        for name, scale in (("long", 4), ("mid", 2), ("short", 1))
        if arguments.get(f"indices_latents_history_{name}") is not None
    )
    return joint(history, patches(arguments["hidden_states"].shape[2:], patch))


def kandinsky6(model, arguments: dict) -> Layout:
    # The video, then a frame that it is to begin with; latents are [B, F, H, W, C]. Audio is a
    # sequence of its own.
    grid = patches(arguments["hidden_states"].shape[1:4], model.config.patch_size)
    kinds = arguments.get("visual_token_type_ids")
    frames = grid.frames if kinds is None else int((kinds[0] == 0).cumprod(0).sum())
    video = Grid(frames, grid.height, grid.width)
    return joint(video, grid.length - video.length)


def joyimage(model, arguments: dict) -> Layout:
    # Of several items [B, n, C, F, H, W] the last, which is drawn, and the others; then text.
    latents = arguments["hidden_states"]
    items = latents.shape[1] if latents.ndim == 6 else 1
    grid = patches(latents.shape[-3:], model.config.patch_size)
    return joint(*[grid] * items, arguments["encoder_hidden_states"].shape[1])
