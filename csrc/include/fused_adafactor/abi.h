// The records that Python hands to the native library, and its entry points: a plain C ABI.
//
// Names are those of the glossary. Every record is filled by fused_adafactor/backends/cpp.py, field by field and in
// this order; kAbiVersion changes with any of them.

#ifndef FUSED_ADAFACTOR_ABI_H
#define FUSED_ADAFACTOR_ABI_H

#include <stdint.h>

namespace fused_adafactor {

constexpr int32_t kAbiVersion = 10;
constexpr int32_t kMaxDims = 8;

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3, kBlocks = 4 };  // kBlocks: blocks.h
enum Eps1Rule : int32_t { kEps1Add = 0, kEps1Clamp = 1 };
enum MomentumSite : int32_t { kNoMomentum = 0, kMomentumGrad = 1, kMomentumUpdate = 2, kMomentumStep = 3 };
enum DecayFactor : int32_t { kNoDecay = 0, kDecayAlpha = 1, kDecayLr = 2, kDecayOne = 3 };
enum Rounding : int32_t { kNearest = 0, kStochastic = 1, kKahan = 2 };

// How the second moments of a tensor come about; see slabs.py.
enum Form : int32_t {
  kUnfactored = 0,  // one for each element
  kFactored = 1,    // matrices whose sums are kept between the sweeps
  kSmall = 2,       // a slab holds whole matrices, and every sweep takes their sums anew from a core's cache
  kTiny = 3,        // matrices of a few elements, many to a chunk
};

// What an item does. A tensor that fits a core's cache is one kWhole item, whose sums are in memory of its thread;
// others are cut in slabs of lines.
enum ItemKind : int32_t {
  kWhole = 0,
  kStats = 1,
  kFinalize = 2,
  kUpdateRms = 3,
  kMeasure = 4,
  kApply = 5,
  kAccumulate = 6,
  kAverage = 7,
  kMerge = 8,
  // 9 and 10 are a GPU's.
  kShare = 11,   // puts what this process has of the sums of a tensor where they are taken over all processes
  kSettle = 12,  // RMS(u) from such a sum
};

// Columns of a matrix that one kMerge adds up over its slabs.
constexpr int64_t kMergeColumns = 2048;

// The numbers and switches of one rule at one step.
struct Rule {
  double beta2, beta1;
  double numerator_scale, amsgrad_scale;
  double eps1, eps2;        // eps2 < 0: no parameter scale
  double clip_threshold;    // < 0: no clipping
  double rho, lr;
  double decay_coefficient;
  double clip_value;        // < 0: gradients are not clipped by value
  double average_momentum;  // EMA of the weights, at this step
  double accumulation_steps;
  uint64_t seed;
  int64_t step;
  int32_t eps1_rule, momentum, decay_factor, decay_before_rms;
  int32_t amsgrad, sums, rounding, overwrite_with_average;
  int32_t norm_clipped;     // gradients are clipped by a norm that is known after the statistics
  int32_t skips;            // a tensor whose Σ g² is not finite is left as it is
};

// Where the sums of a tensor lie that other processes have other parts of, in the math dtype: what this process has of
// each, and once they have been taken the sums. Null for those that are not taken; see summing.py.
struct PartialSums {
  void* grad_sq;
  void* param_sq;
  void* update_sq;    // taken with those above
  void* measured_sq;  // Σ u² too, taken before kApply
  void* row_var_sum;  // [batch]  new ones; old ones where there is row_sq_sum. Lines are rows then, as below
  void* row_sq_sum;   // [batch]
  void* all_row_var;  // [batch, whole rows]  old ones, and zeros for the rows of other processes: instead of sums,
  void* all_row_sq;   // [batch, whole rows]  where the new ones are rounded
  void* line_sq;      // [batch, rows]  lines are on several processes
  void* cross_sq;     // [batch, cols]
  void* weighted;     // [batch, cols]  Σ num² / line
};

// Σ p² of the strips of a tensor as the last step wrote them: nobody has to read p to know RMS(p) while it is as it was
// left. Python tells of what torch knows to have been written; for the rest, kApply sums up what it reads too. See
// expected.h.
struct ExpectedSums {
  double* written;    // [slabs * strips]  by the last step; null where p is read in every step
  double* read;       // [slabs * strips]  of this step, before it was written
  int32_t known;      // `written` is what must be there, as far as Python can tell
  int32_t confirmed;  // steps in a row in which it was
  int32_t trusted;    // of the step: p is not read in the first sweep
  int32_t surprised;  // of the step: something else was there
};

// The parameter that a tensor is a part of, or is itself. Lines are those of the tensor.
struct WholeParameter {
  int64_t numel, rows, cols;
  int64_t first_row, first_col;      // of the part in each matrix
  int64_t first_element;             // its index, added to what `logical` makes of an element of the part
  int64_t stack_sizes[kMaxDims];     // of the part's matrices, merged, and what numbers them in the parameter
  int64_t stack_strides[kMaxDims];
  int64_t first_matrix;
  int32_t stack_ndim, is_split;      // other processes have other parts
};

// One tensor: its geometry in the order of its matrix view, its memory, and where its sums go. Filled once and used for
// many calls; what changes from call to call comes beside it, see fused_adafactor_run.
//
// Elements are numbered k = 0 .. numel-1, row-major over `sizes`, which are the dimensions of the view [..., n, m] (or
// of the parameter, where the view is a reshape of it), merged where that changes nothing. Line number l, of `cols`
// elements, starts at k = l * cols. A line is a row of a matrix, or a column of it (`swapped`); of an unfactored tensor
// and of tiny matrices it is any run of elements.
struct Tensor {
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];        // of the parameter and its gradient, in elements
  int64_t state_strides[kMaxDims];  // of everything full-size in the state
  int64_t logical[kMaxDims];        // of the row-major index in the parameter, the key of stochastic rounding
  int64_t numel, batch, rows, cols;
  int64_t matrix_rows, matrix_cols;  // of tiny matrices
  int32_t ndim, form;
  int32_t swapped;            // lines are the columns of the view: line_var is col_var, cross_var is row_var
  int32_t skip;               // of the call: nothing may be written; kFinalize sets it too
  int32_t param_dtype, grad_dtype, moment_dtype, exp_avg_dtype;
  int32_t math_dtype;         // kFloat32 or kFloat64
  int32_t param_index;
  int32_t mirror_dtype, pad;
  double grad_scale;          // the raw gradient is multiplied by it when it is read
  double grad_factor;         // of the call: clipping by a norm, known after the statistics; 1 if there is none
  void* param;
  const void* grad;           // of the call
  void* line_var;             // [batch, rows]
  void* cross_var;            // [batch, cols]
  void* var;
  void* var_max;
  void* exp_avg;
  uint8_t* exp_avg_scale;     // of each block, line by line, where exp_avg_dtype is kBlocks
  void* compensation;
  void* average;
  void* accumulator;          // math dtype
  void* mirror;               // of mirror_dtype, in the state's layout; written with the parameter and never read
  int64_t rule;               // index into the rules
  int64_t slabs, lines_per_slab;
  int64_t strips, lines_per_strip;  // of a slab: what one kApply takes
  int64_t scratch;            // offset of its sums in the scratch, in bytes
  int64_t wave;               // its number; the sums of a wave take the place of those of the one before the last
  int32_t measures, measures_param_rms;  // RMS(u), RMS(p) are wanted
  WholeParameter whole;
  PartialSums partial;
  ExpectedSums expected;
  int32_t says_update_sq, pad_sums;  // what follows from sums over all rows is said by one process
  // Written by the library.
  double grad_sq, param_rms, alpha, update_rms;
  double update_sq;           // what is known here of Σ u² before the third sweep
};

// What a call found out about a tensor. The last three are known once its kFinalize and kMeasure have run.
struct Outcome {
  double grad_sq;     // Σ g² before any clipping
  double param_rms;
  double alpha;
  double update_rms;  // before clipping
};

struct Item {
  int32_t kind, tensor, slab, pad;
};

// What layouts.cpp calls.
struct Interpreter {
  void* (*item)(void* list, intptr_t number);                                      // PyList_GetItem
  int32_t (*next)(void* dict, intptr_t* position, void** key, void** value);       // PyDict_Next
  int32_t (*look)(void* object, void* seen);  // dltensor_from_py_object_no_sync of torch's DLPack exchange table
};

}  // namespace fused_adafactor

extern "C" {
#pragma GCC visibility push(default)
int32_t fused_adafactor_abi_version();
// Instruction set in use: 0 portable, 1 AVX2 and FMA, 2 AVX-512, 3 AVX-512 with BF16.
int32_t fused_adafactor_isa();
// Choose an instruction set; returns the one then in use, the best of the machine for -1.
int32_t fused_adafactor_set_isa(int32_t isa);
// Run items in ticket order on `threads` threads of the process' OpenMP pool. Returns 0.
//
// One value for each tensor: `grads` and, where they are not null, `grad_factors` (else 1) and `skips` (else 0), which
// are written too; and `outcomes`, which are written unless that is null.
int32_t fused_adafactor_run(const fused_adafactor::Item* items, int64_t count, fused_adafactor::Tensor* tensors,
                            int64_t tensor_count, const void* const* grads, const double* grad_factors,
                            uint8_t* skips, const fused_adafactor::Rule* rules, void* scratch, int32_t threads,
                            fused_adafactor::Outcome* outcomes);
// Note what there is of tensors, in up to `capacity` numbers: of the `count` of a Python list, or for -1 of a dict of
// dicts. How each lies; of a dict, or if `itself`, also which it is and where. Returns how many numbers that takes, or
// -1 with an exception set. Both are called with Python's lock held.
int64_t fused_adafactor_note(const fused_adafactor::Interpreter* python, void* things, int64_t count, int32_t itself,
                             int64_t* notes, int64_t capacity);
// Whether that would note the same: 1 or 0, or 0 with an exception set.
int32_t fused_adafactor_is_as_noted(const fused_adafactor::Interpreter* python, void* things, int64_t count,
                                    int32_t itself, const int64_t* notes, int64_t noted);
#pragma GCC visibility pop
}

#endif  // FUSED_ADAFACTOR_ABI_H
