"""Questions about whole columns of text that Arrow answers without an object a value."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc


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
