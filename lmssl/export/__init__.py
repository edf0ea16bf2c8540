"""From a checkpoint to a folder that stock transformers loads, proven in a fresh process before it appears."""

from lmssl.export.folder import Exported, export_run
from lmssl.export.weights import ExportWeights, load_model

__all__ = ["ExportWeights", "Exported", "export_run", "load_model"]
