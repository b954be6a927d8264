"""Two-layer neural networks trained through their convex formulations, with a certificate of optimality."""

from cvxnn._version import __version__
from cvxnn.audit import NetworkReport, Witness, certify_network
from cvxnn.certificates import Certificate, certify
from cvxnn.diagnosis import Diagnosis, diagnose
from cvxnn.estimators import (
    ConvexAttentionClassifier,
    ConvexAttentionRegressor,
    ConvexCNNClassifier,
    ConvexCNNRegressor,
    ConvexMLPClassifier,
    ConvexMLPRegressor,
)
from cvxnn.layerwise import LayerwiseCNNClassifier
from cvxnn.model_selection import ConvexMLPClassifierCV, ConvexMLPRegressorCV
from cvxnn.onnx_export import export_onnx
from cvxnn.operators import MappedRows, RowSource
from cvxnn.problem import Problem
from cvxnn.problems import attention_problem, cnn_problem, mlp_problem
from cvxnn.relaxation import ReluDecomposition, gated_relaxation, to_relu
from cvxnn.row_files import ParquetRows, store_rows
from cvxnn.solvers import Result, path, solve
from cvxnn.storage import load, save

__all__ = [
    "Certificate",
    "ConvexAttentionClassifier",
    "ConvexAttentionRegressor",
    "ConvexCNNClassifier",
    "ConvexCNNRegressor",
    "ConvexMLPClassifier",
    "ConvexMLPClassifierCV",
    "ConvexMLPRegressor",
    "ConvexMLPRegressorCV",
    "Diagnosis",
    "LayerwiseCNNClassifier",
    "MappedRows",
    "NetworkReport",
    "ParquetRows",
    "Problem",
    "ReluDecomposition",
    "Result",
    "RowSource",
    "Witness",
    "__version__",
    "attention_problem",
    "certify",
    "certify_network",
    "cnn_problem",
    "diagnose",
    "export_onnx",
    "gated_relaxation",
    "load",
    "mlp_problem",
    "path",
    "save",
    "solve",
    "store_rows",
    "to_relu",
]
