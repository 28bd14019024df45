"""Files that are written whole or not at all, a store of results, and the digests they are found by."""

from rewriter.storage.cache import Mirror, Store, load, save_to
from rewriter.storage.digest import Digest, code_digest, key, model_digest, short, tensor_digest
from rewriter.storage.files import (
    Place,
    PlaceError,
    checked,
    inside,
    names,
    read,
    replacing,
    write,
)

__all__ = [
    "Digest",
    "Mirror",
    "Place",
    "PlaceError",
    "Store",
    "checked",
    "code_digest",
    "inside",
    "key",
    "load",
    "model_digest",
    "names",
    "read",
    "replacing",
    "save_to",
    "short",
    "tensor_digest",
    "write",
]
