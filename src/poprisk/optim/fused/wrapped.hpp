// The gate on the step of another optimizer, in one pass over memory before it and one after it.
//
// Part of kernel.cpp, whose arithmetic it shares; the operations are those of the functions of
// keep.py, rounding by rounding, so that both give the same weights bit for bit.

namespace {

// Before another optimizer's step: keep the weights, and observe the gradient, of which
// the variance learns only where there is an average to compare it with.
template <typename real, int estimator>
void observe(const real* __restrict w, const real* __restrict g, real* __restrict m,
             real* __restrict s, real* __restrict start, int64_t n, const Numbers<real> c) {
  for (int64_t i = 0; i < n; i++) {
    start[i] = w[i];
    if constexpr (estimator == EMA) s[i] = observed(s[i], m[i], g[i], c);
    m[i] = lerp(m[i], g[i], c.beta1_weight);
  }
}

template <typename real> void observe(const Task& t, void* const* starts) {
  const Numbers<real> c(t);
  const auto step = t.estimator == EMA ? observe<real, EMA> : observe<real, UNOBSERVED>;
  on_shares(t, [&](int32_t, int64_t j, int64_t from, int64_t to) {
    real* m = static_cast<real*>(t.exp_avgs[j]);
    real* s = static_cast<real*>(t.variances[j]);
    real* start = static_cast<real*>(starts[j]);
    for_each_block<real>(t, j, from, to, to - from, false,
                         [&](int64_t i, int64_t n, const real* w, const real* g) {
      step(w, g, m + i, s + i, start + i, n, c);
    });
  });
}

enum Decay : int32_t { NONE, OF_START, OF_RESULT };

// After it: weights between those before and after the step, at the mask, and decay, which
// takes a share of the weights before the step or of the result; `start` becomes the whole update.
template <typename real, int mask, int decay>
void keep(real* __restrict w, real* __restrict start, const real* __restrict m,
          const real* __restrict s, int64_t n, real share, const Numbers<real> c) {
  for (int64_t i = 0; i < n; i++) {
    const real from = start[i], to = w[i];
    real kept = to;
    if constexpr (mask != OPEN) kept = lerp(from, to, gate<real, mask>(m[i], s[i], c));
    // No choice is left to the loop, where it would keep gcc from vectorizing.
    if constexpr (decay != NONE) kept = madd(-share, decay == OF_START ? from : kept, kept);
    w[i] = kept;
    start[i] = to - from;
  }
}

template <typename real>
using Keep = void(real*, real*, const real*, const real*, int64_t, real, Numbers<real>);

template <typename real, int mask> Keep<real>* keep_for(real share, bool last) {
  if (share == 0) return keep<real, mask, NONE>;
  return last ? keep<real, mask, OF_RESULT> : keep<real, mask, OF_START>;
}

template <typename real> Keep<real>* keep_for(const Task& t, real share, bool last) {
  if (t.mask == HARD) return keep_for<real, HARD>(share, last);
  if (t.mask == SOFT) return keep_for<real, SOFT>(share, last);
  if (t.mask == SNR) return keep_for<real, SNR>(share, last);
  return keep_for<real, OPEN>(share, last);
}

template <typename real> void keep(const Task& t, void* const* starts, real share, bool last) {
  const Numbers<real> c(t);
  const auto step = keep_for<real>(t, share, last);
  on_shares(t, [&](int32_t, int64_t j, int64_t from, int64_t to) {
    const real* m = static_cast<const real*>(t.exp_avgs[j]);
    const real* s = static_cast<const real*>(t.variances[j]);
    real* start = static_cast<real*>(starts[j]);
    for_each_block<real>(t, j, from, to, to - from, true,
                         [&](int64_t i, int64_t n, real* w, const real*) {
      step(w, start + i, m + i, s + i, n, share, c);
    });
  });
}

}  // namespace
