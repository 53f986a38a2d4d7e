"""Where images come from: one small protocol, and a way to open each kind of source."""

from nextblock.data.sources.manifest import Fingerprint, explain_change, fingerprint, write_manifest
from nextblock.data.sources.opening import open_source
from nextblock.data.sources.protocol import Sample, Source

__all__ = [
    "Fingerprint",
    "Sample",
    "Source",
    "explain_change",
    "fingerprint",
    "open_source",
    "write_manifest",
]
