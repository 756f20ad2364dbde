"""Columns of text as Arrow has them: asked as a whole, or read some thousand rows at a time.

One by one, a value that pandas takes out of such a column costs ten times as much.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from diffusemix_pipeline.identity import digest_of_text

_AT_ONCE = 4096  # rows that are held as Python's objects


def values(column: pd.Series) -> Iterator[Any]:
    """Give a column's values."""
    starts = range(0, len(column), _AT_ONCE)
    return chain.from_iterable(column.iloc[s : s + _AT_ONCE].tolist() for s in starts)


def tuples(table: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Give a table's rows."""
    return zip(*(values(table[name]) for name in table), strict=True)


def text_column(texts: Iterable[str], index: pd.Index) -> pd.Series:
    """Return texts as a column, holding some thousand of them as such at a time."""
    left, pieces = iter(texts), [pd.Series(dtype="str")]
    while some := list(islice(left, _AT_ONCE)):
        pieces.append(pd.Series(some, dtype="str"))
    return pd.concat(pieces, ignore_index=True).set_axis(index)


def mapped(column: pd.Series, function: Callable[[Any], Any]) -> pd.Series:
    """Return what `function` makes of each value."""
    return pd.Series([function(value) for value in values(column)], column.index)


def rows_digest(table: pd.DataFrame) -> str:
    """Identify a table's rows, whatever their order, holding some thousand at a time."""
    rows = table.sort_values(list(table), kind="stable")
    return digest_of_text(f"{json.dumps(row)}\n" for row in tuples(rows))


def places_in(known: pa.ChunkedArray, values: pd.Series) -> np.ndarray:
    """Return int (N,): where each of `values` first is in `known`, -1 where it is not."""
    of = pa.array(values, known.type)
    found = pc.index_in(of, value_set=known.combine_chunks())
    return np.asarray(found.fill_null(-1))


def first_alike(*columns: pd.Series) -> np.ndarray:
    """Return int (N,): the first row with the same texts in all columns, missing ones alike.

    No text has a slash, as names of folders and digests have none.
    """
    texts = [pa.array(column, pa.string()) for column in columns]
    rows = pc.binary_join_element_wise(*texts, "/", null_handling="replace", null_replacement="")
    return np.asarray(pc.index_in(rows, value_set=rows))
