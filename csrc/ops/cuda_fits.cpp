// torch.ops.tensorcomp.cuda_fits, cuda_fits_chain, cuda_fits_embedding and cuda_fits_sparse: the question the CUDA ops
// ask themselves at every call, for callers that want to know before. It needs no CUDA, and is here so that every build
// can answer it.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../kernels/cuda/chain_plan.h"
#include "../kernels/cuda/convolution_shape.h"
#include "../kernels/cuda/embedding_plan.h"
#include "../kernels/cuda/sparse_rows.h"

namespace tensorcomp::ops {
namespace {

using namespace tensorcomp::cuda;
using tensorcomp::cuda::EmbeddingParams;  // not the CPU's

constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;

DeviceLimits limits_of(int64_t shared_bytes) {
  DeviceLimits device;
  device.shared_per_block = device.shared_per_multiprocessor =
      static_cast<int32_t>(std::clamp<int64_t>(shared_bytes, 0, kMost));
  return device;
}

// sizes: rank_in, rank_out, ring, kernel (2), stride (2), dilation (2). A kernel of 0 x 0 stands for no core.
bool cuda_fits(std::vector<int64_t> sizes, bool depthwise, int64_t element_size, int64_t shared_bytes) {
  STD_TORCH_CHECK(sizes.size() == 9, "cuda_fits: sizes must hold 9 ints, got ", sizes.size());
  const bool core = sizes[3] != 0 || sizes[4] != 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const bool kernel = i == 3 || i == 4;
    STD_TORCH_CHECK(sizes[i] >= (kernel && !core ? 0 : 1), "cuda_fits: sizes must be >= 1, got ", sizes[i]);
    if (sizes[i] > kMost) return false;
  }
  const auto at = [&](size_t i) { return static_cast<int32_t>(sizes[i]); };
  Convolution c;
  c.element = element_size == 4 ? Element::kFloat32 : Element::kFloat16;
  c.core = !core ? Core::kNone : depthwise ? Core::kDepthwise : Core::kFull;
  c.rank_in = at(0);
  c.rank_out = at(1);
  c.ring = at(2);
  c.kernel_h = std::max(at(3), 1);
  c.kernel_w = std::max(at(4), 1);
  c.stride_h = at(5);
  c.stride_w = at(6);
  c.dilation_h = at(7);
  c.dilation_w = at(8);
  // Of an image larger than any tile: what fits there fits everywhere.
  c.height = c.width = c.out_height = c.out_width = core ? 1 << 16 : 1;
  c.c_in = c.c_out = 8;
  return fits(c, limits_of(shared_bytes));
}

bool cuda_fits_chain(std::vector<int64_t> program, int64_t element_size, int64_t shared_bytes) {
  const std::optional<Program> steps = decode_program(program);
  STD_TORCH_CHECK(steps.has_value(), "cuda_fits_chain: program does not describe a chain of products");
  return chain_fits(*steps, element_size == 4 ? Element::kFloat32 : Element::kFloat16, limits_of(shared_bytes));
}

// sizes: rank_in, vocab, dim and rank_out of each core. What fits backward fits forward.
bool cuda_fits_embedding(std::vector<int64_t> sizes, int64_t shared_bytes) {
  STD_TORCH_CHECK(!sizes.empty() && sizes.size() % 4 == 0, "cuda_fits_embedding: sizes must hold 4 ints a core, got ",
                  sizes.size());
  EmbeddingParams p;
  if (sizes.size() / 4 > kMostEmbeddingCores) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    STD_TORCH_CHECK(sizes[i] >= 1, "cuda_fits_embedding: sizes must be >= 1, got ", sizes[i]);
    if (sizes[i] > kMost) return false;
    EmbeddingCore& core = p.core[i / 4];
    int32_t* const fields[] = {&core.rank_in, &core.vocab, &core.dim, &core.rank_out};
    *fields[i % 4] = static_cast<int32_t>(sizes[i]);
  }
  p.cores = static_cast<int32_t>(sizes.size() / 4);
  return plan_embedding(p, limits_of(shared_bytes), true);
}

// How many rows go through a packed matrix of so many columns and factors of this rank; 0 where none can.
int64_t cuda_fits_sparse(int64_t columns, int64_t rank, int64_t shared_bytes) {
  STD_TORCH_CHECK(columns >= 0 && rank >= 0, "cuda_fits_sparse: columns and rank must be >= 0, got ", columns, " and ",
                  rank);
  return fits_sparse_rows(columns, rank, limits_of(shared_bytes)) ? kMostSparseRows : 0;
}

}  // namespace
}  // namespace tensorcomp::ops

STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def("cuda_fits(int[] sizes, bool depthwise, int element_size, int shared_bytes) -> bool");
  m.def("cuda_fits_chain(int[] program, int element_size, int shared_bytes) -> bool");
  m.def("cuda_fits_embedding(int[] sizes, int shared_bytes) -> bool");
  m.def("cuda_fits_sparse(int columns, int rank, int shared_bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CompositeExplicitAutograd, m) {
  m.impl("cuda_fits", TORCH_BOX(&tensorcomp::ops::cuda_fits));
  m.impl("cuda_fits_chain", TORCH_BOX(&tensorcomp::ops::cuda_fits_chain));
  m.impl("cuda_fits_embedding", TORCH_BOX(&tensorcomp::ops::cuda_fits_embedding));
  m.impl("cuda_fits_sparse", TORCH_BOX(&tensorcomp::ops::cuda_fits_sparse));
}
