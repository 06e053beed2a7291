"""Layout readers of image transformers: from the arguments of ``forward`` to token positions.

Each takes ``(model, arguments by name)``. The comment says the order of the sequence at
``scaled_dot_product_attention``.
"""

from __future__ import annotations

from dittfast.layout import Grid, Layout

from .sequences import Sequences, grids_from_ids, joint, patches, text_lengths


def flux(model, arguments: dict) -> Layout:
    # FLUX, Kontext, Chroma: text, the image, reference images.
    text = arguments["encoder_hidden_states"].shape[1]
    return joint(text, *grids_from_ids(arguments["img_ids"]))


def flux2(model, arguments: dict) -> Layout:
    if arguments.get("kv_cache_mode") is not None:
        raise ValueError(
            f"FLUX.2 with kv_cache_mode={arguments['kv_cache_mode']!r} keeps the keys of its "
            "reference images outside the sequence, which no plan can describe; run the pipeline "
            "without the cache, or call dittfast.disable(pipe)"
        )
    return flux(model, arguments)


def sd3(model, arguments: dict) -> Layout | Sequences:
    # Image, text; the second attention of SD3.5-medium's dual layers sees the image alone.
    grid = patches(arguments["hidden_states"].shape[2:], model.config.patch_size)
    main = joint(grid, arguments["encoder_hidden_states"].shape[1])
    if not model.config.dual_attention_layers:
        return main
    return Sequences(((main,), (Layout((grid,)),)))


def text_then_image(model, arguments: dict) -> Layout:
    # CogView4: text, image. PRX: the same, and only the image asks.
    grid = patches(arguments["hidden_states"].shape[2:], model.config.patch_size)
    return joint(arguments["encoder_hidden_states"].shape[1], grid)


def auraflow(model, arguments: dict) -> Layout:
    # Registers, text, image.
    grid = patches(arguments["hidden_states"].shape[2:], model.config.patch_size)
    text = arguments["encoder_hidden_states"].shape[1]
    return joint(model.register_tokens.shape[1], text, grid)


def image(model, arguments: dict) -> Layout:
    # DiT and PixArt: the image alone; text is cross-attention. Latte: one frame at a time.
    return Layout((patches(arguments["hidden_states"].shape[-2:], model.config.patch_size),))


def qwen(model, arguments: dict) -> Layout:
    # Text, the image, reference images or layers. Like the model, the first batch row's shapes.
    shapes = arguments["img_shapes"][0]
    shapes = [shapes] if isinstance(shapes, tuple) else shapes
    text = arguments["encoder_hidden_states"].shape[1]
    return joint(text, *(Grid(*(int(n) for n in shape)) for shape in shapes))


def hunyuan_image(model, arguments: dict) -> Layout:
    # Image, then all text.
    grid = patches(arguments["hidden_states"].shape[2:], model.config.patch_size)
    text = arguments["encoder_hidden_states"].shape[1]
    second = arguments.get("encoder_hidden_states_2")
    if second is not None and model.context_embedder_2 is not None:
        text += second.shape[1]
    return joint(grid, text)


def z_image(model, arguments: dict) -> Sequences:
    # Image, its padding to a multiple of 32, caption, its padding; then padding of the batch.
    # The padding inside a row is attended to, so all of it is context.
    images, captions = arguments["x"], arguments["cap_feats"]
    if isinstance(images[0], list):
        raise ValueError(
            "Z-Image Omni puts several images and captions into one sequence, which dittfast does "
            "not read; pass layout= to dittfast.enable"
        )
    patch = arguments.get("patch_size", 2)
    patch = (arguments.get("f_patch_size", 1), patch, patch)
    grids = [patches(x.shape[1:], patch) for x in images]
    alone = [_up(grid.length) for grid in grids]
    whole = [n + _up(len(caption)) for n, caption in zip(alone, captions)]
    fill = lambda lengths: tuple(joint(g, max(lengths) - g.length) for g in grids)  # noqa: E731
    return Sequences((fill(whole), fill(alone)))


def _up(n: int, multiple: int = 32) -> int:
    return -(-n // multiple) * multiple


def lumina2(model, arguments: dict) -> Sequences:
    # The valid text of each row, the image right behind it, padding. The noise refiner sees the
    # image alone.
    grid = patches(arguments["hidden_states"].shape[2:], model.config.patch_size)
    text = text_lengths(arguments["encoder_attention_mask"])
    rows = tuple(joint(n, grid, max(text) - n) for n in text)
    return Sequences((rows, (Layout((grid,)),)))


def hidream(model, arguments: dict) -> Layout:
    # Image, its padding, T5 text, Llama text twice (the last layer's and the block's own).
    # Padding has zero keys but is attended to, so it is context.
    hidden = arguments["hidden_states"]
    if hidden.ndim == 4:
        grid = patches(hidden.shape[2:], model.config.patch_size)
        square = hidden.shape[2] == hidden.shape[3]
        length = grid.length if square else model.max_seq
    else:
        grid = Grid(1, *(int(n) for n in arguments["img_sizes"][0]))
        length = hidden.shape[1]
    t5, llama = (arguments[f"encoder_hidden_states_{name}"] for name in ("t5", "llama3"))
    return joint(grid, length - grid.length, t5.shape[1] + 2 * llama[0].shape[-2])


def flux3(model, arguments: dict) -> Sequences:
    # Text, the image, reference images. The first blocks see the image alone.
    (grid,) = grids_from_ids(arguments["img_ids"])
    references = arguments.get("image_cond_ids")
    if references is not None:
        references = grids_from_ids(references[..., [3, 1, 2]])  # column 3 tells them apart
    text = arguments["encoder_hidden_states"].shape[1]
    return Sequences(((joint(text, grid, *(references or ())),), (Layout((grid,)),)))


def krea2(model, arguments: dict) -> Layout:
    # Text, the image; the position ids are those of both.
    text = arguments["encoder_hidden_states"].shape[1]
    return joint(text, *grids_from_ids(arguments["position_ids"][text:]))


def ernie_image(model, arguments: dict) -> Layout:
    # Image, text.
    grid = patches(arguments["hidden_states"].shape[2:], model.config.patch_size)
    return joint(grid, arguments["text_bth"].shape[1])


def glm_keeps_keys(arguments: dict) -> bool:
    """Whether a pass of GLM-Image runs an image to edit, for its keys."""
    caches = arguments.get("kv_caches")
    return caches is not None and caches[0].mode == "write"


def glm_image(model, arguments: dict) -> Layout:
    # Keys of images to edit, kept from an earlier pass, which do not ask; text, the image.
    kept, caches = 0, arguments.get("kv_caches")
    if caches is not None and caches[0].mode == "read" and caches[0].k_caches:
        kept = caches[0].k_caches[0].shape[1]
    grid = patches(arguments["hidden_states"].shape[2:], model.config.patch_size)
    return joint(kept + arguments["encoder_hidden_states"].shape[1], grid)


def bria_fibo2(model, arguments: dict) -> Sequences:
    # What a resampler made of the text ("gist"), the image, images to edit. Where prompts get
    # different amounts of it, it stands behind. The noise refiner sees the images alone.
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    config, mask = model.config, arguments.get("encoder_attention_mask")
    states = arguments["encoder_hidden_states"]
    counts = compute_gist_count(
        [states.shape[2]] * len(states) if mask is None else text_lengths(mask),
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    images = [arguments["hidden_states"], *(arguments.get("context_latents") or ())]
    grids = [patches(x.shape[2:], config.patch_size) for x in images]
    gist = max(counts)
    main = joint(gist, *grids) if min(counts) == gist else joint(*grids, gist)
    return Sequences(((main,), (joint(*grids),)))


def omnigen(model, arguments: dict) -> Layout:
    # Text with reference images in it, the timestep, the image.
    grid = patches(arguments["hidden_states"].shape[2:], model.config.patch_size)
    ids = arguments.get("input_ids")
    return joint((0 if ids is None else ids.shape[1]) + 1, grid)


def nucleus(model, arguments: dict) -> Layout:
    # The image (and references), then text, which is seen and does not ask.
    layout = qwen(model, arguments)
    grids = [s for s in layout.segments if isinstance(s, Grid)]
    return joint(*grids, arguments["encoder_hidden_states"].shape[1])
