"""The benchmark data sets by name: what is known about each, and how a copy of one opens."""

from nextblock.data.named.dataset import Columns, NamedDataset
from nextblock.data.named.lookup import data_root, find, is_named, named
from nextblock.data.named.opening import open_named
from nextblock.data.named.published import PUBLISHED, SUITES, PublishedRow
from nextblock.data.named.table import NAMED

__all__ = [
    "NAMED",
    "PUBLISHED",
    "SUITES",
    "Columns",
    "NamedDataset",
    "PublishedRow",
    "data_root",
    "find",
    "is_named",
    "named",
    "open_named",
]
