"""The parts of `dinov2 export`: ONNX files, and the comparison of a written file with PyTorch."""

__all__: list[str] = []
