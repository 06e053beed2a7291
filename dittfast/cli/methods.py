"""``dittfast methods``: every method with its options: default, type, range and meaning."""

from __future__ import annotations

import argparse
import textwrap

from dittfast.files import check_output, write_text

EXAMPLE = """\
examples:
  dittfast methods
  dittfast methods radial
  dittfast methods --markdown docs/methods.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast methods``."""
    parser.epilog = EXAMPLE
    parser.add_argument("method", nargs="?", metavar="NAME", help="one method only")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables here")


def run(args) -> int:
    """Print the methods, or write them as Markdown."""
    from dittfast.config import unknown
    from dittfast.methods import METHODS

    if args.method is not None and args.method not in METHODS:
        raise unknown("method", args.method, METHODS)
    chosen = {n: cls for n, cls in METHODS.items() if args.method in (None, n)}
    if args.markdown is not None:
        check_output(args.markdown, (".md",))
        write_text(args.markdown, markdown(chosen))
        print(f"wrote {args.markdown}")
        return 0
    print("\n\n".join(_text(name, cls) for name, cls in chosen.items()))
    return 0


def _summary(cls: type) -> str:
    """The first sentence of the class's docstring."""
    import inspect

    return " ".join(inspect.getdoc(cls).split("\n\n")[0].split())


def _kind(cls: type) -> str:
    if cls.computes:
        return "computes its own output"
    # Of one around another method, with the one it takes by default.
    return "planned once per size" if cls().static else "planned from q and k at every call"


def _text(name: str, cls: type) -> str:
    from dittfast.methods.options import options_of

    planned = _kind(cls)
    lines = [f"{name}: {_plain(_summary(cls))}", f"  {planned}"]
    for option in options_of(cls):
        lines.append(f"  {option.name} = {option.default!r}  ({option.type})")
        lines += textwrap.wrap(
            _plain(option.meaning), 92, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines)


def markdown(methods: dict[str, type]) -> str:
    """docs/methods.md: a table of options for every method."""
    from dittfast.methods.options import options_of

    parts = [
        "# Methods and their options\n\n"
        "Printed by `dittfast methods --markdown docs/methods.md` from the methods themselves. An "
        "option goes into\n`dittfast.enable(pipe, METHOD, OPTION=value)`, on the command line into "
        "`--set OPTION=value`, into a YAML\nfile below `options`. `dense_first_steps`, "
        "`dense_last_steps`, `dense_layers` and `min_tokens` go with any\nmethod: see "
        "`dittfast.Schedule`.\n"
    ]
    for name, cls in methods.items():
        planned = f"{_kind(cls).capitalize()}."
        rows = [
            f"| `{o.name}` | `{o.default!r}` | {o.type} | {_cell(o.meaning)} |"
            for o in options_of(cls)
        ]
        table = ["| option | default | type | meaning and range |", "|---|---|---|---|", *rows]
        parts.append(
            f"## `{name}`\n\n{_code(_summary(cls))} {planned}\n\n" + "\n".join(table) + "\n"
        )
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Docstring markup without its marks."""
    return text.replace("``", "")


def _code(text: str) -> str:
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return _code(text).replace("|", "\\|")
