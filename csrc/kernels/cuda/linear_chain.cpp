#include "kernels/cuda/linear_chain.h"

#include <algorithm>

#include "kernels/cuda/convolution_parts.h"

namespace tensorcomp::cuda {
namespace {

using detail::Arena;

// The states of this many bytes fit a large cache about, and leave each launch enough to do.
constexpr int64_t kStateBytesAtOnce = int64_t{64} << 20;

cudaError_t run(ChainParams& p, const ChainRows& x, int64_t first, int64_t rows, const DeviceLimits& device,
                cudaStream_t stream) {
  p.rows = rows;
  p.x = static_cast<const char*>(x.data) + first * x.row * element_bytes(p.element);
  p.x_row = x.row;
  p.x_feature = x.feature;
  if (!plan_chain(p, device)) return cudaErrorInvalidValue;
  return launch_chain(p, chain_blocks(p, device), stream);
}

// Everything backward launches, with its place in scratch memory.
struct Backward {
  ChainParams forward, back;
  void *packed_forward = nullptr, *packed_back = nullptr;
  int64_t chunks = 1;
  // A sum over rows of outer products a matrix, and for the bias; those not wanted have no partial results.
  std::vector<PixelSumParams> sums;
  PixelSumParams bias;
};

PixelSumParams sum_over(Element element, int64_t rows, int32_t m, int32_t n) {
  PixelSumParams p;
  p.element = element;
  p.batch = 1;
  p.w.in = p.w.grid = rows;
  p.m = m;
  p.n = n;
  p.m_pitch = sum_row_pitch(m, false);
  return p;
}

float* floats(Arena& scratch, int64_t count) {
  return static_cast<float*>(scratch.take(static_cast<size_t>(count) * sizeof(float)));
}

Backward backward_parts(const Program& program, Element element, const DeviceLimits& device, int64_t rows,
                        int64_t rows_at_once, const ChainGradients& wanted, Arena& scratch) {
  Backward b;
  const Program turned = transposed_program(program);
  b.forward = *chain_params(program, element);
  b.back = *chain_params(turned, element);
  const int32_t steps = b.forward.steps;
  int32_t least = steps, most = -1;
  for (int32_t i = 0; i < steps; ++i) {
    if (wanted.matrices[i] == nullptr) continue;
    least = std::min(least, i);
    most = i;
  }
  b.forward.run = std::max(most, 0);
  b.back.run = wanted.x != nullptr ? steps : std::max(steps - 1 - least, 0);
  const bool any = most >= 0;
  if (any) b.packed_forward = scratch.take(chain_packed_bytes(program, element));
  if (any || wanted.x != nullptr) b.packed_back = scratch.take(chain_packed_bytes(turned, element));
  // Without gradients of matrices nothing is kept, and all rows go through at once.
  const int64_t at_once = any ? std::min(rows_at_once, rows) : rows;
  b.chunks = detail::ceil_div(rows, at_once);
  for (int32_t i = 0; i < steps; ++i) {
    ChainStep &left = b.back.step[steps - 1 - i], &right = b.forward.step[i];
    PixelSumParams p = sum_over(element, at_once * right.kept, right.n, right.k);
    if (wanted.matrices[i] != nullptr) {
      left.state = scratch.take(static_cast<size_t>(at_once * left.kept * left.pitch));
      right.state = scratch.take(static_cast<size_t>(at_once * right.kept * right.pitch));
      p.splits = plan_splits(p, device);
      if (b.chunks > 1) {
        PixelSumParams one = p;
        one.splits = 1;
        p.splits = std::min(p.splits, detail::ceil_div(2 * device.multiprocessors, sum_blocks(one)));
      }
      p.partial = floats(scratch, b.chunks * p.splits * sum_rows(p) * sum_columns(p));
    }
    b.sums.push_back(p);
  }
  if (wanted.bias != nullptr) {
    // Summed beside one column of anything.
    b.bias = sum_over(element, rows, b.forward.out, 1);
    b.bias.splits = plan_splits(b.bias, device);
    b.bias.partial = floats(scratch, b.bias.splits * sum_rows(b.bias));
    b.bias.partial_bias = floats(scratch, b.bias.splits * b.forward.out);
  }
  return b;
}

cudaError_t finish(const PixelSumParams& p, int64_t splits, void* out, void* out_bias, cudaStream_t stream) {
  PixelSumFinishParams f;
  f.element = p.element;
  f.splits = splits;
  f.m = p.m;
  f.n = f.slice = f.slice_padded = p.n;
  f.m_pitch = p.m_pitch;
  f.partial = p.partial;
  f.partial_bias = p.partial_bias;
  f.out = out;
  f.out_bias = out_bias;
  f.stride_m = p.n;
  f.stride_n = 1;
  return launch_pixel_sum_finish(f, stream);
}

// What a chunk of rows adds to the gradient of one matrix.
cudaError_t sum_states(PixelSumParams p, const ChainStep& left, const ChainStep& right, int64_t rows, int64_t chunk,
                       cudaStream_t stream) {
  const int32_t bytes = element_bytes(p.element);
  p.partial += chunk * p.splits * sum_rows(p) * sum_columns(p);
  p.w.in = p.w.grid = rows * right.kept;
  p.a = left.state;
  p.b = right.state;
  p.a_strides = {0, 1, 0, left.pitch / bytes};
  p.b_strides = {0, 1, 0, right.pitch / bytes};
  return launch_pixel_sum(p, stream);
}

}  // namespace

size_t chain_packed_bytes(const Program& program, Element element) {
  int64_t bytes = 0;
  for (size_t i = 0; i < program.steps.size(); ++i) bytes += chain_packed_bytes(program, i, element_bytes(element));
  return static_cast<size_t>(bytes);
}

cudaError_t pack_chain(const Program& program, Element element, const std::vector<const void*>& matrices,
                       bool transposed, void* packed, cudaStream_t stream) {
  PackBatch batch;
  char* to = static_cast<char*>(packed);
  for (size_t i = 0; i < program.steps.size(); ++i) {
    PackParams p = chain_matrix(program, i, element_bytes(element));
    if (transposed) {
      p.stride_k = p.n;
      p.stride_n = 1;
    }
    p.from = matrices[transposed ? program.steps.size() - 1 - i : i];
    p.to = to;
    to += chain_packed_bytes(program, i, element_bytes(element));
    batch.item[batch.count++] = p;
    if (batch.count == kMostPacks || i + 1 == program.steps.size()) {
      const cudaError_t error = launch_pack(batch, stream);
      if (error != cudaSuccess) return error;
      batch.count = 0;
    }
  }
  return cudaSuccess;
}

cudaError_t forward_chain(ChainParams p, const DeviceLimits& device, const ChainRows& x, const void* packed,
                          const ChainCall& call, void* y, cudaStream_t stream) {
  p.packed = packed;
  p.bias = call.bias;
  p.residual = call.residual;
  p.relu = call.relu;
  p.y = y;
  return run(p, x, 0, x.count, device, stream);
}

int64_t chain_backward_rows(const Program& program, Element element, int64_t rows) {
  int64_t bytes = 0;
  for (const Program& one : {program, transposed_program(program)}) {
    const std::optional<ChainParams> p = chain_params(one, element);
    if (!p.has_value()) return rows;
    for (int32_t i = 0; i < p->steps; ++i) bytes += static_cast<int64_t>(p->step[i].kept) * p->step[i].pitch;
  }
  return std::min(rows, std::max<int64_t>(kStateBytesAtOnce / bytes, 1));
}

size_t chain_backward_scratch(const Program& program, Element element, const DeviceLimits& device, int64_t rows,
                              int64_t rows_at_once, const ChainGradients& wanted) {
  Arena scratch(nullptr);
  backward_parts(program, element, device, rows, rows_at_once, wanted, scratch);
  return scratch.used();
}

cudaError_t backward_chain(const Program& program, Element element, const DeviceLimits& device, const ChainRows& grad,
                           const ChainRows& x, int64_t rows_at_once, const std::vector<const void*>& matrices,
                           const ChainGradients& wanted, void* memory, cudaStream_t stream) {
  Arena scratch(memory);
  Backward b = backward_parts(program, element, device, x.count, rows_at_once, wanted, scratch);
  cudaError_t error = cudaSuccess;
  if (b.packed_forward != nullptr) error = pack_chain(program, element, matrices, false, b.packed_forward, stream);
  if (error == cudaSuccess && b.packed_back != nullptr) {
    error = pack_chain(transposed_program(program), element, matrices, true, b.packed_back, stream);
  }
  b.forward.packed = b.packed_forward;
  b.back.packed = b.packed_back;
  const int64_t at_once = detail::ceil_div(x.count, b.chunks);
  for (int64_t chunk = 0; error == cudaSuccess && b.packed_back != nullptr && chunk < b.chunks; ++chunk) {
    const int64_t first = chunk * at_once, rows = std::min(at_once, x.count - first);
    if (wanted.x != nullptr) {
      b.back.y = static_cast<char*>(wanted.x) + first * b.forward.in * element_bytes(element);
    }
    error = run(b.back, grad, first, rows, device, stream);
    if (error == cudaSuccess && b.packed_forward != nullptr) error = run(b.forward, x, first, rows, device, stream);
    for (size_t i = 0; error == cudaSuccess && i < b.sums.size(); ++i) {
      if (wanted.matrices[i] == nullptr) continue;
      error = sum_states(b.sums[i], b.back.step[b.sums.size() - 1 - i], b.forward.step[i], rows, chunk, stream);
    }
  }
  for (size_t i = 0; error == cudaSuccess && i < b.sums.size(); ++i) {
    if (wanted.matrices[i] == nullptr) continue;
    error = finish(b.sums[i], b.chunks * b.sums[i].splits, wanted.matrices[i], nullptr, stream);
  }
  if (error == cudaSuccess && wanted.bias != nullptr) {
    PixelSumParams p = b.bias;
    p.a = p.b = grad.data;
    p.a_strides = p.b_strides = {0, grad.feature, 0, grad.row};
    error = launch_pixel_sum(p, stream);
    if (error == cudaSuccess) error = finish(p, p.splits, nullptr, wanted.bias, stream);
  }
  return error;
}

}  // namespace tensorcomp::cuda
