// Attention of one query for each sequence, as in a decode step: softmax(scale * q K^T + mask) V, in
// fp32 whatever the elements are.
//
// Heads that share keys and values are done together, and a long cache in chunks, each by whoever is
// free; chunks are put together in order, so that a result does not depend on the number of threads.
#pragma once

#include "types.h"

namespace mixtura {

constexpr int64_t kKeyChunk = 512;  // keys of a task

struct Attention {
  const void *q, *k, *v;
  void* out;                            // (B, heads, value_size)
  Dtype dtype;                          // of q, k, v and out
  const float* mask;                    // added to scores; or null
  int64_t num_sequences, num_heads, num_key_heads, num_keys;
  int64_t head_size, value_size;        // multiples of 16
  int64_t k_strides[3], v_strides[3];   // elements: of a sequence, a head, a key
  int64_t mask_strides[2];              // elements: of a sequence, a head
  float scale;
  float* parts;                         // of each sequence, head and chunk: maximum, sum, 14 more; values

  int64_t num_chunks() const { return (num_keys + kKeyChunk - 1) / kKeyChunk; }
  int64_t part_floats() const { return 16 + value_size; }
  float* part(int64_t sequence, int64_t head, int64_t chunk) const {
    return parts + ((sequence * num_heads + head) * num_chunks() + chunk) * part_floats();
  }
};

// `q` is (B, heads, head_size). Memory for `parts` is made here.
void run_attention(const Kernels& kernels, Attention attention, int num_threads);

}  // namespace mixtura
