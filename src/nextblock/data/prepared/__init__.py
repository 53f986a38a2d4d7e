"""Images prepared once for all training: reduced, encoded anew, and kept in a few large shards with an index."""

from nextblock.data.prepared.about import About, is_prepared
from nextblock.data.prepared.encoding import Encoding
from nextblock.data.prepared.source import PreparedImages, open_prepared

__all__ = ["About", "Encoding", "PreparedImages", "is_prepared", "open_prepared"]
