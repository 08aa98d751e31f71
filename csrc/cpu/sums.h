// Slabs, and the sums of a tensor: where they lie and what they are called. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_SUMS_H
#define FUSED_ADAFACTOR_CPU_SUMS_H

#include "memory.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

struct Lines {
  int64_t begin, end;  // line numbers, over all matrices
};

// Elements of a line; the last one of an unfactored tensor may be shorter than the others.
inline int64_t line_length(const Tensor& t, int64_t line) { return least(t.cols, t.numel - line * t.cols); }

inline int64_t slabs_per_matrix(const Tensor& t) {
  return t.lines_per_slab >= t.rows ? 1 : (t.rows + t.lines_per_slab - 1) / t.lines_per_slab;
}

// Whether apply takes the lines of a matrix one by one where it can; else many short ones together.
inline bool one_line_at_a_time(const Tensor& t) { return t.cols > kNarrow || t.ndim > 1; }

// A slab is a range of lines of one matrix, or several whole matrices.
inline Lines lines_of(const Tensor& t, int64_t slab) {
  const int64_t all = t.batch * t.rows;
  if (t.lines_per_slab >= t.rows) {
    const int64_t begin = slab * t.lines_per_slab;
    return {begin, least(all, begin + t.lines_per_slab)};
  }
  const int64_t per_matrix = slabs_per_matrix(t);
  const int64_t first = slab / per_matrix * t.rows;
  const int64_t begin = first + slab % per_matrix * t.lines_per_slab;
  return {begin, least(first + t.rows, begin + t.lines_per_slab)};
}

// A strip of a slab, which is what a kApply takes. The last slab of a matrix may have nothing left for its last strips.
inline Lines strip_of(const Tensor& t, int64_t strip) {
  const Lines slab = lines_of(t, strip / t.strips);
  if (t.strips == 1) return slab;
  const int64_t begin = slab.begin + strip % t.strips * t.lines_per_strip;
  return {least(begin, slab.end), least(begin + t.lines_per_strip, slab.end)};
}

// Whether a line is the first of a strip.
inline bool begins_strip(const Tensor& t, int64_t line) {
  const int64_t in_slab = t.lines_per_slab >= t.rows ? line % t.lines_per_slab : line % t.rows % t.lines_per_slab;
  return in_slab % t.lines_per_strip == 0;
}

// Σ p² of a slab, from its strips.
inline double sum_of_strips(const Tensor& t, const double* strips, int64_t slab) {
  double sum = 0;
  for (int64_t i = slab * t.strips; i < (slab + 1) * t.strips; ++i) sum += strips[i];
  return sum;
}

// The matrix of a slab of kFactored, which holds lines of one only.
inline int64_t matrix_of(const Tensor& t, int64_t slab) { return slab / slabs_per_matrix(t); }

// How far torch.optim's clamp, v >= eps1², reaches into a matrix.
enum class Clamp { kNowhere, kSomeLines, kEveryLine, kEverywhere };

// What is known of one matrix once its lines have been read.
template <class M>
struct Matrix {
  int64_t number;
  int64_t first;    // number of its first line
  Clamp* clamp;
  M* norm;
  M* largest;       // largest finite factor
  M* grad_sq;       // Σ g² of what is here of it, where it is split over processes
  M* line;          // [rows]  new second moments of the lines
  M* cross;         // [cols]  Σ g² across the lines, then the new second moments there
  M* factor;        // [cols]  Σ num² / line, then 1 / sqrt(cross)

  static int64_t bytes(const Tensor& t) { return (64 + int64_t(sizeof(M)) * (t.rows + 2 * t.cols) + 63) / 64 * 64; }

  Matrix(const Tensor& t, int64_t number, char* at) : number(number), first(number * t.rows) {
    clamp = reinterpret_cast<Clamp*>(at);
    norm = reinterpret_cast<M*>(at + 16);
    largest = reinterpret_cast<M*>(at + 32);
    grad_sq = reinterpret_cast<M*>(at + 48);
    line = reinterpret_cast<M*>(at + 64);
    cross = line + t.rows;
    factor = cross + t.cols;
  }

  // 1 / sqrt(line / norm): what is the line's in 1 / sqrt(v).
  M line_factor(int64_t number) const { return M(1) / std::sqrt(line[number - first] / *norm); }
};

// The sums of a tensor in the scratch. Python reserves the same bytes: see _scratch_bytes in backends/cpp.py.
template <class M>
struct Sums {
  double* slab;     // [slabs, 3]  Σ g², Σ p², Σ u²
  char* matrices;   // [batch] Matrix, where they are kept between the sweeps
  M* partial;       // [slabs, 2, cols]  Σ g² and Σ num² / line of a slab, where a matrix has several

  Sums(const Tensor& t, void* scratch) {
    char* at = static_cast<char*>(scratch) + t.scratch;
    slab = reinterpret_cast<double*>(at);
    matrices = at + (24 * t.slabs + 63) / 64 * 64;
    partial = reinterpret_cast<M*>(matrices + t.batch * Matrix<M>::bytes(t));
  }

  Matrix<M> matrix(const Tensor& t, int64_t number) const {
    return Matrix<M>(t, number, matrices + number * Matrix<M>::bytes(t));
  }
};

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_SUMS_H
