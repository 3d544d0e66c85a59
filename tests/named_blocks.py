"""A block manager whose sequences have names, for stories about two or three of them."""

from cortexlab.scheduler.block_manager import BlockManager
from cortexlab.scheduler.block_table import BlockTable, Need


class NamedBlocks:
    """`BlockManager` with `tables` by name; all other attributes are the manager's."""

    def __init__(self, *args, **kwargs):
        self.manager = BlockManager(*args, **kwargs)
        self.tables: dict[str, BlockTable] = {}

    def __getattr__(self, name: str):
        return getattr(self.manager, name)

    def allocate(self, sequence: str, *need) -> bool:
        """Admit a sequence; ``need``: the fields of `Need`."""
        assert sequence not in self.tables
        table = self.manager.allocate(Need(*need))
        if table is None:
            return False
        self.tables[sequence] = table
        return True

    def grow(self, sequence: str, num_tokens: int) -> bool:
        return self.manager.grow(self.tables[sequence], num_tokens)

    def free(self, sequence: str, prefix_ids=()) -> None:
        self.manager.free(self.tables.pop(sequence), prefix_ids)

    def blocks_wanted(self, *need) -> int:
        return self.manager.blocks_wanted(Need(*need))
