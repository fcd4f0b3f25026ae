"""The way out: model folders, the original's and timm's layouts, ONNX, StableHLO, PyTorch."""
