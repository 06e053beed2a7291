"""What several subcommands share: ``--method``, ``--config``, ``--set``, and how numbers look."""

from __future__ import annotations

import argparse
import contextlib


def add_method_arguments(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """``--method``, ``--config`` and ``--set``; ``otherwise`` says what holds without them."""
    group = parser.add_argument_group("attention")
    either = group.add_mutually_exclusive_group(required=False)
    either.add_argument(
        "-m",
        "--method",
        metavar="NAME",
        help=f"a method such as radial or local, or a preset such as radial/wan2.1{otherwise}",
    )
    either.add_argument(
        "--config", metavar="FILE", help="a YAML file with method, options, schedule"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="an option of the method or its schedule, such as window=8; repeatable",
    )


def chosen_method(args) -> str | None:
    """What ``dittfast.config.resolve`` takes for the method, or None.

    Raises:
        ValueError: a config file without a YAML ending.
        FileNotFoundError: no such config file.
    """
    from pathlib import Path

    if args.config is None:
        return args.method
    path = Path(args.config)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a config file ends in .yaml or .yml")
    return str(path)


def parse_options(pairs: list[str]) -> dict:
    """``["window=8", "dense_layers=[0, 1]"]`` as names and YAML values.

    Raises:
        ValueError: no ``=``, an empty name, a name given twice, or a value that is no YAML.
    """
    import yaml

    options: dict = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, such as --set window=8; got {pair!r}")
        if key in options:
            raise ValueError(f"--set gives {key} twice")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key}: {text!r} is no YAML value") from error
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-3, without a point, as text
        options[key] = value
    return options


def compact(value: float, unit: str = "") -> str:
    """``1.23e12`` as ``1.23 T``."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def seconds(value: float) -> str:
    """Seconds with three digits: ``0.0123 s``, ``1.23 s``, ``123 s``."""
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def quiet_libraries() -> None:
    """One bar, ours: no bars for reading files of which most take no time."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
