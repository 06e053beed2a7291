"""The page of ``dittfast ui``: what it draws, says and refuses; test_ui_browser.py looks at it."""

import re
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tiny import assert_same_picture, flux_pipeline

import dittfast
from dittfast.config import resolve
from dittfast.methods import METHODS
from dittfast.methods.options import options_of
from dittfast.pipelines.ui import answers, studio
from dittfast.pipelines.ui.studio import Cancelled, Job, Request, Studio

CALL = dict(height=64, width=96, num_inference_steps=3, max_sequence_length=12)
LOCAL = dict(window=3, tile=[1, 4, 4], min_tokens=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("ui") / "tiny-flux"
    flux_pipeline().save_pretrained(where)
    return str(where)


@pytest.fixture(scope="module")
def here():
    return Studio("cpu")


def request(folder, **changes):
    given = dict(prompt="a red cat", method="local", options=LOCAL, call=CALL)
    return Request(folder, **given | changes)


@pytest.fixture(scope="module")
def result(here, folder):
    return here.draw(request(folder))


def stock(pipe):
    """The picture of a stock call."""
    generator = torch.Generator().manual_seed(0)
    image = pipe(prompt="a red cat", **CALL, generator=generator, output_type="np").images[0]
    return (image * 255).round().astype(np.uint8)


def test_it_draws_dense_and_sparse(result):
    assert_same_picture(result.dense.run.frames[0], stock(flux_pipeline()))
    assert not np.array_equal(result.sparse.run.frames, result.dense.run.frames)
    assert 0 < result.sparse.density < 1


def test_it_looks_at_the_attention_in_the_middle(result, here, folder):
    look = result.look
    assert (look.step, look.layer) == (1, "single_transformer_blocks.0.attn")
    assert look.tokens == 8 * 12 + 12
    assert 0 < look.density < 1 and 0 < look.mass < 1 and look.error > 0
    everything = here.draw(request(folder, options=LOCAL | {"window": 100}, step=2, layer=0))
    look = everything.look
    assert (look.step, look.layer) == (2, "transformer_blocks.0.attn")
    assert look.density == 1 and look.mass == pytest.approx(1) and look.error < 1e-5


@pytest.mark.slow
def test_the_look_ends_with_its_step(here, folder):
    """After the step that is looked at, the transformer is not asked again."""
    job = Job()
    said = []
    job.on_progress = lambda share, words: said.append((share, words))
    here.draw(request(folder, call=CALL | {"num_inference_steps": 5}, step=1), job)
    looked = [words for _, words in said if words.startswith("attention")]
    assert len(looked) == 1 + 3  # its name, two steps, and the pass that ends the run
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] > 0.9


def test_no_look_where_it_would_take_long(here, folder, monkeypatch):
    monkeypatch.setattr(studio, "MOST_TOKENS", 50)
    found = here.draw(request(folder, call=CALL | {"num_inference_steps": 1}))
    assert found.look is None and "up to 50 tokens, and this has 108" in found.no_look


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("dense, warm-up", marks=pytest.mark.slow),
        "local, step 2",
        pytest.param("attention, step 1", marks=pytest.mark.slow),
    ],
)
def test_a_cancelled_job_leaves_the_pipeline_as_it_was(stage, here, folder, result):
    job = Job()
    job.on_progress = lambda share, words: words.startswith(stage) and job.cancel()
    with pytest.raises(Cancelled):
        here.draw(request(folder), job)
    pipe = here._loaded[1]
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.describe(pipe)
    assert not pipe.transformer._forward_pre_hooks
    again = stock(pipe)
    assert np.array_equal(again, result.dense.run.frames[0])


def test_a_job_cancelled_while_it_waits_does_not_begin(here, folder):
    job = Job(lambda share, words: pytest.fail(f"it began: {words}"))
    job.cancel()
    with pytest.raises(Cancelled):
        here.draw(request(folder), job)


@pytest.mark.slow
def test_one_job_at_a_time(here, folder, monkeypatch):
    inside, most = [], []
    draw = studio.generate

    def watched(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        try:
            return draw(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(studio, "generate", watched)
    quick = request(folder, look=False, call=CALL | {"num_inference_steps": 1})
    threads = [threading.Thread(target=here.draw, args=(quick,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompt=" "), "the prompt is empty"),
        (dict(method="lokal"), "Did you mean 'local'"),
        (dict(method="dense", options={}), "choose another method"),
        (dict(method="radial/wan2.1", options={}), "is for WanTransformer3DModel"),
        (dict(options={"windw": 3}), "Did you mean 'window'"),
        (dict(options={"window": -1}), "window"),
        (dict(call=CALL | {"height": 65}), "the nearest is 64"),
        (dict(call=CALL | {"num_frames": 5}), "takes no num_frames"),
        (dict(call=CALL | {"num_inference_steps": 0}), "at least 1, got 0"),
        (dict(seed=-1), "seed must lie in 0"),
        (dict(step=3), "the step to look at must lie in 0..2 here, got 3"),
        (dict(layer=-1), "the layer to look at must lie in 0..3 here, got -1"),
        (dict(call=CALL | {"image": "no/such.png"}), "no picture at"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_drawn(
    changes, message, here, folder, monkeypatch
):
    monkeypatch.setattr(studio, "generate", lambda *_, **__: pytest.fail("it draws"))
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        here.draw(request(folder, **changes))


def test_a_wrong_model_device_or_backend():
    with pytest.raises(OSError, match="Did you mean 'sample-flux'"):
        Studio("cpu").draw(Request("sample-flx", "a cat", "local"))
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        Studio("cpu", backend="tritn")
    with pytest.raises(ValueError, match="no device"):
        Studio("abc")


class Tags(HTMLParser):
    """The start tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_answers_have_words_for_every_picture(result):
    page = Tags(answers.comparison(result) + answers.attention(result.look, None))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 5
    assert all(len(picture["alt"].split()) > 5 for picture in pictures)
    assert len({picture["alt"] for picture in pictures}) == 5
    assert all(picture["src"].startswith("data:image/") for picture in pictures)


def test_answers_have_times_density_and_distance(result):
    page = Tags(answers.comparison(result))
    assert f"{result.sparse.density:.3f}" in page.text
    ratio = result.dense.seconds_per_step / result.sparse.seconds_per_step
    assert f"{ratio:.2f} x as fast" in page.text
    assert f"PSNR {result.record['against_dense']['psnr_db']:.2f} dB" in page.text
    looked = Tags(answers.attention(result.look, None)).text
    assert f"{result.look.mass:.1%} of dense attention" in looked


@pytest.mark.parametrize(
    "options",
    [{"min_tokens": 10_000}, pytest.param({"dense_first_steps": 3}, marks=pytest.mark.slow)],
)
def test_a_method_that_did_not_run_gets_no_ratio(options, here, folder):
    found = here.draw(request(folder, options=LOCAL | options, look=False))
    page = Tags(answers.comparison(found)).text
    assert "local did not run" in page and "as fast" not in page


def test_what_people_type_is_no_markup(here, folder):
    words = 'a cat <img src=x onerror="alert(1)"> ${1+1} {{value}}'
    quick = CALL | {"num_inference_steps": 1}
    found = here.draw(request(folder, prompt=words, look=False, call=quick))
    page = Tags(answers.comparison(found))
    assert [a["src"][:5] for t, a in page.tags if t == "img"] == ["data:"] * 3
    problem = Tags(answers.problem(ValueError("<b>no</b>\n such")))
    assert "<b>no</b> such" in problem.text
    assert ("div", {"class": "dittfast", "role": "alert"}) in problem.tags


# What follows needs Gradio.


@pytest.fixture
def page():
    pytest.importorskip("gradio", reason="the page is made of Gradio: pip install dittfast[ui]")
    from dittfast.pipelines.ui import page

    return page


def components(blocks):
    return {c.label: c for c in blocks.blocks.values() if getattr(c, "label", None)}


def test_every_option_of_every_method_has_a_field(page, here):
    import gradio as gr

    with gr.Blocks(analytics_enabled=False):
        options = page._options(gr, "local")
    assert list(options.fields) == [name for name, cls in METHODS.items() if not cls.dense]
    for name, fields in options.fields.items():
        assert {n: f.info for n, f in fields.items()} == {
            o.name: o.meaning.replace("``", "") for o in options_of(METHODS[name])
        }
        assert options.groups[name].visible == (name == "local")
    assert set(options.schedule) == {
        "dense_first_steps", "dense_last_steps", "dense_layers", "min_tokens",
        "replan_every", "replan_drift",
    }  # fmt: skip


@pytest.mark.parametrize("chosen", ["local", "rectified", "radial/wan2.1"])
def test_fields_that_were_not_touched_change_nothing(page, chosen):
    import gradio as gr

    with gr.Blocks(analytics_enabled=False):
        options = page._options(gr, "local")
    values = {field: getattr(field, "value", None) for field in options.all()}
    update = dict(zip(options.all(), page._on_method(gr, options)(chosen)))
    for field, change in update.items():
        values[field] = change.get("value", values.get(field)) or ""
    # The page runs a method at any size unless it is told otherwise.
    assert options.given(chosen, values) == {"min_tokens": 0}
    values[options.schedule["min_tokens"]] = " "
    assert options.given(chosen, values) == {}
    method, schedule = resolve(chosen)
    fields = options.fields[method.name]
    for owner, of in ((method, fields), (schedule, options.schedule)):
        for name, field in of.items():
            value = getattr(owner, name)
            shown = update[field].get("placeholder", update[field]["value"])
            assert shown == (value if isinstance(value, bool) else str(value))
    # And one that was: it reaches the method as on the command line.
    name = "dense_layers"
    values[options.schedule[name]] = "[0, -1]"
    first = next(n for n, f in fields.items() if not isinstance(getattr(method, n), bool))
    values[fields[first]] = str(getattr(method, first))
    assert options.given(chosen, values) == {name: [0, -1]}
    values[options.schedule[name]] = "[0"
    with pytest.raises(ValueError, match=r"dense_layers: '\[0' is no YAML value"):
        options.given(chosen, values)


def test_numbers_are_read_or_refused(page):
    assert page._number(" ", "Height, px") is None and page._number(None, "Height, px") is None
    assert page._number(" 64 ", "Height, px") == 64
    assert page._number("3.5", "Guidance scale", float) == 3.5
    with pytest.raises(ValueError, match=r"Height, px takes a whole number, got '6\.5'"):
        page._number("6.5", "Height, px")


def answered(app, host):
    """Status and headers of a GET, as the server sees it."""
    import anyio

    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"host", host)], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 7860),
    }  # fmt: skip
    anyio.run(app, scope, receive, send)
    return sent[0]["status"], {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}


def test_the_page_is_for_this_machine_alone(page, here):
    app = page.application(here)
    status, headers = answered(app, b"127.0.0.1:7860")
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'self'" in policy
    assert not re.search(r"https?:|\*", policy)
    assert answered(app, b"elsewhere.example")[0] == 400
    with page.listen(0) as taken:
        assert taken.getsockname()[0] == "127.0.0.1"
        taken.listen()
        with pytest.raises(OSError, match="--port 0 takes any free one"):
            page.listen(taken.getsockname()[1])
    with pytest.raises(ValueError, match=r"port must lie in 0\.\.65535, got 70000"):
        page.listen(70000)


def test_the_page_asks_nobody(page, here):
    blocks = page.build(here)
    assert blocks.analytics_enabled is False
    run = [f for f in blocks.fns.values() if f.concurrency_id == "studio"]
    assert [f.concurrency_limit for f in run] == [1]


def test_without_gradio_it_says_what_to_install(monkeypatch, here, capsys):
    import sys

    from dittfast.cli import main

    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui", "--port", "0"]) == 2
    assert "pip install 'dittfast[ui]'" in capsys.readouterr().err
