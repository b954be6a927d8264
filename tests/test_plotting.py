"""Pictures: written whole, not blank, for few and for many gates, classes and points."""

import dataclasses
import math
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cvxnn import ConvexMLPClassifier, plotting
from cvxnn.datasets import spiral
from cvxnn.errors import InvalidInputError, StorageError


def pixels(path):
    """The picture, (height, width, 4); it must show something."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) >= 400
    assert len(np.unique(image[::3, ::3, 0])) > 10
    return image


@pytest.fixture(scope="module")
def model():
    X, y = spiral(60)
    return ConvexMLPClassifier(n_gates=20, beta=1e-2, random_state=0).fit(X, y)


def test_gap(model, tmp_path):
    path = plotting.plot_gap(model.result_.trace, tmp_path / "gap.png", tol=1e-4)
    assert path == tmp_path / "gap.png"
    pixels(path)


@pytest.mark.parametrize(
    ("gaps", "tol"), [([], None), ([math.inf], 1e-4), ([0.0], 0.0), ([0.0], None), ([math.inf, 1.0, 0.0], 1e-4)]
)
def test_gap_of_odd_traces(gaps, tol, tmp_path):
    trace = [{"seconds": float(i), "relative_gap": gap} for i, gap in enumerate(gaps)]
    pixels(plotting.plot_gap(trace, tmp_path / "gap.png", tol=tol))


@pytest.mark.parametrize("gaps", [[1.0, 1e-1, 1e-2, 1e-3, 1e-5], [1.0, 1.0, 0.9, 0.9], [1.0, 1e-5], [1e-5], [1.0, 0.0]])
def test_label_of_the_last_gap_covers_nothing(gaps, tmp_path, monkeypatch):
    """Neither the line nor the label of the tolerance, and it lies within the picture."""
    figures, write = [], plotting._write
    monkeypatch.setattr(plotting, "_write", lambda figure, path: (figures.append(figure), write(figure, path))[1])
    trace = [{"seconds": 0.1 * i, "relative_gap": gap} for i, gap in enumerate(gaps, 1)]
    plotting.plot_gap(trace, tmp_path / "gap.png", tol=1e-4)
    (figure,) = figures
    (axes,) = figure.axes
    FigureCanvasAgg(figure).draw()
    label, tolerance = (text.get_window_extent() for text in axes.texts)
    x, y = axes.transData.transform(axes.lines[0].get_xydata()).T
    along = np.linspace(0, len(x) - 1, 2000)
    points = np.stack([np.interp(along, np.arange(len(x)), part) for part in (x, y)], axis=1)
    assert not any(label.contains(*point) for point in points)
    assert not label.overlaps(tolerance)
    assert label.x0 >= 0 and label.y0 >= 0
    assert label.x1 <= figure.bbox.x1 and label.y1 <= figure.bbox.y1


@pytest.mark.parametrize("n", [0, 1, 20, 1000])
def test_gates(model, tmp_path, n):
    ratios = tuple(np.linspace(0.1, 1.0, n))
    certificate = dataclasses.replace(model.certificate_, gate_ratios=ratios)
    pixels(plotting.plot_gates(certificate, tmp_path / "gates.png"))


@pytest.mark.parametrize("n_classes", [2, 10, 40])
def test_confusion(tmp_path, n_classes):
    y = np.arange(120) % n_classes
    perfect = pixels(plotting.plot_confusion(y, y, tmp_path / "a.png", part="test samples"))
    wrong = pixels(plotting.plot_confusion(y, np.roll(y, 1), tmp_path / "b.png", part="test samples"))
    assert perfect.shape != wrong.shape or (perfect != wrong).any()


def test_confusion_of_texts(tmp_path):
    pixels(plotting.plot_confusion(["benign", "malignant"], ["benign", "benign"], tmp_path / "a.png"))


@pytest.mark.parametrize("n", [1, 200])
def test_residuals(tmp_path, n):
    y = np.linspace(0, 1, n)
    pixels(plotting.plot_residuals(y, y + 0.1 * np.sin(20 * y), tmp_path / "a.png"))


@pytest.mark.parametrize("shapes", [((3,), (2,)), ((0,), (0,)), ((3, 1), (3, 1))])
@pytest.mark.parametrize("draw", [plotting.plot_confusion, plotting.plot_residuals])
def test_vectors_of_unequal_shape(tmp_path, draw, shapes):
    with pytest.raises(InvalidInputError, match="y_true has shape"):
        draw(np.zeros(shapes[0]), np.zeros(shapes[1]), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_classes", [3, 10])
def test_decision_regions(tmp_path, n_classes):
    X, y = spiral(60, n_classes)
    names = np.array([f"class {k}" for k in range(n_classes)])

    def predict(points):
        return names[(np.abs(points[:, 0]) * 2 * n_classes).astype(int) % n_classes]

    pixels(plotting.plot_decision_regions(predict, X, names[y], tmp_path / "a.png", feature_names=("x1", "x2")))


@pytest.mark.parametrize("constant", [False, True])
def test_regression_surface(tmp_path, constant):
    X, _ = spiral(60)

    def predict(points):
        return np.zeros(len(points)) if constant else points[:, 0] ** 2

    pixels(plotting.plot_regression_surface(predict, X, predict(X), tmp_path / "a.png"))


def test_a_plane_is_wanted(tmp_path):
    with pytest.raises(InvalidInputError, match=r"X has shape \(4, 3\); two features"):
        plotting.plot_decision_regions(len, np.zeros((4, 3)), np.zeros(4), tmp_path / "a.png")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(StorageError, match="cannot write"):
        plotting.plot_confusion([0, 1], [0, 1], tmp_path / "none" / "a.png")


def test_no_global_state_of_pyplot(tmp_path):
    plotting.plot_confusion([0, 1], [0, 1], tmp_path / "a.png")
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
