"""Draws the pictures of the documentation: python docs/images/make.py"""

from pathlib import Path

import cvxnn
from cvxnn.datasets import spiral
from cvxnn.plotting import plot_decision_regions, plot_gap

FOLDER = Path(__file__).parent


def main() -> None:
    """Train on the spiral and draw decision regions and gap."""
    X, y = spiral(150)
    model = cvxnn.ConvexMLPClassifier(n_gates=200, beta=1e-3, tol=1e-6, random_state=0).fit(X, y)
    print(model.result_)
    plot_decision_regions(model.predict, X, y, FOLDER / "spiral.png", feature_names=("x1", "x2"))
    plot_gap(model.result_.trace, FOLDER / "gap.png", tol=1e-6)


if __name__ == "__main__":
    main()
