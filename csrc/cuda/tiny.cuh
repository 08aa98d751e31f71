// Tiny matrices: a block has many of them in its shared memory at a time, with all that they add up to.

#ifndef FUSED_ADAFACTOR_CUDA_TINY_CUH
#define FUSED_ADAFACTOR_CUDA_TINY_CUH

#include "update.cuh"

namespace fused_adafactor {

// As many whole matrices as there is room for; of 8-bit first moments, no more than one element for each thread, so
// that a block of them is there at once.
template <class M>
class TinyWalk {
 public:
  int64_t begin;  // first element of these matrices
  int count;      // of their elements
  int rows, cols;

  __device__ __forceinline__ TinyWalk(const Job<M>& job, Range elements)
      : begin(elements.begin), rows(int(job.row[f::kMatrixRows])), cols(int(job.row[f::kMatrixCols])),
        end_(elements.end) {
    const bool in_blocks = job.momentum() != kNoMomentum && job.row[f::kExpAvgDtype] == kBlocks;
    const int room = in_blocks ? kThreads : Sizes<M>::kTile;
    step_ = room / (rows * cols) * (rows * cols);
    count = int(least(step_, end_ - begin));
  }

  __device__ __forceinline__ bool round() const { return begin < end_; }

  __device__ __forceinline__ void next() {
    begin += step_;
    count = int(least(step_, end_ - begin));
    __syncthreads();  // before others overwrite what is still read
  }

  __device__ __forceinline__ Place place(int first) const {
    const int element = first + thread_number();
    return place_of<TinyMatrices>(begin + element, element < count);
  }

  // Numbers of a row and of a column among all that are here.
  __device__ __forceinline__ int row_of(int element) const { return element / cols; }
  __device__ __forceinline__ int col_of(int element) const { return element / (rows * cols) * cols + element % cols; }

 private:
  int64_t end_;
  int step_;
};

// New second moments of the rows and columns of matrices whose gradients are in shared memory, and their norms.
template <class M>
__device__ __forceinline__ void tiny_factors(Shared<M>& shared, const TinyWalk<M>& walk) {
  const Job<M>& job = shared.job;
  TinyTile<M>& tile = shared.tiny;
  const int dtype = int(job.row[f::kMomentDtype]), rows = walk.rows, cols = walk.cols;
  const int matrices = walk.count / (rows * cols);
  const int64_t first_matrix = walk.begin / (rows * cols);
  const void* line_var = reinterpret_cast<const void*>(job.row[f::kLineVar]);
  const void* cross_var = reinterpret_cast<const void*>(job.row[f::kCrossVar]);
  __syncthreads();
  for (int row = thread_number(); row < matrices * rows; row += kThreads) {
    M sum = M(0);
    for (int j = 0; j < cols; ++j) sum = fused(tile.grad[row * cols + j], tile.grad[row * cols + j], sum);
    const int64_t element = first_matrix * rows + row;
    const M old = read_one<M>(line_var, dtype, element);
    tile.row[row] = new_factor(job, old, sum, cols, random_of_factor(job, element, false));
  }
  for (int col = thread_number(); col < matrices * cols; col += kThreads) {
    const M* g = tile.grad + col / cols * (rows * cols) + col % cols;
    M sum = M(0);
    for (int i = 0; i < rows; ++i) sum = fused(g[i * cols], g[i * cols], sum);
    const int64_t element = first_matrix * cols + col;
    const M old = read_one<M>(cross_var, dtype, element);
    tile.col[col] = new_factor(job, old, sum, rows, random_of_factor(job, element, true));
  }
  __syncthreads();
  for (int matrix = thread_number(); matrix < matrices; matrix += kThreads) {
    M total = M(0);
    for (int i = 0; i < rows; ++i) total += tile.row[matrix * rows + i];
    const M mean = job.numbers[f::kSumMoments] > M(0) ? total : total / M(rows);
    const M smallest = job.numbers[f::kLeastNorm];
    tile.norm[matrix] = mean < smallest ? smallest : mean;
  }
  __syncthreads();
}

// 1 / sqrt(v) of an element.
template <class M>
__device__ __forceinline__ M tiny_inverse_root(const Shared<M>& shared, const TinyWalk<M>& walk, int element) {
  const TinyTile<M>& tile = shared.tiny;
  const M norm = tile.norm[element / (walk.rows * walk.cols)];
  return inverse_root(tile.row[walk.row_of(element)] / norm) * inverse_root(tile.col[walk.col_of(element)]);
}

// Store what ``tiny_factors`` has found.
template <class M>
__device__ __forceinline__ void write_tiny_factors(const Shared<M>& shared, const TinyWalk<M>& walk) {
  const Job<M>& job = shared.job;
  const int dtype = int(job.row[f::kMomentDtype]), rows = walk.rows, cols = walk.cols;
  const int matrices = walk.count / (rows * cols);
  const int64_t first_matrix = walk.begin / (rows * cols);
  for (int row = thread_number(); row < matrices * rows; row += kThreads) {
    write_one(reinterpret_cast<void*>(job.row[f::kLineVar]), dtype, first_matrix * rows + row, shared.tiny.row[row]);
  }
  for (int col = thread_number(); col < matrices * cols; col += kThreads) {
    write_one(reinterpret_cast<void*>(job.row[f::kCrossVar]), dtype, first_matrix * cols + col, shared.tiny.col[col]);
  }
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_TINY_CUH
