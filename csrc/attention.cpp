#include "attention.h"

#include <algorithm>
#include <vector>

#include "team.h"

namespace mixtura {

namespace {

struct Job {
  const Kernels* kernels;
  const Attention* attention;
};

void region(void* context, Team& team, int member) {
  const Job& job = *(const Job*)context;
  const Attention& a = *job.attention;
  static thread_local std::vector<float> memory;
  const size_t floats = (size_t)(a.num_heads / a.num_key_heads * a.head_size + kKeyChunk + 16);
  if (memory.size() < floats) memory.resize(floats);
  const int64_t chunks = a.num_chunks(), per_sequence = a.num_key_heads * chunks;
  const int64_t count = a.num_sequences * per_sequence;
  for (int64_t n; (n = team.take(0, member, count)) < count;)
    job.kernels->attend(a, n / per_sequence, n % per_sequence / chunks, n % chunks, memory.data());
  team.barrier();
  const int64_t heads = a.num_sequences * a.num_heads;
  for (int64_t n; (n = team.take(1, member, heads)) < heads;)
    job.kernels->join_chunks(a, n / a.num_heads, n % a.num_heads);
}

}  // namespace

void run_attention(const Kernels& kernels, Attention attention, int num_threads) {
  if (attention.num_sequences == 0) return;
  static thread_local std::vector<float> parts;
  const int64_t count = attention.num_sequences * attention.num_heads * attention.num_chunks();
  const size_t floats = (size_t)(count * attention.part_floats());
  if (parts.size() < floats) parts.resize(floats);
  attention.parts = parts.data();
  Job job{&kernels, &attention};
  run_team(num_threads, region, &job);
}

}  // namespace mixtura
