"""``action=export``: a finished model as a GGUF file, or as a repository on the Hugging Face Hub with its card."""

from pipeline.export.export import export_model

__all__ = ["export_model"]
