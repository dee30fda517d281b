// Sigmoid focal loss (arXiv:1708.02002) of anchors against the words of the boxes they were given,
// for CPUs. The target of an anchor is a row of its image's positive map, so nothing of the size
// of the logits is built: the forward pass keeps one sum, the backward pass computes again.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu_versions.h"

namespace fiber_d2 {
namespace {

// Rows are padded to whole blocks, which compilers turn into vectors of any width. A block's
// numbers are added up place by place, so that the order of a sum is that of the source.
constexpr int64_t kBlock = 16;
// Anchors whose losses are summed together; no number of threads changes the order.
constexpr int64_t kAnchors = 64;

struct Shape {
  double alpha, gamma;
};

// exp(x) for x <= 0 to about one unit in the last place, without a branch or a call: 2^n exp(r)
// with |r| <= log(2)/2, where seven terms of the series do. Not smaller than 2^-126.
INLINE float exp_of_negative(float x) {
  x = x > -87.3f ? x : -87.3f;
  // Adding and taking away 1.5 * 2^23 rounds to an integer.
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  // log(2) in two parts, the first with so few digits that its multiples are exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return y * power;
}

INLINE double exp_of_negative(double x) { return std::exp(x); }

// log(1 + z) = 2 artanh(s) for s = z / (2 + z), at most 1/3 here: its series converges fast.
INLINE float log_of_one_plus(float, float s) {
  const float s2 = s * s;
  float y = 1.0f / 15;
  y = y * s2 + 1.0f / 13;
  y = y * s2 + 1.0f / 11;
  y = y * s2 + 1.0f / 9;
  y = y * s2 + 1.0f / 7;
  y = y * s2 + 1.0f / 5;
  y = y * s2 + 1.0f / 3;
  y = y * s2 + 1.0f;
  return 2 * s * y;
}

INLINE double log_of_one_plus(double z, double) { return std::log1p(z); }

// What loss and slope of one logit are made of. The target may lie between 0 and 1; sums of
// products with it and with its complement keep small errors exact, where differences would not.
template <typename T>
struct Terms {
  T balance, error, error_slope, cross_entropy, cross_entropy_slope;
};

template <typename T>
INLINE Terms<T> terms_of(T x, T target, T alpha) {
  const T z = exp_of_negative(-std::abs(x));
  // One division serves the probability and the logarithm.
  const T inverse = 1 / ((1 + z) * (2 + z));
  const T larger = (2 + z) * inverse, smaller = z * larger;
  const T other = 1 - target;
  // Loops with branches do not become vectors, and compilers make branches of several choices that
  // depend on one comparison. Products with 0 and 1 are as exact, and so are these sums.
  const T negative = T(x < 0), positive = 1 - negative;
  const T p = negative * smaller + positive * larger, q = negative * larger + positive * smaller;
  const T above = T(0.5) * (std::abs(x) + x), below = T(0.5) * (std::abs(x) - x);
  Terms<T> terms;
  terms.balance = other * (1 - alpha) + target * alpha;
  terms.error = other * p + target * q;
  terms.error_slope = (other - target) * (p * q);
  terms.cross_entropy = other * above + target * below + log_of_one_plus(z, z * (1 + z) * inverse);
  terms.cross_entropy_slope = other * p - target * q;
  return terms;
}

template <typename T, bool kSquare>
INLINE double sum_row(const T* x, const T* target, const T* counts, int64_t width, Shape shape) {
  const T alpha = T(shape.alpha), gamma = T(shape.gamma);
  T sums[kBlock] = {};
  for (int64_t start = 0; start < width; start += kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      const Terms<T> v = terms_of(x[start + i], target[start + i], alpha);
      const T power = kSquare ? v.error * v.error : std::pow(v.error, gamma);
      const T loss = v.balance * power * v.cross_entropy;
      sums[i] += counts[start + i] * loss;
    }
  }
  double sum = 0;
  for (const T value : sums) sum += value;
  return sum;
}

// The slope takes the place of the logits.
template <typename T, bool kSquare>
INLINE void slope_row(
    T* x, const T* target, const T* counts, int64_t width, Shape shape, T factor) {
  const T alpha = T(shape.alpha), gamma = T(shape.gamma);
  for (int64_t start = 0; start < width; start += kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      const Terms<T> v = terms_of(x[start + i], target[start + i], alpha);
      T slope;
      if (kSquare) {
        slope = v.error * (2 * v.error_slope * v.cross_entropy + v.error * v.cross_entropy_slope);
      } else {
        const T power = std::pow(v.error, gamma);
        // An error of zero belongs to a logit so far out that nothing changes there.
        const T power_slope = v.error > 0 ? gamma * power / v.error * v.error_slope : T(0);
        slope = power_slope * v.cross_entropy + power * v.cross_entropy_slope;
      }
      x[start + i] = factor * counts[start + i] * (v.balance * slope);
    }
  }
}

// Versions per processor exist for plain functions only, not for templates.
#define DEFINE_FOR(T)                                                                           \
  FOR_EACH_CPU double sum_of_row(                                                               \
      const T* x, const T* target, const T* counts, int64_t width, Shape shape) {               \
    return shape.gamma == 2 ? sum_row<T, true>(x, target, counts, width, shape)                 \
                            : sum_row<T, false>(x, target, counts, width, shape);               \
  }                                                                                             \
  FOR_EACH_CPU void slope_of_row(                                                               \
      T* x, const T* target, const T* counts, int64_t width, Shape shape, T factor) {           \
    shape.gamma == 2 ? slope_row<T, true>(x, target, counts, width, shape, factor)              \
                     : slope_row<T, false>(x, target, counts, width, shape, factor);            \
  }

DEFINE_FOR(float)
DEFINE_FOR(double)
#undef DEFINE_FOR

// The arguments of both passes, checked and laid out for the rows.
struct Problem {
  int64_t batch, anchors, tokens, boxes, width, tiles;
  at::Tensor logits, assigned;
  // (B, K + 1, width), the last row that of anchors without a box, and (B, width) of 0 and 1.
  at::Tensor targets, counts;
  // Columns up to the last real token of each image.
  std::vector<int64_t> used;
};

Problem prepare(
    const at::Tensor& logits,
    const at::Tensor& assigned,
    const at::Tensor& positive_map,
    const at::Tensor& token_mask,
    int64_t no_object_column) {
  TORCH_CHECK_VALUE(
      logits.dim() == 3 && assigned.dim() == 2 && positive_map.dim() == 3 && token_mask.dim() == 2,
      "token_focal_loss needs logits (B, A, T), assigned (B, A), positive_map (B, K, T) and "
      "token_mask (B, T)");
  Problem p;
  p.batch = logits.size(0), p.anchors = logits.size(1), p.tokens = logits.size(2);
  p.boxes = positive_map.size(1);
  TORCH_CHECK_VALUE(
      assigned.size(0) == p.batch && assigned.size(1) == p.anchors &&
          positive_map.size(0) == p.batch && positive_map.size(2) == p.tokens &&
          token_mask.size(0) == p.batch && token_mask.size(1) == p.tokens,
      "token_focal_loss: assigned ", assigned.sizes(), ", positive_map ", positive_map.sizes(),
      " and token_mask ", token_mask.sizes(), " do not fit logits of shape ", logits.sizes());
  TORCH_CHECK_VALUE(
      assigned.scalar_type() == at::kLong && token_mask.scalar_type() == at::kBool,
      "token_focal_loss: assigned is int64 and token_mask bool");
  TORCH_CHECK_VALUE(
      logits.is_floating_point(), "token_focal_loss: logits are floating-point numbers");
  // Only the tokens of an anchor have to lie side by side.
  p.logits = p.tokens <= 1 || logits.stride(2) == 1 ? logits : logits.contiguous();
  p.assigned = assigned.contiguous();
  p.width = (p.tokens + kBlock - 1) / kBlock * kBlock;
  p.tiles = (p.batch * p.anchors + kAnchors - 1) / kAnchors;
  const auto options = logits.options().dtype(at::toOpMathType(logits.scalar_type()));
  p.targets = at::zeros({p.batch, p.boxes + 1, p.width}, options);
  p.targets.narrow(1, 0, p.boxes).narrow(2, 0, p.tokens).copy_(positive_map);
  if (0 <= no_object_column && no_object_column < p.tokens)
    p.targets.select(1, p.boxes).select(1, no_object_column).fill_(1);
  p.counts = at::zeros({p.batch, p.width}, options);
  p.counts.narrow(1, 0, p.tokens).copy_(token_mask);
  const at::Tensor mask = token_mask.contiguous();
  p.used.assign(p.batch, 0);
  for (int64_t image = 0; image < p.batch; ++image) {
    const bool* row = mask.const_data_ptr<bool>() + image * p.tokens;
    for (int64_t column = 0; column < p.tokens; ++column)
      if (row[column]) p.used[image] = column + 1;
  }
  return p;
}

// Calls `work(image, anchor, row, target, counts, width)` for every anchor of tile after tile; the
// logits that count lie in `row`, in the type that is computed in and padded to `width`.
template <typename In, typename T, typename Work>
void for_each_row(const Problem& p, const Work& work) {
  std::atomic<bool> strange{false};
  const In* logits = p.logits.const_data_ptr<In>();
  const T* targets = p.targets.const_data_ptr<T>();
  const T* counts = p.counts.const_data_ptr<T>();
  const int64_t* assigned = p.assigned.const_data_ptr<int64_t>();
  at::parallel_for(0, p.tiles, 1, [&](int64_t first, int64_t last) {
    std::vector<T> row(p.width);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t end = std::min((tile + 1) * kAnchors, p.batch * p.anchors);
      for (int64_t index = tile * kAnchors; index < end; ++index) {
        const int64_t image = index / p.anchors, anchor = index % p.anchors;
        const int64_t box = assigned[index];
        if (box < -1 || box >= p.boxes) {
          strange = true;
          continue;
        }
        const int64_t used = p.used[image];
        const int64_t width = (used + kBlock - 1) / kBlock * kBlock;
        const In* from = logits + image * p.logits.stride(0) + anchor * p.logits.stride(1);
        for (int64_t i = 0; i < used; ++i) row[i] = T(from[i]);
        std::fill(row.begin() + used, row.begin() + width, T(0));
        const int64_t target = image * (p.boxes + 1) + (box < 0 ? p.boxes : box);
        work(
            tile, image, anchor, row.data(), targets + target * p.width, counts + image * p.width,
            width);
      }
    }
  });
  TORCH_CHECK_VALUE(
      !strange, "token_focal_loss: assigned has numbers outside -1 to ", p.boxes - 1);
}

at::Tensor forward(
    const at::Tensor& logits,
    const at::Tensor& assigned,
    const at::Tensor& positive_map,
    const at::Tensor& token_mask,
    int64_t no_object_column,
    double alpha,
    double gamma) {
  const Problem p = prepare(logits, assigned, positive_map, token_mask, no_object_column);
  const Shape shape{alpha, gamma};
  std::vector<double> sums(p.tiles, 0.0);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "token_focal_loss", [&] {
        using math_t = at::opmath_type<scalar_t>;
        for_each_row<scalar_t, math_t>(
            p,
            [&](int64_t tile, int64_t, int64_t, math_t* row, const math_t* target,
                const math_t* counts, int64_t width) {
              sums[tile] += sum_of_row(row, target, counts, width, shape);
            });
      });
  double sum = 0;
  for (const double value : sums) sum += value;
  return at::full({}, sum, p.targets.options());
}

at::Tensor backward(
    const at::Tensor& grad,
    const at::Tensor& logits,
    const at::Tensor& assigned,
    const at::Tensor& positive_map,
    const at::Tensor& token_mask,
    int64_t no_object_column,
    double alpha,
    double gamma) {
  const Problem p = prepare(logits, assigned, positive_map, token_mask, no_object_column);
  const Shape shape{alpha, gamma};
  at::Tensor out = at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous));
  const double factor = grad.item<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "token_focal_loss_backward", [&] {
        using math_t = at::opmath_type<scalar_t>;
        scalar_t* slopes = out.mutable_data_ptr<scalar_t>();
        for_each_row<scalar_t, math_t>(
            p,
            [&](int64_t, int64_t image, int64_t anchor, math_t* row, const math_t* target,
                const math_t* counts, int64_t width) {
              slope_of_row(row, target, counts, width, shape, math_t(factor));
              scalar_t* to = slopes + (image * p.anchors + anchor) * p.tokens;
              const int64_t used = p.used[image];
              for (int64_t i = 0; i < used; ++i) to[i] = scalar_t(row[i]);
              std::fill(to + used, to + p.tokens, scalar_t(0));
            });
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiber_d2, library) {
  library.def(
      "token_focal_loss(Tensor logits, Tensor assigned, Tensor positive_map, Tensor token_mask, "
      "int no_object_column, float alpha, float gamma) -> Tensor");
  library.def(
      "token_focal_loss_backward(Tensor grad, Tensor logits, Tensor assigned, Tensor positive_map, "
      "Tensor token_mask, int no_object_column, float alpha, float gamma) -> Tensor");
}

TORCH_LIBRARY_IMPL(fiber_d2, CPU, library) {
  library.impl("token_focal_loss", forward);
  library.impl("token_focal_loss_backward", backward);
}

}  // namespace fiber_d2
