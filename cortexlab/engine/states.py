"""States: what layers without K and V of every token keep of a sequence, in arrays of one size.

Convolutions, state spaces and linear attention cache in mlx-lm's `ArraysCache`. The sequences of a
decode batch have their states stacked, a row each, so a batch that stays together moves nothing:

    step    rows       states
    8       a b c      [3, ...]
    9       a b c      [3, ...]   what step 8 left, as it is
    10      a c d      [3, ...]   copied together: two rows of step 9, and d's own after its prompt
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..scheduler.request import Request

if TYPE_CHECKING:
    from .attention import RowRun

Arrays = list[mx.array | None]  # None: an entry of an `ArraysCache` that its layer does not use


@dataclass(eq=False, slots=True)
class Stack:
    """States of the owners ``rows``, each with its row: arrays ``[len(rows), ...]``."""

    rows: dict[Hashable, int]
    arrays: Arrays

    @property
    def row_bytes(self) -> int:
        return _nbytes(self.arrays) // len(self.rows)

    def part(self, start: int, stop: int) -> Arrays:
        """Views of some rows."""
        if (start, stop) == (0, len(self.rows)):
            return self.arrays
        return [array if array is None else array[start:stop] for array in self.arrays]


class States:
    """The states of an arena's sequences, by owner: the request. ``copied_bytes``: of sequences
    that joined a batch, or left it.

    Lazy, as K and V are: evaluate `arrays` with the arena's.
    """

    def __init__(self):
        self.copied_bytes = 0
        self.clear()

    def clear(self) -> None:
        self._stacks: dict[Hashable, Stack] = {}
        self._seen: dict[Hashable, int] = {}  # tokens that a state has seen

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all live requests; another thread may run a step meanwhile."""
        stacks = list(self._stacks.items())
        return sum(stack.row_bytes for owner, stack in stacks if is_live(owner))

    def arrays(self) -> list[mx.array]:
        stacks = dict.fromkeys(self._stacks.values())
        return [array for stack in stacks for array in stack.arrays if array is not None]

    def prune(self) -> None:
        """Let go of the states of requests that ended or must compute their tokens again."""
        for owner in [owner for owner in self._stacks if not is_live(owner)]:
            del self._stacks[owner], self._seen[owner]

    def take(self, rows: Sequence["RowRun"]) -> Arrays | None:
        """The states that ``rows`` go on from, stacked in their order; None before the first token
        of a sequence, which is alone.
        """
        if not rows[0].start:
            return None
        owners = [row.owner for row in rows]
        assert [self._seen[owner] for owner in owners] == [row.start for row in rows]
        stacks = [self._stacks[owner] for owner in owners]
        if all(stack is stacks[0] for stack in stacks) and list(stacks[0].rows) == owners:
            return stacks[0].arrays
        parts = [stack.part(start, stop) for stack, start, stop in _parts(owners, stacks)]
        if len(parts) == 1:
            taken = parts[0]
        else:
            taken = [_joined(each) for each in zip(*parts, strict=True)]
            self.copied_bytes += _nbytes(taken)
        self._part_from(stacks, set(owners))
        return taken

    def put(self, rows: Sequence["RowRun"], arrays: Arrays) -> None:
        """Keep the states after ``rows``, stacked in their order."""
        if rows[0].num_rows > 1:
            arrays = _trimmed(arrays)
        stack = Stack({row.owner: i for i, row in enumerate(rows)}, arrays)
        for row in rows:
            self._stacks[row.owner], self._seen[row.owner] = stack, row.stop

    def _part_from(self, stacks: Iterable[Stack], leaving: set) -> None:
        """Give those that stay behind when others leave their ``stacks`` arrays of their own: a
        view of a row would keep all rows alive.
        """
        for stack in dict.fromkeys(stacks):
            for owner, row in stack.rows.items():
                if owner not in leaving and self._stacks.get(owner) is stack:
                    own = Stack({owner: 0}, _trimmed(stack.part(row, row + 1)))
                    self._stacks[owner] = own
                    self.copied_bytes += own.row_bytes


def is_live(request: Request) -> bool:
    """Whether a request holds its tokens in the pool, or swapped out."""
    return request.table is not None or request.swapped is not None


def _parts(owners: Sequence[Hashable], stacks: Sequence[Stack]) -> Iterator[tuple[Stack, int, int]]:
    """Runs of neighbouring rows of a stack, ``start .. stop - 1``, that are ``owners`` in order."""
    stack, start, stop = None, 0, 0
    for owner, of_owner in zip(owners, stacks, strict=True):
        row = of_owner.rows[owner]
        if of_owner is stack and row == stop:
            stop += 1
            continue
        if stack is not None:
            yield stack, start, stop
        stack, start, stop = of_owner, row, row + 1
    yield stack, start, stop


def _joined(arrays: Sequence[mx.array | None]) -> mx.array | None:
    return None if arrays[0] is None else mx.concatenate(arrays)


def _trimmed(arrays: Arrays) -> Arrays:
    """The same without the array that a view of a part keeps alive."""
    return [array if array is None else mx.contiguous(array) for array in arrays]


def _nbytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays if array is not None)
