"""Exceptions and warnings. Every message says what was seen and what is wanted."""

__all__ = [
    "CertificationWarning",
    "CvxnnError",
    "DependencyError",
    "DistributedError",
    "InvalidInputError",
    "MemoryShortageError",
    "MemoryWarning",
    "StorageError",
    "UnsupportedError",
]


class CvxnnError(Exception):
    """Base class of all errors raised on purpose by cvxnn."""


class InvalidInputError(CvxnnError, ValueError):
    """An argument has a wrong value, shape or type."""


class UnsupportedError(CvxnnError, ValueError):
    """A valid request that the chosen solver, norm or architecture cannot serve."""


class DependencyError(CvxnnError, ImportError):
    """An optional package is needed and missing."""


class StorageError(CvxnnError, OSError):
    """A file cannot be read or written: damaged, foreign, newer, or no permission."""


class DistributedError(CvxnnError, RuntimeError):
    """The processes of a run do not answer, or do not agree."""


class MemoryShortageError(CvxnnError, MemoryError):
    """Work that needs more memory than there is in all."""


class MemoryWarning(ResourceWarning):
    """Work that needs more memory than is free."""


class CertificationWarning(UserWarning):
    """A training ended without reaching the relative duality gap asked for."""
