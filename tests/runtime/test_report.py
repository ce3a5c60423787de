"""The report page and the figures in it."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from jaxalign.runtime import Report, curves, estimate, maps
from jaxalign.runtime.figures import lane_band

VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps every attribute and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.words, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def metrics():
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    steps = np.arange(1, 801)[:, None]
    loss = 2 / np.sqrt(steps) + 0.05 * rng.normal(size=(800, 8))
    return {"loss": loss, "accuracy": 1 - 0.5 / np.sqrt(steps[:, 0])}


def report(metrics):
    return (
        Report("A <b>sweep</b> & more")
        .text("# Setting\nThree seeds of `dpo`, **each** <script>alert(1)</script>.\n\n- one\n- two\n\nThe end.")
        .table(("beta", "win <rate>", "note"), [(0.1, 0.73125, "x < y"), (0.5, float("nan"), None)], "At step *500*")
        .figure(curves(metrics, title="Training", units={"loss": "nats"}), "Loss & accuracy")
    )


def test_page_is_valid_and_refers_to_nothing_outside(metrics, tmp_path):
    path = report(metrics).write(tmp_path / "deep" / "page.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert "script" not in page.tags
    assert page.tags.count("table") == page.tags.count("img") == 1
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert addresses
    assert all(value.startswith("data:image/png;base64,") for value in addresses)
    assert "http" not in text.replace(addresses[0], "")
    assert "url(" not in text
    assert "@import" not in text
    words = "".join(page.words)
    for expected in ("A <b>sweep</b> & more", "<script>alert(1)", "win <rate>", "x < y", "not measured", "0.7312"):
        assert expected in words
    assert page.tags.count("h2") == 1
    assert page.tags.count("li") == 2
    assert "prefers-color-scheme: dark" in text


def test_print_shows_the_same_table(metrics):
    out = io.StringIO()
    report(metrics).print(Console(file=out, width=120))
    for expected in ("A <b>sweep</b> & more", "win <rate>", "0.7312", "not measured", "At step *500*", "figure: Loss"):
        assert expected in out.getvalue()


def test_square_brackets_are_not_markup():
    out = io.StringIO()
    Report("[red]").table(("[bold]a",), [("0.1 [0.0, 0.2]",)]).print(Console(file=out, width=80))
    for expected in ("[red]", "[bold]a", "0.1 [0.0, 0.2]"):
        assert expected in out.getvalue()


def test_bad_rows_and_pictures():
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Report("t").table(("a", "b"), [(1, 2), (3,)])
    with pytest.raises(ValueError, match="not a PNG"):
        Report("t").figure(b"GIF89a")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.7312, 0.7021, 0.7584), "0.731 [0.702, 0.758]"),
        ((12.345, -1.0, 20.0), "12.3 [-1.0, 20.0]"),
        ((1234.5, 1200.0, 1300.0), "1,234 [1,200, 1,300]"),
        ((0.0, 0.0, 0.0), "0.00 [0.00, 0.00]"),
        ((9.87654e-07,), "9.88e-07"),
        ((None,), "not measured"),
        ((float("nan"), 0.0, 1.0), "not measured"),
        ((1.0, float("-inf"), float("inf")), "1.00 [-inf, inf]"),
    ],
)
def test_estimate(arguments, expected):
    assert estimate(*arguments) == expected


def test_estimate_units_and_errors():
    assert estimate(2.0, 1.0, 3.0, digits=2, unit="nats") == "2.0 [1.0, 3.0] nats"
    with pytest.raises(ValueError, match="both"):
        estimate(1.0, 0.5)
    with pytest.raises(ValueError, match="above"):
        estimate(1.0, 2.0, 0.5)


def test_band_by_hand():
    lanes = np.array([[0.0, 1.0, 3.0, 100.0], [2.0, 2.0, 2.0, 2.0]])
    middle, low, high = lane_band(lanes, band="range")
    np.testing.assert_allclose(middle, [2.0, 2.0])
    np.testing.assert_allclose(low, [0.0, 2.0])
    np.testing.assert_allclose(high, [100.0, 2.0])
    middle, low, high = lane_band(lanes)
    assert low[0] < middle[0] < high[0]
    np.testing.assert_allclose([low[1], high[1]], 2.0)


def test_curves(metrics):
    figure = curves(metrics, units={"loss": "nats"})
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), loss.get_xlabel(), accuracy.get_ylabel()) == ("loss (nats)", "step", "accuracy")
    assert len(accuracy.lines[0].get_xdata()) == 500
    assert accuracy.lines[0].get_xdata()[-1] == 799
    with pytest.raises(KeyError, match="no metric 'lost'"):
        curves(metrics, ["lost"])
    with pytest.raises(ValueError, match="needs"):
        curves({"x": np.zeros((2, 2, 2))}, ["x"])


def test_maps():
    figure = maps({"true": np.eye(3), "learned": np.array([[0.0, np.nan], [1.0, 2.0]])}, units={"true": "reward"})
    pictures = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in pictures] == ["true", "learned"]
    np.testing.assert_array_equal(pictures[0].images[0].get_array(), np.eye(3))
    assert np.ma.getmaskarray(np.ma.masked_invalid(pictures[1].images[0].get_array()))[0, 1]
    assert "reward" in {axes.get_ylabel() for axes in figure.axes}
    with pytest.raises(ValueError, match=r"row is \(3,\)"):
        maps({"row": np.zeros(3)})
    with pytest.raises(ValueError, match="no image"):
        maps({})
