// The gated AdamW update in one pass over memory, and the gate on another optimizer's step in two.
//
// The arithmetic is that of update.py, gate.py and variance.py, operation by operation and rounding
// by rounding: where ATen's kernels fuse a multiplication and an addition, `madd` does, and nothing
// else is contracted (-ffp-contract=off). tests/test_fused.py holds the two together bit for bit.
// Needs a C++17 compiler and no header of torch, so that it compiles in about a second.

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

enum Dtype : int32_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Estimator : int32_t { UNOBSERVED, EMA, SECOND_MOMENT, GIVEN };
enum Mask : int32_t { OPEN, HARD, SOFT, SNR };
enum Phase : int32_t { WHOLE, MOMENTS, WEIGHTS };

constexpr int64_t BLOCK = 512;  // elements worked on together, in L1

// What Python fills in (native.py, class Task): the order and types of the fields must agree.
struct Task {
  void* const* params;
  const void* const* grads;
  void* const* exp_avgs;
  void* const* exp_avg_sqs;
  void* const* variances;
  const int64_t* numels;
  const double* gates;  // WEIGHTS: the mask of each tensor
  double* sums;         // MOMENTS: per thread and tensor, sums of m² and of the raw variance
  int64_t tensors;
  int32_t param_dtype, grad_dtype, estimator, mask, phase, threads;
  double sign;                      // -1: maximize
  double centre, rho_weight;        // EMA: d = g - centre·m, s += rho_weight·(d² - s)
  double decay;                     // w *= decay
  double beta1_weight, beta2, beta2_weight;
  double v_scale, m_scale_sq;       // SECOND_MOMENT: s = max(v_scale·v - m_scale_sq·m², 0)
  double alpha, weight, mask_eps, tiny, q_min;
  double v_correction, eps, rate;   // w -= rate·q·m / (√v/v_correction + eps)
};

template <typename real>
struct Numbers {
  real sign, centre, rho_weight, decay, beta1_weight, beta2, beta2_weight, v_scale, m_scale_sq;
  real alpha, weight, mask_eps, tiny, q_min, v_correction, eps, rate;

  explicit Numbers(const Task& t)
      : sign(t.sign), centre(t.centre), rho_weight(t.rho_weight), decay(t.decay),
        beta1_weight(t.beta1_weight), beta2(t.beta2), beta2_weight(t.beta2_weight),
        v_scale(t.v_scale), m_scale_sq(t.m_scale_sq), alpha(t.alpha), weight(t.weight),
        mask_eps(t.mask_eps), tiny(t.tiny), q_min(t.q_min), v_correction(t.v_correction),
        eps(t.eps), rate(t.rate) {}
};

#if !defined(POPRISK_TWO_ROUNDINGS) && \
    (defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__))
inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double madd(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
template <typename real> inline real madd(real a, real b, real c) { return a * b + c; }
#endif

template <typename real> inline real at_least(real x, real low) { return x > low ? x : low; }

// torch.lerp, which changes its form at a weight of one half.
template <typename real> inline real lerp(real from, real to, real weight) {
  const bool near = weight < real(0.5);  // numbers are chosen, not results: that vectorizes
  return madd(near ? weight : weight - 1, to - from, near ? from : to);
}

template <typename real, int estimator>
inline real raw_variance(real m, real v, real s, const Numbers<real>& c) {
  if constexpr (estimator != SECOND_MOMENT) return s;
  return at_least(madd(-c.m_scale_sq * m, m, v * c.v_scale), real(0));
}

template <typename real, int mask>
inline real gate(real m, real s, const Numbers<real>& c) {
  real signal = m * m;
  if constexpr (mask == HARD) return at_least(madd(-c.alpha, s, signal) > 0 ? real(1) : real(0), c.q_min);
  if constexpr (mask == SOFT) signal = at_least(madd(-c.alpha, s, signal), real(0));
  real total = at_least(madd(c.weight, s, signal) + c.mask_eps, c.tiny);
  return at_least(signal / total, c.q_min);
}

// The variance with the deviation of a gradient from the average before it.
template <typename real>
inline real observed(real s, real mean, real grad, const Numbers<real>& c) {
  const real d = madd(-c.centre, mean, grad);
  return lerp(s, d * d, c.rho_weight);
}

template <typename real>
inline real moved(real w, real step, real v, const Numbers<real>& c) {
  return w + (-c.rate * step) / (std::sqrt(v) / c.v_correction + c.eps);
}

// Everything for n coordinates, read and written once.
template <typename real, int estimator, int mask>
void whole(real* __restrict w, const real* __restrict g, real* __restrict m, real* __restrict v,
           real* __restrict s, int64_t n, const Numbers<real> c) {
  for (int64_t i = 0; i < n; i++) {
    const real grad = c.sign * g[i];
    real mean = m[i], variance = 0;
    if constexpr (estimator == EMA) {
      variance = observed(s[i], mean, grad, c);
      s[i] = variance;
    }
    if constexpr (estimator == GIVEN) variance = s[i];
    mean = lerp(mean, grad, c.beta1_weight);
    const real square = madd(c.beta2_weight * grad, grad, v[i] * c.beta2);
    real step = mean;
    if constexpr (mask != OPEN)
      step = gate<real, mask>(mean, raw_variance<real, estimator>(mean, square, variance, c), c) * mean;
    w[i] = moved(w[i] * c.decay, step, square, c);
    m[i] = mean;
    v[i] = square;
  }
}

// The sums that a mask per tensor compares; eight lanes, so that they vectorize.
template <typename real, int estimator>
void add_sums(const real* __restrict m, const real* __restrict v, const real* __restrict s,
              int64_t n, const Numbers<real> c, double* __restrict sums) {
  double lanes[2][8] = {};
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t width = n - i < 8 ? n - i : 8;
    for (int64_t j = 0; j < width; j++) {
      lanes[0][j] += double(m[i + j] * m[i + j]);
      const real raw = raw_variance<real, estimator>(
          m[i + j], v[i + j], estimator == SECOND_MOMENT ? real(0) : s[i + j], c);
      lanes[1][j] += double(raw);
    }
  }
  for (int j = 0; j < 8; j++) {
    sums[0] += lanes[0][j];
    sums[1] += lanes[1][j];
  }
}

// The first half of `whole`, for a mask per tensor: moments and their sums.
template <typename real, int estimator>
void moments(const real* __restrict g, real* __restrict m, real* __restrict v, real* __restrict s,
             int64_t n, const Numbers<real> c, double* sums) {
  for (int64_t i = 0; i < n; i++) {
    const real grad = c.sign * g[i];
    if constexpr (estimator == EMA) s[i] = observed(s[i], m[i], grad, c);
    m[i] = lerp(m[i], grad, c.beta1_weight);
    v[i] = madd(c.beta2_weight * grad, grad, v[i] * c.beta2);
  }
  add_sums<real, estimator>(m, v, s, n, c, sums);
}

// The second half: one mask for all coordinates.
template <typename real>
void weights(real* __restrict w, const real* __restrict m, const real* __restrict v, int64_t n,
             real q, const Numbers<real> c) {
  for (int64_t i = 0; i < n; i++) w[i] = moved(w[i] * c.decay, q * m[i], v[i], c);
}

template <typename real, int estimator>
void update(real* w, const real* g, real* m, real* v, real* s, int64_t n, const Numbers<real>& c,
            const Task& t, double q, double* sums) {
  if (t.phase == MOMENTS) return moments<real, estimator>(g, m, v, s, n, c, sums);
  if (t.phase == WEIGHTS) return weights<real>(w, m, v, n, real(q), c);
  if constexpr (estimator != UNOBSERVED) {
    if (t.mask == HARD) return whole<real, estimator, HARD>(w, g, m, v, s, n, c);
    if (t.mask == SOFT) return whole<real, estimator, SOFT>(w, g, m, v, s, n, c);
    if (t.mask == SNR) return whole<real, estimator, SNR>(w, g, m, v, s, n, c);
  }
  whole<real, estimator, OPEN>(w, g, m, v, s, n, c);
}

inline float widened(uint16_t x, Dtype dtype) {
  if (dtype == BFLOAT16) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
  }
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return float(half);
}

inline uint16_t narrowed(float x, Dtype dtype) {
  uint16_t y;
  if (dtype == FLOAT16) {
    const _Float16 half = _Float16(x);
    std::memcpy(&y, &half, sizeof y);
    return y;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

template <Dtype dtype> void widen(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = widened(x[i], dtype);
}

template <Dtype dtype> void narrow(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = narrowed(x[i], dtype);
}

void widen(const uint16_t* x, float* y, int64_t n, int32_t dtype) {
  dtype == BFLOAT16 ? widen<BFLOAT16>(x, y, n) : widen<FLOAT16>(x, y, n);
}

void narrow(const float* x, uint16_t* y, int64_t n, int32_t dtype) {
  dtype == BFLOAT16 ? narrow<BFLOAT16>(x, y, n) : narrow<FLOAT16>(x, y, n);
}

// Visit elements [from, to) of tensor j in blocks of `stride`, as weights, gradients and where they
// begin. Those of 16 bits pass through buffers.
template <typename real, typename Visit>
void for_each_block(const Task& t, int64_t j, int64_t from, int64_t to, int64_t stride, bool writes,
                    Visit visit) {
  const bool narrow_param = sizeof(real) == 4 && t.param_dtype != FLOAT32;
  const bool narrow_grad = t.grads && sizeof(real) == 4 && t.grad_dtype != FLOAT32;
  if (narrow_param || narrow_grad) stride = BLOCK;
  alignas(64) float w_buffer[BLOCK], g_buffer[BLOCK];
  for (int64_t i = from; i < to; i += stride) {
    const int64_t n = to - i < stride ? to - i : stride;
    real* w = static_cast<real*>(t.params[j]) + i;
    const real* g = t.grads ? static_cast<const real*>(t.grads[j]) + i : nullptr;
    uint16_t* narrow_w = static_cast<uint16_t*>(t.params[j]) + i;
    if (narrow_param) {
      widen(narrow_w, w_buffer, n, t.param_dtype);
      w = reinterpret_cast<real*>(w_buffer);
    }
    if (narrow_grad) {
      widen(static_cast<const uint16_t*>(t.grads[j]) + i, g_buffer, n, t.grad_dtype);
      g = reinterpret_cast<const real*>(g_buffer);
    }
    visit(i, n, w, g);
    if (narrow_param && writes) narrow(w_buffer, narrow_w, n, t.param_dtype);
  }
}

// Elements [from, to) of tensor j.
template <typename real, int estimator>
void update_range(const Task& t, int64_t j, int64_t from, int64_t to, const Numbers<real>& c,
                  double* sums) {
  real* m = static_cast<real*>(t.exp_avgs[j]);
  real* v = static_cast<real*>(t.exp_avg_sqs[j]);
  real* s = t.variances ? static_cast<real*>(t.variances[j]) : nullptr;
  const double q = t.gates ? t.gates[j] : 1.0;
  const int64_t stride = t.phase == MOMENTS ? BLOCK : to - from;
  for_each_block<real>(t, j, from, to, stride, t.phase != MOMENTS,
                       [&](int64_t i, int64_t n, real* w, const real* g) {
    update<real, estimator>(w, g, m + i, v + i, s ? s + i : s, n, c, t, q, sums);
  });
}

// A thread's share of all elements, counted through the tensors, in whole cache lines.
struct Share {
  int64_t from, to;
  Share(int64_t total, int64_t thread, int64_t threads) {
    const int64_t size = ((total + threads - 1) / threads + 63) / 64 * 64;
    from = thread * size < total ? thread * size : total;
    to = from + size < total ? from + size : total;
  }
};

// Call `visit(tensor, from, to)` for each tensor that has elements in the share.
template <typename Visit>
void for_each_range(const int64_t* numels, int64_t tensors, Share share, Visit visit) {
  int64_t start = 0;
  for (int64_t j = 0; j < tensors && start < share.to; start += numels[j++]) {
    const int64_t from = share.from > start ? share.from - start : 0;
    const int64_t to = share.to - start < numels[j] ? share.to - start : numels[j];
    if (from < to) visit(j, from, to);
  }
}

int64_t total_of(const int64_t* numels, int64_t tensors) {
  int64_t total = 0;
  for (int64_t j = 0; j < tensors; j++) total += numels[j];
  return total;
}

// Call `work(thread)` on every thread; one thread starts no parallel region.
template <typename Work> void on_threads(int32_t threads, Work work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int32_t k = 0; k < threads; k++) work(k);
    return;
  }
#endif
  for (int32_t k = 0; k < threads; k++) work(k);
}

// Call `visit(thread, tensor, from, to)` on every thread for its share of the elements.
template <typename Visit> void on_shares(const Task& t, Visit visit) {
  const int64_t total = total_of(t.numels, t.tensors);
  on_threads(t.threads, [&](int32_t k) {
    for_each_range(t.numels, t.tensors, Share(total, k, t.threads),
                   [&](int64_t j, int64_t from, int64_t to) { visit(k, j, from, to); });
  });
}

double* sums_of(const Task& t, int32_t k, int64_t j) {
  return t.sums ? t.sums + 2 * (k * t.tensors + j) : nullptr;
}

template <typename real, int estimator> void run(const Task& t) {
  const Numbers<real> c(t);
  on_shares(t, [&](int32_t k, int64_t j, int64_t from, int64_t to) {
    update_range<real, estimator>(t, j, from, to, c, sums_of(t, k, j));
  });
}

template <typename real> void run(const Task& t) {
  if (t.estimator == EMA) return run<real, EMA>(t);
  if (t.estimator == SECOND_MOMENT) return run<real, SECOND_MOMENT>(t);
  if (t.estimator == GIVEN) return run<real, GIVEN>(t);
  run<real, UNOBSERVED>(t);
}

// Without their sign bit, floating-point numbers are ordered as integers, NaN above infinity.
// Two streams of 64 lanes each: one alone does not saturate the memory.
template <typename bits> bits largest(const void* x, int64_t from, int64_t to) {
  constexpr int64_t LANES = 64;
  const bits magnitude = bits(~bits(0)) >> 1;
  const bits* p = static_cast<const bits*>(x) + from;
  const int64_t half = (to - from) / (2 * LANES) * LANES;
  bits top[2 * LANES] = {};
  for (int64_t i = 0; i < half; i += LANES)
    for (int64_t stream = 0; stream < 2; stream++)
      for (int64_t k = 0; k < LANES; k++) {
        const bits size = p[stream * half + i + k] & magnitude;
        bits& best = top[stream * LANES + k];
        best = size > best ? size : best;
      }
  bits overall = 0;
  for (const bits best : top) overall = best > overall ? best : overall;
  for (int64_t i = 2 * half; i < to - from; i++) {
    const bits size = p[i] & magnitude;
    overall = size > overall ? size : overall;
  }
  return overall;
}

}  // namespace

#include "wrapped.hpp"

extern "C" {

void poprisk_update(const Task* t) { t->param_dtype == FLOAT64 ? run<double>(*t) : run<float>(*t); }

void poprisk_observe(const Task* t, void* const* starts) {
  t->param_dtype == FLOAT64 ? observe<double>(*t, starts) : observe<float>(*t, starts);
}

void poprisk_keep(const Task* t, void* const* starts, double share, int32_t last) {
  t->param_dtype == FLOAT64 ? keep<double>(*t, starts, share, last)
                            : keep<float>(*t, starts, float(share), last);
}

// Whether all numbers have a magnitude of at most `limit`, given as its bit pattern.
int32_t poprisk_within(const void* const* arrays, const int64_t* numels, int64_t tensors,
                       int32_t itemsize, uint64_t limit, int32_t threads) {
  const int64_t total = total_of(numels, tensors);
  int32_t beyond[256] = {};
  on_threads(threads, [&](int32_t k) {
    for_each_range(numels, tensors, Share(total, k, threads), [&](int64_t j, int64_t from, int64_t to) {
      const uint64_t top = itemsize == 2   ? largest<uint16_t>(arrays[j], from, to)
                           : itemsize == 4 ? largest<uint32_t>(arrays[j], from, to)
                                           : largest<uint64_t>(arrays[j], from, to);
      beyond[k] |= top > limit;
    });
  });
  int32_t any = 0;
  for (int32_t k = 0; k < threads; k++) any |= beyond[k];
  return !any;
}

int64_t poprisk_task_size() { return sizeof(Task); }
}
