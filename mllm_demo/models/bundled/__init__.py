"""The bundled model, "Tessera": a LLaVA whose tower is ours. Importing this registers it with the Auto classes."""

from mllm_demo.models.bundled.tower import TesseraVisionConfig, TesseraVisionModel

__all__ = ["TesseraVisionConfig", "TesseraVisionModel"]
