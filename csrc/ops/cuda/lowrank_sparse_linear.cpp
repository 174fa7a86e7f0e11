// torch.ops.tensorcomp.lowrank_sparse_linear and its backward op for CUDA, for few rows: products with the factors by
// the library, all that is sparse in kernels of ours. More rows go to the oracle, which makes the sparse part dense.
// Schemas, fake kernels and autograd are in tensorcomp_ext/ops.

#include <limits>
#include <tuple>

#include "kernels/cuda/sparse_rows_launch.h"
#include "ops/arguments.h"
#include "ops/cuda/rows.h"

namespace tensorcomp::ops::cuda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using torch::stable::matmul;

constexpr const char* kName = "lowrank_sparse_linear";

Tensor turned(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

RowsSource source_of(const Tensor& matrix) { return {matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1)}; }

// The packed matrix of a call, and what holds it.
struct SparseCall {
  SparseCall(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& given_values, const Tensor& given_offsets,
             const Tensor& given_positions)
      : values(dense(given_values)), offsets(dense(given_offsets)), positions(dense(given_positions)), rows(x) {
    p.element = element_of(a, false);
    p.sparse.m = a.size(0);
    p.sparse.n = b.size(1);
    p.sparse.count = values.size(0);
    p.sparse.values = values.const_data_ptr();
    p.sparse.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
    if (positions.scalar_type() == ScalarType::Byte) {
      p.sparse.bits = static_cast<const uint8_t*>(positions.const_data_ptr());
    } else {
      p.sparse.columns = static_cast<const uint16_t*>(positions.const_data_ptr());
    }
    p.rows = x.numel() / p.sparse.n;
    p.rank = static_cast<int32_t>(a.size(1));
    p.x = {rows.image.data, rows.image.strides.w, rows.image.strides.c};
  }

  Tensor values, offsets, positions;
  Rows rows;
  SparseRowsParams p;
};

// Whether the kernels take a layer of these sizes, for so many rows.
bool taken(const Tensor& a, const Tensor& b, int64_t rows, const CallDevice& device) {
  if (!served(a) || a.numel() == 0 || b.numel() == 0 || rows > kMostSparseRows || device.old()) return false;
  if (a.size(0) > std::numeric_limits<int32_t>::max()) return false;
  return fits_sparse_rows(b.size(1), a.size(1), device.limits());
}

void check_call(const char* op, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& values,
                const Tensor& offsets, const Tensor& positions) {
  check_sparse_layer(op, a, b, values, offsets, positions);
  rows_of(op, x, "x", b.size(1));
  check_like(op, "x", x, "a", a);
}

Tensor matrix_of(const Tensor& t, int64_t rows, int64_t features) {
  const std::array<int64_t, 2> sizes{rows, features};
  return torch::stable::reshape(t, sizes);
}

Tensor call_reference(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& values,
                      const std::optional<Tensor>& bias, const Tensor& offsets, const Tensor& positions) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(x),    from(a),       from(b),        from(values),
                                    from(bias), from(offsets), from(positions)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::lowrank_sparse_linear_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor lowrank_sparse_linear(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& values,
                             std::optional<Tensor> bias, const Tensor& offsets, const Tensor& positions) {
  check_call(kName, x, a, b, values, offsets, positions);
  const int64_t m = a.size(0), n = b.size(1), rows = rows_of(kName, x, "x", n);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == m, kName, ": bias must be [m] with m = ", m, ", got ",
                    sizes_of(*bias));
    check_like(kName, "bias", *bias, "x", x);
  }
  const CallDevice device(a);
  if (!taken(a, b, rows, device)) return call_reference(x, a, b, values, bias, offsets, positions);
  Tensor y = rows_like(x, m);
  if (rows == 0) return y;
  SparseCall call(x, a, b, values, offsets, positions);
  SparseRowsParams& p = call.p;
  STD_TORCH_CHECK(plan_sparse_forward(p, device.limits()), kName, ": no plan for what fits");
  const Tensor low = matmul(matrix_of(x, rows, n), turned(b));
  const Tensor left = a.size(1) == 1 || a.stride(1) == 1 ? a : torch::stable::contiguous(a);
  const Tensor kept = dense(bias.has_value() ? *bias : values);  // of the values nothing is read
  p.low = source_of(low);
  p.a = left.const_data_ptr();
  p.a_row = left.stride(0);
  if (bias.has_value()) p.bias = kept.const_data_ptr();
  p.y = y.mutable_data_ptr();
  TC_CHECK_LAUNCH(launch_sparse_forward(p, device.stream()));
  return y;
}

Gradients reference_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& b,
                             const Tensor& values, const Tensor& offsets, const Tensor& positions, int64_t mask) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 8> stack{from(grad),   from(x),       from(a),         from(b),
                                    from(values), from(offsets), from(positions), from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("tensorcomp::lowrank_sparse_linear_backward_reference", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

// Gradients of values, and of x on top of what the factors give.
void add_sparse(SparseCall& call, const Tensor& grad, const std::optional<Tensor>& grad_values,
                const std::optional<Tensor>& grad_x, const CallDevice& device) {
  SparseRowsParams& p = call.p;
  p.grad = source_of(grad);
  std::optional<Tensor> columns, sums, partial;
  if (p.sparse.bits != nullptr) {
    columns = bytes_on(grad, static_cast<size_t>(p.sparse.count) * sizeof(uint16_t));
    p.expanded = static_cast<uint16_t*>(columns->mutable_data_ptr());
    TC_CHECK_LAUNCH(launch_sparse_columns(p, device.stream()));
    p.sparse.bits = nullptr;
    p.sparse.columns = p.expanded;
  }
  if (grad_values.has_value()) {
    STD_TORCH_CHECK(plan_sparse_values(p, device.limits()), kName, "_backward: no plan for what fits");
    if (p.groups() > 1) {
      sums = bytes_on(grad, static_cast<size_t>(p.sparse.count) * sizeof(float));
      p.sums = static_cast<float*>(sums->mutable_data_ptr());
    }
    p.grad_values = grad_values->mutable_data_ptr();
    TC_CHECK_LAUNCH(launch_sparse_values(p, device.stream()));
  }
  if (grad_x.has_value()) {
    STD_TORCH_CHECK(plan_sparse_input(p, device.limits()), kName, "_backward: no plan for what fits");
    partial = bytes_on(grad, static_cast<size_t>(p.splits * p.groups() * p.group * p.sparse.n) * sizeof(float));
    p.partial = static_cast<float*>(partial->mutable_data_ptr());
    p.grad_x = grad_x->mutable_data_ptr();
    TC_CHECK_LAUNCH(launch_sparse_input(p, device.stream()));
  }
}

// Gradients of x, a, b, the values and the bias; those whose bit is not in `mask` are empty.
Gradients lowrank_sparse_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& b,
                                         const Tensor& values, const Tensor& offsets, const Tensor& positions,
                                         int64_t mask) {
  constexpr const char* kThis = "lowrank_sparse_linear_backward";
  check_call(kThis, x, a, b, values, offsets, positions);
  const int64_t m = a.size(0), n = b.size(1), rows = rows_of(kThis, x, "x", n);
  STD_TORCH_CHECK(rows_of(kThis, grad, "grad", m) == rows, kThis, ": grad must have the ", rows, " rows of x, got ",
                  sizes_of(grad));
  check_like(kThis, "grad", grad, "a", a);
  const CallDevice device(a);
  if (!taken(a, b, rows, device)) return reference_backward(grad, x, a, b, values, offsets, positions, mask);
  const auto wanted = [mask](int bit) { return (mask >> bit & 1) != 0; };
  const auto empty = [&] { return contiguous_on<1>(a, {0}); };
  Gradients found{empty(), empty(), empty(), empty(), empty()};
  auto& [grad_x, grad_a, grad_b, grad_values, grad_bias] = found;
  const Tensor x_rows = matrix_of(x, rows, n), grads = matrix_of(grad, rows, m);
  std::optional<Tensor> of_x, of_values;
  if (wanted(0) || wanted(2)) {
    const Tensor inner = matmul(grads, a);  // [rows, r]
    if (wanted(0)) of_x = dense(matmul(inner, b));
    if (wanted(2)) grad_b = dense(matmul(turned(inner), x_rows));
  }
  if (wanted(1)) grad_a = dense(matmul(turned(grads), matmul(x_rows, turned(b))));
  if (wanted(3)) grad_values = contiguous_on<1>(a, {values.size(0)});
  if (wanted(4)) {
    const std::array<int64_t, 1> down{0};
    grad_bias = torch::stable::sum(grads, torch::headeronly::IntHeaderOnlyArrayRef(down.data(), 1));
  }
  if (wanted(3)) of_values = grad_values;
  if (rows == 0) {
    if (wanted(3)) torch::stable::zero_(grad_values);
  } else if (values.size(0) > 0 && (wanted(0) || wanted(3))) {
    SparseCall call(x, a, b, values, offsets, positions);
    add_sparse(call, grads, of_values, of_x, device);
  }
  if (wanted(0)) {
    const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    grad_x = torch::stable::reshape(*of_x, sizes);
  }
  return found;
}

}  // namespace
}  // namespace tensorcomp::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(TC_CUDA_OPS, TC_CUDA_KEY, m) {
  m.impl("lowrank_sparse_linear", TORCH_BOX(&tensorcomp::ops::cuda::lowrank_sparse_linear));
  m.impl("lowrank_sparse_linear_backward", TORCH_BOX(&tensorcomp::ops::cuda::lowrank_sparse_linear_backward));
}
