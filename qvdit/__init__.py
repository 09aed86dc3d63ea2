"""qvdit: low-bit video diffusion transformers, from a trained model to a proven engine.

    qvdit            the method     calibration data → statistics → quantized, distilled model → checkpoint
    qvdit.export     freezing       checkpoint → ONNX graphs → one builder per target
    qvdit.runtimes   execution      sessions and drop-in transformers
    qvdit.contract   what all three share: dataclasses, the bundle on disk, errors

Importing this package imports nothing heavy.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("qvdit")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "runtimes").is_dir():
    # Python started in a source tree finds this package before an installed one: export/ and runtimes/ are beside it.
    __path__.append(str(_root))
