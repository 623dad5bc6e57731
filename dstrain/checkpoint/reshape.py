"""Any layout to any layout: read any range of any parameter out of a checkpoint, whoever wrote its pieces.

A reader opens the files of all ranks lazily and copies only the bytes that are asked for. Where tensor parallelism cut
a parameter otherwise than the reader wants it, the whole tensor is put together first: one at a time, never more.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint.cuts import Cut
from dstrain.checkpoint.files import DTYPES, Key, rank_file, rank_files, read_header
from dstrain.errors import UserError

_TYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """`numel` elements from flat index `start`, under `key` in file number `file`."""

    start: int
    numel: int
    file: int
    key: str
    dtype: torch.dtype


class CheckpointReader:
    """Reads the tensors of one checkpoint folder. Memory: headers, and one parameter where a cut must be undone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths = rank_files(folder)
        self.pieces: dict[tuple[str, str], dict[str, list[Piece]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scalars: dict[str, dict[str, Any]] = {}
        self._open: dict[int, Any] = {}
        self._whole: tuple[tuple[str, str], torch.Tensor] | None = None
        for number, path in enumerate(self.paths):
            self._index(number, path)
        for cuts in self.pieces.values():
            for pieces in cuts.values():
                pieces.sort(key=lambda piece: piece.start)

    def _index(self, number: int, path: Path) -> None:
        table, metadata = read_header(path)
        if "dstrain" in metadata:
            facts = json.loads(metadata["dstrain"])
            self.shapes.update({name: tuple(shape) for name, shape in facts["shapes"].items()})
            self.scalars.update(facts["scalars"])
        for text, entry in table.items():
            key = Key.parse(text)
            piece = Piece(key.start, entry["shape"][0], number, text, _TYPES[entry["dtype"]])
            pieces = self.pieces.setdefault((key.kind, key.name), {}).setdefault(key.cut, [])
            if all(other.start != piece.start for other in pieces):  # stages that share a parameter both keep it
                pieces.append(piece)

    def rank_facts(self, rank: int) -> dict[str, Any] | None:
        """What the given rank wrote besides tensors (its random states); None where there was no such rank."""
        path = self.folder / rank_file(rank)
        return json.loads(read_header(path)[1]["dstrain"]) if path.exists() else None

    @cached_property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Parameter name -> what is stored of it besides its weight, such as ("exp_avg", "exp_avg_sq")."""
        found: dict[str, list[str]] = {}
        for kind, name in self.pieces:
            if kind not in ("weight", "buffer"):
                found.setdefault(name, []).append(kind)
        return {name: tuple(sorted(kinds)) for name, kinds in found.items()}

    def names(self, kind: str = "weight") -> list[str]:
        return [name for k, name in self.pieces if k == kind]

    def dtype(self, kind: str, name: str) -> torch.dtype:
        return next(iter(self.pieces[kind, name].values()))[0].dtype

    def read(self, kind: str, name: str, start: int, out: torch.Tensor, cut: Cut | None = None) -> None:
        """Fill the flat tensor `out` with the elements from `start` of a parameter, or of `cut` of it.

        Converts to the type of `out`. Raises UserError when the checkpoint lacks any of them.
        """
        cuts = self._cuts(kind, name)
        label = cut.label if cut else ""
        if label in cuts:
            self._copy(cuts[label], kind, name, start, out)
            return
        whole = self.whole(kind, name)
        part = (cut.take(whole) if cut else whole).view(-1)
        out.copy_(part[start : start + out.numel()])

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """The whole tensor, in the type it is stored in. Keeps the last one, so that ranges of it are read once."""
        if self._whole is not None and self._whole[0] == (kind, name):
            return self._whole[1]
        cuts, shape = self._cuts(kind, name), self.shapes[name]
        whole = torch.empty(shape, dtype=self.dtype(kind, name))
        if "" in cuts:
            self._copy(cuts[""], kind, name, 0, whole.view(-1))
        else:
            covered = 0
            for label, pieces in cuts.items():
                cut = Cut.from_label(label, shape)
                part = torch.empty(cut.shape, dtype=whole.dtype)
                self._copy(pieces, kind, name, 0, part.view(-1))
                cut.put(part, whole)
                covered += part.numel()
            self._check_complete(kind, name, covered, whole.numel())
        self._whole = ((kind, name), whole)
        return whole

    def _cuts(self, kind: str, name: str) -> dict[str, list[Piece]]:
        if (kind, name) not in self.pieces:
            raise UserError(f"{self.folder} holds no {kind} of {name}: it is of another model or optimizer")
        return self.pieces[kind, name]

    def _copy(self, pieces: Sequence[Piece], kind: str, name: str, start: int, out: torch.Tensor) -> None:
        end, copied = start + out.numel(), 0
        for piece in pieces:
            low, high = max(start, piece.start), min(end, piece.start + piece.numel)
            if low < high:
                stored = self._file(piece.file).get_slice(piece.key)[low - piece.start : high - piece.start]
                out[low - start : high - start].copy_(stored)
                copied += high - low
        self._check_complete(kind, name, copied, out.numel())

    def _check_complete(self, kind: str, name: str, found: int, wanted: int) -> None:
        if found != wanted:
            raise UserError(
                f"{self.folder} has {found} of {wanted} elements of {kind} of {name}: use another checkpoint"
            )

    def _file(self, number: int) -> Any:
        if number not in self._open:
            from safetensors import safe_open

            self._open[number] = safe_open(str(self.paths[number]), framework="pt")
        return self._open[number]
