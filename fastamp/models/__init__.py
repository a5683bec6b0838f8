"""Models of the paper's experiments."""

from fastamp.models.textcnn import TextCNN

__all__ = ["TextCNN"]
