"""Files of columns: .csv and .tsv, .parquet, .arrow and .feather. Blocks are tables of pyarrow."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from pathlib import Path
from typing import Any

from batchnorm.preprocessing.sinks.sink import AppendingSink, Sink, State


class CsvSink(AppendingSink):
    """Text with a line of names first; numbers in the fewest digits that read back to the same, missing ones empty."""

    def __init__(self, path: Path, scratch: Path, delimiter: str) -> None:
        super().__init__(path, scratch)
        self.delimiter = delimiter

    def _write(self, block: Any) -> None:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        file = self._open()
        if file.tell() == 0:
            line = io.StringIO()
            csv.writer(line, delimiter=self.delimiter, lineterminator="\n").writerow(block.column_names)
            file.write(line.getvalue().encode())
        # Quotes only where a text needs them: the writer knows all or none, so all of a block that has such a text.
        for quoting in ("none", "needed"):
            text = pa.BufferOutputStream()
            options = arrow_csv.WriteOptions(
                include_header=False, delimiter=self.delimiter, quoting_style=quoting, batch_size=max(1, len(block))
            )
            try:
                arrow_csv.write_csv(block, text, options)
            except pa.ArrowInvalid:
                if quoting == "needed":
                    raise
                continue
            break
        file.write(text.getvalue())


class SegmentedSink(Sink):
    """Base of the formats that end in an index of all that they hold.

    Such a file cannot be gone on with: a checkpoint ends a segment, a whole file of its own, and ``close`` makes one of
    them. What takes less than ``interval`` is one segment, which is just renamed.
    """

    interval = 60.0
    _writer: Any = None
    _segments = 0

    def restore(self, state: State) -> bool:
        if not all(self._segment(number).exists() for number in range(state["segments"])):
            return False
        self._segments, self.rows = state["segments"], state["rows"]
        return True

    def close(self) -> None:
        self._flush()
        if self._segments > 1:
            joined = self.scratch / "joined"
            self._join([self._segment(number) for number in range(self._segments)], joined)
            sync_path(joined)
        else:
            joined = self._segment(0)
        os.replace(joined, self.path)
        for number in range(self._segments):
            self._segment(number).unlink(missing_ok=True)

    def release(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):  # the disk is as full as it was
                writer.close()

    def _segment(self, number: int) -> Path:
        return self.scratch / f"segment-{number:05d}"

    def _write(self, block: Any) -> None:
        if self._writer is None:
            self._writer = self._create(self._segment(self._segments), block.schema)
        self._writer.write_table(block)

    def _flush(self) -> State:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            sync_path(self._segment(self._segments))
            self._segments += 1
        return {"segments": self._segments}

    def _create(self, path: Path, schema: Any) -> Any:
        raise NotImplementedError

    def _join(self, segments: list[Path], path: Path) -> None:
        raise NotImplementedError


class ParquetSink(SegmentedSink):
    """A Parquet file, a row group a block."""

    def __init__(self, path: Path, scratch: Path, compression: str) -> None:
        super().__init__(path, scratch)
        self.compression = compression

    def _create(self, path: Path, schema: Any) -> Any:
        from pyarrow import parquet

        return parquet.ParquetWriter(path, schema, compression=self.compression)

    def _write(self, block: Any) -> None:
        if self._writer is None:
            self._writer = self._create(self._segment(self._segments), block.schema)
        self._writer.write_table(block, row_group_size=max(1, len(block)))

    def _join(self, segments: list[Path], path: Path) -> None:
        from pyarrow import parquet

        with self._create(path, parquet.read_schema(segments[0])) as writer:
            for segment in segments:
                with parquet.ParquetFile(segment) as file:
                    for group in range(file.num_row_groups):
                        table = file.read_row_group(group)
                        writer.write_table(table, row_group_size=max(1, len(table)))


class ArrowSink(SegmentedSink):
    """An Arrow IPC file; Feather is one that is compressed."""

    def __init__(self, path: Path, scratch: Path, compression: str | None) -> None:
        super().__init__(path, scratch)
        self.compression = compression

    def _create(self, path: Path, schema: Any) -> Any:
        import pyarrow as pa

        return pa.ipc.new_file(str(path), schema, options=pa.ipc.IpcWriteOptions(compression=self.compression))

    def _join(self, segments: list[Path], path: Path) -> None:
        import pyarrow as pa

        with pa.OSFile(str(segments[0])) as first:
            schema = pa.ipc.open_file(first).schema
        with self._create(path, schema) as writer:
            for segment in segments:
                with pa.OSFile(str(segment)) as opened:
                    file = pa.ipc.open_file(opened)
                    for number in range(file.num_record_batches):
                        writer.write_batch(file.get_batch(number))


def sync_path(path: Path) -> None:
    """Bring a file that a library has written to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
