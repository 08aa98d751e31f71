// Which tensors there are, where they lie and how, in one call for many. They are Python's objects: what tells of them
// is a function of DLPack's exchange table, which torch.Tensor has as __dlpack_c_exchange_api__, and what walks
// through lists and dicts are functions of Python's stable interface. All are passed in, so that nothing of either is
// needed to compile this. Python's lock is held.

#include <cstring>

#include "fused_adafactor/abi.h"

namespace fused_adafactor {
namespace {

// DLTensor of DLPack.
struct Seen {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  int32_t dtype;  // code, bits and lanes
  const int64_t *sizes, *strides;
  uint64_t byte_offset;
};

int64_t number_of(const void* pointer) { return int64_t(reinterpret_cast<intptr_t>(pointer)); }

// Tells numbers, run by run, to a `take` that says whether it wants to go on. Each of these returns false where it
// does not, or where an object is no tensor with memory; then an exception is set.
template <typename Take>
bool tell_tensor(const Interpreter& python, void* object, bool itself, Take&& take) {
  Seen seen{};
  if (python.look(object, &seen) != 0) return false;
  const int64_t facts[] = {seen.ndim, seen.dtype, (int64_t(seen.device_type) << 32) | uint32_t(seen.device_id)};
  const int64_t place[] = {number_of(object), number_of(seen.data) + int64_t(seen.byte_offset)};
  return (!itself || take(place, 2)) && take(facts, 3) && take(seen.sizes, seen.ndim) && take(seen.strides, seen.ndim);
}

template <typename Take>
bool tell_list(const Interpreter& python, void* list, int64_t count, bool itself, Take&& take) {
  for (int64_t i = 0; i < count; ++i) {
    void* object = python.item(list, i);
    if (object == nullptr || !tell_tensor(python, object, itself, take)) return false;
  }
  return true;
}

// A dict of dicts of tensors: also what they are called.
template <typename Take>
bool tell_state(const Interpreter& python, void* state, Take&& take) {
  void *owner, *entries, *name, *object;
  for (intptr_t at = 0; python.next(state, &at, &owner, &entries);) {
    const int64_t owned[] = {number_of(owner), number_of(entries)};
    if (!take(owned, 2)) return false;
    for (intptr_t place = 0; python.next(entries, &place, &name, &object);) {
      const int64_t named = number_of(name);
      if (!take(&named, 1) || !tell_tensor(python, object, true, take)) return false;
    }
  }
  return true;
}

template <typename Take>
bool tell(const Interpreter& python, void* things, int64_t count, bool itself, Take&& take) {
  return count < 0 ? tell_state(python, things, take) : tell_list(python, things, count, itself, take);
}

}  // namespace
}  // namespace fused_adafactor

using namespace fused_adafactor;

extern "C" int64_t fused_adafactor_note(const Interpreter* python, void* things, int64_t count, int32_t itself,
                                        int64_t* notes, int64_t capacity) {
  int64_t noted = 0;
  const bool all = tell(*python, things, count, itself != 0, [&](const int64_t* numbers, int64_t n) {
    if (n > 0 && noted + n <= capacity) std::memcpy(notes + noted, numbers, size_t(n) * sizeof(int64_t));
    noted += n;
    return true;
  });
  return all ? noted : -1;
}

extern "C" int32_t fused_adafactor_is_as_noted(const Interpreter* python, void* things, int64_t count, int32_t itself,
                                               const int64_t* notes, int64_t noted) {
  int64_t at = 0;
  const bool all = tell(*python, things, count, itself != 0, [&](const int64_t* numbers, int64_t n) {
    const int64_t* expected = notes + at;
    at += n;
    return at <= noted && (n == 0 || std::memcmp(expected, numbers, size_t(n) * sizeof(int64_t)) == 0);
  });
  return all && at == noted;
}
