"""The options of methods as they are listed: complete, and refused outside the stated range."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from dittfast.cli import main, methods
from dittfast.config import resolve
from dittfast.methods import METHODS
from dittfast.methods.options import descriptions, options_of

ROOT = Path(__file__).resolve().parent.parent
EVERY = [(name, option) for name, cls in METHODS.items() for option in options_of(cls)]


@pytest.mark.parametrize("name", METHODS)
def test_every_field_is_listed_with_its_default(name):
    cls = METHODS[name]
    listed = {option.name: option.default for option in options_of(cls)}
    assert listed == {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}


def outside(meaning: str) -> list[float]:
    """Numbers just outside the range that an option's description states."""
    found: list[float] = []
    for low, high in re.findall(r"(\d+) to (\d+)", meaning):
        found += [int(low) - 1, int(high) + 1]
    found += [int(low) - 1 for low in re.findall(r"(?:at least|from) (\d+)", meaning)]
    found += [int(low) for low in re.findall(r"above (\d+)", meaning)]
    for opening, low, high, closing in re.findall(r"in ([\[(])(\d+), (\d+)([\])])", meaning):
        found.append(int(low) if opening == "(" else math.nextafter(int(low), -1))
        found.append(int(high) if closing == ")" else math.nextafter(int(high), 9))
    return found


NUMBERS = [(n, o, value) for n, o in EVERY if "tuple" not in o.type for value in outside(o.meaning)]


@pytest.mark.parametrize("name, option, value", NUMBERS, ids=lambda x: getattr(x, "name", str(x)))
def test_numbers_outside_the_stated_range_are_refused(name, option, value):
    with pytest.raises(ValueError, match=option.name):
        METHODS[name](**{option.name: value})


@pytest.mark.parametrize("name, option", EVERY, ids=lambda x: getattr(x, "name", x))
def test_numbers_state_their_range_and_words_their_choices(name, option):
    if option.type.split(" ")[0] in ("int", "float"):
        assert outside(option.meaning), f"{name}.{option.name} states no range"
    if option.type == "str":
        choices = re.findall(r'"(\w+)"', option.meaning)
        assert option.default in choices
        for choice in choices:
            METHODS[name](**{option.name: choice})
        with pytest.raises(ValueError, match=option.name):
            METHODS[name](**{option.name: "zebra"})


def test_an_option_without_words_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Silent:
        """A method.

        Args:
            a, b: two numbers,
                on two lines.
        """

        a: int = 1
        c: int = 2

    assert descriptions(Silent) == {x: "two numbers, on two lines." for x in "ab"}
    with pytest.raises(ValueError, match="Silent does not describe c"):
        options_of(Silent)


def test_the_command_lists_them(capsys, tmp_path):
    assert main(["methods", "radial"]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.startswith("radial: ") and "decay_factor = 1.0  (float or tuple[float, ...])" in shown
    )
    assert "local" not in shown
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {option.name} = {option.default!r}" in shown for _, option in EVERY)
    assert main(["methods", "radail"]) == 2
    assert "Did you mean 'radial'?" in capsys.readouterr().err
    assert main(["methods", "--markdown", str(tmp_path / "a.md")]) == 0
    assert (tmp_path / "a.md").read_text() == methods.markdown(METHODS)


def test_the_document_is_what_the_methods_say():
    """``dittfast methods --markdown docs/methods.md`` writes it again."""
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == methods.markdown(METHODS)


WRONG = [{}, [], "x", "false", None, True, -1, 2.0, 0.3, 10**30, 1e300, math.nan, [10**9] * 3]


@pytest.mark.parametrize("name", METHODS)
def test_values_of_any_kind_are_taken_or_refused_in_words(name):
    """As a preset may have them: no TypeError, and no word or float where it would be misread."""
    for option in options_of(METHODS[name]):
        kinds = set(re.findall(r"\w+", option.type))
        for value in WRONG:
            try:
                resolve(name, **{option.name: value})
            except ValueError as error:
                assert option.name in str(error), (option, value, error)
                continue
            kind = type(value).__name__
            one_of = {"list": "tuple", "NoneType": "None"}.get(kind, kind)
            is_number = kind == "int" and "float" in kinds
            assert one_of in kinds or is_number or option.name == "inner", (option, value)
