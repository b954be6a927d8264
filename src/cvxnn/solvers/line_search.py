"""A step length that lowers a function enough and flattens its slope (More, Thuente 1994)."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LineSearch"]

#: Sufficient decrease, flatness, and relative width of the interval at which the search ends: those of L-BFGS-B.
_DECREASE, _FLATNESS, _WIDTH = 1e-3, 0.9, 0.1
_LONGEST = 1e10
#: How far beyond the last step the next one may be, while no minimiser is between two steps.
_LEAST_GROWTH, _MOST_GROWTH = 1.1, 4.0
_SHRINKAGE = 0.66


@dataclass(frozen=True)
class _Trial:
    """A step, and the value and slope of the function there."""

    step: float
    value: float
    slope: float

    def tilted(self, slope: float) -> _Trial:
        """The same of the function minus a linear one."""
        return _Trial(self.step, self.value - self.step * slope, self.slope - slope)


class LineSearch:
    """Asks for the value and slope at one step after the other, until it is `done`.

    Parameters
    ----------
    value, slope : float
        Of the function at 0; the slope is negative.
    step : float
        The first step to try.

    Attributes
    ----------
    step : float
        What to try next; the step that was found, once it is done.
    done : bool
    """

    def __init__(self, value: float, slope: float, step: float) -> None:
        self.step, self.done = step, False
        self._start = _Trial(0.0, value, slope)
        # The best step so far, and the other end of the interval.
        self._best = self._other = self._start
        self._bracketed, self._first_stage = False, True
        self._width, self._width_before = _LONGEST, 2 * _LONGEST
        self._least, self._most = 0.0, (1 + _MOST_GROWTH) * step

    def tell(self, value: float, slope: float) -> None:
        """Value and slope at `step`."""
        tilt = _DECREASE * self._start.slope
        trial = _Trial(self.step, value, slope)
        limit = self._start.value + trial.step * tilt
        low_enough = value <= limit
        if self._first_stage and low_enough and slope >= 0:
            self._first_stage = False
        self.done = low_enough and abs(slope) <= -_FLATNESS * self._start.slope
        if self._bracketed:
            narrow = self._most - self._least <= _WIDTH * self._most
            self.done |= narrow or not self._least < trial.step < self._most
        self.done |= trial.step == _LONGEST and low_enough and slope <= tilt
        if self.done:
            return
        if self._first_stage and value <= self._best.value and not low_enough:
            # A lower value that is not low enough: the interval is to hold a minimiser of the tilted function.
            self._narrow(trial.tilted(tilt), tilt)
        else:
            self._narrow(trial, 0.0)
        best, other = self._best.step, self._other.step
        if self._bracketed:
            if abs(other - best) >= _SHRINKAGE * self._width_before:
                self.step = best + 0.5 * (other - best)
            self._width_before, self._width = self._width, abs(other - best)
            self._least, self._most = min(best, other), max(best, other)
        else:
            self._least = self.step + _LEAST_GROWTH * (self.step - best)
            self._most = self.step + _MOST_GROWTH * (self.step - best)
        self.step = min(max(self.step, 0.0), _LONGEST)
        narrow = self._most - self._least <= _WIDTH * self._most
        if self._bracketed and (narrow or not self._least < self.step < self._most):
            self.step = best

    def _narrow(self, trial: _Trial, tilt: float) -> None:
        """Take a trial into the interval, and choose the next step, for the function minus a linear one."""
        best, other = self._best.tilted(tilt), self._other.tilted(tilt)
        turned = trial.slope * math.copysign(1.0, best.slope) < 0
        if trial.value > best.value:
            step, bracketed = _below_higher(best, trial), True
        elif turned:
            step, bracketed = _farther(trial.step, _cubic(trial, best), _secant(trial, best)), True
        elif abs(trial.slope) < abs(best.slope):
            step, bracketed = self._flatter(best, other, trial), self._bracketed
        elif self._bracketed:
            step, bracketed = _cubic(trial, other), True
        else:
            step, bracketed = (self._most if trial.step > best.step else self._least), False
        if trial.value > best.value:
            other = trial
        else:
            best, other = trial, (best if turned else other)
        self._best, self._other = best.tilted(-tilt), other.tilted(-tilt)
        self.step, self._bracketed = step, bracketed

    def _flatter(self, best: _Trial, other: _Trial, trial: _Trial) -> float:
        """A lower value and a smaller slope of the same sign: the cubic may have no minimiser beyond."""
        secant = _secant(trial, best)
        theta = 3 * (best.value - trial.value) / (trial.step - best.step) + best.slope + trial.slope
        scale = max(abs(theta), abs(best.slope), abs(trial.slope))
        root = scale * math.sqrt(max(0.0, (theta / scale) ** 2 - (best.slope / scale) * (trial.slope / scale)))
        root = -root if trial.step > best.step else root
        ratio = ((root - trial.slope) + theta) / ((root + (best.slope - trial.slope)) + root)
        if ratio < 0 and root != 0:
            cubic = trial.step + ratio * (best.step - trial.step)
        else:
            cubic = self._most if trial.step > best.step else self._least
        if not self._bracketed:
            return min(max(_farther(trial.step, cubic, secant), self._least), self._most)
        step = cubic if abs(cubic - trial.step) < abs(secant - trial.step) else secant
        bound = trial.step + _SHRINKAGE * (other.step - trial.step)
        return min(bound, step) if trial.step > best.step else max(bound, step)


def _cubic(first: _Trial, second: _Trial) -> float:
    """Minimiser of the cubic through two trials with their slopes, counted from the first."""
    theta = 3 * (first.value - second.value) / (second.step - first.step) + first.slope + second.slope
    scale = max(abs(theta), abs(first.slope), abs(second.slope))
    root = scale * math.sqrt(max(0.0, (theta / scale) ** 2 - (first.slope / scale) * (second.slope / scale)))
    root = -root if second.step < first.step else root
    ratio = ((root - first.slope) + theta) / (((root - first.slope) + root) + second.slope)
    return first.step + ratio * (second.step - first.step)


def _secant(first: _Trial, second: _Trial) -> float:
    """Where the slope through two trials is zero."""
    return first.step + first.slope / (first.slope - second.slope) * (second.step - first.step)


def _below_higher(best: _Trial, trial: _Trial) -> float:
    """A step between the best one and a higher value: of the cubic, or half way to it from that of the parabola."""
    cubic, apart = _cubic(best, trial), trial.step - best.step
    drop = (best.value - trial.value) / apart + best.slope
    parabola = best.step + best.slope / drop / 2 * apart
    if abs(cubic - best.step) < abs(parabola - best.step):
        return cubic
    return cubic + (parabola - cubic) / 2


def _farther(step: float, first: float, second: float) -> float:
    return first if abs(first - step) > abs(second - step) else second
