"""Rows of a dataclass as an Arrow table, and read back one at a time without a copy of the table.

A field is a one-dimensional array, a number or a string; every row of a field has the same type.  The values of all
rows lie behind each other, so a row's array is a view of the table's memory, which may be a mapped file.

Left out on purpose: compression, which a mapped file can't have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa

R = TypeVar("R")


def to_table(rows: Sequence[Any]) -> pa.Table:
    """One column a field; there must be a row."""
    assert rows, "no row to take the types from"
    names = [field.name for field in dataclasses.fields(rows[0])]
    return pa.table({name: _column([getattr(row, name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    if isinstance(values[0], np.ndarray):
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
        return pa.LargeListArray.from_arrays(offsets, np.concatenate(values))
    return pa.array(values, type=pa.large_string() if isinstance(values[0], str) else None)


class TableRows(Sequence[R]):
    """A range of a table's rows, each made when it is asked for; arrays are read-only."""

    def __init__(self, kind: type[R], table: pa.Table, numbers: range) -> None:
        """Rows of the dataclass ``kind``, which must have the table's columns as its fields."""
        self._kind, self._numbers = kind, numbers
        table = table.combine_chunks()
        self._readers = {name: _reader(table.column(name).chunk(0)) for name in table.column_names}

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> list[R]: ...
    def __getitem__(self, index: int | slice) -> R | list[R]:
        if isinstance(index, slice):
            return [self._row(number) for number in self._numbers[index]]
        return self._row(self._numbers[index])

    def _row(self, number: int) -> R:
        return self._kind(**{name: read(number) for name, read in self._readers.items()})


def _reader(column: pa.Array) -> Callable[[int], Any]:
    if pa.types.is_large_list(column.type):
        offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
        return lambda i: values[offsets[i] : offsets[i + 1]]
    if pa.types.is_large_string(column.type):
        return lambda i: column[i].as_py()
    numbers = column.to_numpy()
    return lambda i: numbers[i].item()
