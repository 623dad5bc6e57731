"""Where a stream comes from: local files, the hub."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

from dstrain.arguments import DataArguments
from dstrain.data.columns import ColumnFlags, choose_shape, value_kind
from dstrain.data.files import read_file
from dstrain.data.rows import BadRow, Row, read_row
from dstrain.data.sources import find_files, load_hub
from dstrain.errors import UserError

_END_BYTES = 2**16


class StreamSource(Protocol):
    """Files of rows. identity: name -> what is known of a file without reading it whole."""

    description: str
    identity: dict[str, str]

    def __len__(self) -> int:
        """How many files."""
        ...

    def read(self, file: int, first: int) -> Iterator[Row | BadRow]:
        """The rows of one file from number `first` on."""
        ...


class FileStream:
    """Local files, in the order given."""

    def __init__(self, files: list[Path], columns: ColumnFlags):
        self._files, self._columns = files, columns
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        self.description = f"stream of {files[0]}{more}"
        self.identity = name_files(files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, file: int, first: int) -> Iterator[Row | BadRow]:
        return islice(read_file(self._files[file], self._columns), first, None)


class HubStream:
    """The training split of a dataset of the hub, or of a local folder in hub layout, as one file."""

    def __init__(self, name: str, config: str | None, columns: ColumnFlags):
        import datasets

        self._rows = load_hub(name, config, streaming=True)["train"]
        self._where = f"{name} (train)"
        self.description = f"stream of dataset {self._where}"
        first: dict = next(iter(self._rows), {})
        kinds = {column: value_kind(cell) for column, cell in first.items()}
        self._shape = choose_shape(f"--dataset_name {self._where}", kinds, columns)
        files = (datasets.load_dataset_builder(name, config).config.data_files or {}).get("train", [])
        local = [Path(file) for file in files if Path(file).is_file()]
        # Of a file on the hub the address says all, since the revision is part of it.
        self.identity = name_files(local) | {file: "" for file in files if not Path(file).is_file()}

    def __len__(self) -> int:
        return 1

    def read(self, file: int, first: int) -> Iterator[Row | BadRow]:
        rows = self._rows.select_columns(list(self._shape.columns)).skip(first)
        return (read_row(f"{self._where} row {number}", row, self._shape) for number, row in enumerate(rows, first + 1))


def name_files(files: list[Path]) -> dict[str, str]:
    """File name -> its size and a hash of its first and last 64 KiB. Raises UserError for one that cannot be read."""
    found: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        try:
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read(_END_BYTES))
                size = file.seek(0, 2)
                file.seek(max(0, size - _END_BYTES))
                digest.update(file.read(_END_BYTES))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        name = path.name if path.name not in found else f"{path.name} ({number})"
        found[name] = f"{size} bytes, ends {digest.hexdigest()[:16]}"
    return found


def open_stream(dargs: DataArguments) -> StreamSource:
    """The training text that the flags name. Raises UserError."""
    if dargs.dataset_name:
        return HubStream(dargs.dataset_name, dargs.dataset_config_name, ColumnFlags.of(dargs))
    return FileStream(find_files(dargs.train_file, "--train_file"), ColumnFlags.of(dargs))
