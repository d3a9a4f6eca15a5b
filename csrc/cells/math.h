// The functions of gates, written once for every value type A of a kernel: float and double (scalar
// code and CUDA threads) and the vectors of csrc/cpu.
//
// A value type offers + - * / and unary minus, and:
//   ScalarOf<A>               its scalar type; A(scalar) broadcasts a scalar
//   a > b, a >= b             masks, false where a or b is NaN
//   select(mask, a, b)        mask ? a : b
//   power_of_two(shifted)     2^n for shifted = kRoundingShift + n, n an integer (see exp_parts)
//
// All functions are free of branches, and NaN in gives NaN out.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define FASTRNN_HD __host__ __device__ __forceinline__
#else
#define FASTRNN_HD inline __attribute__((always_inline))
#endif

namespace fastrnn::cells {

// Constants of a floating point format.
template <class Real>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  using Bits = std::int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kExponentBias = 127;
  static constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: x + shift rounds x to integer
  static constexpr float kLn2High = 0.693359375f;       // ln 2 in few bits: n * high is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kExpMax = 89.0f, kExpMin = -87.0f;  // 2^n is infinite, or still normal
  static constexpr float kTanhMax = 10.0f;  // tanh rounds to 1 for smaller x already
  static constexpr int kTerms = 7;          // of the series of e^r - 1
  static constexpr int kLogTerms = 8;       // of the series of log(1 + y), y <= 1
};

template <>
struct FloatFormat<double> {
  using Bits = std::int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kExponentBias = 1023;
  static constexpr double kRoundingShift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kExpMax = 710.0, kExpMin = -708.0;
  static constexpr double kTanhMax = 22.0;
  static constexpr int kTerms = 13;
  static constexpr int kLogTerms = 17;
};

// The scalar type of a value type; vectors name their own.
template <class A>
struct Scalar {
  using Type = typename A::Real;
};
template <>
struct Scalar<float> {
  using Type = float;
};
template <>
struct Scalar<double> {
  using Type = double;
};
template <class A>
using ScalarOf = typename Scalar<A>::Type;

FASTRNN_HD float select(bool mask, float a, float b) { return mask ? a : b; }
FASTRNN_HD double select(bool mask, double a, double b) { return mask ? a : b; }

// The low bits of kRoundingShift + n hold n; moved into the exponent field they make 2^n.
template <class Real>
FASTRNN_HD Real scalar_power_of_two(Real shifted) {
  typename FloatFormat<Real>::Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  using Unsigned = std::conditional_t<sizeof(Real) == 4, std::uint32_t, std::uint64_t>;
  const auto moved = (static_cast<Unsigned>(bits) + Unsigned(FloatFormat<Real>::kExponentBias))
                     << FloatFormat<Real>::kMantissaBits;
  Real result;
  std::memcpy(&result, &moved, sizeof(result));
  return result;
}
FASTRNN_HD float power_of_two(float shifted) { return scalar_power_of_two(shifted); }
FASTRNN_HD double power_of_two(double shifted) { return scalar_power_of_two(shifted); }

template <class A>
FASTRNN_HD A clamp(A x, A low, A high) {
  x = select(x > high, high, x);
  return select(low > x, low, x);
}

// sum_{k=1}^{terms} r^k / k!  =  e^r - 1  for |r| <= ln(2)/2, by Horner's rule from the last term.
template <class A>
FASTRNN_HD A expm1_series(A r) {
  using F = FloatFormat<ScalarOf<A>>;
  using Real = ScalarOf<A>;
  Real reciprocal_factorial = Real(1);
  for (int k = 2; k <= F::kTerms; ++k) reciprocal_factorial /= Real(k);
  A sum = A(reciprocal_factorial);
  Real coefficient = reciprocal_factorial;
  for (int k = F::kTerms; k > 1; --k) {
    coefficient *= Real(k);  // 1/(k-1)!
    sum = sum * r + A(coefficient);
  }
  return sum * r;
}

// e^x = scale * (1 + minus_one) with scale = 2^n, minus_one = e^r - 1, x = n ln 2 + r.
template <class A>
FASTRNN_HD void exp_parts(A x, A& scale, A& minus_one) {
  using F = FloatFormat<ScalarOf<A>>;
  using Real = ScalarOf<A>;
  const A shifted = x * A(Real(1.4426950408889634)) + A(F::kRoundingShift);
  const A n = shifted - A(F::kRoundingShift);
  const A r = (x - n * A(F::kLn2High)) - n * A(F::kLn2Low);
  scale = power_of_two(shifted);
  minus_one = expm1_series(r);
}

// 1 / (1 + e^-x). It keeps its relative accuracy in the negative tail and reaches an exact 0 as
// torch's does, so that a closed gate times infinity is NaN. (With an infinite scale, scale + scale
// * minus_one would be NaN; scale times a positive number is not.)
template <class A>
FASTRNN_HD A sigmoid(A x) {
  using Real = ScalarOf<A>;
  using F = FloatFormat<Real>;
  A scale, minus_one;
  exp_parts(clamp(-x, A(F::kExpMin), A(F::kExpMax)), scale, minus_one);
  return A(Real(1)) / (A(Real(1)) + scale * (A(Real(1)) + minus_one));
}

// With m = e^2|x| - 1, computed without cancellation: |tanh(x)| = m / (m + 2), which keeps its
// relative accuracy near 0 (1 - 2 sigmoid(-2x) would lose it), and = 1 - 2 / (m + 2), used where
// the result is nearer to 1 than to 0: there the 1 - tanh(x)^2 of the gradients depends on each
// bit. One division serves both.
template <class A>
FASTRNN_HD A tanh(A x) {
  using Real = ScalarOf<A>;
  using F = FloatFormat<Real>;
  const A zero = A(Real(0)), one = A(Real(1)), two = A(Real(2));
  const A magnitude = select(zero > x, -x, x);
  const A bounded = select(magnitude > A(F::kTanhMax), A(F::kTanhMax), magnitude);
  A scale, minus_one;
  exp_parts(bounded + bounded, scale, minus_one);
  const A m = scale * minus_one + (scale - one);
  const A quotient = select(m > two, two, m) / (m + two);
  const A result = select(m > two, one - quotient, quotient);
  return select(zero > x, -result, result);
}

// e^x for x <= 0. Below the smallest normal number it stays there.
template <class A>
FASTRNN_HD A exp_of_negative(A x) {
  using Real = ScalarOf<A>;
  A scale, minus_one;
  exp_parts(clamp(x, A(FloatFormat<Real>::kExpMin), A(Real(0))), scale, minus_one);
  return scale + scale * minus_one;
}

// log(1 / (1 + e^-x)) = min(x, 0) - log(1 + y), y = e^-|x|. With s = y / (2 + y), at most 1/3,
// log(1 + y) = 2 (s + s^3/3 + s^5/5 + ...).
template <class A>
FASTRNN_HD A log_sigmoid(A x) {
  using Real = ScalarOf<A>;
  const A zero = A(Real(0));
  const A y = exp_of_negative(select(zero > x, x, -x));
  const A s = y / (A(Real(2)) + y), square = s * s;
  A sum = A(Real(0));
  for (int k = FloatFormat<Real>::kLogTerms - 1; k >= 0; --k)
    sum = sum * square + A(Real(2) / Real(2 * k + 1));
  return select(x > zero, zero, x) - s * sum;
}

template <class A>
FASTRNN_HD A relu(A x) {
  using Real = ScalarOf<A>;
  return select(A(Real(0)) > x, A(Real(0)), x);
}

}  // namespace fastrnn::cells
