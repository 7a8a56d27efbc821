"""Element-wise functions of vectors, without a call of the C library: epilogues of convolutions and other kernels.

Errors, in units of the last place (ulp) of the result where nothing else is said, for finite arguments:

* exp: 2 ulp. ``exp(x) = 2ⁿ · exp(r)`` with ``n = round(x / ln 2)`` and ``|r| <= ln 2 / 2``, by the minimax polynomial
  of degree 6 of Cephes (``expf``). Results below 2⁻¹²⁶ are 2⁻¹²⁶.
* sigmoid, SiLU: 4 ulp, from exp, an addition and a division.
* tanh: 3 ulp: the odd polynomial of Cephes (``tanhf``) below 0.625, else ``1 - 2 / (exp(2x) + 1)``.
* erf: 3e-7 absolute: a rational function of degrees 13 and 8, as in Eigen. GELU: ``2e-7 · |x|``, plus 1 ulp.
* GELU by tanh: 6 ulp of x.
* log: 2 ulp, by the polynomial of Cephes (``logf``); positive numbers below 2⁻¹²⁶ are taken as 2⁻¹²⁶.
* softplus: 4 ulp, ``max(x, 0) + log1p(exp(-|x|))``. mish: 6 ulp, ``x · n / (n + 2)`` with ``n = exp(x)² + 2 exp(x)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from repvgg.engine.codegen.ir_builder import IRBuilder, Value
from repvgg.engine.graph import Epilogue

Emitter: TypeAlias = Callable[[IRBuilder, Value, float, float], Value]

# exp
_LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2; products of the first with small integers are exact
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_MIN, _EXP_MAX = -87.33654, 88.37626  # between them, 2ⁿ is a normal number
# Adding it rounds to an integer, and leaves that integer plus the exponent bias, 127, in the lowest bits.
_ROUND = 12582912.0 + 127.0
_MANTISSA_BITS = 23
_SQRT_HALF_BITS = 0x3F3504F3  # of √½ as a float

_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_TANH_SMALL = 0.625

_ERF_MAX = 4.0  # erf(4) = 1 - 1.5e-8
_ERF_NUMERATOR = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_ERF_DENOMINATOR = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
    -1.42647390514189e-02,
)
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1),
    *(2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_MIN_NORMAL = 1.17549435e-38
_MISH_MAX = 20.0  # beyond it, mish(x) is x in float32
_SQRT_HALF, _SQRT_2_OVER_PI = 0.70710678118654752, 0.79788456080286536


def apply(
    b: IRBuilder,
    epilogue: Epilogue,
    value: Value,
    added: Callable[[], Value] | None = None,
    slopes: Value | None = None,
) -> Value:
    """Apply the functions of an epilogue in turn.

    Args:
        b: the function.
        epilogue: see :class:`repvgg.engine.graph.Pointwise`.
        value: a vector.
        added: loads the vector that "add" adds.
        slopes: address of the slopes of "prelu" for these channels.
    """
    for one in epilogue:
        if one.kind == "add":
            assert added is not None
            value = b.binary("fadd", value, added())
        elif one.kind == "prelu":
            assert slopes is not None
            value = b.where("olt", value, "zeroinitializer", b.binary("fmul", value, b.load(slopes)), value)
        else:
            value = EMITTERS[one.kind](b, value, one.a, one.b)
    return value


def describe(epilogue: Epilogue) -> str:
    """Return the names of the functions, for a profile."""
    return ", ".join(one.kind.replace("_", " ") for one in epilogue)


def _polynomial(b: IRBuilder, x: Value, coefficients: Sequence[float]) -> Value:
    value: Value = b.number(coefficients[0])
    for each in coefficients[1:]:
        value = b.fma(value, x, b.number(each))
    return value


def _clamp(b: IRBuilder, x: Value, low: float, high: float) -> Value:
    # Comparisons with NaN are false, so NaN passes on, as in PyTorch.
    if low != float("-inf"):
        x = b.where("olt", x, b.number(low), b.number(low), x)
    return x if high == float("inf") else b.where("ogt", x, b.number(high), b.number(high), x)


def exp(b: IRBuilder, x: Value) -> Value:
    """Build e to the x, between 2⁻¹²⁶ and 2^127.5."""
    x = _clamp(b, x, _EXP_MIN, _EXP_MAX)
    shifted = b.fma(x, b.number(_LOG2_E), b.number(_ROUND))
    n = b.binary("fsub", shifted, b.number(_ROUND))
    r = b.fma(n, b.number(-_LN2_HIGH), x)
    r = b.fma(n, b.number(-_LN2_LOW), r)
    power = b.fma(_polynomial(b, r, _EXP), b.binary("fmul", r, r), b.binary("fadd", r, b.number(1.0)))
    integers = f"<{b.width} x i32>"
    bits = b.assign(f"bitcast {b.vector} {shifted} to {integers}")
    shifts = f"<{', '.join([f'i32 {_MANTISSA_BITS}'] * b.width)}>"
    scale = b.assign(f"bitcast {integers} {b.assign(f'shl {integers} {bits}, {shifts}')} to {b.vector}")
    return b.binary("fmul", power, scale)


def _exp(b: IRBuilder, x: Value, *_: float) -> Value:
    # Beyond the range above, infinity.
    value = exp(b, x)
    limit = b.number(88.722839)
    value = b.where(
        "ogt",
        x,
        b.number(_EXP_MAX),
        b.binary("fmul", exp(b, b.binary("fsub", x, b.number(1.0))), b.number(2.718281828459045)),
        value,
    )
    return b.where("ogt", x, limit, b.number(float("inf")), value)


def sigmoid(b: IRBuilder, x: Value) -> Value:
    """Build ``1 / (1 + exp(-x))``."""
    power = exp(b, b.assign(f"fneg {b.vector} {x}"))
    return b.binary("fdiv", b.number(1.0), b.binary("fadd", power, b.number(1.0)))


def _tanh(b: IRBuilder, x: Value) -> Value:
    square = b.binary("fmul", x, x)
    small = b.fma(b.binary("fmul", _polynomial(b, square, _TANH), square), x, x)
    power = exp(b, b.binary("fadd", x, x))
    fraction = b.binary("fdiv", b.number(2.0), b.binary("fadd", power, b.number(1.0)))
    large = b.binary("fsub", b.number(1.0), fraction)
    return b.where("olt", square, b.number(_TANH_SMALL**2), small, large)


def _erf(b: IRBuilder, x: Value) -> Value:
    x = _clamp(b, x, -_ERF_MAX, _ERF_MAX)
    square = b.binary("fmul", x, x)
    numerator = b.binary("fmul", x, _polynomial(b, square, _ERF_NUMERATOR))
    return b.binary("fdiv", numerator, _polynomial(b, square, _ERF_DENOMINATOR))


def _gelu(b: IRBuilder, x: Value) -> Value:
    half = b.binary("fmul", x, b.number(0.5))
    return b.fma(half, _erf(b, b.binary("fmul", x, b.number(_SQRT_HALF))), half)


def _gelu_tanh(b: IRBuilder, x: Value) -> Value:
    inner = b.fma(b.binary("fmul", x, x), b.number(2 * _SQRT_2_OVER_PI * 0.044715), b.number(2 * _SQRT_2_OVER_PI))
    return b.binary("fmul", x, sigmoid(b, b.binary("fmul", inner, x)))


def _elu(b: IRBuilder, x: Value, alpha: float) -> Value:
    power = b.binary("fsub", exp(b, x), b.number(1.0))
    return b.where("olt", x, "zeroinitializer", b.binary("fmul", power, b.number(alpha)), x)


def _leaky_relu(b: IRBuilder, x: Value, slope: float) -> Value:
    return b.where("olt", x, "zeroinitializer", b.binary("fmul", x, b.number(slope)), x)


def _hard_sigmoid(b: IRBuilder, x: Value) -> Value:
    return b.binary("fmul", _clamp(b, b.binary("fadd", x, b.number(3.0)), 0.0, 6.0), b.number(1 / 6))


def _affine(b: IRBuilder, x: Value, scale: float, shift: float) -> Value:
    if shift == 0.0:
        return b.binary("fmul", x, b.number(scale))
    return b.binary("fadd", x, b.number(shift)) if scale == 1.0 else b.fma(x, b.number(scale), b.number(shift))


def log(b: IRBuilder, x: Value) -> Value:
    """Build the natural logarithm: of 0 minus infinity, of negative numbers NaN."""
    # x = 2ⁿ·m with m in [√½, √2): n and m from the bits of x/√½.
    integers = f"<{b.width} x i32>"

    def integer(number: int) -> Value:
        return f"<{', '.join([f'i32 {number}'] * b.width)}>"

    normal = b.where("olt", x, b.number(_MIN_NORMAL), b.number(_MIN_NORMAL), x)
    bits = b.assign(f"bitcast {b.vector} {normal} to {integers}")
    shifted = b.assign(f"sub {integers} {bits}, {integer(_SQRT_HALF_BITS)}")
    power = b.assign(f"ashr {integers} {shifted}, {integer(_MANTISSA_BITS)}")
    mantissa = b.assign(f"sub {integers} {bits}, {b.assign(f'shl {integers} {power}, {integer(_MANTISSA_BITS)}')}")
    n = b.assign(f"sitofp {integers} {power} to {b.vector}")
    m = b.binary("fsub", b.assign(f"bitcast {integers} {mantissa} to {b.vector}"), b.number(1.0))
    square = b.binary("fmul", m, m)
    value = b.binary("fmul", b.binary("fmul", _polynomial(b, m, _LOG), m), square)
    value = b.fma(n, b.number(_LN2_LOW), value)
    value = b.fma(square, b.number(-0.5), value)
    value = b.fma(n, b.number(_LN2_HIGH), b.binary("fadd", m, value))
    value = b.where("oeq", x, b.number(float("inf")), x, value)
    value = b.where("oeq", x, "zeroinitializer", b.number(float("-inf")), value)
    return b.where("ult", x, "zeroinitializer", b.number(float("nan")), value)  # also of NaN


def _log1p(b: IRBuilder, x: Value) -> Value:
    """Build ``log(1 + x)`` for x in [0, 1]."""
    total = b.binary("fadd", x, b.number(1.0))
    lost = b.binary("fsub", x, b.binary("fsub", total, b.number(1.0)))  # by the rounding of the sum
    return b.binary("fadd", log(b, total), b.binary("fdiv", lost, total))


def _softplus(b: IRBuilder, x: Value) -> Value:
    small = exp(b, b.assign(f"fneg {b.vector} {b.call_vector('llvm.fabs', x)}"))
    return b.binary("fadd", b.relu(x), _log1p(b, small))


def _mish(b: IRBuilder, x: Value) -> Value:
    power = exp(b, _clamp(b, x, float("-inf"), _MISH_MAX))
    n = b.binary("fmul", power, b.binary("fadd", power, b.number(2.0)))
    return b.binary("fmul", x, b.binary("fdiv", n, b.binary("fadd", n, b.number(2.0))))


def _softsign(b: IRBuilder, x: Value) -> Value:
    return b.binary("fdiv", x, b.binary("fadd", b.call_vector("llvm.fabs", x), b.number(1.0)))


#: The code of each kind of function, with its parameters a and b.
EMITTERS: dict[str, Emitter] = {
    "relu": lambda b, x, *_: b.relu(x),
    "clamp": _clamp,  # between a and b
    "leaky_relu": lambda b, x, slope, _: _leaky_relu(b, x, slope),
    "hard_sigmoid": lambda b, x, *_: _hard_sigmoid(b, x),
    "hard_swish": lambda b, x, *_: b.binary("fmul", x, _hard_sigmoid(b, x)),
    "sigmoid": lambda b, x, *_: sigmoid(b, x),
    "silu": lambda b, x, *_: b.binary("fmul", x, sigmoid(b, x)),
    "tanh": lambda b, x, *_: _tanh(b, x),
    "gelu": lambda b, x, *_: _gelu(b, x),
    "gelu_tanh": lambda b, x, *_: _gelu_tanh(b, x),
    "elu": lambda b, x, alpha, _: _elu(b, x, alpha),
    "affine": _affine,  # a · x + b
    "exp": _exp,
    "abs": lambda b, x, *_: b.call_vector("llvm.fabs", x),
    "cube": lambda b, x, *_: b.binary("fmul", x, b.binary("fmul", x, x)),
    "erf": lambda b, x, *_: _erf(b, x),
    "log": lambda b, x, *_: log(b, x),
    "softplus": lambda b, x, *_: _softplus(b, x),
    "mish": lambda b, x, *_: _mish(b, x),
    "softsign": lambda b, x, *_: _softsign(b, x),
    "threshold": lambda b, x, a, number: b.where("ole", x, b.number(a), b.number(number), x),
    "square": lambda b, x, *_: b.binary("fmul", x, x),
    "sqrt": lambda b, x, *_: b.call_vector("llvm.sqrt", x),
    "rsqrt": lambda b, x, *_: b.binary("fdiv", b.number(1.0), b.call_vector("llvm.sqrt", x)),
    "reciprocal": lambda b, x, *_: b.binary("fdiv", b.number(1.0), x),
}
