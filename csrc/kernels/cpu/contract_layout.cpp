// Orders the modes of a contraction's intermediates.
//
// An order decides how long the vectors of three products are (forward and both gradients) and how their packed operand
// is read. For each intermediate the cheapest orders are kept, made of the orders kept for its operands.

#include <algorithm>
#include <limits>

#include "../contract_program.h"

namespace tensorcomp {
namespace {

constexpr int kKept = 24;       // orders of an intermediate that are tried further on
constexpr int kKeptOfBoth = 8;  // the same of each of two that are made into a third
constexpr int kMostTried = 40;  // orders made of two operands'
constexpr double kNever = std::numeric_limits<double>::infinity();

// --- cost of a product, in cycles of a core with sixteen lanes; other ones rank alike ---

constexpr int64_t kLanes = 8, kPanel = 32, kTallest = 14;

struct Loop {
  int64_t size, in, out;
};

// Dims as loops; neighbours that go on in each other are one.
int merge(const ChainDim* dims, int count, Loop* loops) {
  int made = 0;
  for (int i = 0; i < count; ++i) {
    const ChainDim& d = dims[i];
    Loop* last = made > 0 ? &loops[made - 1] : nullptr;
    if (last && last->in == d.size * d.in && last->out == d.size * d.out) *last = {last->size * d.size, d.in, d.out};
    else loops[made++] = {d.size, d.in, d.out};
  }
  return made;
}

int64_t take(Loop* loops, int* count, int at) {
  if (at < 0) return 1;
  const int64_t size = loops[at].size;
  loops[at] = loops[--*count];
  return size;
}

int largest(const Loop* loops, int count) {
  int found = -1;
  for (int i = 0; i < count; ++i) {
    if (found < 0 || loops[i].size > loops[found].size) found = i;
  }
  return found;
}

// `rows` by `columns` of a product over k entries in `taps` stretches.
double tiles_cost(int64_t rows, int64_t columns, int64_t k, int64_t taps) {
  const int64_t tiles = (rows + kTallest - 1) / kTallest;
  const double height = static_cast<double>(rows) / static_cast<double>(tiles);
  const double ends = 30 + 4 * static_cast<double>(taps);
  const auto panel = [&](int64_t units) {
    const double vectors = static_cast<double>(units) / 2;
    const double step = std::max({height * vectors, (height + vectors) / 2, 4.0});
    return step * static_cast<double>(k) + ends;
  };
  const int64_t rest = columns % kPanel;
  double cost = static_cast<double>(columns / kPanel) * panel(kPanel / kLanes);
  if (rest > 0) cost += panel((rest + kLanes - 1) / kLanes);
  return cost * static_cast<double>(tiles);
}

// Copying y into panels or rows. n comes with its strides in y first, k with them last.
double packing_cost(const ChainStep& s) {
  Loop n[kMaxChainDims], k[kMaxChainDims];
  const int n_loops = merge(s.n, s.n_count, n), k_loops = merge(s.k, s.k_count, k);
  const Loop last_n = n_loops ? n[n_loops - 1] : Loop{1, 1, 1}, last_k = k_loops ? k[k_loops - 1] : Loop{1, 1, 1};
  const double count = static_cast<double>(s.n_size * s.k_size);
  const double length = static_cast<double>(last_n.in == 1 ? last_n.size : last_k.size);
  const double each = last_n.in == 1 ? 0.15 : last_k.out == 1 ? 0.5 : 1.5;
  return count * (each + 3 / length);
}

double product_cost(const ChainStep& s) {
  Loop rows[kMaxChainDims], n[kMaxChainDims], k[kMaxChainDims];
  int row_loops = merge(s.rows, s.row_count, rows);
  const int n_loops = merge(s.n, s.n_count, n), k_loops = merge(s.k, s.k_count, k);
  int64_t row_size = 1;
  for (int i = 0; i < row_loops; ++i) row_size *= rows[i].size;
  const int64_t run = n_loops ? n[n_loops - 1].size : 1, inner_k = k_loops ? k[k_loops - 1].size : 1;
  const bool unit_k = k_loops == 0 || k[k_loops - 1].in == 1;
  const bool unit_n = n_loops == 0 || n[n_loops - 1].out == 1;
  int unit_in = -1, unit_out = -1;
  for (int i = 0; i < row_loops; ++i) {
    if (rows[i].in == 1) unit_in = i;
    if (rows[i].out == 1) unit_out = i;
  }
  double products, tiles;
  if (unit_out >= 0 && unit_out == unit_in && (n_loops == 0 || !unit_n)) {  // vectors along a kept dim
    const int64_t columns = rows[unit_in].size;
    products = static_cast<double>(row_size / columns * (s.n_size / run));
    tiles = tiles_cost(run, columns, s.k_size, s.k_size / inner_k);
  } else {
    if (n_loops > 0 && !unit_n && unit_out >= 0) return kNever;  // the other operand can be packed instead
    const int64_t height = take(rows, &row_loops, !unit_k && unit_in >= 0 ? unit_in : largest(rows, row_loops));
    const int64_t segments = take(rows, &row_loops, largest(rows, row_loops));
    const int64_t group = 2 * height <= kTallest && segments > 1 ? 2 : 1;
    products = static_cast<double>(row_size / height / segments * (s.n_size / run));
    const int64_t stretch = unit_k || unit_in >= 0 ? inner_k : 1;
    tiles = tiles_cost(height * group, run, s.k_size, s.k_size / stretch) * static_cast<double>(segments) /
            static_cast<double>(group);
  }
  return products * (tiles + 30) + packing_cost(s);
}

// --- products ---

// A tensor as it lies in memory.
struct Laid {
  const int* label;
  int dims;
  int64_t stride[kMaxContractLabels + 1];  // zero where it has no such label

  Laid(const int* labels, int count, const int64_t* size) : label(labels), dims(count), stride{} {
    int64_t inside = 1;
    for (int d = count; d-- > 0;) {
      stride[labels[d]] = inside;
      inside *= size[labels[d]];
    }
  }
};

// z = x y, summed over what z does not have.
ChainStep step_of(const Laid& x, const Laid& y, const Laid& z, const int64_t* size) {
  ChainStep s;
  for (int d = 0; d < x.dims; ++d) {
    const int label = x.label[d];
    s.in_size *= size[label];
    if (z.stride[label] == 0) s.k_size *= size[label];
    if (size[label] == 1) continue;  // has no say in what lies side by side
    if (z.stride[label]) s.rows[s.row_count++] = {size[label], x.stride[label], z.stride[label]};
    else s.k[s.k_count++] = {size[label], x.stride[label], y.stride[label]};
  }
  for (int d = 0; d < z.dims; ++d) {
    const int label = z.label[d];
    s.out_size *= size[label];
    if (y.stride[label] == 0) continue;
    s.n_size *= size[label];
    if (size[label] > 1) s.n[s.n_count++] = {size[label], y.stride[label], z.stride[label]};
  }
  return s;
}

// The cheaper way to make tensor `made` of a pair; its cost.
double best_product(const Laid* const* laid, int made, const int64_t* size, ContractProduct* product) {
  const int others[2] = {made == 2 ? 0 : 2, made == 1 ? 0 : 1};
  double best = kNever;
  for (int way = 0; way < 2; ++way) {
    const int x = others[way], y = others[1 - way];
    const ChainStep step = step_of(*laid[x], *laid[y], *laid[made], size);
    const double cost = product_cost(step);
    if (cost >= best) continue;
    best = cost;
    product->step = step;
    product->x = x;
    product->y = y;
  }
  return best;
}

double pair_cost(const Laid* const* laid, const int64_t* size) {
  ContractProduct unused;
  double cost = 0;
  for (int made = 0; made < 3; ++made) cost += best_product(laid, made, size, &unused);
  return cost;
}

// --- orders ---

struct Order {
  int label[kMaxContractDims];
  double cost;        // of all that leads to it, there and back
  int first, second;  // which of its operands' orders
};

struct Orders {
  int count = 0;
  Order order[kKept];

  void keep(const Order& found, int dims) {
    for (int i = 0; i < count; ++i) {
      if (!std::equal(found.label, found.label + dims, order[i].label)) continue;
      if (found.cost >= order[i].cost) return;
      std::copy(order + i + 1, order + count, order + i);
      --count;
      break;
    }
    int at = count;
    while (at > 0 && order[at - 1].cost > found.cost) --at;
    if (at == kKept) return;
    if (count < kKept) ++count;
    std::copy_backward(order + at, order + count - 1, order + count);
    order[at] = found;
  }
};

struct Labels {
  int count = 0;
  int label[kMaxContractDims];
  void add(int l) { label[count++] = l; }
};

class Search {
 public:
  explicit Search(ContractProgram* program) : p_(*program) {
    const ContractTensor& result = p_.result();
    for (int d = 0; d < result.dims; ++d) place_[result.label[d]] = d + 1;
    for (int i = 0; i < p_.cores; ++i) {
      orders_[i].count = 1;
      orders_[i].order[0] = {};
      std::copy_n(p_.tensors[i].label, kMaxContractDims, orders_[i].order[0].label);
    }
  }

  void run() {
    for (int i = 0; i < p_.pairs; ++i) search(i);
    settle(p_.cores + p_.pairs - 1, 0);
    for (int i = 0; i < p_.pairs; ++i) {
      ContractPair& pair = p_.pair[i];
      const Laid first = as_is(pair.tensors[0]), second = as_is(pair.tensors[1]), result = as_is(pair.tensors[2]);
      const Laid* const laid[3] = {&first, &second, &result};
      for (int made = 0; made < 3; ++made) best_product(laid, made, p_.size, &pair.products[made]);
    }
  }

 private:
  static uint32_t mask_of(const ContractTensor& tensor) {
    uint32_t mask = 0;
    for (int d = 0; d < tensor.dims; ++d) mask |= 1u << tensor.label[d];
    return mask;
  }

  Laid as_is(int tensor) const { return Laid(p_.tensors[tensor].label, p_.tensors[tensor].dims, p_.size); }

  void search(int at) {
    const ContractPair& pair = p_.pair[at];
    const ContractTensor& a = p_.tensors[pair.tensors[0]];
    const ContractTensor& b = p_.tensors[pair.tensors[1]];
    const ContractTensor& c = p_.tensors[pair.tensors[2]];
    const Orders &of_a = orders_[pair.tensors[0]], &of_b = orders_[pair.tensors[1]];
    const uint32_t kept = mask_of(c);
    uint32_t next = 0;  // labels that the product is summed over later
    for (int i = at + 1; i < p_.pairs; ++i) {
      for (int side = 0; side < 2; ++side) {
        if (p_.pair[i].tensors[side] != pair.tensors[2]) continue;
        next |= mask_of(p_.tensors[p_.pair[i].tensors[1 - side]]);
      }
    }
    const bool last = at + 1 == p_.pairs, both = !last && of_a.count > 1 && of_b.count > 1;
    const int most = both ? kKeptOfBoth : kKept;
    for (int i = 0; i < of_a.count && i < most; ++i) {
      const Laid first(of_a.order[i].label, a.dims, p_.size);
      for (int j = 0; j < of_b.count && j < most; ++j) {
        const Laid second(of_b.order[j].label, b.dims, p_.size);
        tried_ = 0;
        if (last) std::copy_n(c.label, kMaxContractDims, tries_[tried_++]);
        else arrange(first, second, kept, next);
        for (int t = 0; t < tried_; ++t) {
          const Laid made(tries_[t], c.dims, p_.size);
          const Laid* const laid[3] = {&first, &second, &made};
          Order found;
          std::copy_n(tries_[t], kMaxContractDims, found.label);
          found.cost = of_a.order[i].cost + of_b.order[j].cost + pair_cost(laid, p_.size);
          found.first = i;
          found.second = j;
          orders_[pair.tensors[2]].keep(found, c.dims);
        }
      }
    }
  }

  // Orders of a product's labels: those from either operand, each split by what is summed over next, side by side in
  // any order; and the modes of the result in their order, with what is summed over next and the rest around them.
  void arrange(const Laid& first, const Laid& second, uint32_t kept, uint32_t next) {
    Labels quarters[4], thirds[3];
    for (const Laid* from : {&first, &second}) {
      for (int d = 0; d < from->dims; ++d) {
        const int label = from->label[d];
        if (!(kept >> label & 1)) continue;
        const bool summed = next >> label & 1;
        quarters[(from == &second) + 2 * summed].add(label);
        thirds[place_[label] ? 0 : summed ? 1 : 2].add(label);
      }
    }
    Labels& modes = thirds[0];
    std::sort(modes.label, modes.label + modes.count, [this](int a, int b) { return place_[a] < place_[b]; });
    permute(quarters, 4);
    permute(thirds, 3);
  }

  void permute(const Labels* groups, int count) {
    int order[4] = {0, 1, 2, 3};
    do {
      bool once = true;  // groups without labels stay in front, as they come
      for (int i = 1; i < count; ++i)
        once &= groups[order[i]].count > 0 || (groups[order[i - 1]].count == 0 && order[i - 1] < order[i]);
      if (!once || tried_ == kMostTried) continue;
      int* to = tries_[tried_++];
      for (int i = 0; i < count; ++i) to = std::copy_n(groups[order[i]].label, groups[order[i]].count, to);
    } while (std::next_permutation(order, order + count));
  }

  // Takes an order for a tensor, and what it was made of for those before it.
  void settle(int tensor, int chosen) {
    if (tensor < p_.cores) return;
    const Order& order = orders_[tensor].order[chosen];
    std::copy_n(order.label, p_.tensors[tensor].dims, p_.tensors[tensor].label);
    const ContractPair& pair = p_.pair[tensor - p_.cores];
    settle(pair.tensors[0], order.first);
    settle(pair.tensors[1], order.second);
  }

  ContractProgram& p_;
  int place_[kMaxContractLabels + 1] = {};  // of a label in the result, from 1
  Orders orders_[kMaxContractTensors];
  int tries_[kMostTried][kMaxContractDims];
  int tried_ = 0;
};

}  // namespace

void lay_out(ContractProgram* program) { Search(program).run(); }

}  // namespace tensorcomp
