"""R-FISTA of scnn (the package pyscnn)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from benchmark_utils.sampling import Restarted
from benchopt import BaseSolver
from scnn.metrics import Metrics
from scnn.models import ConvexGatedReLU
from scnn.optimize import optimize_model
from scnn.regularizers import NeuronGL1
from scnn.solvers import RFISTA


class Solver(Restarted, BaseSolver):
    """The same program: its loss is divided by n c, so lambda = beta / n. Tolerance zero, iterations varied."""

    name = "scnn-rfista"
    requirements = ["pip::pyscnn"]

    def skip(self, X: Any, Y: Any, gates: Any, **_: Any) -> tuple[bool, str | None]:
        """One output only: for more its penalty is another one."""
        if Y.shape[1] > 1:
            return True, "for several outputs its penalty is not the nuclear norm"
        if (X @ gates == 0).any():
            return True, "its gates are x . g > 0, and a sample lies on one"
        return False, None

    def set_objective(self, X: Any, Y: Any, gates: Any, beta: float, cap: float, **_: Any) -> None:
        """Keep what is needed."""
        self.X, self.y, self.gates, self.beta, self.cap = X, Y[:, 0], gates, beta, cap

    def warm_up(self) -> None:
        """Load what is loaded at the first call."""
        self.run(1)

    def run(self, iterations: int) -> None:
        """So many iterations from zero."""
        begin = time.perf_counter()
        self.trained = None
        if iterations > 0:
            model = ConvexGatedReLU(self.gates, c=1)
            self.trained, _ = optimize_model(
                model,
                RFISTA(model, max_iters=iterations, tol=0.0),
                Metrics(metric_freq=max(25, iterations)),
                self.X,
                self.y,
                regularizer=NeuronGL1(self.beta / len(self.X)),
                return_convex=True,
                unitize_data=False,
                dtype="float64",
            )
        self.run_timed(time.perf_counter() - begin, iterations)

    def get_result(self) -> dict[str, Any]:
        """Blocks in the order of the gates given: the trained model lists those in use, in an order of its own."""
        Z = np.zeros((self.gates.shape[1], self.X.shape[1], 1))
        if self.trained is not None:
            place = {column.tobytes(): k for k, column in enumerate(np.ascontiguousarray(self.gates.T))}
            weights = np.asarray(self.trained.parameters[0]).reshape(-1, self.X.shape[1])
            columns = np.ascontiguousarray(np.asarray(self.trained.G).T)
            for column, weight in zip(columns, weights, strict=True):
                Z[place[column.tobytes()], :, 0] = weight
        return {"Z": Z}
