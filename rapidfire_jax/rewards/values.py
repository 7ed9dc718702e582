"""What a reward may return: one finite number a response, or one a token."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rapidfire_jax.errors import InputError

type Values = np.ndarray | list[np.ndarray]  # float32 [B]; or float32 [tokens of the response], one a response


def check_numbers(
    where: str, values: Any, count: int, *, each: str = "responses", item: str = "row", first: int = 0
) -> np.ndarray:
    """`values` as float32 [count].

    Args:
      where: the reward, for messages.
      values: whatever it returned.
      count: how many numbers are wanted.
      each: what a number is for, in messages.
      item: what one of them is called there.
      first: number of the first one there.

    Raises:
      InputError: another shape, something that is not a number, or a number that float32 cannot hold.
    """
    try:
        array = np.asarray(values)
    except Exception as error:
        raise InputError(f"{where} returned {type(values).__name__}, not numbers: {error}") from error
    if array.shape != (count,):
        found = f"shape {array.shape}" if array.shape else f"{values!r:.100}"
        raise InputError(f"{where} returned {found}; one number for each of {count} {each} is wanted")
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        bad = next((i for i, v in enumerate(values) if not isinstance(v, int | float | np.number)), 0)
        raise InputError(f"{where}: {item} {first + bad}: {values[bad]!r:.100} is not a number")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    for bad in np.flatnonzero(~np.isfinite(numbers)).tolist():
        raise InputError(f"{where}: {item} {first + bad}: {array[bad]} is not a finite float32")
    return numbers


def check_values(where: str, values: Any, tokens: Sequence[Sequence[int]] | None, count: int) -> Values:
    """What a function returned: one number for each of `count` responses, or for each a list of one number a token.

    Raises:
      InputError: numbers and lists mixed, lists where the tokens are not known, and what `check_numbers` refuses.
    """
    rows = values if isinstance(values, list | tuple) else list(values) if getattr(values, "ndim", 1) > 1 else []
    listed = [isinstance(row, list | tuple) or getattr(row, "ndim", 0) > 0 for row in rows]
    if not any(listed):
        return check_numbers(where, values, count)
    if not all(listed):
        number = listed.index(False)
        raise InputError(
            f"{where}: row {number} is {rows[number]!r:.100}, row {listed.index(True)} a list; return a number for "
            "every response, or for every response a list of one number a token"
        )
    if tokens is None:
        raise InputError(
            f"{where} returned a list a response, but no response tokens are known here; return one number a response"
        )
    if len(rows) != count:
        raise InputError(f"{where} returned {len(rows)} lists; one for each of {count} responses is wanted")
    return [
        check_numbers(f"{where}: row {i}", row, len(ids), each="response tokens", item="token")
        for i, (row, ids) in enumerate(zip(rows, tokens, strict=True))
    ]
