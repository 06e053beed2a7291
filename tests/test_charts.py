"""Contact sheets and curves: the pictures are in them, and heights follow the values."""

import numpy as np
import pytest

from dittfast.measure.charts import COLORS, Curve, SheetRow, _ticks, contact_sheet, line_chart


def find(page, piece):
    """Where ``piece`` stands in ``page``, as (y, x); None if nowhere."""
    high, wide = piece.shape[:2]
    for y, x in zip(*np.nonzero((page == piece[0, 0]).all(-1))):
        if np.array_equal(page[y : y + high, x : x + wide], piece):
            return y, x
    return None


def test_a_sheet_shows_its_pictures_in_rows_and_columns():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 200, (2, 3, 64, 64, 3), dtype=np.uint8)
    rows = [SheetRow(f"row {n}", "0.5", list(row)) for n, row in enumerate(pictures)]
    page = np.asarray(contact_sheet(rows, ["one", "two", "three"], "title", "footer", size=64))
    places = [[find(page, p) for p in row] for row in pictures]
    for first, *others in places:
        assert all(place[0] == first[0] and place[1] > first[1] for place in others)
    assert [a[1] for a in places[0]] == [b[1] for b in places[1]]
    assert places[1][0][0] >= places[0][0][0] + 64
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([SheetRow("empty", "", [])])


def test_a_chart_is_as_high_as_its_values():
    values = (1.0, 3.0, 2.0)
    chart = line_chart([Curve("a", values), Curve("b", (2.5,), flat=True)], ["x", "y", "z"])
    page = np.asarray(chart)
    dots = (page == COLORS[0]).all(-1)
    tops = [np.nonzero(dots[:, 84 + round((n + 0.5) * 640 / 3)])[0].min() for n in range(3)]
    assert tops[1] < tops[2] < tops[0]
    dashes = np.nonzero((page == COLORS[1]).all(-1)[:, 84:724])[0]
    assert tops[1] < dashes.mean() < tops[2]


def test_ticks_are_round_and_around():
    for low, high in [(0, 1), (0.1234, 0.1291), (-3e-5, 2e4), (5, 5), (0, 0)]:
        ticks = _ticks(low, high)
        assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 9
    assert _ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_bad_charts():
    with pytest.raises(ValueError, match="finite"):
        line_chart([Curve("a", (1.0, float("nan")))], ["x", "y"])
    with pytest.raises(ValueError, match="fewer"):
        line_chart([Curve("a", (1.0, 2.0))], ["x"])
