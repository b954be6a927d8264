from cvxnn.solvers.burer_monteiro.quasi_newton import BmLbfgs


class BmGlobal(BmLbfgs):
    name = "bm_global"
