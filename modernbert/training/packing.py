"""Pack pieces of text into rows of one length: best-fit, in a random order that can be resumed."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BLOCK = 4096  # pieces read at once


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n,) int64 of an epoch, from numpy's PCG64DXSM(seed + epoch).

    `torch.randperm` is biased for the many pieces of a large corpus, enough to make a run diverge.
    """
    return np.random.Generator(np.random.PCG64DXSM(seed + epoch)).permutation(n)


class BestFitPacker:
    """An endless stream of rows, each a list of pieces whose lengths sum to at most `capacity`.

    Pieces come in the order of the epoch. Each goes into the open row with the smallest space that
    is enough; when there is none it opens a row, and beyond `rows` open ones the fullest is done.
    An epoch ends with its last open rows, so that it uses every piece exactly once.

    Args:
        lengths: (N,) tokens of each piece, special tokens included.
        order: the pieces of an epoch, (N,) indices; `lambda epoch: permutation(N, seed, epoch)`.
        capacity: tokens that a row holds.
        rows: how many rows are kept open. More fill better; a few hundred fill 98 % and above
            where enough of the pieces are short.

    Attributes: `epoch`, which the next row belongs to, and `position`, how many of its pieces are
    taken. Raises `ValueError` for pieces that no row can hold.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        order: Callable[[int], np.ndarray],
        capacity: int,
        rows: int = 256,
    ) -> None:
        self._lengths = np.asarray(lengths)
        if capacity < 1 or rows < 1:
            raise ValueError(f"capacity is {capacity} and rows is {rows}; both must be at least 1")
        if not len(self._lengths):
            raise ValueError("there are no pieces to pack; check the sources and the split")
        if (longest := int(self._lengths.max())) > capacity:
            raise ValueError(
                f"piece {int(self._lengths.argmax())} has {longest} tokens, more than the "
                f"{capacity} of a row; cut texts into pieces of at most {capacity} tokens, special "
                "tokens included, or raise the capacity"
            )
        self._order, self._capacity, self._most = order, capacity, rows
        self._start(epoch=0, position=0, rows=[])

    def next_rows(self, rows: int) -> list[list[int]]:
        """The next `rows` rows; the last ones of an epoch may be followed by those of the next."""
        return [self._next_row() for _ in range(rows)]

    def rest_of_epoch(self) -> Iterator[list[int]]:
        """The rows that are left of this epoch, all of it for a new packer."""
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next_row()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain numbers and lists for JSON."""
        rows = [list(row) for row in self._rows]
        return {"epoch": self.epoch, "position": self.position, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where a packer of the same arguments gave `state_dict`."""
        rows = [list(row) for row in state["rows"]]
        self._start(state["epoch"], state["position"], rows)

    def _start(self, epoch: int, position: int, rows: list[list[int]]) -> None:
        self.epoch, self.position = epoch, position
        # Open rows and the space left in each, the fullest first.
        self._rows = rows
        self._spaces = [self._capacity - int(self._lengths[row].sum()) for row in rows]
        order = np.asarray(self._order(epoch))
        if not len(order):
            raise ValueError(f"the order of epoch {epoch} is empty; give it at least one piece")
        self._end = len(order)
        self._pieces = self._read(order, position)

    def _read(self, order: np.ndarray, position: int) -> Iterator[tuple[int, int]]:
        for start in range(position, len(order), BLOCK):
            block = order[start : start + BLOCK]
            yield from zip(block.tolist(), self._lengths[block].tolist(), strict=True)

    def _next_row(self) -> list[int]:
        rows, spaces = self._rows, self._spaces
        for piece, length in self._pieces:
            self.position += 1
            at = bisect_left(spaces, length)
            row: list[int] = []
            space = self._capacity
            if at < len(spaces):
                row, space = rows.pop(at), spaces.pop(at)
            row.append(piece)
            space -= length
            at = bisect_left(spaces, space)
            spaces.insert(at, space)
            rows.insert(at, row)
            if spaces[0] == 0 or len(spaces) > self._most:
                break
        spaces.pop(0)
        done = rows.pop(0)
        if not rows and self.position == self._end:
            self._start(self.epoch + 1, 0, [])
        return done
