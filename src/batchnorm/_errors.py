"""The exceptions of the package.

Every error is a :class:`BatchnormError` *and* the built-in kind that a PyTorch or scikit-learn user expects, so that
code written for those catches ours too::

    BatchnormError
    ├── InputError              ValueError      a value, a range, an option that makes no sense here
    │   ├── ShapeError          RuntimeError    a shape, rank, width or number of channels that does not fit
    │   ├── ConfigError                         a study's configuration
    │   ├── RecordsError                        a run's folder or its records
    │   ├── CheckpointError                     a file of weights
    │   ├── SurgeryError        RuntimeError    a change of a model that is refused
    │   └── StatisticsFileError                 a file of saved statistics
    ├── DtypeError              TypeError, RuntimeError    a type of data that cannot be handled
    ├── SynchronizationError    RuntimeError    processes that disagree, or one that does not answer
    ├── OutputError             OSError         a place that cannot be written
    └── MissingDependencyError  ImportError     an optional package that is not installed

A message is one line: what was expected, what came, what to do.
"""

from __future__ import annotations


class BatchnormError(Exception):
    """Base of all errors that the package raises on purpose."""


class InputError(BatchnormError, ValueError):
    """A value is out of range or an option is unknown."""


class ShapeError(InputError, RuntimeError):
    """A tensor has a rank, a width or a number of channels that does not fit.

    Also a RuntimeError, because that is what torch raises when a buffer has the wrong number of channels.
    """


class ConfigError(InputError):
    """A study's configuration has an unknown key or a value that makes no sense."""


class RecordsError(InputError):
    """A run's folder, or a line of its records, cannot be read."""


class CheckpointError(InputError):
    """A file of weights cannot be read safely, or does not belong to the model."""


class SurgeryError(InputError, RuntimeError):
    """A change of a model is refused; the message names the layer, and the model is as it was."""


class StatisticsFileError(InputError):
    """A file of saved statistics is truncated, foreign or of another version."""


class DtypeError(BatchnormError, TypeError, RuntimeError):
    """Data of a type that cannot be handled, or of types that do not go together.

    Also a RuntimeError, because that is what torch raises for dtypes that do not match.
    """


class SynchronizationError(BatchnormError, RuntimeError):
    """The processes of a group disagree about a layer, or one of them does not answer.

    Also a RuntimeError, because that is what torch.distributed raises.
    """


class OutputError(BatchnormError, OSError):
    """A file or folder cannot be written."""


class MissingDependencyError(BatchnormError, ImportError):
    """An optional package is needed and is not installed."""
