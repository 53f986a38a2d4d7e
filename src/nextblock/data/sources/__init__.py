"""Where images come from: one small protocol, a way to open each kind of source, and views of sources."""

from nextblock.data.sources.manifest import Fingerprint, content_digest, explain_change, fingerprint, write_manifest
from nextblock.data.sources.opening import is_local, is_pattern, open_source
from nextblock.data.sources.protocol import Sample, Source
from nextblock.data.sources.views import Joined, Relabelled, Subset, class_names, known_labels, renumbered

__all__ = [
    "Fingerprint",
    "Joined",
    "Relabelled",
    "Sample",
    "Source",
    "Subset",
    "class_names",
    "content_digest",
    "explain_change",
    "fingerprint",
    "is_local",
    "is_pattern",
    "known_labels",
    "open_source",
    "renumbered",
    "write_manifest",
]
