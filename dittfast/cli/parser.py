"""The parser of the command line: what is wrong in one line, no option twice, a hint at a slip."""

from __future__ import annotations

import argparse
import difflib
import re

from . import values


class UsageError(ValueError):
    """The words of a command line are wrong."""


class _Once(argparse._StoreAction):
    """An option with a value; given twice, one of the two would be dropped in silence."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string and self in parser.given:
            old = getattr(namespace, self.dest)
            raise argparse.ArgumentError(
                self, f"is given twice, as {old!r} and as {values!r}; give it once"
            )
        parser.given.append(self)
        super().__call__(parser, namespace, values, option_string)


class _Each(argparse._AppendAction):
    """An option that may be repeated, with another value each time."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values in (getattr(namespace, self.dest) or ()):
            raise argparse.ArgumentError(self, f"is given twice with {values!r}; give it once")
        super().__call__(parser, namespace, values, option_string)


class _Several(_Once):
    """A list of values, each once."""

    def __call__(self, parser, namespace, given, option_string=None):
        try:
            values.different(given)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        super().__call__(parser, namespace, given, option_string)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong and where help is; knows what an option was meant to be.

    Raises:
        UsageError: from parsing, in the place of an exit.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.given: list[argparse.Action] = []
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.register("action", "append", _Each)
        self.register("action", "several", _Several)
        self.register("type", None, values.text)

    def add_subparsers(self, **how):
        tasks = super().add_subparsers(**how)
        tasks.type = values.anything  # what stands behind a task is for its own parser to judge
        return tasks

    def error(self, message: str):
        message = re.sub(r"^argument (\S+): (must|is given)", r"\1 \2", message)
        raise UsageError(f"{message}; {self.prog} --help lists the options")

    def meant(self, word: str) -> str:
        """A hint at the option of this parser nearest to an unknown one."""
        option = word.partition("=")[0]
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        if near == [option]:
            return f"; write it after {self.prog}"
        return f"; did you mean {near[0]}?" if near else ""

    def tasks(self) -> argparse._SubParsersAction | None:
        """What chooses among the parsers below this one; None where there are none."""
        return next((a for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)

    def chosen(self, args: argparse.Namespace) -> Parser:
        """The parser of the command, and of its task, that ``args`` names."""
        tasks = self.tasks()
        return tasks.choices[getattr(args, tasks.dest)].chosen(args) if tasks else self

    def add_debug(self, default=False) -> None:
        """Adds ``--debug``, which may stand before a task and after it."""
        self.add_argument(
            "--debug", action="store_true", default=default, help="show the traceback of an error"
        )
        tasks = self.tasks()
        for task in tasks.choices.values() if tasks else ():
            task.add_debug(default=argparse.SUPPRESS)  # keeps what stood before it
