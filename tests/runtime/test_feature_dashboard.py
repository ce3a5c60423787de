"""The feature dashboard: its data, and in a real browser (where there is one) its search, sort and links."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from jaxalign.runtime.feature_dashboard import KINDS, FeaturePage, dashboard_html, page_data, write_dashboard
from jaxalign.runtime.sae_figures import density_histogram, l0_frontier

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXTS = {5: " the", 7: " cat", 9: "</script>", 11: "\n", 300: " dog"}


def page(**changes):
    """Three features, of which 0 and 2 have examples; 0 fires on "the", 2 on "cat" and a token that looks like HTML."""
    values = {
        "title": "Features of <tiny>",
        "name": "k=2",
        "facts": ["3 features"],
        "tokens": np.array([[5, 7, 9, 11], [5, 5, 7, 7]]),
        "texts": TEXTS,
        "density": np.array([0.375, 0.0, 0.5]),
        "maximum": np.array([2.0, 0.0, 4.0]),
        "mean": np.array([1.0, 0.0, 3.0]),
        "shown": np.array([0, 2]),
        "groups": [("Strongest", 2), ("Weakest quarter", 1)],
        "places": np.array([[0, 5, 4], [1, 2, -1]]),
        "activations": np.array([[[0, 2, 0], [0, 1, 0], [0, 0.001, 0]], [[0, 4, 3], [4, 3, 0], [0, 0, 0]]]),
        "before": 1,
        "histogram": np.array([[2, 1], [1, 3]]),
        "top": (np.array([[0.5], [0.25]]), np.array([[300], [7]])),
        "bottom": (np.array([[-0.5], [-0.25]]), np.array([[7], [11]])),
        "related": (np.array([[0.9], [0.9]]), np.array([[2], [0]])),
        "frontier": [{"name": "k=2", "l0": 2.0, "explained_variance": [0.7, 0.6, 0.8]}],
    }
    return FeaturePage(**{**values, **changes})


def unpacked(data, name):
    return np.frombuffer(base64.b64decode(data[name]["data"]), np.dtype(KINDS[data[name]["type"]]).newbyteorder("<"))


def test_the_data_survives_the_packing():
    data = page_data(page())
    assert data["vocabulary"] == [" the", " cat", "</script>", "\n", " dog"]
    assert unpacked(data, "tokens").tolist() == [0, 1, 2, 3, 0, 0, 1, 1]
    assert unpacked(data, "topTokens").tolist() == [4, 1]
    assert unpacked(data, "places").tolist() == [0, 5, 4, 1, 2, -1]
    np.testing.assert_allclose(unpacked(data, "density"), [0.375, 0, 0.5])
    # In 255 steps of the feature's maximum, rounded up: the weakest firing is not lost.
    assert unpacked(data, "activations").reshape(2, 3, 3)[0].tolist() == [[0, 255, 0], [0, 128, 0], [0, 1, 0]]
    assert (data["examples"], data["width"], data["effects"], data["length"]) == (3, 3, 1, 4)
    assert set(data["arrays"]) == {name for name, value in data.items() if isinstance(value, dict)}


def test_a_page_without_logits_has_none():
    data = page_data(page(top=None, bottom=None))
    assert data["effects"] == 0
    assert unpacked(data, "topValues").size == 0


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"histogram is \(1, 2\), places is \(2, 3\) of 3 features"):
        page_data(page(histogram=np.ones((1, 2))))
    with pytest.raises(ValueError, match=r"the groups hold .* places 3 examples"):
        page_data(page(groups=[("Strongest", 2)]))
    with pytest.raises(ValueError, match="token 300 has no text"):
        page_data(page(texts={i: t for i, t in TEXTS.items() if i != 300}))


def test_the_page_is_one_file_that_text_cannot_break_out_of(tmp_path):
    text = dashboard_html(page())
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    embedded = text.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in embedded
    assert json.loads(embedded)["vocabulary"][2] == "</script>"
    assert "Features of &lt;tiny&gt;" in text
    assert write_dashboard(tmp_path / "a" / "b.html", page()).read_text(encoding="utf-8") == text


def test_a_feature_takes_under_a_kilobyte():
    features, examples, window = 2000, 20, 24
    rng = np.random.default_rng(0)
    big = page(
        density=rng.uniform(size=features), maximum=np.ones(features), mean=np.ones(features),
        shown=np.arange(features), groups=[("Strongest", examples)],
        places=rng.integers(0, 8, (features, examples)), activations=rng.uniform(size=(features, examples, window)),
        histogram=rng.integers(0, 99, (features, 24)), top=(np.zeros((features, 8)), np.full((features, 8), 5)),
        bottom=(np.zeros((features, 8)), np.full((features, 8), 5)),
        related=(np.zeros((features, 6)), np.zeros((features, 6), int)),
    )  # fmt: skip
    assert len(dashboard_html(big)) / features < 1200


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the browser has on the page at an address."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    folder = tmp_path_factory.mktemp("dashboard")
    path = write_dashboard(folder / "page.html", page())

    def at(fragment):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
                   "--virtual-time-budget=2000", "--dump-dom", f"{path.as_uri()}#{fragment}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)

    return at


def numbers(dom):
    return [int(n) for n in re.findall(r'<li><a href="#feature=(\d+)', dom.partition("<main")[0])]


def test_the_browser_lists_features_and_shows_one(shown):
    dom = shown("feature=2&sort=often")
    assert numbers(dom) == [2, 0, 1]
    assert "<h2>Feature 2</h2>" in dom
    assert re.search(r'<a href="#feature=2&amp;sort=often" aria-current="true">', dom)
    assert re.search(r'class="token peak"[^>]*title="4.00"[^>]*> cat<', dom)
    assert "&lt;/script&gt;" in dom  # a token, shown as text
    assert "50% of tokens" in dom
    assert "<title>Feature 2 · Features of &lt;tiny&gt;</title>" in dom


def test_the_browser_searches(shown):
    dom = shown("q=the")
    assert numbers(dom) == [0]
    assert "1 of 3 features match" in dom
    assert numbers(shown("q=dog&in=writes")) == [0]


def test_the_pictures_are_drawn_and_refuse_what_does_not_fit():
    figure = l0_frontier(["k=8", "k=16"], [8.1, 16.3], [[0.5, 0.4, 0.6], [0.7, 0.6, 0.8]])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["k=8", "k=16"]
    assert axes.get_xlabel() == "L0 (features a token)"
    with pytest.raises(ValueError, match="needs \\[N\\] and \\[N, 3\\]"):
        l0_frontier(["k=8"], [8.0], [[0.5, 0.4]])
    figure = density_histogram({"k=8": [0.0, 0.01, 0.1], "k=16": [0.5, 0.5, 0.5]})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "k=8 (1 of 3 never fired)", "k=16"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="k=8 has values outside"):
        density_histogram({"k=8": [1.5]})
