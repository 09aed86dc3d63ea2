"""Freezing: quantized checkpoint → ONNX graphs → one builder per target. Needs onnx."""
