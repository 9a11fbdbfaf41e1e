// csrc/cuda/warp.cuh for the host: the same functions, for the fibers of cuda_on_host.h. Instructions of a whole warp exchange
// their operands through memory; asynchronous copies arrive when they are waited for, no sooner, and spoil their target till then.

namespace on_host {

// Numbers that the lanes of a warp show each other; two sets, as a fast lane may be one instruction ahead.
struct Exchange {
  unsigned a[kWarp][4], b[kWarp][2];
  const unsigned char* row[kWarp];
};
static Exchange exchanges[4096 / kWarp][2];

static Exchange& exchange() { return exchanges[current / kWarp][fibers[current].turns++ % 2]; }
static void sync_lanes() { wait(warps[current / kWarp]); }

static double bfloat16(unsigned bits) { return __uint_as_float(bits << 16); }

// Products of the numbers in two words.
static double product_bf16(unsigned a, unsigned b) {
  return bfloat16(a & 0xFFFFu) * bfloat16(b & 0xFFFFu) + bfloat16(a >> 16) * bfloat16(b >> 16);
}
static double product_f16(unsigned a, unsigned b) {
  const auto half = [](unsigned bits) { return static_cast<double>(half_to_float(static_cast<unsigned short>(bits))); };
  return half(a & 0xFFFFu) * half(b & 0xFFFFu) + half(a >> 16) * half(b >> 16);
}
static double product_tf32(unsigned a, unsigned b) {
  return static_cast<double>(__uint_as_float(a & ~0x1FFFu)) * __uint_as_float(b & ~0x1FFFu);
}

static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, double (*product)(unsigned, unsigned)) {
  Exchange& shown = exchange();
  std::copy(a, a + 4, shown.a[lane()]);
  shown.b[lane()][0] = b0;
  shown.b[lane()][1] = b1;
  sync_lanes();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4, column = lane() % 4 * 2 + i % 2;
    double sum = 0;
    for (unsigned word = 0; word < 8; ++word)
      sum += product(shown.a[row * 4 + word % 4][i / 2 + word / 4 * 2], shown.b[column * 4 + word % 4][word / 4]);
    d[i] += static_cast<float>(sum);
  }
}

}  // namespace on_host

namespace advkd {

ADVKD_INLINE unsigned char* shared_memory() {
  auto& bytes = on_host::shared[on_host::block_in_cluster()];
  return reinterpret_cast<unsigned char*>((reinterpret_cast<size_t>(bytes.data()) + 127) / 128 * 128);
}

ADVKD_INLINE void sync_warp() { on_host::sync_lanes(); }

ADVKD_INLINE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { on_host::mma(d, a, b0, b1, on_host::product_bf16); }
ADVKD_INLINE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { on_host::mma(d, a, b0, b1, on_host::product_f16); }
ADVKD_INLINE void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { on_host::mma(d, a, b0, b1, on_host::product_tf32); }

ADVKD_INLINE u32 round_tf32(u32 bits) { return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & ~0x1FFFu; }

ADVKD_INLINE u32 pack_bf16(float low, float high) { return bf16::encode(low) | static_cast<u32>(bf16::encode(high)) << 16; }
ADVKD_INLINE u32 pack_f16(float low, float high) { return f16::encode(low) | static_cast<u32>(f16::encode(high)) << 16; }

ADVKD_INLINE void load_fragment(u32 (&a)[4], const unsigned char* row) {
  if (reinterpret_cast<size_t>(row) % 16 != 0) std::abort();
  const auto& bytes = on_host::shared[on_host::block_in_cluster()];
  if (row < shared_memory() || row + 16 > shared_memory() + bytes.size() - 128) std::abort();
  on_host::Exchange& shown = on_host::exchange();
  shown.row[on_host::lane()] = row;
  on_host::sync_lanes();
  for (unsigned matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&a[matrix], shown.row[matrix * 8 + on_host::lane() / 4] + on_host::lane() % 4 * 4, 4);
  // The lanes have read before any of them goes on to write there.
  on_host::sync_lanes();
}

ADVKD_INLINE void copy_async(unsigned char* to, const void* from, bool inside) {
  if (reinterpret_cast<size_t>(to) % 16 != 0 || (inside && reinterpret_cast<size_t>(from) % 16 != 0)) std::abort();
  std::memset(to, 0xFF, 16);
  on_host::fibers[on_host::current].copies.back().push_back({to, from, inside});
}

ADVKD_INLINE void copy_commit() { on_host::fibers[on_host::current].copies.emplace_back(); }

template <int kOpen>
ADVKD_INLINE void copy_wait() {
  auto& groups = on_host::fibers[on_host::current].copies;
  while (groups.size() > kOpen + 1) {
    for (const on_host::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.inside) std::memcpy(copy.to, copy.from, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace advkd
