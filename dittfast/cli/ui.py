"""``dittfast ui``: a page on this machine to draw with, dense and sparse."""

from __future__ import annotations

import argparse

from .options import add_model_argument, add_place_arguments, quiet_libraries, say
from .values import whole

EXAMPLE = """\
examples:
  dittfast ui
  dittfast ui --model sample-video --port 0 --open

The page answers to this machine alone, 127.0.0.1. From another one:
  ssh -L 7860:127.0.0.1:7860 HOST
It needs Gradio: pip install 'dittfast[ui]'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast ui``."""
    parser.epilog = EXAMPLE
    add_model_argument(parser)
    add_place_arguments(parser)
    page = parser.add_argument_group("page")
    page.add_argument(
        "--port",
        type=whole(0, 65535),
        default=7860,
        metavar="N",
        help="0: any free one (default: 7860)",
    )
    page.add_argument("--open", action="store_true", help="open the page in a browser")


def run(args) -> int:
    """Serve the page until Ctrl-C."""
    from dittfast.pipelines.runs import sources
    from dittfast.pipelines.ui.page import serve
    from dittfast.pipelines.ui.studio import Studio

    sources.find(args.model)
    studio = Studio(args.device, args.dtype, args.backend)
    quiet_libraries()

    def ready(url: str) -> None:
        say(f"dittfast ui is at {url}; Ctrl-C ends it")
        if args.open:
            import webbrowser

            webbrowser.open(url)

    serve(studio, args.model, args.port, ready)
    return 0
