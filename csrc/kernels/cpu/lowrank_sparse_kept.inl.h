// What a mask keeps of a matrix: the sparse part where there is no low-rank one, and the gradient of its values.

template <bool kBits, class E>
inline void store_kept_row(const uint8_t* mask, const E* from, E* to, int64_t columns) {
  int64_t i = 0;
  for (; i + Wide::kLanes <= columns; i += Wide::kLanes) {
    const Kept kept = kept_of<kBits>(mask, i, Wide::kLanes);
    store_lanes(load_kept(from + i, kept, Wide::kLanes), to + i, Wide::kLanes);
  }
  if (i == columns) return;
  const int lanes = static_cast<int>(columns - i);
  store_lanes(load_kept(from + i, kept_of<kBits>(mask, i, lanes), lanes), to + i, lanes);
}

// The rows of part `part` of `parts`, in `to` one behind the other: zero where the mask keeps nothing.
template <class E>
inline void store_kept(const SparseWeightShape& s, const void* from, int64_t from_row, void* to, int64_t part,
                       int64_t parts) {
  for (int64_t row = s.m * part / parts; row < s.m * (part + 1) / parts; ++row) {
    const uint8_t* mask = s.mask + row * s.mask_row;
    const E* at = static_cast<const E*>(from) + row * from_row;
    E* put = static_cast<E*>(to) + row * s.n;
    if (s.bits) store_kept_row<true>(mask, at, put, s.n);
    else store_kept_row<false>(mask, at, put, s.n);
  }
}
