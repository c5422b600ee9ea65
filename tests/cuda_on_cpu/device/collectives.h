// Barriers, shuffles and votes.
#pragma once

namespace cuda_on_cpu {

// `source`: the lane to read from, or -1 for the caller's own value.
template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable<T>::value, "shuffles carry up to 16 bytes");
  Unwatched unwatched;
  const Exchanged all = exchange(mask, &value, sizeof(T), Kind::shuffle, file, line);
  if (source < 0) return value;
  T result;
  if (all.lanes >> source & 1)
    __builtin_memcpy(&result, all.value[source], sizeof(T));
  else
    __builtin_memset(&result, 0xFF, sizeof(T));  // a lane that did not take part: undefined in CUDA, poison here
  return result;
}

inline int group_of(int width) { return current->lane & ~(width - 1); }

}  // namespace cuda_on_cpu

inline void __syncthreads(CALL_SITE) {
  cuda_on_cpu::Unwatched unwatched;
  cuda_on_cpu::barrier(file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CALL_SITE) {
  cuda_on_cpu::Unwatched unwatched;
  const char nothing = 0;
  cuda_on_cpu::exchange(mask, &nothing, 1, cuda_on_cpu::Kind::sync, file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CALL_SITE) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::group_of(width) + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CALL_SITE) {
  const int source = cuda_on_cpu::current->lane ^ bits;
  return cuda_on_cpu::shuffle(mask, value, source >= cuda_on_cpu::group_of(width) + width ? -1 : source, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, CALL_SITE) {
  const int source = cuda_on_cpu::current->lane - static_cast<int>(distance);
  return cuda_on_cpu::shuffle(mask, value, source < cuda_on_cpu::group_of(width) ? -1 : source, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, CALL_SITE) {
  const int source = cuda_on_cpu::current->lane + static_cast<int>(distance);
  return cuda_on_cpu::shuffle(mask, value, source >= cuda_on_cpu::group_of(width) + width ? -1 : source, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CALL_SITE) {
  cuda_on_cpu::Unwatched unwatched;
  const char vote = predicate != 0;
  const cuda_on_cpu::Exchanged all = cuda_on_cpu::exchange(mask, &vote, 1, cuda_on_cpu::Kind::vote, file, line);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((all.lanes >> lane & 1) && all.value[lane][0]) result |= 1u << lane;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate, CALL_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CALL_SITE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
inline unsigned __activemask() { return cuda_on_cpu::active_lanes(); }
