"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .disk.problems import writing
from .disk.processes import host_name, start_of

# After so many seconds a temporary file of a machine that cannot be seen from here is a leftover.
_A_DAY = 86_400


def check_output(path: str | Path, suffixes: Sequence[str] | None = None) -> Path:
    """``path``, if a file can be written there; call it before work that would be lost.

    Args:
        suffixes: the allowed endings, such as ``(".png", ".jpg")``; None for any.

    Raises:
        ValueError: an ending that is not allowed, or something there that is no regular file.
        FileNotFoundError, NotADirectoryError, PermissionError: the folder cannot take a file.
    """
    path = Path(path)
    if suffixes is not None and path.suffix.lower() not in suffixes:
        ending = f"{path.suffix!r}" if path.suffix else "no ending"
        raise ValueError(f"{path}: the file must end in {', '.join(suffixes)}; it has {ending}")
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"the folder {folder} does not exist; create it: mkdir -p {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder, so {path} cannot be written")
    with _writable(path):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file; name a file to write")
        _try_folder(folder)
    return path


def check_folder(path: str | Path) -> Path:
    """``path``, if it is a folder or can be made one, and files can be written there.

    Raises:
        NotADirectoryError: it or something above it is a file.
        OSError: nothing can be written there.
    """
    path = Path(path)
    with _writable(path):
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is a file; name a folder")
        _try_folder(nearest)
    return path


@contextmanager
def folder_for(path: str | Path) -> Iterator[Path]:
    """``path``, made a folder; after an error what was made here and is still empty is gone.

    Raises:
        As :func:`check_folder`.
    """
    path = check_folder(path)
    made = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it
            for place in made:
                place.rmdir()
        raise


def _try_folder(folder: Path) -> None:
    """What permissions say is not the whole truth, least of all to root: make a file there."""
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Inside, an error of the system names what was to be written, and the remedy."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        raise type(error)(f"{path} cannot be written ({error.strerror}); name another") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path``, for the block to write; ``path`` appears when it is done.

    The temporary file has the same ending. It replaces ``path`` in one step when the block ends,
    and is removed when the block raises, Ctrl-C included: ``path`` is then what it was before.
    What a killed process left of the same file is removed, too. The file keeps the permissions it
    had; a new one gets those that the umask leaves, whatever the writer in the block gives it.

    Raises:
        OSError: the disk is full, with the file's name, whatever the writer raised over it.
    """
    # A link stays a link: what it points to is replaced.
    path = check_output(Path(path).resolve())
    _remove_leftovers(path)
    token = f"{_short(host_name())}-{_writer(os.getpid())}-{secrets.token_hex(4)}"
    temporary = path.with_name(f"{_prefix(path)}{token}{path.suffix}")
    try:
        with writing(path):
            mode = _mode(path, temporary)
            yield temporary
            os.chmod(temporary, mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A hidden folder beside ``folder``, for the block to fill; it gets the name when that is done.

    What stood there before goes as a whole. When the block raises, Ctrl-C included, the hidden
    folder is removed and ``folder`` is what it was. What a killed process left of the same folder
    is removed, too. The name of the hidden folder, ``.NAME.part``, is the same in all processes.
    """
    folder = Path(folder)
    part, gone = (folder.with_name(f".{folder.name}.{state}") for state in ("part", "gone"))
    _settle(folder, part, gone)
    try:
        part.mkdir(parents=True)
        if folder.exists():
            shutil.copymode(folder, part)
        yield part
        sync_folder(part)  # the files themselves were synced when they were written
        if folder.exists():
            os.rename(folder, gone)
        os.rename(part, folder)
        sync_folder(folder.parent)
    finally:
        _settle(folder, part, gone)


def _settle(folder: Path, part: Path, gone: Path) -> None:
    """Remove what an exchange of folders left, or undo one that was stopped half way."""
    if gone.exists() and not folder.exists():
        os.rename(gone, folder)
    for left in (part, gone):
        shutil.rmtree(left, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; it loses its name before its files go, also when Ctrl-C comes in between."""
    gone = folder.with_name(f".{folder.name}.gone")
    try:
        os.rename(folder, gone)
        shutil.rmtree(gone)
    finally:
        shutil.rmtree(gone, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode(path: Path, temporary: Path) -> int:
    """The permissions for ``path``: those it has, else those of a file made here and now."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(temporary.stat().st_mode)
    temporary.unlink()
    return mode


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _writer(pid: int) -> str:
    """A process as it stands in the names of temporary files; another one with the same id has
    another name."""
    return f"{pid}-{_short(start_of(pid) or 'gone')}"


def _prefix(path: Path) -> str:
    return f".{path.stem[:80]}."


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of ``path`` whose process is gone."""
    pattern = re.compile(
        re.escape(_prefix(path))
        + r"(?P<host>\w{6})-(?P<writer>(?P<pid>\d+)-\w{6})-\w{8}"
        + re.escape(path.suffix)
    )
    for entry in os.scandir(path.parent):
        match = pattern.fullmatch(entry.name)
        if not match:
            continue
        with contextlib.suppress(OSError):  # its writer may be finishing it
            if match["host"] == _short(host_name()):
                gone = _writer(int(match["pid"])) != match["writer"]
            else:
                gone = time.time() - entry.stat().st_mtime > _A_DAY
            if gone:
                os.unlink(entry.path)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    """Write ``value`` as indented, standard JSON, atomically.

    Raises:
        ValueError: a NaN or an infinity in ``value``, for which JSON has no word.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_image(path: str | Path, image) -> None:
    """Write a ``PIL.Image`` in the format that the ending of ``path`` names, atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary)


def save_video(path: str | Path, frames, fps: int = 16) -> None:
    """Encode ``frames [F, H, W, 3]`` uint8 as .mp4 (H.264) or .gif; combine with atomic_path.

    H.264 needs even sizes: an odd last row or column is repeated. Its colours are converted by
    the matrix that players take for the size, BT.709 from 720 rows on and BT.601 below, and the
    file names it. A GIF counts in hundredths of a second, so its frames begin at the nearest one.

    Raises:
        ValueError: another ending, fewer than one frame a second, or for a GIF more than 50; for
            .mp4, no ffmpeg here.
        OSError: the disk is full.
    """
    import imageio.v3 as iio
    import numpy as np
    from PIL import Image

    path = Path(path)
    check_fps(path, fps)
    if path.suffix.lower() == ".gif":
        first, *rest = map(Image.fromarray, frames)
        times = gif_milliseconds(len(frames), fps)
        first.save(path, save_all=True, append_images=rest, duration=times, loop=0)
    elif path.suffix.lower() == ".mp4":
        check_ffmpeg(path)
        odd = [(0, n % 2) for n in np.shape(frames)[1:3]]
        even = np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge")
        matrix = "bt709" if even.shape[1] >= _HD_ROWS else "smpte170m"
        iio.imwrite(
            path,
            even,
            plugin="FFMPEG",
            fps=fps,
            codec="libx264",
            macro_block_size=1,
            output_params=[
                *("-vf", f"scale=out_color_matrix={matrix}:out_range=tv,format=yuv420p"),
                *("-colorspace", matrix, "-color_range", "tv"),
                *("-color_primaries", "bt709", "-color_trc", "bt709"),  # those of sRGB, nearly
            ],
        )
        _check_frames(path, len(frames))
    else:
        raise ValueError(f"{path}: a video ends in .mp4 or .gif")


# From this height on players read untagged video by BT.709.
_HD_ROWS = 720
# Browsers slow frames of one hundredth of a second down to ten.
_MOST_GIF_FPS = 50


def check_fps(path: str | Path, fps: int) -> None:
    """Whether a video file can play ``fps`` frames a second; call it before long work.

    Raises:
        ValueError: fewer than one, or for a GIF more than 50.
    """
    if fps < 1:
        raise ValueError(f"fps must be at least 1, got {fps}")
    if Path(path).suffix.lower() == ".gif" and fps > _MOST_GIF_FPS:
        raise ValueError(
            f"{path}: a GIF plays at most {_MOST_GIF_FPS} frames a second, got fps {fps}; take "
            "fewer, or write an .mp4"
        )


def gif_milliseconds(count: int, fps: int) -> list[int]:
    """How long each of ``count`` frames is shown, in milliseconds that a GIF can say.

    Frame n begins at the hundredth of a second nearest to n / fps, so the whole keeps its length.
    """
    begins = [round(100 * n / fps) for n in range(count + 1)]
    return [10 * (after - before) for before, after in itertools.pairwise(begins)]


def _check_frames(path: Path, count: int) -> None:
    """ffmpeg says that the disk is full, but its caller does not hear it."""
    import imageio_ffmpeg

    try:
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except RuntimeError:  # what there is of the file cannot be read
        written = 0
    if written != count:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"ffmpeg wrote {written} of {count} frames to {path.parent}, where {free:,} bytes are "
            "free; make room, or write elsewhere"
        )


def check_ffmpeg(path: str | Path) -> None:
    """Whether an .mp4 can be written; call it before work that would be lost.

    Raises:
        ValueError: there is no ffmpeg.
    """
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"{path} needs ffmpeg, and there is none ({' '.join(str(error).split())[:120]}); "
            "pip install --force-reinstall imageio-ffmpeg brings one, or write a .gif"
        ) from error
