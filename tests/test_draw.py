"""Pictures: what is drawn is what the plan says, and text stays inside."""

import numpy as np
import pytest
import torch
from PIL import Image

from dittfast.layout import Layout, make_blocks
from dittfast.measure import draw
from dittfast.methods import Local, Radial
from dittfast.plan import Plan

LEFT = 78  # where block_mask puts the mask


def cells(plan, **choice):
    """The colour of every cell ``[nQ, nK, 3]`` and the mask as it is pasted."""
    size = choice.pop("size", 720)
    shares = draw._shares(plan, choice.get("batch", 0), choice.get("head", 0), size)
    mask = np.asarray(draw._shaded(*shares, size))
    scale = max(1, size // max(shares[0].shape))
    return mask[::scale, ::scale], mask


def is_colour(pixels, colour):
    return (pixels == np.array(colour, dtype=np.uint8)).all(-1)


def page_mask(page, mask, title):
    """The part of a page where the mask stands."""
    top = page.shape[0] - 20 - mask.shape[0]
    return page[top : top + mask.shape[0], LEFT : LEFT + mask.shape[1]]


def test_cells_are_the_block_mask():
    plan = Radial(block_size=16).plan(Layout.video(9, 5, 8))
    shown, _ = cells(plan)
    expected = plan.to_block_mask()[0, 0].numpy()
    assert not expected.all()
    assert np.array_equal(is_colour(shown, draw.FULL), expected)
    assert np.array_equal(is_colour(shown, draw.HIDDEN), ~expected)


def test_full_and_partial_blocks_differ():
    layout = Layout.image(24, 20, text=5)
    plan = Local(window=4).plan(layout)
    shown, _ = cells(plan)
    tokens = plan.to_dense_mask()[0, 0]
    if plan.q_blocks.order is not None:
        tokens = tokens[plan.q_blocks.order.long()][:, plan.kv_blocks.order.long()]
    sums = [plan.q_blocks.lengths.tolist(), plan.kv_blocks.lengths.tolist()]
    for i, rows in enumerate(tokens.split(sums[0], 0)):
        for j, block in enumerate(rows.split(sums[1], 1)):
            colour = draw.FULL if block.all() else draw.PARTIAL if block.any() else draw.HIDDEN
            assert tuple(shown[i, j]) == colour, (i, j)


def test_heads_and_batch_rows_have_their_own_mask():
    blocks = Layout.image(6, 6).blocks(9)
    mask = torch.rand(2, 3, 4, 4) < 0.4
    mask |= torch.eye(4, dtype=torch.bool)
    plan = Plan.from_block_mask(mask, blocks, blocks)
    for batch in range(2):
        for head in range(3):
            shown, _ = cells(plan, batch=batch, head=head)
            assert np.array_equal(is_colour(shown, draw.FULL), mask[batch, head].numpy())
    with pytest.raises(ValueError, match=r"head must lie in 0..2 for this plan, got 3"):
        draw.block_mask(plan, head=3)
    with pytest.raises(ValueError, match=r"batch must lie in 0..1 for this plan, got -1"):
        draw.block_mask(plan, batch=-1)


def test_blocks_are_drawn_in_order_of_position():
    blocks = make_blocks([8, 0, 4], [3, 4, 4])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    shown, _ = cells(Plan.from_block_mask(mask, blocks, blocks))
    by_position = mask[[1, 2, 0]][:, [1, 2, 0]].numpy()
    assert np.array_equal(is_colour(shown, draw.FULL), by_position)


def test_many_blocks_share_a_pixel_by_their_mean():
    blocks = Layout.image(1, 50).blocks(1)
    mask = torch.rand(50, 50) < 0.3
    mask |= torch.eye(50, dtype=torch.bool)
    full, partial = draw._shares(Plan.from_block_mask(mask, blocks, blocks), 0, 0, 16)
    assert full.shape == (13, 13) and not partial.any()
    for i in range(13):
        for j in range(13):
            part = mask[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].double()
            assert full[i, j] == pytest.approx(float(part.mean()))


@pytest.mark.parametrize("text_first", [True, False])
def test_lines_stand_where_segments_and_frames_begin(text_first):
    layout = Layout.video(4, 6, 8, text=30, text_first=text_first)
    plan = Plan.from_block_mask(
        torch.eye(layout.blocks(16).count, dtype=torch.bool), layout.blocks(16), layout.blocks(16)
    )
    page = np.asarray(draw.block_mask(plan, layout, title="t"))
    _, mask = cells(plan)
    part = page_mask(page, mask, "t")
    scale = mask.shape[0] // plan.q_blocks.count
    grid = 2 if text_first else 0  # 30 text tokens are 2 blocks, a frame of 48 is 3
    frames = [(grid + 3 * n) * scale for n in range(4) if grid + 3 * n]
    boundary = grid or 12
    for axis in (0, 1):
        lined = is_colour(part, draw.FRAME_LINE).sum(axis) > 0.8 * part.shape[axis] - 4
        segment = is_colour(part, draw.SEGMENT_LINE).sum(axis) > 0.8 * part.shape[axis]
        at = {int(n) for n in np.nonzero(segment)[0]}
        assert boundary * scale in at and len(at) == 2
        # The boundary hides the line of the frame that begins there.
        expected = [n for n in frames if n != boundary * scale]
        assert [int(n) for n in np.nonzero(lined & ~segment)[0]] == expected


def test_a_plan_without_layout_is_drawn_bare():
    plan = Plan.full(100, block_size=16)
    page = np.asarray(draw.block_mask(plan))
    _, mask = cells(plan)
    assert np.array_equal(page_mask(page, mask, ""), mask)
    assert not is_colour(page, draw.SEGMENT_LINE).any()


def test_pooled_keys_are_marked():
    layout = Layout.image(16, 16, text=8)
    plan = Local(window=4, downsample=4).plan(layout)
    segments, frames = draw._marks(layout, plan.kv_blocks)
    assert [name for _, name in segments] == ["text", "image", "pooled"] and not frames
    assert draw.block_mask(plan, layout).width > 0


def test_difference_is_absolute_and_brightened_by_a_power_of_two():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-9, 10, a.shape), 0, 255).astype(np.uint8)
    shown, gain = draw.difference(a, b)
    apart = np.abs(a.astype(int) - b.astype(int))
    assert gain == 16  # 9 * 16 <= 255 < 9 * 32
    assert np.array_equal(shown, np.minimum(apart * gain, 255))
    shown, gain = draw.difference(a, a)
    assert gain == 1 and not shown.any()
    shown, gain = draw.difference(np.zeros_like(a), np.full_like(a, 255))
    assert gain == 1 and (shown == 255).all()
    with pytest.raises(ValueError, match="one shape"):
        draw.difference(a, b[:, :, :8])
    with pytest.raises(ValueError, match="uint8"):
        draw.difference(a, b / 255)


@pytest.mark.parametrize("size", [(12, 8), (100, 300), (256, 256), (700, 300)])
def test_a_comparison_holds_every_pixel_of_its_pictures(size):
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    panels = [draw.Panel(Image.new("RGB", size, c), f"name {c}", ("a line",)) for c in colours]
    page = np.asarray(draw.compare(panels, "title", "footer"))
    factor = max(1, -(-draw.PANEL // size[0]))
    for colour in colours:
        rows, columns = np.nonzero(is_colour(page, colour))
        assert rows.size == size[0] * size[1] * factor**2
        assert np.ptp(columns) + 1 == size[0] * factor and np.ptp(rows) + 1 == size[1] * factor


@pytest.mark.parametrize("words", ["word " * 300, "w" * 3000, "短 é " * 200])
def test_text_is_cut_before_the_border(words):
    panels = [draw.Panel(Image.new("RGB", (256, 40), (0, 90, 0)), words, (words,))] * 2
    page = np.asarray(draw.compare(panels, words, words))
    assert (page[:, -8:] == 255).all() and (page[:, :8] == 255).all() and (page[-8:] == 255).all()
    middle = slice(15 + 256 + 2, 15 + 256 + 13)  # between the pictures, below the title
    assert (page[80:-60, middle] == 255).all()


def test_text_uses_letters_the_font_has():
    assert draw.printable('"a  blue\nheart, 1.5x"') == '"a blue heart, 1.5x"'
    assert draw.printable("café") == "cafe"
    assert draw.printable("猫 ok") == "? ok"


def test_empty_comparison():
    with pytest.raises(ValueError, match="at least one panel"):
        draw.compare([])
