"""Where transformed data go: the same kinds of files that sources read, written as a stream.

:func:`transform_file` transforms a file, a folder or a pattern of files of any size, and can go on where it stopped.
"""

from __future__ import annotations

from batchnorm.preprocessing.sinks.job import interrupted_rows
from batchnorm.preprocessing.sinks.transforming import Transformed, transform_file

__all__ = ["Transformed", "interrupted_rows", "transform_file"]
