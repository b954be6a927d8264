"""scikit-learn's own checks, with no expected failures."""

import warnings

import pytest
from sklearn.exceptions import SkipTestWarning
from sklearn.utils.estimator_checks import check_estimator

from cvxnn import (
    ConvexMLPClassifier,
    ConvexMLPClassifierCV,
    ConvexMLPRegressor,
    ConvexMLPRegressorCV,
)

ESTIMATORS = [
    ConvexMLPClassifier(n_gates=20, random_state=0),
    ConvexMLPClassifier(activation="linear", loss="cross_entropy"),
    ConvexMLPRegressor(n_gates=20, random_state=0),
    ConvexMLPClassifierCV(n_gates=10, n_betas=3, cv=2, random_state=0),
    ConvexMLPRegressorCV(n_gates=10, n_betas=3, cv=2, random_state=0),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: f"{type(e).__name__}-{e.activation}-{e.loss}")
@pytest.mark.filterwarnings("default::cvxnn.errors.CertificationWarning")
def test_check_estimator(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        results = check_estimator(estimator, on_fail=None)
    failed = [r for r in results if r["status"] not in {"passed", "skipped"}]
    assert not failed, "\n".join(f"{r['check_name']}: {r['exception']!r}" for r in failed)
    assert sum(r["status"] == "passed" for r in results) > 40
