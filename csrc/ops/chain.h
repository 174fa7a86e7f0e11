// Shared by the ops that run a chain of products: chain and two_factor_linear.
#pragma once

#include <string>
#include <vector>

#include "../kernels/cpu/dispatch.h"
#include "tensor_utils.h"

namespace tensorcomp::ops {

// Fills the result with what the products are added to, on the same threads and before them.
class ChainBefore {
 public:
  virtual ~ChainBefore() = default;
  virtual int64_t macs() const = 0;  // a row of x
  // The phases that `parts` parts run; x and y are those of the call.
  virtual int64_t begin(const ChainParams& call, int64_t parts) = 0;
  virtual void run(int64_t phase, int64_t part) = 0;
};

// What a call names in its messages, and what it does before the first and after the last product.
struct ChainCall {
  const char* name;
  std::optional<Tensor> bias = std::nullopt;
  std::optional<Tensor> residual = std::nullopt;  // not beside `before`
  bool relu = false;
  ChainBefore* before = nullptr;
};

// False where the numbers are no program that the kernels take.
inline bool decode_chain(const std::vector<int64_t>& numbers, ChainProgram* program) {
  return tensorcomp::decode_chain(numbers.data(), static_cast<int64_t>(numbers.size()), program);
}

// The error of a program that the oracle refuses too.
inline std::string no_such_program(const std::vector<int64_t>& numbers) {
  std::string text;
  for (const int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return ": program [" + text + "] is none, or the tensors do not fit it";
}

// in -> rank -> out, as Program.encode() writes it.
inline std::vector<int64_t> pair_numbers(int64_t in, int64_t rank, int64_t out) {
  return {1, in, 2, 1, 0, 1, rank, 1, 0, 1, 0, 1, out, 1, 0};
}

// Raises unless a is [out, R] and b [R, in].
void check_factors(const char* name, const Tensor& a, const Tensor& b);

// The rows of a tensor whose last dim is contiguous: how many, and their distance. False where they have no single one.
bool rows_of(const Tensor& t, int64_t* rows, int64_t* distance);

// Raises unless the matrices fit the program; their memory, contiguous copies kept in `held`.
std::vector<const void*> checked_matrices(const char* name, const ChainProgram& program,
                                          const std::vector<Tensor>& matrices, std::vector<Tensor>* held);

// The matrices as the kernels in use read them, behind a header and the program that tell what for.
Tensor pack_chain(const char* name, const std::vector<int64_t>& numbers, const std::vector<Tensor>& matrices);

// A program that was read before; `bytes` its packed matrices take in either dtype with the kernels of `table`.
struct KnownChain {
  int64_t table;
  std::vector<int64_t> numbers;
  ChainProgram program;
  std::array<size_t, 2> bytes;
};

// The program that these numbers encode; raises where they are none. Valid in this thread until it reads other
// programs.
const KnownChain& known_chain(const char* name, const int64_t* numbers, int64_t count);

// What lies in a packed tensor: the program it was packed for, and its matrices.
struct PackedChain {
  const KnownChain* chain;  // valid in this thread until it reads other programs
  const void* matrices;
};

// Raises unless the matrices are of this program and made for the kernels in use. Without numbers: of any program.
PackedChain checked_packed(const char* name, const std::vector<int64_t>& numbers, DType dtype, const Tensor& packed);

// y, from packed matrices or, where `packed` is null, from others that are packed for this call.
Tensor run_chain(const ChainCall& call, const ChainProgram& program, const Tensor& x, const void* packed,
                 const void* const* matrices);

// Gradients of x, the bias and the matrices; those whose bit is not in `mask` are empty.
std::vector<Tensor> chain_gradients(const char* name, const ChainProgram& program, const Tensor& grad, const Tensor& x,
                                    const std::vector<Tensor>& matrices, int64_t mask);

}  // namespace tensorcomp::ops
