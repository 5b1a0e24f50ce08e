"""Files of rows -> their rows, one after another: JSON lines, CSV, Parquet and Arrow, no more of them than the columns that are wanted."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saebench.files import first_line

_LINES, _PARQUET, _ARROW = frozenset({".jsonl", ".json"}), ".parquet", ".arrow"
ROW_SUFFIXES = _LINES | {_PARQUET, _ARROW}
"""what files of rows are named that a data set is made of"""
CSV = ".csv"
_LONGEST_FIELD = 2**31 - 1  # characters; the limit of `csv` is shorter than some texts
_PACKED = frozenset({".gz", ".bz2", ".zst", ".xz"})  # on top of one for lines
_PARQUET_ROWS = 1024  # read at once


def suffix_of(file: Path) -> str:
    """What a file holds, by its name: that of `a.jsonl.gz` is .jsonl."""
    return Path(file.stem).suffix if file.suffix in _PACKED else file.suffix


def rows_of(file: Path, wanted: Sequence[str], errors: str) -> Iterator[Any]:
    """The rows of a file: dictionaries, or whatever else its JSON holds.

    Of Parquet the `wanted` columns that are there, or all where none is; `errors` is of bytes in JSON that are no UTF-8, `strict`
    or `replace`. Raises ValueError naming the file, and the line where there are lines, that cannot be read.
    """
    suffix = suffix_of(file)
    try:
        if suffix in _LINES:
            yield from _json_rows(file, errors)
        elif suffix == CSV:
            yield from _csv_rows(file, errors)
        else:
            yield from _parquet_rows(file, wanted) if suffix == _PARQUET else _arrow_rows(file)
    except (ValueError, OSError, EOFError, csv.Error, lzma.LZMAError, zlib.error) as error:
        if str(file) in str(error):
            raise
        raise ValueError(
            f"{str(file)!r} is damaged or no {file.suffix} file: {first_line(error)}"
        ) from error  # its reader does not name it


def _json_rows(file: Path, errors: str) -> Iterator[Any]:
    """Rows of a file with one in each line, or with a list of them."""
    with _unpacked(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors=errors) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if number == 1 and line.lstrip().startswith("["):
                    yield from _parsed(line + lines.read(), repr(str(file)))
                elif line.strip():
                    yield _parsed(line, f"line {number} of {str(file)!r}")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{str(file)!r} is not text in UTF-8: turn it into that first, or give --errors replace"
            ) from error


def _csv_rows(file: Path, errors: str) -> Iterator[dict[str, Any]]:
    """Rows by the names of the first line; a field that a row lacks is None."""
    csv.field_size_limit(_LONGEST_FIELD)
    with _unpacked(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors=errors, newline="") as lines:
        yield from csv.DictReader(lines)


def _unpacked(file: Path) -> Any:
    """A file's bytes, whatever it is compressed with. (pyarrow takes no name that is not UTF-8, and does not know xz.)"""
    if file.suffix in (".xz", ".gz", ".bz2"):
        module = {".xz": lzma, ".gz": gzip, ".bz2": bz2}[file.suffix]
        return module.open(file)
    if file.suffix == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(file.open("rb"), "zstd")
    return file.open("rb")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}): mend it, or leave it out") from error


def _parquet_rows(file: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with file.open("rb") as stream, pq.ParquetFile(stream) as table:
        there = table.schema_arrow.names
        columns = [name for name in wanted if name in there] or there
        for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
            yield from batch.to_pylist()


def _arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file as `datasets` writes it (a stream), or as `pyarrow.feather` does."""
    import pyarrow as pa

    with file.open("rb") as stream:
        try:
            batches: Any = pa.ipc.open_stream(stream)
        except pa.ArrowInvalid:
            stream.seek(0)
            opened = pa.ipc.open_file(stream)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()
