// Instructions that CUDA C++ leaves to PTX: tensor-core products, loads of their fragments, copies to shared memory that run
// beside the arithmetic. Each is one instruction; tests replace this file as a whole by functions for the host. Needs cuda/storage.cuh.
// K, the axis that is summed over, comes in steps of 32 bytes: 16 elements of 16 bits or 8 of 32. A thread's registers hold the
// same bytes of a step either way. With g = lane / 4 and t = lane % 4, A (16 rows) is {row g word t, row g + 8 word t, row g
// word t + 4, row g + 8 word t + 4}, B (8 columns) {column g word t, column g word t + 4}, and the sums are
// {row g columns 2t and 2t + 1, row g + 8 columns 2t and 2t + 1}.

namespace advkd {

// A block's dynamic shared memory, aligned to 128 bytes.
ADVKD_INLINE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char advkd_shared[];
  return advkd_shared;
}

ADVKD_INLINE void sync_warp() { __syncwarp(); }

#define ADVKD_MMA(SHAPE_AND_TYPES)                                                                                           \
  asm("mma.sync.aligned." SHAPE_AND_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d += a * b of bfloat16, float16 and TensorFloat-32 (of whose 32 bits the last 13 are not read), added in float32.
ADVKD_INLINE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { ADVKD_MMA("m16n8k16.row.col.f32.bf16.bf16.f32"); }
ADVKD_INLINE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { ADVKD_MMA("m16n8k16.row.col.f32.f16.f16.f32"); }
ADVKD_INLINE void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { ADVKD_MMA("m16n8k8.row.col.f32.tf32.tf32.f32"); }

#undef ADVKD_MMA

// A float's bits rounded to TensorFloat-32: to nearest, ties away from zero.
ADVKD_INLINE u32 round_tf32(u32 bits) {
  u32 rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// Two numbers rounded to bfloat16 or float16, to nearest with ties to even, `low` in the lower half of the word.
ADVKD_INLINE u32 pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
ADVKD_INLINE u32 pack_f16(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// A step of A from shared memory. `row`: of lanes 0 to 15 the first 16 bytes of the step in row `lane`, of lanes 16 to 31 the
// other 16 bytes in row `lane - 16`; aligned to 16 bytes.
ADVKD_INLINE void load_fragment(u32 (&a)[4], const unsigned char* row) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

// Starts a copy of 16 bytes, or of as many zeros where not `inside` (`from` is not read then, but must be an address).
ADVKD_INLINE void copy_async(unsigned char* to, const void* from, bool inside) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// Closes a group of this thread's copies.
ADVKD_INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies but those of the last `kOpen` groups.
template <int kOpen>
ADVKD_INLINE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

}  // namespace advkd
