// The embedding's entry points in the kernel table.

template <class Entry>
struct Embedding {
  static size_t piece_bytes(const EmbeddingParams& p, int64_t parts, bool backward) {
    return EmbeddingWork<Entry>(p, parts, 0, backward, nullptr).bytes;
  }

  static size_t scratch_bytes(const EmbeddingParams& p, int64_t parts, bool backward) {
    return piece_bytes(p, parts, backward) * static_cast<size_t>(parts);
  }

  static void run(const EmbeddingParams& p, int64_t parts, int64_t part) {
    const size_t stride = piece_bytes(p, parts, false);
    embedding_rows<Entry>(p, parts, part, static_cast<char*>(p.scratch) + stride * static_cast<size_t>(part));
  }

  static void backward_run(const EmbeddingParams& p, int64_t parts, int64_t phase, int64_t part) {
    const size_t stride = piece_bytes(p, parts, true);
    char* memory = static_cast<char*>(p.scratch);
    if (phase == 0) {
      embedding_backward_rows<Entry>(p, parts, part, memory + stride * static_cast<size_t>(part));
    } else {
      embedding_backward_sum<Entry>(p, parts, part, memory, stride);
    }
  }

  static EmbeddingKernels table() { return {scratch_bytes, run, backward_run}; }
};
