"""Records, locks and paths: what was written comes back, or a sentence says what is wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import PYTHON

from dittfast import files
from dittfast.disk.inside import path_inside
from dittfast.disk.locks import LOCK, FolderInUse, FolderLock, locked
from dittfast.disk.problems import FileProblem, reading
from dittfast.disk.processes import host_name, start_of
from dittfast.disk.records import read_json, read_record, read_text, write_record
from dittfast.disk.structure import check_structure
from dittfast.disk.tensors import (
    read_array,
    read_headers,
    read_pickled,
    read_tensors,
    write_pickled,
    write_tensors,
)
from dittfast.markdown import as_text

ROOT = Path(__file__).resolve().parents[1]


def test_every_changed_byte_of_a_record_is_noticed(tmp_path):
    """Or the record says the same: white space, and e for E in a number."""
    (tmp_path / "a.bin").write_bytes(b"12345")
    data = {"name": "é", "list": [1, -2.5e-7, True, None], "more": {"x": "y"}}
    path = tmp_path / "r.json"
    write_record(path, data, ["a.bin"])
    written = path.read_bytes()
    refused = 0
    for at in range(len(written)):
        for flip in (1, 32, 128):
            path.write_bytes(written[:at] + bytes([written[at] ^ flip]) + written[at + 1 :])
            try:
                found = read_record(path)
            except FileProblem as error:
                assert str(path) in str(error)
                refused += 1
            else:
                assert found.data == data, (at, flip)
                assert found.check("a.bin").read_bytes() == b"12345"
    assert refused > 2.5 * len(written)


def test_files_beside_a_record_are_what_they_were(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"12345")
    write_record(tmp_path / "r.json", {"x": 1}, ["a.bin"])
    record = read_record(tmp_path / "r.json", {"x": int})
    assert record.data == {"x": 1} and record.check("a.bin") == tmp_path / "a.bin"
    (tmp_path / "a.bin").write_bytes(b"12346")
    with pytest.raises(FileProblem, match=r"a\.bin: it was changed or damaged.*; do this"):
        record.check("a.bin", "do this")
    with pytest.raises(FileProblem, match="does not list it"):
        record.check("b.bin")
    assert read_record(tmp_path / "r.json", verify=False).check("a.bin")
    (tmp_path / "r.json").write_text('{"x": 2}')  # as earlier versions wrote it
    assert read_record(tmp_path / "r.json").check("a.bin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "too large"),
        ("[" * 5000 + "]" * 5000, "RecursionError"),
        ("[1]", "must be a mapping"),
        ("\udcff", "UTF-8"),
    ],
)
def test_json_that_is_none_is_named(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FileProblem, match=message) as found:
        read_json(path, dict)
    assert str(path) in str(found.value) and "\n" not in str(found.value)


def test_text_may_begin_with_a_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé".encode())
    assert read_text(tmp_path / "a.txt") == "é"
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(FileProblem, match=r"a\.txt: it is not UTF-8"):
        read_text(tmp_path / "a.txt")


FORM = {"a": int, "b?": [float], "c": (None, {"d": str, "*": bool})}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1, "c": None}, None),
        ({"a": 1, "b": [1, 2.5], "c": {"d": "x", "y": True}}, None),
        ([], "it must be a mapping, got a list of 0"),
        ({"c": None}, "it has no 'a'"),
        ({"a": True, "c": None}, "a must be an integer, got True"),
        ({"a": 1.0, "c": None}, "a must be an integer, got 1.0"),
        ({"a": 1, "c": None, "bb": 1}, "it has 'bb', which means nothing there; did it say 'b'"),
        ({"a": 1, "c": None, "b": [1, "2"]}, r"b\[1\] must be a number, got '2'"),
        ({"a": 1, "c": {"d": 1}}, r"c.d must be text, got 1"),
        ({"a": 1, "c": {"d": "x", "y": 1}}, "c.y must be true or false"),
        ({"a": 1, "c": 7}, "c must be"),
    ],
)
def test_structure(value, message):
    if message is None:
        check_structure(value, FORM)
    else:
        with pytest.raises(ValueError, match=message):
            check_structure(value, FORM)


def test_tensors_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    headers = read_headers(tmp_path / "t.safetensors")
    assert headers == {"a": ("BF16", (3, 4)), "b": ("I64", (5,))}
    assert headers["a"].is_floating and not headers["b"].is_floating
    found = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(found[n], x) for n, x in tensors.items())
    write_pickled(tmp_path / "t.pt", {"x": [1, tensors]})
    assert torch.equal(read_pickled(tmp_path / "t.pt")["x"][1]["a"], tensors["a"])
    np.save(tmp_path / "t.npy", np.ones((2, 3)))
    assert read_array(tmp_path / "t.npy").shape == (2, 3)


def test_code_in_files_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    torch.save({"x": Evil()}, tmp_path / "t.pt")
    np.save(tmp_path / "t.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(FileProblem, match=r"t\.pt"):
        read_pickled(tmp_path / "t.pt")
    with pytest.raises(FileProblem, match=r"t\.npy"):
        read_array(tmp_path / "t.npy")
    assert not (tmp_path / "was here").exists()


def test_what_is_compressed_is_not_unfolded(tmp_path):
    """A megabyte of it could hold a thousand; PyTorch compresses nothing, and would read it."""
    write_pickled(tmp_path / "t.pt", {"x": torch.zeros(100_000)})
    with (
        zipfile.ZipFile(tmp_path / "t.pt") as whole,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for part in whole.infolist():
            small.writestr(part.filename, whole.read(part))
    assert torch.load(tmp_path / "small.pt", weights_only=True)["x"].numel() == 100_000
    assert (tmp_path / "small.pt").stat().st_size < 10_000
    with pytest.raises(FileProblem, match=r"small\.pt: .* is compressed, as"):
        read_pickled(tmp_path / "small.pt")


def test_what_a_header_claims_is_not_allocated(tmp_path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117)
    text = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.encode() + b"\n"
    (tmp_path / "t.npy").write_bytes(text + bytes(100))
    with pytest.raises(FileProblem, match=r"t\.npy: it is damaged"):
        read_array(tmp_path / "t.npy")
    tensor = {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    text = json.dumps(tensor).encode()
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(100))
    with pytest.raises(FileProblem, match=r"t\.safetensors: it is damaged"):
        read_headers(tmp_path / "t.safetensors")


def test_errors_that_name_no_file_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(PermissionError, match="mine"), reading(tmp_path / "mine"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(FileProblem, match=r"x: it cannot be read \(KeyError 'a'\)"), reading("x"):
        {}["a"]
    with pytest.raises(FileProblem) as found, reading("x"):
        raise ValueError("\x1b[2J\nmore\ud800" + "y" * 10**5)
    assert str(found.value).isprintable() and len(str(found.value)) < 300


# Writing.


@pytest.fixture
def small_disk():
    """Files cannot grow beyond 4 kB, whoever writes them: as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [write_tensors, write_pickled, "json", "numpy", "image"])
def test_a_disk_without_room_is_an_oserror_with_the_file(tmp_path, small_disk, write):
    from PIL import Image

    from dittfast.disk.tensors import write_array

    noise = np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)
    path = tmp_path / ("big.png" if write == "image" else "big.npy")
    with pytest.raises(OSError) as found:
        if write == "json":
            files.write_json(path, list(range(9999)))
        elif write == "numpy":
            write_array(path, noise)
        elif write == "image":
            files.write_image(path, Image.fromarray(noise))
        else:
            write(path, {"a": torch.randn(9999)})
    assert str(path) in str(found.value) and found.value.errno
    assert not list(tmp_path.iterdir())


def test_permissions_follow_the_umask_or_the_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "new.safetensors", {"a": torch.ones(1)})
        files.write_json(tmp_path / "new.json", [])
        (tmp_path / "old.json").write_text("")
        (tmp_path / "old.json").chmod(0o604)
        files.write_json(tmp_path / "old.json", [])
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == {"new.safetensors": 0o640, "new.json": 0o640, "old.json": 0o604}


WRITER = """
import os, signal, sys
from dittfast import files
with files.atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    sys.stdin.read(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def python(code, *arguments):
    return subprocess.Popen(
        [*PYTHON, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "a.json"
    with python(WRITER, path) as writer:
        left = writer.stdout.readline().strip()
        files.write_json(path, 1)  # it may still finish
        assert sorted(p.name for p in tmp_path.iterdir()) == [left, "a.json"]
        writer.communicate("x")
    assert (tmp_path / left).exists()
    files.write_json(tmp_path / "b.json", 1)
    assert (tmp_path / left).exists()
    files.write_json(path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


# One writer.

HOLDER = """
import sys
from dittfast.disk.locks import FolderLock
lock = FolderLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read(1)
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    with python(HOLDER, tmp_path, "--steps") as holder:
        holder.stdout.readline()
        words = rf"in use by process {holder.pid} on .* since .*--steps\); wait for it"
        with pytest.raises(FolderInUse, match=words):
            FolderLock(tmp_path)
        with locked(tmp_path, is_main=False):  # the others of one launch
            pass
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path), locked(tmp_path):  # of a dead process; the same one may twice
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
    with python(HOLDER, tmp_path) as holder:
        holder.stdout.readline()
        holder.communicate("x")
    assert not (tmp_path / LOCK).exists()  # given back at the end


def test_a_lock_of_another_machine_is_not_taken(tmp_path):
    owner = {"host": "elsewhere x", "pid": 1, "start": "", "since": "today", "command": "c"}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with pytest.raises(FolderInUse, match=r"process 1 on elsewhere since today.*remove .*lock"):
        FolderLock(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps(owner)[:20])  # its writer died over it
    FolderLock(tmp_path).release()
    # The same number of a process, but not the same process.
    owner |= {"host": host_name()}
    (tmp_path / LOCK).write_text(json.dumps(owner | {"pid": os.getpid(), "start": "once"}))
    FolderLock(tmp_path).release()


def test_of_many_that_want_a_folder_one_gets_it(tmp_path):
    racers = [python(HOLDER, tmp_path) for _ in range(4)]
    deadline = time.monotonic() + 120
    while sum(r.poll() is None for r in racers) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sum(r.poll() is None for r in racers) == 1
    for racer in racers:
        racer.communicate("x")
    assert sorted(r.returncode for r in racers) == [0, 1, 1, 1]


def test_processes_are_told_apart(monkeypatch):
    assert start_of(os.getpid()) == start_of(os.getpid()) is not None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert start_of(gone.pid) is None
    monkeypatch.setattr(Path, "exists", lambda self: False)  # a system without /proc
    assert start_of(os.getpid()) == ""
    assert start_of(gone.pid) is start_of(10**30) is None


# Folders of strangers.


def test_names_lead_nowhere_else(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("")
    (tmp_path / "secret").write_text("")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "pipe")
    assert path_inside(tmp_path, "in", "a.png") == tmp_path / "in" / "a.png"
    assert not path_inside(tmp_path, "not", "there").exists()
    for name in ("..", "", ".", "../secret", "/etc/passwd", "a/b", "a\\b", "c:x", "a\0", 7):
        with pytest.raises(FileProblem, match="is not the name of something in it"):
            path_inside(tmp_path / "in", name)
    for names in (("in", "link.png"), ("link", "a.png")):
        with pytest.raises(FileProblem, match="it is a link"):
            path_inside(tmp_path, *names)
    with pytest.raises(FileProblem, match="neither a file nor a folder"):
        path_inside(tmp_path, "in", "pipe")


def test_nothing_is_written_through_links_of_a_folder(tmp_path):
    """A lock would empty the file that it leads to, a pipe would be waited for."""
    kept = tmp_path / "kept"
    kept.write_text("mine")
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    (out / "12:30 a\\b.txt").write_text("")  # any name will do
    (tmp_path / "disk").mkdir()
    (out / "checkpoints").symlink_to(tmp_path / "disk")
    FolderLock(out).release()
    for name in (LOCK, "heads.json", "images/00000.png"):
        (out / name).symlink_to(kept)
        with pytest.raises(FileProblem, match=f"{name}: it is a link"), locked(out):
            pass
        (out / name).unlink()
    os.mkfifo(out / LOCK)
    with pytest.raises(FileProblem, match="neither a file nor a folder"):
        FolderLock(out)
    assert kept.read_text() == "mine"


def test_a_lock_costs_little_in_a_large_folder(tmp_path):
    """Against listing it once, in processor time."""
    for place in range(10):
        (tmp_path / f"images{place}").mkdir()
        for number in range(500):
            (tmp_path / f"images{place}" / f"{number:05}.png").touch()

    def seconds(call):
        times = []
        for _ in range(5):
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
        return min(times)

    def names():
        return [len(files) for _, _, files in os.walk(tmp_path)]

    assert sum(names()) == 5000
    assert seconds(lambda: FolderLock(tmp_path).release()) < 2 * seconds(names) + 0.005


@pytest.mark.parametrize(
    "text",
    ["![x](http://a/b.png)", "[x](javascript:a)", "[a]: http://b", "<img src=x>", "`a` *b* ~~c~~",
     "a | b", "_c_ __d__", "# big", "1. one", "- two", "\\[x](y)", "![x][a]"],
)  # fmt: skip
def test_markdown_shows_text(text):
    """Read back by a parser of Markdown: one paragraph, nothing in it but text."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    tokens = markdown.parse(as_text(text, begins=True))
    assert [t.type for t in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {t.type for t in tokens[1].children} <= {"text", "text_special"}
    assert "".join(t.content for t in tokens[1].children) == text
    assert as_text("log_linear [30.81, 31.66]") == "log_linear [30.81, 31.66]"
