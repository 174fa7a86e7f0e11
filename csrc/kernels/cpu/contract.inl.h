// A network of cores contracted pair by pair: every product packs one of its operands and streams the other.
//
// Products of one wave do not wait for each other. Large ones are cut among the threads, small ones are made whole by
// one of them.

// Products of floats below this many multiply-adds are not worth cutting.
constexpr int64_t kWholeMacs = 50'000;

// Which products a call makes, wave by wave: calls each(pair, which of its tensors).
template <class Each>
inline void contract_products(const ContractParams& p, int64_t wave, const Each& each) {
  const ContractProgram& program = *p.program;
  for (int i = 0; i < program.pairs; ++i) {
    const ContractPair& pair = program.pair[i];
    if (!p.grad) {
      if (pair.forward_wave == wave) each(pair, 2);
    } else if (pair.backward_wave == wave) {
      for (int side = 0; side < 2; ++side) {
        if (p.wanted >> pair.tensors[side] & 1) each(pair, side);
      }
    }
  }
}

inline ContractPlan contract_plan(const ContractParams& p, int64_t threads) {
  const ContractProgram& program = *p.program;
  ContractPlan g;
  g.parts = threads;
  const int64_t waves = p.grad ? program.backward_waves : program.forward_waves;
  g.phases = 2 * waves;
  int64_t packed = 0, taps = 1;
  for (int64_t wave = 0; wave < waves; ++wave) {
    int64_t words = 0;
    contract_products(p, wave, [&](const ContractPair& pair, int made) {
      const ChainStep& s = pair.products[made].step;
      const ChainForm f = step_form(s);
      words += packed_words<Float32>(s, f);
      const int64_t needed = chain_taps(s, f);
      taps = needed > taps ? needed : taps;
    });
    packed = words > packed ? words : packed;
  }
  g.grads = round_up(packed, 16);
  g.own = g.grads + (p.grad ? round_up(program.saved, 16) : 0);
  g.own_words = round_up(4 * taps, 16);
  g.scratch_bytes = static_cast<size_t>(g.own + g.own_words * threads) * 4;
  return g;
}

inline void contract_run(const ContractParams& p, const ContractPlan& g, int64_t phase, int64_t part) {
  const ContractProgram& program = *p.program;
  float* scratch = static_cast<float*>(p.scratch);
  int64_t* taps = reinterpret_cast<int64_t*>(scratch + g.own + part * g.own_words);
  const int last = program.cores + program.pairs - 1;
  const auto value = [&](int tensor) -> float* {
    if (tensor < program.cores) return const_cast<float*>(p.cores[tensor]);
    return tensor == last ? p.result : p.saved + program.tensors[tensor].at;
  };
  const auto gradient = [&](int tensor) -> float* {
    if (tensor < program.cores) return p.grad_cores[tensor];
    return tensor == last ? const_cast<float*>(p.grad) : scratch + g.grads + program.tensors[tensor].at;
  };
  int64_t turn = 0;
  float* packed = scratch;
  contract_products(p, phase / 2, [&](const ContractPair& pair, int made) {
    const ContractProduct& product = pair.products[made];
    const ChainStep& s = product.step;
    const ChainForm f = step_form(s);
    float* const to = packed;
    packed += packed_words<Float32>(s, f);
    const bool whole = pair.macs < kWholeMacs;
    if (whole && turn++ % g.parts != part) return;
    const int64_t share = whole ? 0 : part, shares = whole ? 1 : g.parts;
    const auto operand = [&](int at) {
      return p.grad && at == 2 ? gradient(pair.tensors[2]) : value(pair.tensors[at]);
    };
    if (phase % 2 == 0) {
      pack_floats(s, f, operand(product.y), 1, 1, to, share, shares);
      return;
    }
    ChainRows in, out;
    in.at = reinterpret_cast<char*>(operand(product.x));
    out.at = reinterpret_cast<char*>(p.grad ? gradient(pair.tensors[made]) : value(pair.tensors[2]));
    multiply_chain_step<Float32>(s, f, to, 0, nullptr, taps, nullptr, in, out, 1, share, shares);
  });
}

inline constexpr ContractKernels contract_kernels() { return {contract_plan, contract_run}; }
