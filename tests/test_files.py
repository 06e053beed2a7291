"""Atomic writes: a file is what it was or what it should be, never half of it."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dittfast import files


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_write_changes_nothing(tmp_path, stop, before):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(stop), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        raise stop
    assert names(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or path.read_text() == before


def test_the_old_file_stands_until_the_new_one_is_done(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_path(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_json_is_standard_json(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"é": [1, None, 0.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None, 0.5]}
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None, 0.5]}
    assert names(tmp_path) == ["a.json"]


def test_a_picture_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    files.write_image(tmp_path / "a.png", Image.fromarray(pixels))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    files.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_check_output_names_what_is_wrong(tmp_path):
    assert files.check_output(tmp_path / "a.PNG", (".png",)) == tmp_path / "a.PNG"
    with pytest.raises(ValueError, match=r"must end in \.png, \.jpg; it has '\.txt'"):
        files.check_output(tmp_path / "a.txt", (".png", ".jpg"))
    with pytest.raises(ValueError, match="it has no ending"):
        files.check_output(tmp_path / "a", (".png",))
    with pytest.raises(FileNotFoundError, match="mkdir -p"):
        files.check_output(tmp_path / "no" / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        files.check_output(tmp_path / "file" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        files.check_output(tmp_path / "folder.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        files.write_text(tmp_path / "pipe", "x")
    assert not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize("ending", [".gif", ".mp4"])
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_videos_hold_every_frame(tmp_path, ending, size):
    import imageio.v3 as iio

    frames = np.zeros((5, *size, 3), np.uint8)
    for n in range(5):
        frames[n, :, : 8 * (n + 1)] = 250
    path = tmp_path / f"a{ending}"
    with files.atomic_path(path) as temporary:
        files.save_video(temporary, frames, fps=8)
    read = np.stack(list(iio.imiter(path)))
    assert read.shape[0] == 5
    even = tuple(n + n % 2 for n in size) if ending == ".mp4" else size
    assert read.shape[1:3] == even
    cut = read[:, : size[0], : size[1]].astype(int)
    assert np.abs(cut - frames).mean() < 4


def test_a_video_needs_a_known_ending_and_a_rate(tmp_path):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\.mp4 or \.gif"):
        files.save_video(tmp_path / "a.avi", frames)
    with pytest.raises(ValueError, match="fps must be at least 1, got 0"):
        files.save_video(tmp_path / "a.gif", frames, fps=0)


def test_without_ffmpeg_the_remedy_is_named(tmp_path, monkeypatch):
    import imageio_ffmpeg

    def missing():
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"a.mp4 needs ffmpeg.*write a .gif"):
        files.save_video(tmp_path / "a.mp4", frames)
    assert not list(tmp_path.iterdir())
    files.save_video(tmp_path / "a.gif", frames)


def test_a_video_that_was_cut_short_is_no_video(tmp_path, monkeypatch):
    import imageio.v3 as iio

    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3)).astype(np.uint8)
    write = iio.imwrite

    def full(path, *given, **options):
        write(path, *given, **options)
        os.truncate(path, os.path.getsize(path) // 2)

    monkeypatch.setattr(iio, "imwrite", full)
    with (
        pytest.raises(OSError, match=r"wrote \d of 9 frames .* make room"),
        files.atomic_path(tmp_path / "a.mp4") as temporary,
    ):
        files.save_video(temporary, frames)
    assert not list(tmp_path.iterdir())


def test_without_ffmpeg_nothing_is_drawn(tmp_path, monkeypatch, capsys):
    import imageio_ffmpeg

    from dittfast.cli import main
    from dittfast.pipelines.runs import sources

    def missing():
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    monkeypatch.setattr(sources, "load", lambda *given: pytest.fail("loaded a model"))
    assert main(["generate", "a cat", "-o", str(tmp_path / "a.mp4"), "--device", "cpu"]) == 2
    assert "needs ffmpeg" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_file_it_was_for(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("{}")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json'") as found:
        files.write_json(tmp_path / "a.json", [1])
    assert found.value.errno == 28
    assert (tmp_path / "a.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("size, kr, kb, name", [
    ((720, 1280), 0.2126, 0.0722, "bt709"), ((480, 832), 0.299, 0.114, "smpte170m"),
])  # fmt: skip
def test_a_video_has_the_colours_that_players_read_at_its_size(size, kr, kb, name, tmp_path):
    """Y'CbCr by the standards' own formulas, and tags that say which; 8-bit limited range."""
    import subprocess

    import imageio_ffmpeg

    path, (height, width) = tmp_path / "a.mp4", size
    for colour in ((0, 255, 0), (200, 30, 90)):
        files.save_video(path, np.full((2, *size, 3), colour, np.uint8))
        ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
        raw = subprocess.run([*ffmpeg, "-f", "rawvideo", "-"], capture_output=True, check=True)
        planes = np.frombuffer(raw.stdout, np.uint8)[: height * width * 3 // 2]
        luma, chroma = planes[: height * width], planes[height * width :].reshape(2, -1)
        r, g, b = (c / 255 for c in colour)
        y = kr * r + (1 - kr - kb) * g + kb * b
        expected = [16 + 219 * y, *(128 + 112 * (c - y) / (1 - k) for c, k in ((b, kb), (r, kr)))]
        found = [luma.mean(), chroma[0].mean(), chroma[1].mean()]
        assert np.allclose(found, expected, atol=1.5)
    told = subprocess.run(
        [ffmpeg[0], "-hide_banner", "-i", str(path)], capture_output=True, text=True, check=False
    )
    assert f"yuv420p(tv, {name}" in told.stderr


@pytest.mark.parametrize("fps", [16, 24, 30, 50])
def test_gif_frames_begin_at_the_nearest_hundredth(fps, tmp_path):
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    files.save_video(tmp_path / "a.gif", frames, fps)
    begins = [0]
    with Image.open(tmp_path / "a.gif") as gif:
        for n in range(9):
            gif.seek(n)
            begins.append(begins[-1] + gif.info["duration"])
    assert all(abs(at - 1000 * n / fps) <= 5 for n, at in enumerate(begins))
    with pytest.raises(ValueError, match=r"a\.gif: a GIF plays at most 50 .* got fps 60"):
        files.save_video(tmp_path / "a.gif", frames, 60)


def filled(folder, text):
    with files.atomic_folder(folder) as part:
        (part / "inside.txt").write_text(text)


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path):
    folder = tmp_path / "new" / "step"
    for text in ("one", "two"):
        filled(folder, text)
        assert (folder / "inside.txt").read_text() == text and names(folder.parent) == ["step"]
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(folder) as part:
        (part / "inside.txt").write_text("three")
        raise KeyboardInterrupt
    assert (folder / "inside.txt").read_text() == "two" and names(folder.parent) == ["step"]


@pytest.mark.parametrize("renames", [1, 2])
def test_an_exchange_of_folders_that_stops_half_way_is_undone(tmp_path, monkeypatch, renames):
    """By the process itself, or, after a SIGKILL, by the next one."""
    folder, rename, left = tmp_path / "step", os.rename, [renames]
    filled(folder, "one")

    def stops(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", stops)
    with pytest.raises(KeyboardInterrupt):
        filled(folder, "two")
    monkeypatch.undo()
    assert (folder / "inside.txt").read_text() == "one" and names(tmp_path) == ["step"]

    folder.rename(tmp_path / ".step.gone")
    (tmp_path / ".step.part").mkdir()
    with pytest.raises(ZeroDivisionError), files.atomic_folder(folder):
        1 / 0  # noqa: B018
    assert (folder / "inside.txt").read_text() == "one" and names(tmp_path) == ["step"]


def test_a_folder_that_is_being_removed_does_not_stay_behind(tmp_path, monkeypatch):
    folder, rmtree = tmp_path / "step", shutil.rmtree
    filled(folder, "one")

    def stops(path, ignore_errors=False):
        if not ignore_errors:
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", stops)
    with pytest.raises(KeyboardInterrupt):
        files.remove_folder(folder)
    assert names(tmp_path) == []
