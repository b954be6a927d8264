"""How runs are sampled: until the gap asked for is reached, or the cap."""

from __future__ import annotations

from typing import Any

from benchopt.stopping_criterion import StoppingCriterion

__all__ = ["Certified", "Cvxnn", "Reached", "Restarted"]


class Reached(StoppingCriterion):
    """Ends a curve at the relative gap asked for, or at a run that took as long as the cap.

    Both are in what the objective reports, so that they can be given on the command line.
    """

    def check_convergence(self, objective_list: list[dict[str, Any]]) -> tuple[bool, float]:
        """Whether the newest point ends the curve, and how far it is on a scale from 0 to 1."""
        last = objective_list[-1]
        stop = last["objective_gap"] <= last["objective_target"] or last["time"] >= 0.95 * last["objective_cap"]
        return stop, float(stop)


class Certified(Reached):
    """Ends a curve at a run to the tolerance asked for: it has to be proven, not only reached."""

    def check_convergence(self, objective_list: list[dict[str, Any]]) -> tuple[bool, float]:
        """Whether the newest point was to be certified to the target."""
        last = objective_list[-1]
        stop = last["stop_val"] <= last["objective_target"] or last["time"] >= 0.95 * last["objective_cap"]
        return stop, float(stop)


class Restarted:
    """For methods that can only be run anew, with more iterations: twice as many, or as many as the cap allows."""

    sampling_strategy = "iteration"
    stopping_criterion = Reached()
    growth = 2.0

    def run_timed(self, seconds: float, iterations: int) -> None:
        """Remember how long a run took."""
        self._seconds, self._iterations = seconds, iterations

    def get_next(self, iterations: int) -> int:
        """The next number of iterations."""
        wanted = max(iterations + 1, int(self.growth * iterations))
        seconds, cap = getattr(self, "_seconds", 0.0), getattr(self, "cap", float("inf"))
        if seconds > 0 and self._iterations > 0:
            wanted = min(wanted, int(cap / (seconds / self._iterations)) + 1)
        return max(iterations + 1, wanted)


class Cvxnn:
    """A solver of this package: everything is timed from X, Y and the gates to the weights, certificates included."""

    sampling_strategy = "tolerance"
    stopping_criterion = Certified()
    cvxnn_name = "auto"
    options: dict[str, Any] | None = None

    def set_objective(self, X: Any, Y: Any, gates: Any, beta: float, cap: float, **_: Any) -> None:
        """Keep what is needed."""
        self.data, self.beta, self.cap = (X, Y, gates), beta, cap

    def warm_up(self) -> None:
        """A run to a gap of one, which loads what is loaded at the first call."""
        self.run(1.0)

    def get_next(self, tol: float) -> float:
        """Tolerances 1e-2, 1e-4, 1e-6, ..."""
        return 1e-2 if tol > 1 else tol / 100

    def run(self, tol: float) -> None:
        """Solve to a certified relative gap."""
        import cvxnn
        from benchmark_utils.programs import make_program

        problem = make_program(*self.data, self.beta)
        self.result = cvxnn.solve(
            problem, self.cvxnn_name, tol=tol, time_limit=self.cap, random_state=0, solver_options=self.options
        )

    def get_result(self) -> dict[str, Any]:
        """Blocks Z."""
        Z, factors = self.result.Z, self.result.factors
        return {"Z": factors[0] @ factors[1].mT if Z is None else Z}
