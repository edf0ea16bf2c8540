"""The model card of an export: what was trained, on what, with which numbers."""

from lmssl.card.sections import AUTO_CLASSES
from lmssl.card.write import write_card

__all__ = ["AUTO_CLASSES", "write_card"]
