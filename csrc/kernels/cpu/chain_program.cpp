// Reads programs of chains.

#include "../chain_program.h"

namespace tensorcomp {
namespace {

// Stable, the largest stride first: what is contiguous in memory ends up side by side, the unit stride last.
template <class Stride>
void sort_dims(ChainDim* dims, int count, const Stride& stride) {
  for (int i = 1; i < count; ++i) {
    const ChainDim moved = dims[i];
    int j = i;
    for (; j > 0 && stride(dims[j - 1]) < stride(moved); --j) dims[j] = dims[j - 1];
    dims[j] = moved;
  }
}

// Dims of one element have no say in what lies side by side.
int without_ones(ChainDim* dims, int count) {
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    if (dims[i].size != 1) dims[kept++] = dims[i];
  }
  return kept;
}

int64_t stride_in(const ChainDim& d) { return d.in; }
int64_t stride_out(const ChainDim& d) { return d.out; }

struct Reader {
  const int64_t* numbers;
  int64_t count, at = 0;

  int64_t next() { return at < count ? numbers[at++] : -1; }
  // A list of at most `most` numbers; its length, or -1.
  int64_t list(int64_t* to, int64_t most) {
    const int64_t length = next();
    if (length < 0 || length > count - at || length > most) return -1;
    for (int64_t i = 0; i < length; ++i) to[i] = numbers[at++];
    return length;
  }
};

bool permutes(const int64_t* order, int64_t count) {
  uint64_t seen = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (order[i] < 0 || order[i] >= count || (seen >> order[i] & 1)) return false;
    seen |= uint64_t{1} << order[i];
  }
  return true;
}

// size *= by, for by >= 1; false where the product is more than kernels count.
bool grow(int64_t& size, int64_t by) {
  if (size > kMaxChainElements / by) return false;
  size *= by;
  return true;
}

// One step for rows of `dims`, which become those after it.
bool read_step(Reader& reader, int64_t* dims, int64_t& rank, ChainStep& step) {
  constexpr int64_t kMost = kMaxChainDims;
  int64_t contracted[kMost], brought[kMost], order[2 * kMost];
  const int64_t sums = reader.list(contracted, kMost);
  const int64_t brings = reader.list(brought, kMost);
  const int64_t orders = reader.list(order, 2 * kMost);
  if (sums < 1 || brings < 0 || orders != rank - sums + brings || orders > kMost || !permutes(order, orders)) {
    return false;
  }
  int64_t before[kMost];  // strides of the dims before the step
  step.in_size = 1;
  for (int64_t d = rank; d-- > 0;) {
    before[d] = step.in_size;
    if (!grow(step.in_size, dims[d])) return false;
  }
  bool summed[kMost] = {};
  step.k_size = 1;
  for (int64_t i = sums; i-- > 0;) {
    const int64_t d = contracted[i];
    if (d < 0 || d >= rank || summed[d]) return false;
    summed[d] = true;
    step.k[i] = {dims[d], before[d], step.k_size};
    step.k_size *= dims[d];
  }
  ChainDim arranged[2 * kMost];  // kept dims, then new ones; `out` is filled in below
  int64_t kept = 0;
  for (int64_t d = 0; d < rank; ++d) {
    if (!summed[d]) arranged[kept++] = {dims[d], before[d], 0};
  }
  step.n_size = 1;
  for (int64_t i = brings; i-- > 0;) {
    if (brought[i] < 1) return false;
    arranged[kept + i] = {brought[i], step.n_size, 0};
    if (!grow(step.n_size, brought[i])) return false;
  }
  if (int64_t matrix = step.n_size; !grow(matrix, step.k_size)) return false;
  step.out_size = 1;
  for (int64_t place = orders; place-- > 0;) {
    ChainDim& d = arranged[order[place]];
    d.out = step.out_size;
    if (!grow(step.out_size, d.size)) return false;
    dims[place] = d.size;
  }
  rank = orders;
  for (int64_t i = 0; i < kept; ++i) step.rows[i] = arranged[i];
  for (int64_t i = 0; i < brings; ++i) step.n[i] = arranged[kept + i];
  step.row_count = without_ones(step.rows, static_cast<int>(kept));
  step.k_count = without_ones(step.k, static_cast<int>(sums));
  step.n_count = without_ones(step.n, static_cast<int>(brings));
  sort_dims(step.k, step.k_count, stride_in);
  sort_dims(step.n, step.n_count, stride_out);
  return true;
}

}  // namespace

bool decode_chain(const int64_t* numbers, int64_t count, ChainProgram* program) {
  Reader reader{numbers, count};
  int64_t dims[kMaxChainDims];
  int64_t rank = reader.list(dims, kMaxChainDims);
  const int64_t steps = reader.next();
  if (rank < 1 || steps < 1 || steps > kMaxChainSteps) return false;
  for (int64_t d = 0; d < rank; ++d) {
    if (dims[d] < 1) return false;
  }
  program->count = static_cast<int>(steps);
  program->macs = 0;
  for (int64_t i = 0; i < steps; ++i) {
    ChainStep& step = program->steps[i];
    if (!read_step(reader, dims, rank, step)) return false;
    // Its square is the product of the rows before and after and the matrix: at most kMaxChainElements^3.
    program->macs += step.in_size * step.n_size;
    if (program->macs > kMaxChainMacs) return false;
  }
  program->in_features = program->steps[0].in_size;
  program->out_features = program->steps[steps - 1].out_size;
  return reader.at == count;
}

ChainStep transposed(const ChainStep& step) {
  ChainStep back = step;
  back.in_size = step.out_size;
  back.out_size = step.in_size;
  back.k_size = step.n_size;
  back.n_size = step.k_size;
  back.k_count = step.n_count;
  back.n_count = step.k_count;
  for (int i = 0; i < step.row_count; ++i) back.rows[i] = {step.rows[i].size, step.rows[i].out, step.rows[i].in};
  // Both lists are sorted by their strides in memory already.
  for (int i = 0; i < step.n_count; ++i) back.k[i] = {step.n[i].size, step.n[i].out, step.n[i].in};
  for (int i = 0; i < step.k_count; ++i) back.n[i] = {step.k[i].size, step.k[i].out, step.k[i].in};
  return back;
}

}  // namespace tensorcomp
