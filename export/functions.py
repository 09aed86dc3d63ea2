"""``LowBitLinear`` of domain ``qvdit`` as ONNX functions: what any conforming runtime executes in the node's place.

Two bodies define the same operator: ``qdq`` (QuantizeLinear/DequantizeLinear around MatMul, for interchange) and
``integer`` (MatMulInteger, for ONNX Runtime). A body is assembled from the parts that a layer has; every combination is
one overload of the function. The values ``x_q`` (or ``x_from_zero`` and ``z_float``) and ``acc`` keep these names in
every body, so that a parity check can look at them.

``weight_scale`` and ``weight_zero`` are [N], or [N, C] for C groups of input features; ``acc`` is [M, N] or [C, M, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx
import onnx.parser

from qvdit.contract import FrameRows, LowBitLayer

DOMAIN, DOMAIN_VERSION, NODE = "qvdit", 1, "LowBitLinear"
OPSET = 21  # the first whose QuantizeLinear takes INT4 and an output type
INPUTS = (
    "x",
    "weight_q",
    "weight_scale",
    "weight_zero",
    "bias",
    "inv_smooth",
    "alpha",
    "beta",
    "frame_gain",
    "tokens_per_frame",
)
# Unsigned with zero point 128: on x86, u8 x s8 is eight times as fast as s8 x s8 in ONNX Runtime. Expanded as another
# type, because ONNX Runtime shares no 8-bit constants, and would quantize one x for every linear that reads it.
_ZERO_POINT = (
    "x_zero = Constant <value = uint8 {128}> ()",
    "zero_point_float = Constant <value_float = 128.0> ()",
    "rows = Shape (s_rows)",
    "zero_points_float = Expand (zero_point_float, rows)",
    "zero_points = Cast <to = 2> (zero_points_float)",
)
_RADIX = 8  # of the Walsh-Hadamard transform: pieces that a pass over memory adds and subtracts
ATTRIBUTES = ("weight_bits", "act_bits", "act_symmetric", "rotation")
Body = Literal["qdq", "integer"]


@dataclass(frozen=True)
class Variant:
    """Which parts a layer's body has."""

    act_bits: int
    act_symmetric: bool
    weight_zero: bool
    bias: bool
    inv_smooth: bool
    tqe: bool
    frame_gain: bool
    group: int = 0  # G: features that share a weight scale; 0: all of a row
    rotation: int = 0  # B

    @staticmethod
    def of(layer: LowBitLayer) -> Variant:
        """The variant that a layer needs."""
        return Variant(
            act_bits=layer.act_bits,
            act_symmetric=layer.act_symmetric,
            weight_zero=layer.weight_zero is not None,
            bias=layer.bias is not None,
            inv_smooth=layer.inv_smooth is not None,
            tqe=layer.rank > 0,
            frame_gain=layer.frame_gain is not None and layer.rows is not FrameRows.NONE,
            group=layer.group if layer.weight_scale.ndim == 2 else 0,
            rotation=layer.rotation,
        )

    @property
    def from_zero(self) -> bool:
        """Whether x_q - z_x fits into 8 bits, and one product sums it: it then needs no zero point for each row."""
        return not self.act_symmetric and self.act_bits < 8 and not self.group

    @property
    def overload(self) -> str:
        """The function overload's name, for example ``a8_symmetric_bias_tqe``."""
        parts = [f"a{self.act_bits}", "symmetric" if self.act_symmetric else "asymmetric"]
        parts += [f for f in ("weight_zero", "bias", "inv_smooth", "tqe", "frame_gain") if getattr(self, f)]
        parts += [f"{f}{getattr(self, f)}" for f in ("group", "rotation") if getattr(self, f)]
        return "_".join(parts)


def function(variant: Variant, body: Body) -> onnx.FunctionProto:
    """The function of one variant."""
    lines = [
        "x_float = Cast <to = 1> (x)",
        "x_rows = Flatten <axis = -1> (x_float)",  # [M, K]
        *_transform(variant),
        *_scale(variant),
        *(_quantize_symmetric(body) if variant.act_symmetric else _quantize_asymmetric(variant, body)),
        *_product(variant, body),
        *_epilogue(variant, body),
        "leading = Shape <start = 0, end = -1> (x)",
        "minus_one = Constant <value_ints = [-1]> ()",
        "y_shape = Concat <axis = 0> (leading, minus_one)",
        "y_float = Reshape (y_rows, y_shape)",
        "y = CastLike (y_float, x)",
    ]
    text = (
        f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n'
        f"{NODE} <{', '.join(ATTRIBUTES)}> ({', '.join(INPUTS)}) => (y)\n{{\n" + "\n".join(lines) + "\n}"
    )
    proto = onnx.parser.parse_function(text)
    proto.overload = variant.overload
    return proto


def _transform(variant: Variant) -> list[str]:
    """x̃ [M, K], called x_smooth: the butterfly of the Walsh-Hadamard transform, three levels a pass over memory."""
    smoothed = "Mul (x_rows, inv_smooth)" if variant.inv_smooth else "Identity (x_rows)"
    if not variant.rotation:
        return [f"x_smooth = {smoothed}"]
    lines, before, half = [f"x_1 = {smoothed}"], "x_1", 1
    while half < variant.rotation:
        count = min(_RADIX, variant.rotation // half)
        parts = [f"x_{half}_{i}" for i in range(count)]
        butterfly, results = _butterfly(parts)
        after = f"x_{count * half}"
        lines += [
            f"shape_{half} = Constant <value_ints = [0, -1, {count}, {half}]> ()",
            f"rows_{half} = Reshape ({before}, shape_{half})",
            f"{', '.join(parts)} = Split <axis = 2, num_outputs = {count}> (rows_{half})",
            *butterfly,
            f"{after} = Concat <axis = 2> ({', '.join(results)})",
        ]
        before, half = after, count * half
    return [*lines, "rows_shape = Constant <value_ints = [0, -1]> ()", f"x_smooth = Reshape ({before}, rows_shape)"]


def _butterfly(parts: list[str]) -> tuple[list[str], list[str]]:
    """a + b and a - b of each pair, level by level: the lines, and the names of the results."""
    lines, names, distance = [], list(parts), 1
    while distance < len(names):
        for i in range(len(names)):
            if not i & distance:
                a, b = names[i], names[i + distance]
                names[i], names[i + distance] = f"{parts[i]}_plus_{distance}", f"{parts[i]}_minus_{distance}"
                lines += [f"{names[i]} = Add ({a}, {b})", f"{names[i + distance]} = Sub ({a}, {b})"]
        distance *= 2
    return lines, names


def _scale(variant: Variant) -> list[str]:
    """s_x [M, 1] and its poisoned twin, NaN for a row with NaN or Inf in it."""
    lines = [
        "last_axis = Constant <value_ints = [-1]> ()",
        "zero = Constant <value_float = 0.0> ()",
        "smallest = Constant <value_float = 1e-8> ()",
        "x_min = ReduceMin <keepdims = 1> (x_smooth, last_axis)",
        "x_max = ReduceMax <keepdims = 1> (x_smooth, last_axis)",
    ]
    if variant.act_symmetric:
        lines += [
            f"levels = Constant <value_float = {float((1 << (variant.act_bits - 1)) - 1)}> ()",
            "opposite = Neg (x_min)",
            "span = Max (x_max, opposite)",
        ]
    else:
        lines += [
            f"levels = Constant <value_float = {float((1 << variant.act_bits) - 1)}> ()",
            "low = Min (x_min, zero)",
            "high = Max (x_max, zero)",
            "span = Sub (high, low)",
        ]
    return [
        *lines,
        "ratio = Div (span, levels)",
        "s_x = Max (ratio, smallest)",
        "s_rows = Squeeze (s_x, last_axis)",  # [M]
        # 0, or NaN for a row with NaN or Inf: a sum of products with zero, because a sum of huge values would overflow
        # and a maximum may overlook a NaN; as a product with a column, it reads x once and writes next to nothing.
        "features = Shape <start = 1> (x_smooth)",
        "single = Constant <value_ints = [1]> ()",
        "column_shape = Concat <axis = 0> (features, single)",
        "zero_column = ConstantOfShape (column_shape)",
        "poison = MatMul (x_smooth, zero_column)",
        "s_out = Add (s_x, poison)",
        "s_out_rows = Squeeze (s_out, last_axis)",
    ]


def _quantize_symmetric(body: Body) -> list[str]:
    """x_q [M, K]. Saturation never acts: |x / s_x| is at most qmax (1 + ε), which rounds to qmax."""
    if body == "qdq":
        return [
            "x_q = QuantizeLinear <axis = 0, output_dtype = 3> (x_smooth, s_rows)",  # int8
            "x_dq = DequantizeLinear <axis = 0> (x_q, s_out_rows)",
        ]
    return [
        *_ZERO_POINT,
        "x_q = QuantizeLinear <axis = 0> (x_smooth, s_rows, zero_points)",
        "x_dq = DequantizeLinear <axis = 0> (x_q, s_out_rows, zero_points)",
    ]


def _quantize_asymmetric(variant: Variant, body: Body) -> list[str]:
    """x_q [M, K] and x_zeros [M], unsigned."""
    zero = ["below = Neg (low)", "z_ratio = Div (below, s_x)", "z_float = Round (z_ratio)"]
    if body == "integer" and variant.from_zero:
        return [*zero, *_quantize_from_zero(variant)]
    lines = [
        *zero,
        "z_rows = Squeeze (z_float, last_axis)",
        "x_zeros = Cast <to = 2> (z_rows)",
        "x_wide = QuantizeLinear <axis = 0> (x_smooth, s_rows, x_zeros)",
    ]
    if variant.act_bits < 8:
        lines += [
            f"x_top = Constant <value = uint8 {{{(1 << variant.act_bits) - 1}}}> ()",
            "x_q = Min (x_wide, x_top)",
        ]
    else:
        lines += ["x_q = Identity (x_wide)"]
    if body == "integer":
        return [*lines, "x_dq = DequantizeLinear <axis = 0> (x_q, s_out_rows, x_zeros)"]
    # The poison as a factor of its own: directly between DequantizeLinear and MatMul, ONNX Runtime (1.31) would fuse
    # the three into a kernel that refuses a zero point per row.
    return [
        *lines,
        "x_clean = DequantizeLinear <axis = 0> (x_q, s_rows, x_zeros)",
        "one = Constant <value_float = 1.0> ()",
        "one_or_nan = Add (poison, one)",
        "x_dq = Mul (x_clean, one_or_nan)",
    ]


def _quantize_from_zero(variant: Variant) -> list[str]:
    """x_q - z_x + 128, unsigned, called x_from_zero, and z_x, called z_float.

    The least integer needs no bound: round(x̃ / s_x) is at least -z_x, as rounding is monotone.
    """
    highest = (1 << variant.act_bits) - 1
    return [
        *_ZERO_POINT,
        f"most = Constant <value_float = {128.0 + highest}> ()",
        "top_float = Sub (most, z_float)",
        "x_top = Cast <to = 2> (top_float)",  # [M, 1]
        "x_wide = QuantizeLinear <axis = 0> (x_smooth, s_rows, zero_points)",
        "x_from_zero = Min (x_wide, x_top)",
        "x_dq = DequantizeLinear <axis = 0> (x_from_zero, s_out_rows, zero_points)",
    ]


def _product(variant: Variant, body: Body) -> list[str]:
    if body == "qdq":
        return _product_qdq(variant)
    return _product_grouped(variant) if variant.group else _product_integer(variant)


def _product_grouped(variant: Variant) -> list[str]:
    """acc [C, M, N] int32, exact, and product [M, N] = s_x · Σ_g scale[g] · acc[g].

    acc = Σ x_q w - z_x Σ w - weight_zero Σ (x_q - z_x): MatMulInteger takes no zero point for a group, nor for a row.
    """
    lines = [
        f"by_group = Constant <value_ints = [0, -1, {variant.group}]> ()",
        "first_axis = Constant <value_ints = [0]> ()",
        "second_axis = Constant <value_ints = [1]> ()",
        "x_split = Reshape (x_q, by_group)",
        "x_groups = Transpose <perm = [1, 0, 2]> (x_split)",  # [C, M, G]
        "weight_int8 = Cast <to = 3> (weight_q)",
        "weight_split = Reshape (weight_int8, by_group)",
        "weight_groups = Transpose <perm = [1, 2, 0]> (weight_split)",  # [C, G, N], folded when the session loads
    ]
    if variant.act_symmetric:
        lines += [
            "gathered = MatMulInteger (x_groups, weight_groups, x_zero)",
            "x_zeros_wide = Cast <to = 6> (x_zero)",
        ]
    else:
        lines += [
            "no_zero = Constant <value = uint8 {0}> ()",
            "raw = MatMulInteger (x_groups, weight_groups, no_zero)",
            "weight_wide = Cast <to = 6> (weight_groups)",
            "column_sum = ReduceSum <keepdims = 1> (weight_wide, second_axis)",  # [C, 1, N], folded
            "x_zeros_rows = Cast <to = 6> (x_zeros)",
            "x_zeros_wide = Unsqueeze (x_zeros_rows, last_axis)",  # [M, 1]
            "offset = Mul (x_zeros_wide, column_sum)",
            "gathered = Sub (raw, offset)",
        ]
    if variant.weight_zero:
        lines += [
            "x_wide_groups = Cast <to = 6> (x_groups)",
            "x_centred = Sub (x_wide_groups, x_zeros_wide)",
            "row_sum = ReduceSum <keepdims = 1> (x_centred, last_axis)",  # [C, M, 1]
            "zero_int8 = Cast <to = 3> (weight_zero)",
            "zero_wide = Cast <to = 6> (zero_int8)",
            "zero_columns = Transpose <perm = [1, 0]> (zero_wide)",
            "zero_groups = Unsqueeze (zero_columns, second_axis)",  # [C, 1, N]
            "zero_part = Mul (row_sum, zero_groups)",
            "acc = Sub (gathered, zero_part)",
        ]
    else:
        lines += ["acc = Identity (gathered)"]
    return [
        *lines,
        "acc_float = Cast <to = 1> (acc)",
        "scale_columns = Transpose <perm = [1, 0]> (weight_scale)",
        "scale_groups = Unsqueeze (scale_columns, second_axis)",  # [C, 1, N]
        "scaled = Mul (acc_float, scale_groups)",
        "summed = ReduceSum <keepdims = 0> (scaled, first_axis)",
        "product = Mul (summed, s_out)",
    ]


def _product_integer(variant: Variant) -> list[str]:
    """acc [M, N] int32, exact, and product = s_x · scale · acc."""
    lines = [
        "weight_int8 = Cast <to = 3> (weight_q)",  # folded when the session loads
        "weight_kn = Transpose <perm = [1, 0]> (weight_int8)",
    ]
    if variant.weight_zero:
        lines += ["weight_zero_int8 = Cast <to = 3> (weight_zero)"]
    zero = "weight_zero_int8" if variant.weight_zero else ""
    if variant.act_symmetric or variant.from_zero:
        multiplied = "x_from_zero" if variant.from_zero else "x_q"
        lines += [f"acc = MatMulInteger ({multiplied}, weight_kn, x_zero{', ' + zero if zero else ''})"]
    else:
        # ONNX Runtime takes no zero point per row of A: its part is a rank-1 term, exact in int32.
        lines += [
            "weight_wide = Cast <to = 6> (weight_kn)",
            *(
                ["zero_wide = Cast <to = 6> (weight_zero_int8)", "centred = Sub (weight_wide, zero_wide)"]
                if zero
                else ["centred = Identity (weight_wide)"]
            ),
            "first_axis = Constant <value_ints = [0]> ()",
            "column_sum = ReduceSum <keepdims = 1> (centred, first_axis)",  # [1, N], folded
            "no_zero = Constant <value = uint8 {0}> ()",
            f"raw = MatMulInteger (x_q, weight_kn, no_zero{', ' + zero if zero else ''})",
            "x_zeros_wide = Cast <to = 6> (x_zeros)",
            "x_zeros_column = Unsqueeze (x_zeros_wide, last_axis)",
            "offset = Mul (x_zeros_column, column_sum)",
            "acc = Sub (raw, offset)",
        ]
    # A scale that is a product of two, the first one number, is what ONNX Runtime looks for to multiply, cast and scale
    # in one kernel on a CPU. It is 1, which the session must not know when it loads, or it would fold the product.
    return [
        *lines,
        "acc_float = Cast <to = 1> (acc)",
        "count = Shape (s_rows)",
        "count_float = Cast <to = 1> (count)",
        "unit = Div (count_float, count_float)",
        "scale = Mul (unit, weight_scale)",
        "scaled = Mul (acc_float, scale)",
        "product = Mul (scaled, s_out)",
    ]


def _product_qdq(variant: Variant) -> list[str]:
    zero = ", weight_zero" if variant.weight_zero else ""
    by = f"axis = 1, block_size = {variant.group}" if variant.group else "axis = 0"
    weight = f"weight_dq = DequantizeLinear <{by}> (weight_q, weight_scale{zero})"
    if variant.group or not variant.act_symmetric:
        # A Gemm, because ONNX Runtime (1.31) replaces a MatMul of dequantized weights by one that rounds x once more.
        return [weight, "product = Gemm <transB = 1> (x_dq, weight_dq)"]
    return [
        weight,
        "weight_kn = Transpose <perm = [1, 0]> (weight_dq)",
        "product = MatMul (x_dq, weight_kn)",
    ]


def _epilogue(variant: Variant, body: Body) -> list[str]:
    """TQE's term and the bias."""
    if not variant.tqe:
        return ["y_rows = Add (product, bias)" if variant.bias else "y_rows = Identity (product)"]
    lines = ["factor = MatMul (x_dq, alpha)"]  # [M, R], s_x inside
    if variant.frame_gain:
        lines += [
            "row_count = Shape <start = 0, end = 1> (s_rows)",
            "int_zero = Constant <value_int = 0> ()",
            "int_one = Constant <value_int = 1> ()",
            "row_limit = Squeeze (row_count)",
            "row = Range (int_zero, row_limit, int_one)",
            "token_frame = Div (row, tokens_per_frame)",
            "frames = Shape (frame_gain)",
            "frame = Mod (token_frame, frames)",
            "gain_rows = Gather (frame_gain, frame)",
            "gain = Unsqueeze (gain_rows, last_axis)",
            "gained = Mul (factor, gain)",
        ]
    else:
        lines += ["gained = Identity (factor)"]
    if not variant.bias:
        return [*lines, "y_rows = Gemm (gained, beta, product)"]
    # The bias is one rank more, so that a single Gemm adds everything to the product.
    return [
        *lines,
        "ones = Div (s_x, s_x)",  # NaN where y is NaN anyway
        "gained_and_one = Concat <axis = 1> (gained, ones)",
        "first = Constant <value_ints = [0]> ()",
        "bias_row = Unsqueeze (bias, first)",
        "beta_and_bias = Concat <axis = 0> (beta, bias_row)",  # folded when the session loads
        "y_rows = Gemm (gained_and_one, beta_and_bias, product)",
    ]
