"""The dittfast command line.

A subcommand is a module here with ``add_arguments(parser)`` and ``run(args) -> exit code``. Only
the one that was asked for is imported, and torch only inside its ``run``, so help is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from dittfast import __version__
from dittfast.disk.problems import shown

from .parser import Parser, UsageError

COMMANDS = {
    "generate": "draw a picture with a pipeline, dense and sparse",
    "hunt": "search the attention heads that guide a model best",
    "tune": "find the cheapest preset within a budget of quality or speed, and prove it",
    "plan": "draw a method's block mask for a grid of tokens, with its density and FLOPs",
    "probe": "show what a method keeps of a real run's attention, head by head",
    "estimate": "compute what every method would save on a published model at its real size",
    "methods": "list the methods with all their options",
    "evaluate": "compare a model's pictures and speed with dense attention's",
    "report": "turn an evaluation into one HTML page",
    "distill": "train a model to work with sparse attention",
    "bench": "measure speed, after checking that the results agree",
    "ui": "draw dense and sparse on a page in the browser",
    "parity": "check every model family under every method, on tiny random models",
    "doctor": "show what runs on this machine, and why the rest does not",
}
INTERRUPTED = 130
# What ends a command: Ctrl-C, kill, and a terminal that is closed.
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
# Seconds in which half-written files are cleared away.
_CLEARING = 5.0
# What `dittfast plan` did before these were commands of their own: option -> command.
_MOVED = {"--probe": "probe", "--model": "estimate"}


def _parser(command: str | None) -> Parser:
    """The parser, with the arguments of ``command`` only."""
    parser = Parser(
        prog="dittfast",
        description="Faster diffusion transformers: sparse attention in diffusers pipelines.",
        epilog="dittfast COMMAND --help lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"dittfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
        )
        if name == command:
            module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(sub)
            sub.add_debug()
            sub.set_defaults(run=module.run)
    return parser


def _arguments(argv: list[str]) -> argparse.Namespace:
    """What a command line asks for.

    Raises:
        UsageError: it does not say so rightly.
    """
    parser = _parser(next((a for a in argv if not a.startswith("-")), None))
    args, rest = parser.parse_known_args(argv)
    # A command that takes a list of words takes them between its options, too.
    if rest and (not hasattr(args, "words") or any(word.startswith("-") for word in rest)):
        chosen = parser.chosen(args)
        hint = next(filter(None, (chosen.meant(word) for word in rest if word[:1] == "-")), "")
        chosen.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    elif rest:
        args.words.extend(rest)
    return args


@contextlib.contextmanager
def _only_json(args) -> Iterator[None]:
    """With ``--json -`` standard output is the JSON's; what people read goes to stderr."""
    if getattr(args, "json", None) != "-":
        yield
        return
    args.json_stream = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _modern(argv: list[str]) -> list[str]:
    """``argv`` in today's spelling; an old one is answered with a hint."""
    if argv[:1] != ["plan"]:
        return argv
    for at, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option not in _MOVED:
            continue
        before, after = argv[1:at], argv[at + 1 :]
        if not equals and after and not after[0].startswith("-"):
            value, after = after[0], after[1:]
        model = [value] if value else []
        if option == "--probe" and model:
            model = ["--model", *model]
        elif model == ["list"]:
            model = []
        command = _MOVED[option]
        print(
            f"dittfast: `dittfast plan {option}` is now `dittfast {command}`; dittfast {command} "
            "--help shows its options",
            file=sys.stderr,
        )
        return [command, *model, *before, *after]
    return argv


class _Ended(KeyboardInterrupt):
    """A signal asked the command to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _ending_cleanly():
    """Inside, a signal that ends the process raises, so that what is half done is cleared away.

    More of them do not stop the clearing, whichever they are. One that comes later raises again:
    Python drops what is raised in a destructor, and a command must not be deaf from then on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    heard = -math.inf

    def end(number, frame):
        nonlocal heard
        if time.monotonic() - heard > _CLEARING:
            heard = time.monotonic()
            raise _Ended(number)

    numbers = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    # A signal that is ignored (nohup) stays ignored.
    usual = signal.SIG_DFL, signal.default_int_handler
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) in usual}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _OnStderr(logging.StreamHandler):
    """The package's log messages for people: each once."""

    def __init__(self):
        super().__init__(sys.stderr)
        self._seen: set[str] = set()
        self.setFormatter(logging.Formatter("dittfast: %(message)s"))

    def filter(self, record):
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new and super().filter(record)


# How the allocators of PyTorch, of numpy and of systems say it.
_NO_MEMORY = (
    "out of memory", "not enough memory", "allocate memory", "Unable to allocate",
    "array is too big",
)  # fmt: skip


def _out_of_memory(error: BaseException) -> str | None:
    """What to say where memory ran out, of a device or of the host; None for other errors."""
    text = " ".join(str(error).split())
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not known and not any(words in text for words in _NO_MEMORY):
        return None
    asked = re.search(r"(allocate|allocated) ([\d.]+ ?(?:bytes|[KMGTP]i?B))", text)
    tried = f" (it asked for {asked[2]})" if asked else ""
    where = "the device" if "CUDA" in text or "HIP" in text else "this machine"
    return (
        f"out of memory on {where}{tried}. Less is needed by a smaller --height, --width, "
        "--num-frames or --batch-size, by --dtype bfloat16, --quantize int8 and --vae-tiling, and "
        "on an accelerator by --offload model, group or sequential"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code.

    0: done; 1: a check failed; 2: bad input, said in one line; 130: interrupted by Ctrl-C; 128
    plus its number: ended by a signal (143 for SIGTERM).
    """
    try:
        args = _arguments(_modern(list(sys.argv[1:] if argv is None else argv)))
    except UsageError as error:
        print(f"dittfast: error: {error}", file=sys.stderr)
        return 2
    logger, handler = logging.getLogger("dittfast"), _OnStderr()
    logger.addHandler(handler)
    informative = [logging.getLogger(name) for name in getattr(args, "says", ())]
    for one in informative:
        one.setLevel(logging.INFO)
    try:
        with _ending_cleanly(), _only_json(args):
            return args.run(args)
    except KeyboardInterrupt as ended:
        print("\ndittfast: interrupted; no half-written file is left", file=sys.stderr)
        return 128 + ended.number if isinstance(ended, _Ended) else INTERRUPTED
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        words = _out_of_memory(error)
        if words is None and isinstance(error, RuntimeError):
            raise  # a fault of ours, or torch's: its traceback is needed
        if args.debug:
            raise
        words = words or shown(error, 2000) or type(error).__name__
        print(f"dittfast: error: {words}", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(handler)
        for one in informative:
            one.setLevel(logging.NOTSET)
