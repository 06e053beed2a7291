"""Layout readers of transformers that get one packed sequence: text, images, video, audio.

Each takes ``(model, arguments by name)``. The comment says the order of the sequence at
``scaled_dot_product_attention``.
"""

from __future__ import annotations

from dittfast.layout import Grid, Layout

from .sequences import Sequences, grids_from_ids, joint, last_grid


def qwen21(model, arguments: dict) -> Layout:
    # Text with reference images in it, the image. Text is causal and every image sees what stands
    # before it; only the last one, which is drawn, sees everything.
    for block in model.transformer_blocks:
        name = type(block.attn.processor).__name__
        if "Flex" in name:
            raise ValueError(
                f"this Qwen-Image 2.1 runs {name}, one call of flex attention that no plan can "
                "take the place of; put QwenImage21AttnProcessor back"
            )
    grid = Grid(*(int(n) for n in arguments["img_shapes"][0][-1]))
    image = arguments["img_mask"][0].bool()
    tokens = image.numel() + 3 * int(image.sum())  # four tokens in the place of an image
    return joint(tokens - grid.length, grid)


_DRAWN = 2  # Ideogram4's indicator of tokens of the image; its text has another, padding none


def ideogram4(model, arguments: dict) -> Layout:
    # Padding, text, the image.
    drawn = arguments["indicator"] == _DRAWN
    start = drawn.shape[1] - int(drawn[0].sum())
    segments = arguments["segment_ids"][:, start:]
    if not bool(drawn[:, start:].all()) or not bool((segments == segments[:, :1]).all()):
        raise ValueError(
            "Ideogram 4 is read where every batch row ends with one image, in one segment; this "
            "pass packs more into a row. Run the images one at a time"
        )
    return joint(start, *grids_from_ids(arguments["position_ids"][0, start:]))


def minimax_h3(model, arguments: dict) -> Layout:
    # Text, reference images, videos and sounds, the audio, the video.
    places, rows = arguments["position_ids"], arguments["video_indices"]
    gap = (rows[1:] - rows[:-1] != 1).nonzero()
    last = rows[int(gap[-1]) + 1 if len(gap) else 0 :]
    if int(last[-1]) != len(places) - 1:
        raise ValueError(
            f"MiniMax H3 is read where the video ends the sequence; its last token is "
            f"{int(last[-1])} of {len(places)}. Pass layout= to dittfast.enable"
        )
    grid = last_grid(places[last].T)
    return joint(len(places) - grid.length, grid)


def cosmos3(model, arguments: dict) -> Layout:
    # Text, which is causal among itself; the video; sound, actions. Text does not ask.
    grids = [Grid(*(int(n) for n in shape)) for shape in arguments["vision_token_shapes"]]
    text, length = arguments["und_len"], arguments["sequence_length"]
    return joint(text, *grids, length - text - sum(grid.length for grid in grids))


def joyimage_plus(model, arguments: dict) -> Sequences:
    # The image, references, padding to the longest row; text.
    longest = arguments["hidden_states"].shape[1]
    text = arguments["encoder_hidden_states"].shape[1]
    rows = []
    for shapes in arguments["shape_list"]:
        grids = [Grid(*(int(n) for n in shape)) for shape in shapes]
        rows.append(joint(*grids, longest - sum(grid.length for grid in grids) + text))
    return Sequences((tuple(rows),))
