// Sums of squares per piece of a sample, and v = factor g.
//
// Bound by memory: v of a sample follows its sum while the sample lies in the caches. Four squares are added in float, then to
// one of 16 sums in double precision: a relative error of 3 2^-24 at most, however many elements there are. The sums are the same
// on every instruction set and are added up in one order, as are the pieces: neither threads nor vectors change a bit.

#include "cpu/penalty_reduce.h"

#include "cpu/elements.h"

namespace advkd::ADVKD_ISA {
namespace {

typedef double VD __attribute__((vector_size(4 * kLanes)));
// A block has four rows of one column per sum.
constexpr int kSums = 16, kRows = 4, kBlock = kRows * kSums, kColumns = kSums / kLanes;

// Lanes kFirst .. kFirst + kLanes / 2 - 1.
template <int kFirst, std::size_t... I>
inline VD widen(V x, std::index_sequence<I...>) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, (kFirst + I)...), VD);
}

template <typename T>
inline void add_squares(const T* g, VD (&sums)[2 * kColumns]) {
  constexpr auto half = std::make_index_sequence<kLanes / 2>{};
  for (int column = 0; column < kColumns; ++column) {
    V squares[kRows];
    for (int row = 0; row < kRows; ++row) {
      const V x = load(g + row * kSums + column * kLanes);
      squares[row] = x * x;
    }
    const V sum = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    sums[2 * column] += widen<0>(sum, half);
    sums[2 * column + 1] += widen<kLanes / 2>(sum, half);
  }
}

template <typename T>
double sum_of_squares(const T* g, i64 count) {
  VD sums[2 * kColumns] = {};
  i64 i = 0;
  for (; i + kBlock <= count; i += kBlock) add_squares(g + i, sums);
  T rest[kBlock] = {};
  std::memcpy(rest, g + i, (count - i) * sizeof(T));
  add_squares(rest, sums);
  double partial[kSums];
  std::memcpy(partial, sums, sizeof partial);
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) partial[j] += partial[j + width];
  return partial[0];
}

template <typename T>
void scale(const T* g, V factor, T* out, i64 count) {
  i64 i = 0;
  for (; i + kLanes <= count; i += kLanes) put(out + i, factor * load(g + i));
  T rest[kLanes] = {};
  std::memcpy(rest, g + i, (count - i) * sizeof(T));
  put(rest, factor * load(rest));
  std::memcpy(out + i, rest, (count - i) * sizeof(T));
}

template <typename T>
void make_sums(const PenaltyReduce& s, i64 begin, i64 end) {
  double* sum = s.sums + begin;
  for_each_piece(s.pieces, begin, end, [&](i64 sample, i64 first, i64 size) {
    *sum++ = sum_of_squares(static_cast<const T*>(s.g) + sample * s.pieces.count + first, size);
  });
}

template <typename T>
void make_scaled(const PenaltyReduce& s, i64 begin, i64 end) {
  for_each_piece(s.pieces, begin, end, [&](i64 sample, i64 first, i64 size) {
    const i64 place = sample * s.pieces.count + first;
    scale(static_cast<const T*>(s.g) + place, splat(s.factors[sample]), static_cast<T*>(s.out) + place, size);
  });
}

constexpr PenaltyKernel kSumKernels[] = {make_sums<float>, make_sums<bf16>, make_sums<f16>};
constexpr PenaltyKernel kScaleKernels[] = {make_scaled<float>, make_scaled<bf16>, make_scaled<f16>};

}  // namespace

void penalty_sums(const PenaltyReduce& s, i64 begin, i64 end) {
  kSumKernels[static_cast<int>(s.dtype)](s, begin, end);
}

void penalty_scale(const PenaltyReduce& s, i64 begin, i64 end) {
  kScaleKernels[static_cast<int>(s.dtype)](s, begin, end);
}

}  // namespace advkd::ADVKD_ISA
