"""``--adapter``: what ``dittfast distill`` trained, as one way of drawing."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dittfast.pipelines.measure.variants import Variant


def add_adapter_argument(parser) -> None:
    """``--adapter``."""
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="what dittfast distill trained, method and weights; --set changes its options",
    )


@dataclass(frozen=True)
class Adapter:
    """A trained adapter that is in the pipeline while something is drawn with it.

    Args:
        path: the folder, or a file of CLEAR's checkpoints.
        options: of its method and schedule, in the place of its own.
    """

    path: str
    options: dict = field(default_factory=dict)
    backend: str = "auto"

    @property
    def name(self) -> str:
        return Path(self.path).resolve().name

    def digest(self) -> str:
        """A short hash of what training wrote, and the options that were changed."""
        path, sha256 = Path(self.path), hashlib.sha256(repr(sorted(self.options.items())).encode())
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.suffix in (".safetensors", ".json"):
                sha256.update(file.read_bytes())
        return sha256.hexdigest()[:16]

    def resolved(self):
        """Its method and schedule, as they run.

        Raises:
            ValueError: an option that the method does not have.
        """
        from dittfast.config import resolve
        from dittfast.distill.artifacts import read_description

        if Path(self.path).is_file():
            raise ValueError(f"{self.path} is a file; evaluate takes an adapter's folder")
        about = read_description(self.path).data
        given = {"min_tokens": 0, **about["schedule"], **about["options"], **self.options}
        return resolve(about["preset"], **given)

    @contextlib.contextmanager
    def __call__(self, pipe, schedule: dict) -> Iterator[None]:
        from dittfast.distill.artifacts import load_adapter, unload_adapter

        load_adapter(pipe, self.path, backend=self.backend, **self.options, **schedule)
        try:
            yield
        finally:
            unload_adapter(pipe)


def adapter_variants(chosen: Iterable[str], backend: str = "auto") -> list[Variant]:
    """Variants of adapters as ``--adapter FOLDER`` or ``LABEL=FOLDER`` names them.

    Raises:
        ValueError: a file in the place of a folder, or a description that is none.
    """
    from dittfast.pipelines.measure.variants import Variant

    variants = []
    for text in chosen:
        label, equals, folder = text.partition("=")
        adapter = Adapter(folder if equals else text, {}, backend)
        label = label if equals else adapter.name
        variants.append(Variant(label, *adapter.resolved(), backend, way=adapter))
    return variants


def chosen_adapter(args) -> Adapter | None:
    """The adapter that was asked for, checked as far as its folder tells.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: together with what does not go with it, or a description that is none.
    """
    from .options import parse_options

    if args.adapter is None:
        return None
    for name in ("method", "config", "quantize"):
        if getattr(args, name, None):
            why = "brings its own method; change that with --set"
            if name == "quantize":
                why = "is checked against the weights that it was trained on"
            raise ValueError(f"--adapter {why}, so leave out --{name}")
    path = Path(args.adapter)
    if path.is_dir():
        from dittfast.distill.artifacts import read_description

        read_description(path)
    elif not path.is_file():
        raise FileNotFoundError(f"there is no adapter at {path}; name the folder of one")
    return Adapter(args.adapter, parse_options(args.options), args.backend)
