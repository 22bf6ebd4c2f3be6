// Functions of vectors of float32 that stay in registers, where a library is called with all of them put away. Off by
// at most 3e-7 of an exponential or sigmoid, and by 2e-7 for tanh; infinities and NaN are as they are there.
namespace pyrovae {
template <typename T>
T exp(T x) {
  return x.exp();
}
template <typename T>
T sigmoid(T x) {
  return T(1) / (T(1) + x.neg().exp());
}
template <typename T>
T tanh(T x) {
  return T(2) / (T(1) + (T(-2) * x).exp()) - T(1);
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr float WHOLE = 0x1.8p23f;  // a number to which this is added has no other digits

// x 2^n, of n + WHOLE
inline V scaled(V x, V n) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(x, n - V(WHOLE));
#else
  Numbers all = (Numbers)(__m256)n - 0x4b400000, half = all >> 1;
  auto power = [](Numbers n) { return V((__m256)((n + 127) << 23)); };
  return x * power(half) * power(all - half);
#endif
}

// 1 / x, of x in [1, 2]
inline V inverse(V x) {
#ifdef CPU_CAPABILITY_AVX512
  V y = _mm512_rcp14_ps(x);
  return y * fused(V(0.f) - x, y, V(2.f));
#else
  return V(1.f) / x;
#endif
}

template <>
inline V exp(V x) {
  x = at::vec::clamp(x, V(-104.f), V(89.f));
  V n = fused(x, V(0x1.715476p0f), V(WHOLE)), whole = n - V(WHOLE);
  V r = fused(whole, V(-0x1.7f7d1cp-20f), fused(whole, V(-0x1.62e4p-1f), x));  // less log 2, in two parts
  V p = fused(fused(fused(fused(V(.001395172f), r, V(.0083695985f)), r, V(.041666187f)), r, V(.16666512f)), r, V(.5f));
  return scaled(fused(r * r, p, r) + V(1.f), n);
}

template <>
inline V sigmoid(V x) {
  V e = exp(x.abs().neg()), high = inverse(V(1.f) + e), low = e * high;
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_mask_mov_ps(high, _mm512_movepi32_mask(_mm512_castps_si512(x)), low);
#else
  return V::blendv(high, low, x);  // by its sign
#endif
}

template <>
inline V tanh(V x) {
  V e = exp(V(-2.f) * x.abs()), size = (V(1.f) - e) * inverse(V(1.f) + e);
  return size | (x & V(-0.f));
}
#endif
}  // namespace pyrovae
