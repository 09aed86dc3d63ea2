"""What the method, the exporter and the runtimes share: standard library, numpy and safetensors only."""

from qvdit.contract.bits import ACT_BITS, WEIGHT_BITS, Bits
from qvdit.contract.errors import QvditError
from qvdit.contract.layer import FrameRows, LowBitLayer, StaticInt8Layer

__all__ = ["ACT_BITS", "WEIGHT_BITS", "Bits", "FrameRows", "LowBitLayer", "QvditError", "StaticInt8Layer"]
