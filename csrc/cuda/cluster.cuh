// Instructions of a cluster that CUDA C++ leaves to PTX: blocks that run at the same time, wait for each other and write to
// each other's shared memory. From sm_90 on; before that only clusters of one block have code. Tests replace this file as a
// whole by functions for the host. Needs cuda/warp.cuh.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define ADVKD_CLUSTER(BLOCKS)
#define ADVKD_HAS_CLUSTERS 0
#else
#define ADVKD_CLUSTER(BLOCKS) __cluster_dims__(BLOCKS, 1, 1)
#define ADVKD_HAS_CLUSTERS 1
#endif

namespace advkd {

// The two halves of a barrier of all threads of a cluster, for whole warps: what a thread has written before it arrives, in any
// block's shared memory, is what the others read after their wait.
ADVKD_INLINE void cluster_arrive() {
#if ADVKD_HAS_CLUSTERS
  sync_warp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

ADVKD_INLINE void cluster_wait() {
#if ADVKD_HAS_CLUSTERS
  sync_warp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Writes 16 bytes to the shared memory of a block of the cluster, where `place` is in this block's.
ADVKD_INLINE void cluster_store(unsigned char* place, unsigned block, const uint4& bits) {
#if ADVKD_HAS_CLUSTERS
  u32 address = static_cast<u32>(__cvta_generic_to_shared(place));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
               "r"(bits.w)
               : "memory");
#endif
}

}  // namespace advkd
