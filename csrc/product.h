// Matrix products for operators that work tile by tile.
//
// PyTorch's own run at half the rate of oneDNN's on some processors: the library behind them keeps
// its best code for its maker's. oneDNN is reached through the operators that torch.compile uses
// for linear layers. Where they are missing or know other arguments, PyTorch's own do the work.

#pragma once

#include <optional>
#include <string_view>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace fiber_d2 {

class Product {
  using Pack = at::Tensor(const at::Tensor&, std::optional<int64_t>);
  using Multiply = at::Tensor(
      const at::Tensor&,
      const at::Tensor&,
      const std::optional<at::Tensor>&,
      std::string_view,
      c10::List<std::optional<at::Scalar>>,
      std::optional<std::string_view>);

 public:
  // For products with `matrix` (N, K), or with others of its type, of about `rows` rows.
  Product(const at::Tensor& matrix, int64_t rows) : matrix_(matrix), packed_(matrix) {
    const bool brief = matrix.scalar_type() == at::kBFloat16;
    if (!(brief || matrix.scalar_type() == at::kFloat) || !at::hasMKLDNN()) return;
    if (!at::globalContext().userEnabledMkldnn()) return;
    auto& all = c10::Dispatcher::singleton();
    if (brief) {
      const auto known = all.findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
      if (!known || !known->typed<bool()>().call()) return;
    }
    const auto pack = all.findSchema({"mkldnn::_reorder_linear_weight", ""});
    const auto multiply = all.findSchema({"mkldnn::_linear_pointwise", ""});
    if (!pack || !multiply) return;
    try {
      multiply_.emplace(multiply->typed<Multiply>());
      packed_ = pack->typed<Pack>().call(matrix, rows);
    } catch (const c10::Error&) {
      multiply_.reset();
      packed_ = matrix;
    }
  }

  // x (M, K) times the transposed matrix, plus a bias (N,), to `out` (M, N) of any type.
  void write(at::Tensor& out, const at::Tensor& x, const std::optional<at::Tensor>& bias) const {
    if (multiply_)
      out.copy_(linear(x, packed_, bias));
    else if (out.scalar_type() != x.scalar_type())
      out.copy_(at::linear(x, matrix_, bias));
    else if (bias.has_value())
      at::addmm_out(out, *bias, x, matrix_.t());
    else
      at::mm_out(out, x, matrix_.t());
  }

  // Adds x (M, K), transposed, times y (M, N) to `sum` (K, N).
  void add(at::Tensor& sum, const at::Tensor& x, const at::Tensor& y) const {
    if (multiply_)
      sum.add_(linear(x.t(), y.t(), std::nullopt));
    else
      sum.addmm_(x.t(), y);
  }

 private:
  at::Tensor linear(
      const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) const {
    const c10::List<std::optional<at::Scalar>> nothing;
    return multiply_->call(x, weight, bias, "none", nothing, std::nullopt);
  }

  at::Tensor matrix_, packed_;
  std::optional<c10::TypedOperatorHandle<Multiply>> multiply_;
};

}  // namespace fiber_d2
