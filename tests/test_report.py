"""The report page: escaped, self-contained, with every number; read back by a parser."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dittfast.cli import main
from dittfast.measure import report
from dittfast.measure.embed import image_tag
from dittfast.measure.plots import Point, distance_plot, pareto_front, pareto_plot
from dittfast.measure.report import _points, html_report, markdown_report, read_results, tables_of
from dittfast.measure.summary import bootstrap_mean

EVIL = 'a <script>alert("x")</script> & "cat" | dog'


def method(label, name, work, values):
    pictures = [
        {
            "identical": False, "psnr_db": v, "ssim": 0.9, "lpips": None, "latent_cosine": 0.99,
            "temporal_error": None, "motion_ratio": None,
        }
        for v in values
    ]  # fmt: skip
    pooled = {"identical": 0} | {
        key: bootstrap_mean(p[key] for p in pictures if p[key] is not None) for key in pictures[0]
        if key != "identical"
    }  # fmt: skip
    return {
        "label": label,
        "method": {"name": name, "window": 3},
        "schedule": {"dense_first_steps": 1, "dense_last_steps": 0, "min_tokens": 0},
        "backend": "cpu",
        "density": work,
        "checked": {"backend": "cpu", "layers": 2, "density": work, "work": work},
        "sparse_layers": "2 of 2",
        "dense_over_method_seconds": {"median": 0.8, "pairs": 2},
        "pooled": pooled,
        "pictures": pictures,
    }


@pytest.fixture
def folder(tmp_path):
    methods = [method("wide", "local", 0.4, [30, 34]), method("near", "local", 0.1, [20, 22])]
    methods.append(method("top", "rectified", 0.3, [19, 20]))
    structure = [
        {
            "layer": f"layer {n}", "step": 1, "context": [0.1], "bins": ["0", "1", "2-3"],
            "space": [[0.5, 0.3, 0.2]], "space_uniform": [0.1, 0.3, 0.6], "frame_bins": ["0"],
            "frames": [[1.0]], "frames_uniform": [1.0],
        }
        for n in range(2)
    ]  # fmt: skip
    data = {
        "task": "fidelity", "model": "tiny", "weights": "abc", "pipeline": "P",
        "call": {"height": 40, "width": 60, "num_inference_steps": 2}, "dtype": "float32",
        "device": {"type": "cpu", "name": "a CPU", "threads": 1}, "versions": {"torch": "2"},
        "dense": "stock", "lpips": "not here", "interval": "bootstrap", "pairs": [],
        "items": [{"index": i, "prompt": EVIL, "seed": i} for i in range(2)],
        "methods": methods, "structure": structure,
    }  # fmt: skip
    (tmp_path / "fidelity.json").write_text(json.dumps(data))
    draw = np.random.default_rng(0)
    for label in ("dense", "wide", "near", "top"):
        (tmp_path / label / "images").mkdir(parents=True)
        for i in range(2):
            pixels = draw.integers(0, 255, (40, 60, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / "images" / f"{i:05d}.png")
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "wide" / "mask.png")
    return tmp_path


class Page(HTMLParser):
    """Tags that are open, all sources and links, and all text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.ids, self.links, self.words = [], [], [], [], []
        self.tags = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [v for k, v in attributes if k in ("href", "xlink:href", "src")]
        if tag == "img":
            self.images.append(given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def test_the_page_is_whole_escaped_and_self_contained(folder):
    text = html_report(folder, read_results(folder), pictures=1)
    page = Page(text)
    assert not page.open and "script" not in page.tags
    assert EVIL in " ".join(page.words)
    assert all(x.startswith(("data:", "#")) for x in page.links)
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r"<pre>.*?</pre>", "", text))
    assert len(page.ids) == len(set(page.ids))
    # One prompt: dense, picture and difference of each method; then one mask.
    assert len(page.images) == 3 * 3 + 1 and all(i["alt"] for i in page.images)
    assert page.images[1]["alt"] == f"wide: {EVIL}"
    first = base64.b64decode(page.images[0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(first)).size == (60, 40)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert text.count("<svg") == 3 and "currentColor" in text and "#010203" not in text
    for words in ("32.00 [30.00, 34.00]", "window=3", "weights abc"):
        assert words in text


def test_markdown_holds_the_tables_and_prompts(folder):
    text = markdown_report(read_results(folder))
    assert "| wide | 0.400 | 0.400 |" in text
    assert "- a &lt;script&gt;" in text and "<script" not in text


def latency_row(label, median, name="local"):
    """What the tables read of a row of latency.json, with the settings of the pictures."""
    schedule = {"dense_first_steps": 1, "dense_last_steps": 0, "min_tokens": 0}
    spread = {"p20": median - 0.1, "p50": median, "p80": median + 0.1}
    seconds = {"whole": spread, "step": spread}
    return {
        "label": label, "pairs": 5, "end_to_end": spread, "per_step": spread,
        "seconds": {"dense": seconds, "method": seconds}, "attention": {"density": 0.2},
        "share": {"dense": {"attention": 0.3}}, "ceiling": 1.4, "ceiling_at_density": 1.3,
        "parity": {"layers": 2, "backend": "cpu", "density": 0.2},
        "peak_memory_bytes": {"dense": None, "method": None}, "against_dense": {"psnr_db": 20.0},
        "model": "tiny", "weights": "abc", "dtype": "float32", "versions": {"torch": "1"},
        "call": {"height": 40, "width": 60, "num_inference_steps": 2}, "schedule": schedule,
        "device": {"type": "cpu", "name": "a CPU"}, "method": {"name": name, "window": 3},
        "backend": "cpu",
    }  # fmt: skip


def test_one_table_has_density_speed_and_quality(folder):
    rows = [latency_row("wide", 0.8), latency_row("top", 0.5, "rectified")]
    (folder / "latency.json").write_text(json.dumps({"task": "latency", "rows": rows}))
    distances = [
        {
            "folder": f"many/{name}", "value": value, "is_fid": False, "features": "net",
            "dims": 8, "pictures": 256, "reference": "many/dense/images",
            "reference_pictures": 255, "too_few": False,
        }
        for name, value in (("near/images", 3.25), ("wide", 1.5))
    ]  # fmt: skip
    (folder / "fid.json").write_text(json.dumps({"task": "fid", "rows": distances}))
    results = read_results(folder)
    table, *others = tables_of(results)
    assert len(others) == 3
    assert [row[:3] for row in table.rows] == [
        ("wide", "0.400", "0.80 [0.70, 0.90]"),
        ("near", "0.100", "-"),
        ("top", "0.300", "0.50 [0.40, 0.60]"),
    ]
    assert [row[-1] for row in table.rows] == ["1.5", "3.25", "-"]
    assert table.head[-1] == "Fréchet distance, features of net"
    assert table.notes[-1].endswith("no FID: 256 pictures of each method against 255 of dense.")
    text = html_report(folder, results, pictures=1)
    assert Page(text).words.count("Speed and quality by method and density") == 1
    # Measured speed replaces the rough one of single calls.
    assert "dense seconds / method seconds, whole call<" in text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"call": {"height": 40, "width": 60, "num_inference_steps": 4}}, "num_inference_steps: 2"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' -> 'bfloat16'"),
        ({"device": {"type": "cuda", "name": "a GPU"}}, "device.name: 'a CPU' -> 'a GPU'"),
        ({"method": {"name": "local", "window": 4}}, "method.window: 3 -> 4"),
        ({"schedule": {"dense_first_steps": 0}}, "schedule.dense_first_steps: 1 -> 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_was_timed_otherwise_does_not_stand_beside(folder, change, words):
    rows = [latency_row("wide", 7.77) | change, latency_row("near", 0.5)]
    (folder / "latency.json").write_text(json.dumps({"task": "latency", "rows": rows}))
    results = read_results(folder)
    table, *_ = tables_of(results)
    assert [row[2] for row in table.rows] == ["other settings", "0.50 [0.40, 0.60]", "-"]
    (note,) = [n for n in table.notes if n.startswith("other settings: speed of wide")]
    assert words in note
    ((points, *_), *_) = _points(results)
    assert [p.label for p in points] == ["near"]


def test_the_command_writes_three_files(folder, capsys):
    assert main(["report", str(folder), "--pictures", "1", "--no-plots", "--json", "-"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ("report.html", "report.md", "report.json")
    assert last["files"] == [str(folder / n) for n in names]
    assert (folder / "report.html").stat().st_size == last["bytes"]
    assert "<svg" not in (folder / "report.html").read_text()
    assert json.loads((folder / "report.json").read_text())["fidelity"]["model"] == "tiny"


def test_a_video_becomes_a_moving_preview(folder):
    for label in ("dense", "wide", "near", "top"):
        images = folder / label / "images"
        for number in range(3):
            Image.new("RGB", (60, 40), (80 * number, 0, 0)).save(images / f"00000_{number:03d}.png")
        (images / "00000.png").unlink()
    text = html_report(folder, read_results(folder), pictures=1, plots=False)
    moving = base64.b64decode(Page(text).images[0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(moving)).n_frames == 3


def test_bad_folders(folder, tmp_path, capsys):
    (folder / "near" / "images" / "00000.png").unlink()
    with pytest.raises(FileNotFoundError, match="picture 0 of near is not in"):
        html_report(folder, read_results(folder), plots=False)
    with pytest.raises(ValueError, match="pictures must be at least 1, got 0"):
        html_report(folder, read_results(folder), pictures=0)
    (folder / "near" / "images" / "00000.png").write_text("text")
    assert main(["report", str(folder), "--no-plots"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (folder / "report.html").exists()
    (folder / "latency.json").write_text('{"task": "fid"}')
    with pytest.raises(ValueError, match=r"latency.json: it is a result of fid, not of latency"):
        read_results(folder)
    (folder / "latency.json").write_text("[")
    with pytest.raises(ValueError, match=r"latency.json: it is not valid JSON"):
        read_results(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no fidelity.json"):
        read_results(tmp_path / "near")


def rewrite(folder, change):
    data = json.loads((folder / "fidelity.json").read_text())
    change(data)
    (folder / "fidelity.json").write_text(json.dumps(data))


def test_nothing_outside_the_folder_gets_into_the_page(folder, tmp_path_factory, capsys):
    """By a label, an index, a link or a file that is no picture."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "images").mkdir()
    for name in ("00000.png", "00001.png"):
        Image.new("RGB", (60, 40), "red").save(outside / "images" / name)
    secret = outside / "secret.png"
    Image.new("RGB", (30, 30), "red").save(secret)
    whole = (folder / "fidelity.json").read_text()

    def refused(message):
        assert main(["report", str(folder), "--no-plots"]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and not (folder / "report.html").exists(), error
        (folder / "fidelity.json").write_text(whole)

    for label in (f"../../{outside.name}", str(outside), ".."):
        rewrite(folder, lambda data, label=label: data["methods"][0].update(label=label))
        refused("is not the name of something in it")
    for index in ("*", "../x", [1], {}):
        rewrite(folder, lambda data, index=index: data["items"][0].update(index=index))
        refused(str(folder))
    mask = (folder / "wide" / "mask.png").read_bytes()
    (folder / "wide" / "mask.png").unlink()
    (folder / "wide" / "mask.png").symlink_to(secret)
    refused("mask.png: it is a link")
    (folder / "wide" / "mask.png").unlink()
    (folder / "wide" / "mask.png").write_bytes(b"<svg onload=alert(1)>")
    refused(r"mask.png: it cannot be read as a PNG")
    (folder / "wide" / "mask.png").write_bytes(mask + b"<script>hidden</script>")
    picture = folder / "near" / "images" / "00000.png"
    drawn = picture.read_bytes()
    picture.unlink()
    picture.symlink_to(outside / "images" / "00000.png")
    refused("00000.png: it is a link")
    picture.unlink()
    picture.write_bytes(drawn)
    assert main(["report", str(folder), "--no-plots"]) == 0
    page = (folder / "report.html").read_text()
    for source in re.findall(r"base64,([\w+/=]+)", page):
        assert b"<script>" not in base64.b64decode(source)
    latency = folder / "latency.json"
    latency.symlink_to(secret)
    with pytest.raises(ValueError, match=r"latency.json: it is a link"):
        read_results(folder)


def test_small_files_do_not_fill_the_memory(folder, monkeypatch):
    """A picture of one colour has a few kilobytes, whatever its size."""
    images = folder / "near" / "images"
    (images / "00000.png").unlink()
    for number in range(3):
        Image.new("1", (8000, 1000)).save(images / f"00000_{number:03d}.png")
    monkeypatch.setattr(report, "_MOST_PIXELS", 2 * 8_000_000)
    monkeypatch.setattr(Image.Image, "convert", None)  # nothing is decoded
    with pytest.raises(ValueError, match="3 frames have 24,000,000 pixels together, of which a"):
        report._frames(folder, "near", {"index": 0})


def test_markdown_from_a_hostile_folder_is_text(folder):
    evil = "![x](http://a/b.png) [y](http://c) <img src=d> `e`\n# f"

    def change(data):
        data["model"], data["dense"], data["lpips"] = evil, evil, evil
        data["items"][0]["prompt"] = data["device"]["name"] = evil
        data["methods"][0]["method"]["name"] = evil

    rewrite(folder, change)
    results = read_results(folder)
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(markdown_report(results))
    kinds = {t.type for token in tokens for t in [token, *(token.children or [])]}
    assert not kinds & {"image", "link_open", "html_inline", "html_block", "softbreak"}
    headings = [tokens[n + 1].content for n, t in enumerate(tokens) if t.type == "heading_open"]
    assert "f" not in headings
    assert "a/b.png" not in "".join(Page(html_report(folder, results, plots=False)).links)


def test_pareto_front():
    points = [Point(n, "g", x, y) for n, x, y in (("a", 1, 1), ("b", 2, 3), ("c", 3, 2))]
    assert [p.label for p in pareto_front(points, larger_x=False)] == ["a", "b"]
    assert [p.label for p in pareto_front(points, larger_x=True)] == ["b", "c"]


def test_many_layers_become_their_mean_and_range():
    curves = {f"block {n}": [n / 10, 1 - n / 10] for n in range(11)}
    text = distance_plot(curves, ["0", "1"], [0.5, 0.5], "d", "many")
    assert "mean and range of 11 layers" in text and "block 3" not in text


def test_labels_of_near_points_do_not_overlap():
    points = [Point(f"a method {n}", "g", 1 + n * 1e-3, 1 + n * 1e-3) for n in range(4)]
    text = pareto_plot([*points, Point("far", "h", 2, 2)], "x", "y", "one")
    at = re.findall(r"translate\(([\d.]+) ([\d.]+)\)[^<>]*>a method", text)
    if not at:  # matplotlib writes x and y where the text is not turned
        at = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^<>]*>a method', text)
    assert len(at) == 4
    places = [(float(x), float(y)) for x, y in at]
    for i, (x, y) in enumerate(places):
        for u, v in places[:i]:
            # 9 pt text: a line further, or on the other side of the points.
            assert abs(y - v) >= 8 or abs(x - u) >= 12


def test_plots_are_the_same_every_time():
    points = [Point("a", "g", 1, 1, 0.5, 1.5), Point("b", "h", 2, 3)]
    assert pareto_plot(points, "x", "y", "one") == pareto_plot(points, "x", "y", "one")
    text = distance_plot({"layer": [0.7, 0.3]}, ["0", "1"], [0.5, 0.5], "d", "two")
    assert text.startswith("<svg") and "uniform" in text and 'id="two-' in text


def test_a_picture_waits_for_nothing():
    """A page is printed and photographed whole: what loads when it is scrolled to is missing."""
    tag = image_tag("data:,", 'a "fox"')
    assert re.findall(r" (\w+)=", tag) == ["src", "alt"] and "&quot;fox&quot;" in tag
    with pytest.raises(ValueError, match="needs words"):
        image_tag("data:,", " ")
