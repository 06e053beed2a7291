"""Reading pictures of every kind as a viewer shows them, for FID and for training alike."""

import json

import numpy as np
import pytest
from PIL import Image

from dittfast.distill.pictures import find_pictures, read_frames
from dittfast.measure.features import FeatureNetwork
from dittfast.measure.fid import check_pictures, frechet
from dittfast.pictures import open_picture, read_picture

SHADES = np.linspace(0, 255, 8 * 6).round().astype(np.uint8).reshape(6, 8)
COLOURS = np.stack([SHADES, SHADES[::-1], 255 - SHADES], -1)


def pixels(path):
    return np.asarray(read_picture(path))


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    deep = SHADES.astype(np.uint16) * 257
    for name in ("a.png", "a.tif", "a.pgm"):
        if name == "a.pgm":  # older versions of Pillow read them and write none
            size = f"P5 {deep.shape[1]} {deep.shape[0]} 65535\n".encode()
            (tmp_path / name).write_bytes(size + deep.astype(">u2").tobytes())
        else:
            Image.fromarray(deep).save(tmp_path / name)
        found = open_picture(tmp_path / name)
        assert np.array_equal(np.asarray(found.image), np.repeat(SHADES[..., None], 3, 2)), name
        assert found.changes == ("16-bit grey scaled to 8 bits",)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_shows_white_whatever_lies_below(mode, tmp_path):
    clear = np.zeros((6, 8), np.uint8)
    clear[:3] = 255
    picture = Image.fromarray(COLOURS).convert("RGB")
    if mode == "P":
        picture = Image.fromarray((SHADES >= 128).astype(np.uint8), "P")
        picture.putpalette([255, 0, 0, 0, 0, 255])
        picture.save(tmp_path / "a.png", transparency=0)
        expected = np.full((6, 8, 3), 255, np.uint8)
        expected[SHADES >= 128] = (0, 0, 255)
    else:
        base = picture.convert(mode[:-1] if mode != "PA" else "L")
        expected = np.asarray(base.convert("RGB")).copy()
        expected[3:] = 255
        picture = base.convert("RGBA")
        picture.putalpha(Image.fromarray(clear))
        picture = picture.convert(mode) if mode != "PA" else picture
        picture.save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), expected)
    assert open_picture(tmp_path / "a.png").changes == ("transparent parts put on white",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_say_which_way_is_up(orientation, tmp_path):
    # What has to be done to the stored picture by the EXIF standard, in numpy's words.
    turn = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), turn(COLOURS))


def test_other_colour_models_become_rgb(tmp_path):
    flat = np.broadcast_to(np.array([200, 40, 90], np.uint8), (16, 16, 3))
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "a.tif")
    assert np.array_equal(pixels(tmp_path / "a.tif"), flat)
    palette = Image.fromarray(flat).quantize(4)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(pixels(tmp_path / "p.png"), flat)
    Image.fromarray(SHADES > 99).save(tmp_path / "one.png")
    assert np.array_equal(pixels(tmp_path / "one.png")[..., 0], 255 * (SHADES > 99))


def test_arrays_are_pictures_or_refused_by_name(tmp_path):
    np.save(tmp_path / "a.npy", COLOURS)
    assert np.array_equal(pixels(tmp_path / "a.npy"), COLOURS)
    for wrong in (COLOURS / 255, COLOURS[..., :2], SHADES, COLOURS[:0]):
        np.save(tmp_path / "b.npy", wrong)
        with pytest.raises(ValueError, match=rf"b\.npy holds {wrong.dtype} \["):
            read_picture(tmp_path / "b.npy")
    (tmp_path / "c.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"c\.npy is no array that can be read"):
        read_picture(tmp_path / "c.npy")


def test_what_nobody_can_show_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture at .*none\.png"):
        read_picture(tmp_path / "none.png")
    frames = [Image.fromarray(x) for x in (COLOURS, COLOURS[::-1])]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=r"animated \(2 frames\)"):
            read_picture(tmp_path / name)
    Image.fromarray(SHADES / np.float32(255)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif .*floats, whose range"):
        read_picture(tmp_path / "f.tif")
    Image.fromarray(SHADES.astype(np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(ValueError, match=r"i\.tif .*32-bit integers, whose range"):
        read_picture(tmp_path / "i.tif")
    (tmp_path / "text.png").write_text("not a picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:6000])
    for name in ("text.png", "half.png"):
        with pytest.raises(ValueError, match=rf"{name} is no picture that can be read"):
            read_picture(tmp_path / name)


def test_fid_compares_what_is_seen(tmp_path):
    """The same scenes in 8 bits, in 16 bits, turned by EXIF and behind alpha are at distance 0."""
    draw = np.random.default_rng(0)
    network = FeatureNetwork(("a", "b"), ("red",), size=32, dims=8, name="tiny").eval()
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(12):
        grey = draw.integers(0, 256, (32, 32)).astype(np.uint8)
        seen = Image.fromarray(grey).convert("RGB")
        alpha = seen.convert("RGBA")
        alpha.putalpha(Image.fromarray(np.where(grey == 255, 0, 255).astype(np.uint8)))
        for name, picture, more in (
            ("seen", seen, {}),
            ("deep", Image.fromarray(grey.astype(np.uint16) * 257), {}),
            ("turned", seen.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
            ("alpha", alpha, {}),
        ):
            (tmp_path / name).mkdir(exist_ok=True)
            picture.save(tmp_path / name / f"{number:02}.png", **more)
    for name in ("deep", "turned", "alpha"):
        found = frechet(tmp_path / name, tmp_path / "seen", network)
        assert abs(found["value"]) < 1e-5, name
        assert sum(found["changes"][0].values()) == 12 and not found["changes"][1]
        assert np.array_equal(read_frames(tmp_path / name / "03.png", 32, 32)[0],
                              pixels(tmp_path / "seen" / "03.png")), name  # fmt: skip
    np.save(tmp_path / "seen" / "x.npy", np.zeros((32, 32, 3)))
    with pytest.raises(ValueError, match=r"1 of 13 pictures .* x\.npy holds float64|x\.npy holds"):
        check_pictures(tmp_path / "seen")


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"file_name": "a.png", "text": "x"', "line 2: no JSON"),
        ("[" * 5000, "line 2: no JSON"),
        ('["a.png", "x"]', "line 2: expected"),
        ('{"file_name": "a.png", "caption": "x"}', r"line 2: 'text' must be one text.*caption"),
        ('{"file_name": "a.png", "text": ["x", "y"]}', r"line 2: 'text' must be one text.*\['x'"),
        ('{"text": "x"}', "line 2: 'file_name' must be"),
        ('{"file_name": "b.png", "text": "x"}', r"line 2: there is no file .*b\.png"),
        ('{"file_name": "a.png", "text": "x"}\n' * 2, "line 3: a.png has a caption already"),
        (b'{"file_name": "a.png", "text": "caf\xe9"}', "line 2: not UTF-8"),
    ],
)
def test_wrong_captions_are_told_with_file_and_line(line, words, tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(b"\n" + line)
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, {words}"):
        find_pictures(tmp_path)


def test_captions_may_begin_with_a_byte_order_mark(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    Image.fromarray(COLOURS).save(tmp_path / "b.png")
    row = json.dumps({"file_name": "a.png", "text": "one\u2028line"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("beside", encoding="utf-8-sig")
    assert [p.caption for p in find_pictures(tmp_path)] == ["one\u2028line", "beside"]
    (tmp_path / "b.txt").write_bytes(b"fine\ncaf\xe9")
    with pytest.raises(ValueError, match=r"b\.txt, line 2: not UTF-8"):
        find_pictures(tmp_path)
    (tmp_path / "c.mp4").write_bytes(b"no clip")
    with pytest.raises(ValueError, match=r"c\.mp4 is no clip that can be read"):
        read_frames(tmp_path / "c.mp4", 8, 8, 2)
