"""qvdit: low-bit video diffusion transformers, from a trained model to a proven engine.

    qvdit            the method     calibration data → statistics → quantized, distilled model → checkpoint
    qvdit.export     freezing       checkpoint → ONNX graphs → one builder per target
    qvdit.runtimes   execution      sessions and drop-in transformers
    qvdit.contract   what all three share: dataclasses, the bundle on disk, errors

Importing this package imports nothing heavy.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qvdit")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"
