"""The page itself: fields and buttons in Gradio, served to this machine alone."""

# Gradio reads the annotations of handlers at run time, so they must not be strings.
import dataclasses
import socket
import threading
import time
from collections.abc import Callable

from dittfast.config import SCHEDULE_FIELDS, method_fields, option_value, presets, resolve
from dittfast.methods import METHODS
from dittfast.methods.options import descriptions, options_of
from dittfast.schedule import Schedule

from ..runs import sources
from . import answers
from .studio import Cancelled, Job, Request, Studio

HOST = "127.0.0.1"
# The browser loads nothing from elsewhere, and no other page may show this one in a frame.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_SYSTEM_FONTS = ["system-ui", "sans-serif"]
_SYSTEM_MONO = ["ui-monospace", "monospace"]
_WAITING = 8  # requests that may wait for their turn
_METHOD = "local"  # the page begins with its preset for the model, where there is one
# What stands in a field at first. Below the break-even nothing would be seen of a method.
_PRESET = {"min_tokens": "0"}
_ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError)

CALL = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
_CALL_LABELS = {
    "height": "Height, px",
    "width": "Width, px",
    "num_frames": "Frames (video)",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance scale",
}
_KINDS = {"guidance_scale": float}
_SEED, _LAYER, _STEP = "Seed", "Layer, from 0", "Step, from 0"


def _number(text: str | None, label: str, kind: type = int):
    """What a field for a number holds; None where it is empty.

    Raises:
        ValueError: no number.
    """
    text = (text or "").strip()  # Gradio gives None for a field that was never touched
    try:
        return kind(text) if text else None
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{label} takes {what}, got {text!r}; empty is the default") from None


def choices() -> list[str]:
    """What the page offers as methods: every one but dense, then the presets."""
    return [name for name, cls in METHODS.items() if not cls.dense] + presets()


@dataclasses.dataclass(frozen=True)
class _Options:
    """The fields for a method's options: a component each, by method and option."""

    groups: dict
    fields: dict
    schedule: dict

    def all(self) -> list:
        """Every component, groups first, in one order."""
        inner = [field for fields in self.fields.values() for field in fields.values()]
        return [*self.groups.values(), *inner, *self.schedule.values()]

    def given(self, chosen: str, values: dict) -> dict:
        """The options that the chosen method's fields give; empty ones are left to the method."""
        method, schedule = resolve(chosen)
        options = {}
        for owner, fields in ((method, self.fields[method.name]), (schedule, self.schedule)):
            for name, field in fields.items():
                value = values[field]
                if value is None:
                    continue
                if isinstance(value, str):
                    value = value.strip()
                    if not value:
                        continue
                    value = option_value(value, name)
                if value != getattr(owner, name):
                    options[name] = value
        return options


def _option_field(gr, name: str, kind: str, default, meaning: str):
    meaning = meaning.replace("``", "")
    if kind == "bool":
        return gr.Checkbox(default, label=name, info=meaning)
    return gr.Textbox(_PRESET.get(name, ""), label=name, info=meaning, placeholder=str(default))


def _options(gr, chosen: str) -> _Options:
    """The fields of every method; those of others than the chosen one are hidden."""
    now, planned = resolve(chosen)
    groups, fields = {}, {}
    for name, cls in METHODS.items():
        if cls.dense:
            continue
        with gr.Group(visible=name == now.name) as group:
            known = now if name == now.name else cls()
            fields[name] = {
                o.name: _option_field(gr, o.name, o.type, getattr(known, o.name), o.meaning)
                for o in options_of(cls)
            }
        groups[name] = group
    words = descriptions(Schedule, "Attributes")
    with gr.Group():
        schedule = {
            name: _option_field(gr, name, "", getattr(planned, name), words[name])
            for name in SCHEDULE_FIELDS
        }
    return _Options(groups, fields, schedule)


def _on_method(gr, options: _Options) -> Callable:
    """What a newly chosen method changes: its fields appear, empty, with its defaults behind."""

    def update(chosen: str) -> list:
        method, planned = resolve(chosen)
        changes = [gr.update(visible=name == method.name) for name in options.groups]
        for name, cls in METHODS.items():
            if not cls.dense:
                owner = method if name == method.name else cls()
                changes += [fresh(owner, field) for field in method_fields(cls)]
        return changes + [fresh(planned, field) for field in SCHEDULE_FIELDS]

    def fresh(owner, field: str):
        value = getattr(owner, field)
        if isinstance(value, bool):
            return gr.update(value=value)
        return gr.update(value=_PRESET.get(field, ""), placeholder=str(value))

    return update


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All fields: components by what they mean."""

    options: _Options
    call: dict
    prompt: object
    model: object
    method: object
    negative: object
    image: object
    seed: object
    look: object
    layer: object
    step: object

    def all(self) -> set:
        """Every component whose value a drawing needs."""
        own = {f.name for f in dataclasses.fields(self)} - {"options", "call"}
        fields = {getattr(self, name) for name in own} | {*self.call.values()}
        return fields | {f for f in self.options.all() if f not in self.options.groups.values()}

    def request(self, values: dict) -> Request:
        """What the fields ask for.

        Raises:
            ValueError: a field that holds no number, or no YAML value.
        """
        call = {
            name: _number(values[field], _CALL_LABELS[name], _KINDS.get(name, int))
            for name, field in self.call.items()
        }
        call |= {"negative_prompt": values[self.negative] or None, "image": values[self.image]}
        return Request(
            values[self.model] or "",
            values[self.prompt] or "",
            values[self.method],
            self.options.given(values[self.method], values),
            call,
            seed=_number(values[self.seed], _SEED) or 0,
            look=values[self.look],
            step=_number(values[self.step], _STEP),
            layer=_number(values[self.layer], _LAYER),
        )


def _controls(gr, model: str):
    """The fields, and where they can be seen whatever is folded out: buttons and what happens."""
    prompt = gr.Textbox("a panda on a green background", label="Prompt", lines=2)
    known = gr.Dropdown(
        [*dict.fromkeys([model, *sources.sample_models()])],
        value=model,
        label="Model",
        info="a sample, a diffusers folder or a hub id",
        allow_custom_value=True,
    )
    own = f"{_METHOD}/{model}"
    first = own if own in presets() else _METHOD
    method = gr.Dropdown(choices(), value=first, label="Method", info="or a preset: method/model")
    with gr.Row():
        draw = gr.Button("Draw", variant="primary")
        stop = gr.Button("Cancel", variant="stop")
    status = gr.HTML(answers.sentence("Ready."))
    with gr.Accordion("Options of the method", open=False):
        options = _options(gr, first)
    with gr.Accordion("Size, steps and seed", open=True):
        gr.Markdown("Where a field is empty, the model's own value holds.")
        with gr.Row():
            call = {name: gr.Textbox(label=_CALL_LABELS[name], min_width=120) for name in CALL[:-1]}
            seed = gr.Textbox("0", label=_SEED, min_width=120)
    with gr.Accordion("More", open=False):
        call["guidance_scale"] = gr.Textbox(label=_CALL_LABELS["guidance_scale"])
        negative = gr.Textbox(label="Negative prompt")
        image = gr.File(
            label="First frame, for a pipeline that animates a picture",
            file_types=["image"],
            type="filepath",
        )
    with gr.Accordion("Attention", open=False):
        look = gr.Checkbox(
            True, label="Show the mask and what it keeps", info="takes up to one more dense run"
        )
        with gr.Row():
            layer = gr.Textbox(label=_LAYER, placeholder="the middle", min_width=120)
            step = gr.Textbox(label=_STEP, placeholder="the middle", min_width=120)
    fields = _Inputs(options, call, prompt, known, method, negative, image, seed, look, layer, step)
    return fields, draw, stop, status


def _handlers(gr, studio: Studio, inputs) -> tuple[Callable, Callable, Callable]:
    """What runs when somebody draws, presses Cancel, or leaves the page."""
    jobs: dict[str, Job] = {}  # under way, by browser session

    def on_draw(values: dict, browser: gr.Request, progress=gr.Progress()):  # noqa: B008
        job = jobs[browser.session_hash] = Job(lambda share, words: progress(share, desc=words))
        began = time.perf_counter()
        try:
            result = studio.draw(inputs.request(values), job)
        except Cancelled as stopped:
            return answers.sentence(f"{stopped}".capitalize() + "."), "", ""
        except _ERRORS as error:
            return answers.problem(error), "", ""
        finally:
            if jobs.get(browser.session_hash) is job:
                del jobs[browser.session_hash]
        done = answers.sentence(f"Done in {time.perf_counter() - began:.3g} s.")
        looked = answers.attention(result.look, result.no_look)
        return done, answers.comparison(result), looked

    def cancel(browser: gr.Request) -> None:
        if browser.session_hash in jobs:
            jobs[browser.session_hash].cancel()

    def on_stop(browser: gr.Request):
        cancel(browser)
        return answers.sentence("Cancelled.")

    return on_draw, on_stop, cancel


def build(studio: Studio, model: str = "sample-flux"):
    """The page as ``gradio.Blocks``.

    Raises:
        ValueError: Gradio is not installed.
    """
    gr = _gradio()
    with gr.Blocks(title="dittfast", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# dittfast\nDraws with dense attention and with a sparse method, from the same prompt "
            "and noise, and shows the difference."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs, draw, stop, status = _controls(gr, model)
            with gr.Column(scale=5, min_width=320):
                pictures = gr.HTML()
                attention = gr.HTML()
        on_draw, on_stop, cancel = _handlers(gr, studio, inputs)
        quiet = {"api_visibility": "private"}
        drawing = gr.on(
            [draw.click, inputs.prompt.submit],
            on_draw,
            inputs=inputs.all(),
            outputs=[status, pictures, attention],
            show_progress_on=status,
            concurrency_id="studio",
            concurrency_limit=1,
            **quiet,
        )
        stop.click(on_stop, outputs=status, cancels=[drawing], queue=False, **quiet)
        options = inputs.options
        changed = _on_method(gr, options)
        inputs.method.change(changed, inputs.method, options.all(), queue=False, **quiet)
        page.unload(cancel)
    return page.queue(max_size=_WAITING, api_open=False)


def _gradio():
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            "dittfast ui needs Gradio, which is not installed; pip install 'dittfast[ui]'"
        ) from error
    return gradio


class _Policed:
    """ASGI: every answer carries the policy that keeps the browser from asking other servers."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                headers.append((b"content-security-policy", _POLICY.encode()))
                headers.append((b"referrer-policy", b"no-referrer"))
            await send(message)

        await self.app(scope, receive, with_policy)


def listen(port: int) -> socket.socket:
    """A socket of this machine alone; port 0 takes any that is free.

    Raises:
        ValueError: a port out of range.
        OSError: the port is in use.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must lie in 0..65535, got {port}; 0 takes any that is free")
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((HOST, port))
    except OSError as error:
        taken.close()
        raise OSError(
            f"port {port} of {HOST} cannot be had ({error.strerror}); --port 0 takes any free one"
        ) from error
    return taken


def application(studio: Studio, model: str = "sample-flux", port: int = 0):
    """The page as an ASGI application that answers to the names of this machine alone.

    Raises:
        ValueError: Gradio is not installed.
    """
    gr = _gradio()
    import fastapi
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # A page elsewhere whose name is made to point here is not answered.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    app.add_middleware(_Policed)
    theme = gr.themes.Default(font=_SYSTEM_FONTS, font_mono=_SYSTEM_MONO)
    # Its own grey of hints is too pale to read on white.
    theme = theme.set(block_info_text_color="*neutral_600")
    return gr.mount_gradio_app(
        app,
        build(studio, model),
        path="/",
        server_name=HOST,
        server_port=port,
        theme=theme,
        css=answers.STYLE,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
    )


def serve(
    studio: Studio, model: str, port: int, on_ready: Callable[[str], None] = lambda url: None
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        on_ready: called with the page's address when it answers.

    Raises:
        ValueError, OSError: as :func:`listen` and :func:`build`.
    """
    taken = listen(port)
    with taken:
        port = taken.getsockname()[1]
        app = application(studio, model, port)
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))

        def tell() -> None:
            while not server.started:
                if server.should_exit:
                    return
                time.sleep(0.05)
            on_ready(f"http://{HOST}:{port}")

        threading.Thread(target=tell, daemon=True).start()
        server.run(sockets=[taken])
