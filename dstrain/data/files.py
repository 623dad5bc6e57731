"""Local files as documents: text (one document a file), JSON lines, JSON, CSV, TSV, parquet; also .gz and .zst.

A text file is one document: lines are no documents in code, prose or verse, so they are not treated as such (unlike
in run_clm.py, which ends up with the same tokens but puts no end-of-text between files). For many short texts use
JSON lines. Whatever cannot be read is refused with its file and line; nothing is skipped but empty documents.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dstrain.data.columns import Document, choose_columns, read_row
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


def read_file(path: Path, text_column: str | None) -> Iterator[Document]:
    """The documents of one file, in order. A file of unknown suffix is text. Raises UserError."""
    readers: dict[str, Callable[[Path, str | None], Iterator[Document]]] = {
        "text": _read_text,
        "json": _read_json,
        "csv": lambda path, column: _read_csv(path, column, ","),
        "tsv": lambda path, column: _read_csv(path, column, "\t"),
        "parquet": _read_parquet,
    }
    kind = file_kind(path)[0] or "text"
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: leave it out or fill it")
    yield from readers[kind](path, text_column)


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


def _decode(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start + 1} is 0x{data[error.start]:02x}): "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from None


def _lines(path: Path) -> Iterator[str]:
    """Decoded lines with their ends; a byte order mark is dropped."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            text = _decode(f"{path}:{number}", line)
            yield text.removeprefix("\ufeff") if number == 1 else text


def _read_text(path: Path, text_column: str | None) -> Iterator[Document]:
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line} is not UTF-8 (byte 0x{data[error.start]:02x}): a binary file, or convert it, "
            "for example with iconv -f latin1 -t utf-8"
        ) from None
    yield (text.removeprefix("\ufeff"),)


def _read_json(path: Path, text_column: str | None) -> Iterator[Document]:
    """JSON lines, or one JSON array of objects (read whole); which of the two shows in the first character."""
    with _open(path) as file:
        is_array = next((line.strip()[:1] == b"[" for line in file if line.strip()), False)
    columns = None
    for where, row in _json_array(path) if is_array else _json_lines(path):
        if not isinstance(row, dict):
            raise UserError(f'{where} is not an object: write {{"text": "..."}}')
        if columns is None:
            columns = choose_columns(where, {name: isinstance(cell, str) for name, cell in row.items()}, text_column)
        document = read_row(where, row, columns)
        for cell in document:
            _refuse_surrogates(where, cell)
        yield document


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where} is not valid JSON ({error.msg} at column {error.colno}): write one object on each line"
                ) from None


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    text = "".join(_lines(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} is not valid JSON ({error.msg} at column {error.colno})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _refuse_surrogates(where: str, cell: str) -> None:
    if not cell.isascii():
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(cell[error.start]):04x}"
            raise UserError(f"{where} holds half a surrogate pair ({code}), which is no character: mend it") from None


def _read_csv(path: Path, text_column: str | None, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
        columns = choose_columns(f"{path}:1", dict.fromkeys(header, True), text_column)
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where} has {len(cells)} fields, the header {len(header)}: quote text that holds commas"
                )
            yield read_row(where, dict(zip(header, cells, strict=True)), columns)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num} is not valid CSV ({error})") from None


def _read_parquet(path: Path, text_column: str | None) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        if file_kind(path)[1]:
            with _open(path) as stream:
                file = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()))
        else:
            file = pyarrow.parquet.ParquetFile(path)
        types = {field.name: _is_text(field.type) for field in file.schema_arrow}
        columns = choose_columns(str(path), types, text_column)
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield read_row(f"{path} row {number}", row, columns)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable parquet file ({' '.join(str(error).split())[:200]})") from None


def _is_text(arrow_type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        return _is_text(arrow_type.value_type)
    return types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type)
