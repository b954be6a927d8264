"""Networks trained by anyone: read, judged with certificates, and improved."""

from cvxnn.audit.certification import certify_network
from cvxnn.audit.reading import ACTIVATIONS, read_network
from cvxnn.audit.report import NetworkReport
from cvxnn.audit.witness import Witness

__all__ = ["ACTIVATIONS", "NetworkReport", "Witness", "certify_network", "read_network"]
