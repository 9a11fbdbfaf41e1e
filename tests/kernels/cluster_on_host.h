// csrc/cuda/cluster.cuh for the host: the same functions, for the fibers of cuda_on_host.h.

#define ADVKD_CLUSTER(BLOCKS)
#define ADVKD_HAS_CLUSTERS 1

namespace on_host {

// The barrier's generation when a thread of the cluster arrived.
static unsigned arrivals[4096];

}  // namespace on_host

namespace advkd {

ADVKD_INLINE void cluster_arrive() {
  on_host::arrivals[on_host::current] = on_host::cluster.generation;
  ++on_host::cluster.waiting;
  on_host::cluster.release_if_complete();
  // Others may run on before this thread does: what it has yet to write comes too late.
  on_host::fibers[on_host::current].waits = nullptr;
  on_host::yield();
}

ADVKD_INLINE void cluster_wait() {
  on_host::Fiber& fiber = on_host::fibers[on_host::current];
  fiber.since = on_host::arrivals[on_host::current];
  if (on_host::cluster.generation != fiber.since) return;
  fiber.waits = &on_host::cluster;
  on_host::yield();
}

ADVKD_INLINE void cluster_store(unsigned char* place, unsigned block, const uint4& bits) {
  auto& theirs = on_host::shared[block];
  const auto offset = place - shared_memory();
  const auto begin = (reinterpret_cast<size_t>(theirs.data()) + 127) / 128 * 128;
  // Nobody may write to the shared memory of a block that has ended.
  if (offset < 0 || begin + offset + 16 > reinterpret_cast<size_t>(theirs.data()) + theirs.size()) std::abort();
  for (unsigned i = block * blockDim.x; i < (block + 1) * blockDim.x; ++i)
    if (!on_host::fibers[i].started || on_host::fibers[i].done) std::abort();
  *reinterpret_cast<uint4*>(begin + offset) = bits;
}

}  // namespace advkd
