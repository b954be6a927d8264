"""Solvers on Burer-Monteiro factors Z_k = U_k V_k^T (equation (14))."""

from cvxnn.solvers.burer_monteiro.globally import BmGlobal
from cvxnn.solvers.burer_monteiro.gradient import BmGd
from cvxnn.solvers.burer_monteiro.noisy import BmNoisyGd
from cvxnn.solvers.burer_monteiro.preconditioned import BmPrecGd
from cvxnn.solvers.burer_monteiro.projected import BmProjectedGd
from cvxnn.solvers.burer_monteiro.quasi_newton import BmLbfgs
from cvxnn.solvers.burer_monteiro.stochastic import BmSgd

__all__ = ["BmGd", "BmGlobal", "BmLbfgs", "BmNoisyGd", "BmPrecGd", "BmProjectedGd", "BmSgd"]
