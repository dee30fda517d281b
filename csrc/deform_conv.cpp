// Modulated deformable convolution (Deformable ConvNets v2, arXiv:1811.11168) for CPUs.
//
// Output positions are processed in tiles that fit a core's cache: a tile is sampled into rows of
// k*k*C numbers from the channels-last map, and one matrix product turns it into the output. The
// backward pass samples again instead of keeping the rows, which would be k*k times the map.
//
// Map, weight and bias may be bfloat16, in the forward pass: places and weights of the samples, and
// their sums, stay float32, and so is the output; rows and products are bfloat16.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu_versions.h"
#include "product.h"

namespace fiber_d2 {
namespace {

struct Geometry {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel, stride, padding;
  // From one image to the next; the channels of an image lie densely.
  int64_t offset_step, mask_step;

  int64_t points() const { return kernel * kernel; }
  int64_t columns() const { return points() * channels; }
  int64_t pixels() const { return height * width; }
  int64_t positions() const { return out_height * out_width; }
};

// Between what is stored and what is computed with; bits, as compilers make vectors of these alone.
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(at::BFloat16 x) {
  const uint32_t bits = uint32_t(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

INLINE void store(float x, float& to) { to = x; }
INLINE void store(double x, double& to) { to = x; }
// To the nearest, of two to the even one; what is not a number stays so.
INLINE void store(float x, at::BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : rounded;
  to.x = uint16_t(bits >> 16);
}

// Where one sampling point reads: four corners with bilinear weights, corners off the map at -1.
template <typename T>
struct Point {
  int64_t corner[4];
  T weight[4];
  T y_fraction, x_fraction, mask;
};

template <typename T>
INLINE Point<T> locate(
    const Geometry& g, const T* offset, const T* mask, int64_t position, int64_t tap) {
  const int64_t area = g.positions();
  const int64_t row = position / g.out_width, column = position % g.out_width;
  const T y = T(row * g.stride - g.padding + tap / g.kernel) + offset[2 * tap * area + position];
  const T x =
      T(column * g.stride - g.padding + tap % g.kernel) + offset[(2 * tap + 1) * area + position];
  // Far points may not overflow the integers; in this order neither does what is not a number.
  const T y_floor = std::min(std::max(T(-2), std::floor(y)), T(g.height + 1));
  const T x_floor = std::min(std::max(T(-2), std::floor(x)), T(g.width + 1));
  const int64_t top = int64_t(y_floor), left = int64_t(x_floor);
  Point<T> point;
  point.y_fraction = y - y_floor;
  point.x_fraction = x - x_floor;
  // What is not a number stays visible in the result.
  point.mask = std::isnan(y + x) ? y + x : mask[tap * area + position];
  for (int i = 0; i < 4; ++i) {
    const int64_t cy = top + i / 2, cx = left + i % 2;
    const bool inside = cy >= 0 && cy < g.height && cx >= 0 && cx < g.width;
    const T wy = i / 2 ? point.y_fraction : 1 - point.y_fraction;
    const T wx = i % 2 ? point.x_fraction : 1 - point.x_fraction;
    point.corner[i] = inside ? cy * g.width + cx : -1;
    point.weight[i] = inside ? wy * wx : T(0);
  }
  return point;
}

// Rows `begin` to `end` (output positions of one image) of k*k*C samples, modulated.
template <typename S, typename T>
INLINE void sample(
    const Geometry& g,
    const S* map,
    const T* offset,
    const T* mask,
    const S* zeros,
    int64_t begin,
    int64_t end,
    S* rows) {
  for (int64_t position = begin; position < end; ++position) {
    for (int64_t tap = 0; tap < g.points(); ++tap, rows += g.channels) {
      const Point<T> p = locate(g, offset, mask, position, tap);
      const S* a[4];
      for (int i = 0; i < 4; ++i) a[i] = p.corner[i] < 0 ? zeros : map + p.corner[i] * g.channels;
      const T w0 = p.weight[0] * p.mask, w1 = p.weight[1] * p.mask;
      const T w2 = p.weight[2] * p.mask, w3 = p.weight[3] * p.mask;
      const S *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3];
#pragma omp simd
      for (int64_t c = 0; c < g.channels; ++c)
        store(w0 * widen(a0[c]) + w1 * widen(a1[c]) + w2 * widen(a2[c]) + w3 * widen(a3[c]), rows[c]);
    }
  }
}

// From the gradient of the rows to those of map, offsets and mask; `rows` are sampled on the way.
// Corners off the map read `zeros` and write to `waste`.
template <typename T>
INLINE void scatter(
    const Geometry& g,
    const T* map,
    const T* offset,
    const T* mask,
    const T* zeros,
    const T* grad_rows,
    int64_t begin,
    int64_t end,
    T* rows,
    T* grad_map,
    T* grad_offset,
    T* grad_mask,
    T* waste) {
  const int64_t area = g.positions();
  for (int64_t position = begin; position < end; ++position) {
    for (int64_t tap = 0; tap < g.points(); ++tap) {
      const Point<T> p = locate(g, offset, mask, position, tap);
      const T* a[4];
      T* to[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t start = p.corner[i] * g.channels;
        a[i] = p.corner[i] < 0 ? zeros : map + start;
        to[i] = p.corner[i] < 0 ? waste + i * g.channels : grad_map + start;
      }
      const T w0 = p.weight[0] * p.mask, w1 = p.weight[1] * p.mask;
      const T w2 = p.weight[2] * p.mask, w3 = p.weight[3] * p.mask;
      const T *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3];
      T *to0 = to[0], *to1 = to[1], *to2 = to[2], *to3 = to[3];
      T d0 = 0, d1 = 0, d2 = 0, d3 = 0;
      // The four targets are different places: corners are, and so are the places for waste.
#pragma omp simd reduction(+ : d0, d1, d2, d3)
      for (int64_t c = 0; c < g.channels; ++c) {
        const T grad = grad_rows[c];
        const T v0 = a0[c], v1 = a1[c], v2 = a2[c], v3 = a3[c];
        rows[c] = w0 * v0 + w1 * v1 + w2 * v2 + w3 * v3;
        d0 += grad * v0;
        d1 += grad * v1;
        d2 += grad * v2;
        d3 += grad * v3;
        to0[c] += w0 * grad;
        to1[c] += w1 * grad;
        to2[c] += w2 * grad;
        to3[c] += w3 * grad;
      }
      const T fy = p.y_fraction, fx = p.x_fraction;
      grad_mask[tap * area + position] =
          p.weight[0] * d0 + p.weight[1] * d1 + p.weight[2] * d2 + p.weight[3] * d3;
      // A point without a corner on the map has no slope, however large its fraction is.
      const bool off = (p.corner[0] & p.corner[1] & p.corner[2] & p.corner[3]) < 0;
      grad_offset[2 * tap * area + position] =
          off ? T(0) : p.mask * ((1 - fx) * (d2 - d0) + fx * (d3 - d1));
      grad_offset[(2 * tap + 1) * area + position] =
          off ? T(0) : p.mask * ((1 - fy) * (d1 - d0) + fy * (d3 - d2));
      rows += g.channels;
      grad_rows += g.channels;
    }
  }
}

// Versions per processor exist for plain functions only, not for templates.
#define DEFINE_SAMPLE_FOR(S, T)                                                                 \
  FOR_EACH_CPU void sample_tile(                                                                \
      const Geometry& g, const S* map, const T* offset, const T* mask, const S* zeros,          \
      int64_t begin, int64_t end, S* rows) {                                                    \
    sample<S, T>(g, map, offset, mask, zeros, begin, end, rows);                                \
  }

#define DEFINE_SCATTER_FOR(T)                                                                   \
  FOR_EACH_CPU void scatter_tile(                                                               \
      const Geometry& g, const T* map, const T* offset, const T* mask, const T* zeros,          \
      const T* grad_rows, int64_t begin, int64_t end, T* rows, T* grad_map, T* grad_offset,     \
      T* grad_mask, T* waste) {                                                                 \
    scatter<T>(                                                                                 \
        g, map, offset, mask, zeros, grad_rows, begin, end, rows, grad_map, grad_offset,        \
        grad_mask, waste);                                                                      \
  }

DEFINE_SAMPLE_FOR(float, float)
DEFINE_SAMPLE_FOR(double, double)
DEFINE_SAMPLE_FOR(at::BFloat16, float)
DEFINE_SCATTER_FOR(float)
DEFINE_SCATTER_FOR(double)
#undef DEFINE_SAMPLE_FOR
#undef DEFINE_SCATTER_FOR

// Half of a usual second-level cache, so that rows are still there for the product.
constexpr int64_t kTileBytes = 1 << 19;

struct Tiles {
  int64_t per_image, rows, total;

  Tiles(const Geometry& g, int64_t item_size) {
    rows = std::clamp<int64_t>(kTileBytes / std::max<int64_t>(1, g.columns() * item_size), 16, 512);
    rows = std::max<int64_t>(1, std::min(rows, g.positions()));
    per_image = (g.positions() + rows - 1) / rows;
    total = per_image * g.batch;
  }
};

// Images (B, C, ...) with dense channels; anything may lie between images.
at::Tensor dense_per_image(const at::Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return tensor.contiguous();
    expected *= tensor.size(d);
  }
  return tensor;
}

Geometry check(
    const at::Tensor& x,
    const at::Tensor& offset,
    const at::Tensor& mask,
    const at::Tensor& weight,
    int64_t stride,
    int64_t padding) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && offset.dim() == 4 && mask.dim() == 4 && weight.dim() == 4,
      "deform_conv2d needs four-dimensional tensors");
  TORCH_CHECK_VALUE(stride >= 1 && padding >= 0, "deform_conv2d: stride >= 1 and padding >= 0");
  Geometry g{};
  g.batch = x.size(0), g.channels = x.size(1), g.height = x.size(2), g.width = x.size(3);
  g.out_channels = weight.size(0), g.kernel = weight.size(2);
  g.out_height = offset.size(2), g.out_width = offset.size(3);
  g.stride = stride, g.padding = padding;
  TORCH_CHECK_VALUE(
      weight.size(1) == g.channels && weight.size(3) == g.kernel,
      "deform_conv2d: a weight of shape ", weight.sizes(), " does not fit a map of shape ",
      x.sizes());
  const std::vector<int64_t> offset_shape{g.batch, 2 * g.points(), g.out_height, g.out_width};
  const std::vector<int64_t> mask_shape{g.batch, g.points(), g.out_height, g.out_width};
  TORCH_CHECK_VALUE(
      offset.sizes() == at::IntArrayRef(offset_shape) && mask.sizes() == at::IntArrayRef(mask_shape),
      "deform_conv2d: offset and mask have shapes ", offset.sizes(), " and ", mask.sizes(),
      ", but need ", offset_shape, " and ", mask_shape);
  const at::ScalarType computed = at::toOpMathType(x.scalar_type());
  TORCH_CHECK_VALUE(
      weight.scalar_type() == x.scalar_type() && offset.scalar_type() == computed &&
          mask.scalar_type() == computed,
      "deform_conv2d needs tensors of one type, but for bfloat16 map and weight, which need float32 "
      "offset and mask");
  g.offset_step = offset.stride(0), g.mask_step = mask.stride(0);
  return g;
}

at::Tensor kernel_matrix(const at::Tensor& weight) {
  return weight.permute({0, 2, 3, 1}).contiguous().view({weight.size(0), -1});
}

at::Tensor forward(
    const at::Tensor& x_in,
    const at::Tensor& offset_in,
    const at::Tensor& mask_in,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    int64_t stride,
    int64_t padding) {
  const at::Tensor offset = dense_per_image(offset_in), mask = dense_per_image(mask_in);
  const Geometry g = check(x_in, offset, mask, weight, stride, padding);
  const at::Tensor x = x_in.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor out = at::empty(
      {g.batch, g.out_channels, g.out_height, g.out_width},
      offset.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (out.numel() == 0) return out;
  const at::Tensor flat = out.permute({0, 2, 3, 1}).view({-1, g.out_channels});
  const at::Tensor zeros = at::zeros({g.channels}, x.options());
  const Tiles tiles(g, x.element_size());
  at::AutoDispatchBelowADInplaceOrView no_autograd_here;
  const Product product(kernel_matrix(weight), tiles.rows);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "deform_conv2d", [&] {
    using math_t = at::opmath_type<scalar_t>;
    at::parallel_for(0, tiles.total, 1, [&](int64_t first, int64_t last) {
      at::AutoDispatchBelowADInplaceOrView no_autograd;
      at::Tensor rows = at::empty({tiles.rows, g.columns()}, x.options());
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t image = tile / tiles.per_image;
        const int64_t begin = tile % tiles.per_image * tiles.rows;
        const int64_t end = std::min(begin + tiles.rows, g.positions());
        sample_tile(
            g,
            x.const_data_ptr<scalar_t>() + image * g.pixels() * g.channels,
            offset.const_data_ptr<math_t>() + image * g.offset_step,
            mask.const_data_ptr<math_t>() + image * g.mask_step,
            zeros.const_data_ptr<scalar_t>(),
            begin,
            end,
            rows.mutable_data_ptr<scalar_t>());
        at::Tensor target = flat.narrow(0, image * g.positions() + begin, end - begin);
        product.write(target, rows.narrow(0, 0, end - begin), bias);
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_in,
    const at::Tensor& x_in,
    const at::Tensor& offset_in,
    const at::Tensor& mask_in,
    const at::Tensor& weight,
    int64_t stride,
    int64_t padding) {
  const at::Tensor offset = dense_per_image(offset_in), mask = dense_per_image(mask_in);
  const Geometry g = check(x_in, offset, mask, weight, stride, padding);
  const at::Tensor x = x_in.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor grad =
      grad_in.permute({0, 2, 3, 1}).contiguous().view({-1, g.out_channels});
  at::Tensor grad_x = at::zeros_like(x, x.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor grad_offset = at::zeros(offset.sizes(), x.options());
  at::Tensor grad_mask = at::zeros(mask.sizes(), x.options());
  if (grad.numel() == 0 || x.numel() == 0)
    return {grad_x, grad_offset, grad_mask, at::zeros_like(weight)};

  const Tiles tiles(g, x.element_size());
  at::AutoDispatchBelowADInplaceOrView no_autograd_here;
  const Product product(kernel_matrix(weight).t().contiguous(), tiles.rows);
  // Each worker takes a run of tiles. Images that two workers share are summed apart, so that the
  // result depends on the number of threads alone, not on who was first.
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), tiles.total);
  const auto start_of = [&](int64_t worker) { return worker * tiles.total / workers; };
  at::Tensor grad_matrices = at::zeros({workers, g.out_channels, g.columns()}, x.options());
  std::vector<std::vector<std::pair<int64_t, at::Tensor>>> shared(workers);
  const at::Tensor zeros = at::zeros({g.channels}, x.options());
  const int64_t map_size = g.pixels() * g.channels;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "deform_conv2d_backward", [&] {
    at::parallel_for(0, workers, 1, [&](int64_t first_worker, int64_t last_worker) {
      at::AutoDispatchBelowADInplaceOrView no_autograd;
      at::Tensor rows = at::empty({tiles.rows, g.columns()}, x.options());
      at::Tensor grad_rows = at::empty_like(rows);
      at::Tensor waste = at::zeros({4 * g.channels}, x.options());
      for (int64_t worker = first_worker; worker < last_worker; ++worker) {
        const int64_t first = start_of(worker), last = start_of(worker + 1);
        at::Tensor grad_matrix = grad_matrices[worker];
        int64_t current = -1;
        scalar_t* grad_map = nullptr;
        for (int64_t tile = first; tile < last; ++tile) {
          const int64_t image = tile / tiles.per_image;
          if (image != current) {
            current = image;
            const bool whole =
                image * tiles.per_image >= first && (image + 1) * tiles.per_image <= last;
            if (whole) {
              grad_map = grad_x.mutable_data_ptr<scalar_t>() + image * map_size;
            } else {
              shared[worker].emplace_back(image, at::zeros({map_size}, x.options()));
              grad_map = shared[worker].back().second.template mutable_data_ptr<scalar_t>();
            }
          }
          const int64_t begin = tile % tiles.per_image * tiles.rows;
          const int64_t end = std::min(begin + tiles.rows, g.positions());
          const int64_t count = end - begin;
          const at::Tensor grad_tile = grad.narrow(0, image * g.positions() + begin, count);
          at::Tensor target = grad_rows.narrow(0, 0, count);
          product.write(target, grad_tile, std::nullopt);
          scatter_tile(
              g,
              x.const_data_ptr<scalar_t>() + image * map_size,
              offset.const_data_ptr<scalar_t>() + image * g.offset_step,
              mask.const_data_ptr<scalar_t>() + image * g.mask_step,
              zeros.const_data_ptr<scalar_t>(),
              grad_rows.const_data_ptr<scalar_t>(),
              begin,
              end,
              rows.mutable_data_ptr<scalar_t>(),
              grad_map,
              grad_offset.mutable_data_ptr<scalar_t>() + image * 2 * g.points() * g.positions(),
              grad_mask.mutable_data_ptr<scalar_t>() + image * g.points() * g.positions(),
              waste.mutable_data_ptr<scalar_t>());
          product.add(grad_matrix, grad_tile, rows.narrow(0, 0, count));
        }
      }
    });
  });
  at::Tensor flat = grad_x.permute({0, 2, 3, 1}).view({g.batch, map_size});
  for (const auto& parts : shared)
    for (const auto& [image, part] : parts) flat[image].add_(part);
  at::Tensor grad_weight = (workers == 1 ? grad_matrices[0] : grad_matrices.sum(0))
                               .view({g.out_channels, g.kernel, g.kernel, g.channels})
                               .permute({0, 3, 1, 2})
                               .contiguous();
  return {grad_x, grad_offset, grad_mask, grad_weight};
}

}  // namespace

TORCH_LIBRARY(fiber_d2, library) {
  library.def(
      "deform_conv2d(Tensor x, Tensor offset, Tensor mask, Tensor weight, Tensor? bias, int stride, "
      "int padding) -> Tensor");
  library.def(
      "deform_conv2d_backward(Tensor grad, Tensor x, Tensor offset, Tensor mask, Tensor weight, "
      "int stride, int padding) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fiber_d2, CPU, library) {
  library.impl("deform_conv2d", forward);
  library.impl("deform_conv2d_backward", backward);
}

}  // namespace fiber_d2
