"""Local files as documents: text (one document a file), JSON lines, JSON, CSV, TSV, parquet; also .gz and .zst.

A text file is one document: lines are no documents in code, prose or verse, so they are not treated as such (unlike
in run_clm.py, which ends up with the same tokens but puts no end-of-text between files). For many short texts use
JSON lines. A row that cannot be used becomes a `BadRow` with its file and line; damage that hides where the next row
begins (half a gzip file, a broken JSON array, an open quote in CSV) is refused.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from dstrain.data.columns import LIST, NULL, OTHER, TEXT, ColumnFlags, check_column, choose_shape, value_kind
from dstrain.data.rows import BadRow, Row, check_document, read_row
from dstrain.errors import UserError

_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSION = {".gz", ".zst"}


def file_kind(path: Path) -> tuple[str | None, str]:
    """(kind, compression): kind is None for an unknown suffix, compression is "", ".gz" or ".zst"."""
    compression = path.suffix.lower() if path.suffix.lower() in _COMPRESSION else ""
    suffix = Path(path.stem).suffix if compression else path.suffix
    return _KINDS.get(suffix.lower()), compression


def read_file(path: Path, columns: ColumnFlags, group_column: str | None = None) -> Iterator[Row | BadRow]:
    """The rows of one file, in order. A file of unknown suffix is text. Raises UserError."""
    readers: dict[str, Callable[[Path, ColumnFlags, str | None], Iterator[Row | BadRow]]] = {
        "text": lambda path, columns, _: _read_text(path, columns),
        "json": _read_json,
        "csv": partial(_read_csv, delimiter=","),
        "tsv": partial(_read_csv, delimiter="\t"),
        "parquet": _read_parquet,
    }
    kind = file_kind(path)[0] or "text"
    if path.stat().st_size == 0:
        yield BadRow(str(path), "empty file", f"{path} is empty: leave it out or fill it")
    else:
        yield from readers[kind](path, columns, group_column)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a file; damage that shows while reading becomes a UserError."""
    compression = file_kind(path)[1]
    try:
        if compression == ".gz":
            with gzip.open(path, "rb") as unzipped:
                yield unzipped  # type: ignore[misc]
        elif compression == ".zst":
            import pyarrow  # its reader notices a truncated file; python-zstandard's ends in silence

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                yield io.BufferedReader(stream, 2**20)  # type: ignore[arg-type]
        else:
            with open(path, "rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): is it whole?") from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> BadRow:
    problem = (
        f"{where} is not UTF-8 (byte {error.start + 1} is 0x{error.object[error.start]:02x}): "
        "convert it, for example with iconv -f latin1 -t utf-8"
    )
    return BadRow(where, "not UTF-8", problem)


def _lines(path: Path) -> Iterator[tuple[str, BadRow | None]]:
    """Decoded lines with their ends, and what is wrong with them; a byte order mark is dropped."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            bad = None
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad = _not_utf8(f"{path}:{number}", error)
                text = line.decode("utf-8", "replace")
            yield text.removeprefix("\ufeff") if number == 1 else text, bad


def _read_text(path: Path, columns: ColumnFlags) -> Iterator[Row | BadRow]:
    if needing := columns.needing_columns:
        raise UserError(f"{path} is plain text, which has no columns: {needing[0]} needs JSON lines, CSV or parquet")
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"{path}:{line}"
        problem = (
            f"{where} is not UTF-8 (byte 0x{data[error.start]:02x}): a binary file, or convert it, "
            "for example with iconv -f latin1 -t utf-8"
        )
        yield BadRow(where, "not UTF-8", problem)
    else:
        yield check_document(str(path), (text.removeprefix("\ufeff"),))


def _read_json(path: Path, columns: ColumnFlags, group_column: str | None) -> Iterator[Row | BadRow]:
    """JSON lines, or one JSON array of objects (read whole); which of the two shows in the first character."""
    with _open(path) as file:
        is_array = next((line.strip()[:1] == b"[" for line in file if line.strip()), False)
    shape = None
    for where, row in _json_array(path) if is_array else _json_lines(path):
        if isinstance(row, BadRow):
            yield row
        elif not isinstance(row, dict):
            yield BadRow(where, "wrong type", f'{where} is not an object: write {{"text": "..."}}')
        else:
            shape = shape or choose_shape(where, {name: value_kind(cell) for name, cell in row.items()}, columns)
            yield read_row(where, row, shape, group_column)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, the value or a BadRow)."""
    for number, (line, bad) in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        if bad:
            yield where, bad
        elif line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                problem = (
                    f"{where} is not valid JSON ({error.msg} at column {error.colno}): write one object on each line"
                )
                yield where, BadRow(where, "invalid JSON", problem)


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    lines = []
    for line, bad in _lines(path):
        if bad:
            raise UserError(bad.problem)
        lines.append(line)
    try:
        rows = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} is not valid JSON ({error.msg} at column {error.colno})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _read_csv(path: Path, columns: ColumnFlags, group_column: str | None, delimiter: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)
    broken: list[BadRow] = []  # lines of the row that is being read

    def lines() -> Iterator[str]:
        for line, bad in _lines(path):
            if bad:
                broken.append(bad)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if broken:
            raise UserError(broken[0].problem)
        shape = choose_shape(f"{path}:1", dict.fromkeys(header, TEXT), columns)
        if group_column:
            check_column(f"{path}:1", header, group_column)
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if broken:
                yield broken[0]
                broken.clear()
            elif len(cells) == len(header):
                yield read_row(where, dict(zip(header, cells, strict=True)), shape, group_column)
            elif cells:
                counts = f"{len(cells)} fields, the header {len(header)}"
                yield BadRow(where, "wrong number of fields", f"{where} has {counts}: quote text that holds commas")
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num} is not valid CSV ({error})") from None


def _read_parquet(path: Path, columns: ColumnFlags, group_column: str | None) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        if file_kind(path)[1]:
            with _open(path) as stream:
                file = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()))
        else:
            file = pyarrow.parquet.ParquetFile(path)
        kinds = {field.name: arrow_kind(field.type) for field in file.schema_arrow}
        shape = choose_shape(str(path), kinds, columns)
        needed = list(shape.columns)
        if group_column:
            check_column(str(path), kinds, group_column)
            needed.append(group_column)
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=needed):
            for row in batch.to_pylist():
                number += 1
                yield read_row(f"{path} row {number}", row, shape, group_column)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable parquet file ({' '.join(str(error).split())[:200]})") from None


def arrow_kind(arrow_type: Any) -> str:
    """What the cells of a pyarrow type are, see `columns.TEXT`."""
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        return arrow_kind(arrow_type.value_type)
    if types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type):
        return TEXT
    if types.is_null(arrow_type):
        return NULL
    lists = (types.is_list, types.is_large_list, types.is_list_view)
    return LIST if any(is_list(arrow_type) for is_list in lists) else OTHER
