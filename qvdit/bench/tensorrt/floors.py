"""What the engines must reach on an H200, checked against a run's rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qvdit.bench.floors import Figure, Verdict
from qvdit.bench.saved import ratio
from qvdit.bench.tensorrt.results import Results, Row

XL = ("latte-xl-block", "latte-xl-slice", "latte-xl")
_QUANTIZED = ("int8_qdq", "w8a8", "w4a8", "w4a8_no_tqe", "w3a6")


def verdicts(results: Results) -> list[Verdict]:
    """Every floor, in the order in which they are worth reading."""
    return [*_speed(results), _weights(results), *_parity(results)]


def _speed(results: Results) -> Iterator[Verdict]:
    """Of the XL model."""
    models = [model for model in results.models() if model in XL]

    def faster(than: str, bound: float) -> Iterator[Figure]:
        for model in models:
            found = ratio(results.find(model, than), results.find(model, "w4a8"))
            if found is not None:
                yield Figure(f"{model}, w4a8 against {than}", found, bound, most=False)

    def cost() -> Iterator[Figure]:
        for model in models:
            found = ratio(results.find(model, "w4a8"), results.find(model, "w4a8_no_tqe"))
            if found is not None:
                yield Figure(f"{model}, w4a8", 100 * (found - 1), 5.0, most=True)

    yield _verdict("XL, w4a8: 1.3x as fast as the FP16 engine", "x", faster("fp16", 1.3))
    yield _verdict("XL, w4a8: not slower than TensorRT's static INT8", "x", faster("int8_qdq", 1.0))
    yield _verdict("XL, TQE of rank 1 with frame gain: at most 5 % of the whole model", "%", cost())


def _weights(results: Results) -> Verdict:
    def share() -> Iterator[Figure]:
        for model in results.models():
            half, low = results.find(model, "fp16"), results.find(model, "w4a8")
            if half and low:
                yield Figure(f"{model}, w4a8", 100 * low.weight_bytes / half.weight_bytes, 30.0, most=True)

    return _verdict("w4a8: at most 30 % of the FP16 engine's bytes of weights", "%", share())


def _parity(results: Results) -> Iterator[Verdict]:
    rows = [row for row in results.rows if row.engine in _QUANTIZED]
    counted = [row for row in rows if row.layers_compared]
    differ = (Figure(_name(row), row.xq_mismatches + row.acc_mismatches, 0, most=True) for row in counted)
    yield _verdict("integers: none differs from PyTorch's, in any layer", "integers", differ)
    text = "error against full precision, of the quantized model: at most 1.1 of that of PyTorch's FP16 run"
    yield _verdict(text, "x", (Figure(_name(row), _value(row.error_ratio), 1.1, most=True) for row in rows))
    text = "… and at least 0.9 of that of its float32 run: what runs is the quantized model"
    yield _verdict(text, "x", (Figure(_name(row), row.error_ratio_float32 or 0.0, 0.9, most=False) for row in rows))


def _value(ratio: float | None) -> float:
    return float("inf") if ratio is None else ratio


def _name(row: Row) -> str:
    return f"{row.model}, {row.engine}"


def _verdict(text: str, unit: str, figures: Iterable[Figure]) -> Verdict:
    return Verdict(text, unit, tuple(sorted(figures, key=lambda figure: figure.slack)))
