// One fiber per CUDA thread; the blocks of a grid run one after another on the calling thread.
//
// A fiber runs until it waits at __syncthreads, in a warp's collective or before an atomic. The scheduler then picks
// another ready fiber, in the order that is set. It is compiled without sanitizers, since its own synchronization must
// not count as order between the kernels' accesses.
#include <cuda_runtime.h>
#include <device_launch_parameters.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../device/runtime.h"
#include "control.h"
#include "sanitizers.h"

namespace cuda_on_cpu {

// The built-in variables, with the names that the toolkit's header declares.
Thread* current;
uint3 thread_index asm("threadIdx");
uint3 block_index asm("blockIdx");
dim3 block_size asm("blockDim");
dim3 grid_size asm("gridDim");
int warp_size asm("warpSize") = 32;

namespace {

constexpr size_t kStack = 64 << 10, kGuard = 4096;
constexpr int kMaxThreads = 1024, kMaxSharedBytes = 232448, kMasks = 8;

enum class State : char { ready, at_barrier, in_collective, done };

struct Fiber : Thread {
  ucontext_t context;
  char* stack = nullptr;
  void *tsan = nullptr, *fake_stack = nullptr;
  State state = State::done;
  const char* file = "";  // where it waits
  int line = 0;
};

// A collective of the lanes of one mask. Two sets of values: lanes may enter the next one while others still read.
struct Meeting {
  bool used = false;
  unsigned mask = 0, arrived = 0, complete[2] = {0, 0};
  int turn = 0, line = 0;
  Kind kind = Kind::sync;
  const char* file = "";
  char tag[2];
  unsigned char value[2][32][16];
};

struct Warp {
  unsigned exists = 0, exited = 0;
  Meeting meetings[kMasks];
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<int> ready;
int threads, done, at_barrier, barrier_turn;
char barrier_tag[2], block_tag, grid_tag;

ucontext_t scheduler;
void *scheduler_fake_stack, *scheduler_tsan;
const void* scheduler_stack;
size_t scheduler_stack_size;

void (*body)(void*);
void* body_argument;
char* dynamic;
size_t dynamic_bytes;

bool failed;
cudaError_t last_error = cudaSuccess;
std::string last_message;
int order = forward;
uint64_t random_state = 1;
uint64_t counts[3];

unsigned next_random() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<unsigned>(random_state >> 11);
}

void switch_to_scheduler(bool for_good) {
  auto* me = static_cast<Fiber*>(current);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &me->fake_stack, scheduler_stack, scheduler_stack_size);
  }
  if (scheduler_tsan) __tsan_switch_to_fiber(scheduler_tsan, 1);  // 1: the switch itself orders nothing
  swapcontext(&me->context, &scheduler);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
}

void switch_to(Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStack);
  if (scheduler_tsan) __tsan_switch_to_fiber(fiber.tsan, 1);
  swapcontext(&scheduler, &fiber.context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
  current = nullptr;
}

// Ends the launch. Does not return if a fiber calls it.
void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[160];
  if (current) {
    snprintf(
        where, sizeof where, "block (%u,%u,%u) thread (%u,%u,%u): ", block_index.x, block_index.y, block_index.z,
        current->index.x, current->index.y, current->index.z);
  } else {
    snprintf(where, sizeof where, "block (%u,%u,%u): ", block_index.x, block_index.y, block_index.z);
  }
  last_message = std::string("cuda_on_cpu: ") + where + text;
  last_error = cudaErrorLaunchFailure;
  failed = true;
  if (current) switch_to_scheduler(false);
}

void wake(Fiber& fiber) {
  fiber.state = State::ready;
  ready.push_back(fiber.number);
}

bool same_place(const Fiber& a, const char* file, int line) { return a.line == line && strcmp(a.file, file) == 0; }

void open_barrier() {
  const Fiber* first = nullptr;
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state != State::at_barrier) continue;
    if (!first) first = &fiber;
    if (!same_place(fiber, first->file, first->line)) {
      fail("barrier divergence: __syncthreads at %s:%d and at %s:%d", first->file, first->line, fiber.file, fiber.line);
      return;
    }
  }
  at_barrier = 0;
  barrier_turn ^= 1;
  for (int i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::at_barrier) wake(*fibers[i]);
  }
}

bool all_here(const Warp& warp, const Meeting& meeting) {
  return meeting.arrived == (meeting.mask & warp.exists & ~warp.exited);
}

void close(Meeting& meeting, int warp) {
  meeting.complete[meeting.turn] = meeting.arrived;
  for (int lane = 0; lane < 32; ++lane) {
    if ((meeting.arrived >> lane & 1) && fibers[warp * 32 + lane]->state == State::in_collective) {
      wake(*fibers[warp * 32 + lane]);
    }
  }
  meeting.arrived = 0;
  meeting.turn ^= 1;
}

Meeting* meeting_of(Warp& warp, unsigned mask) {
  for (Meeting& meeting : warp.meetings) {
    if (meeting.used && meeting.mask == mask) return &meeting;
  }
  for (Meeting& meeting : warp.meetings) {
    if (meeting.arrived) continue;
    meeting.used = true;
    meeting.mask = mask;
    return &meeting;
  }
  fail("more than %d masks at once in a warp", kMasks);
  return nullptr;
}

// The entry point of a fiber, on its own stack.
void thread_main() {
  auto* me = static_cast<Fiber*>(current);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  }
  acquire(&block_tag);
  body(body_argument);
  release(&grid_tag);
  me->state = State::done;
  ++done;
  Warp& warp = warps[me->warp];
  warp.exited |= 1u << me->lane;
  if (at_barrier && at_barrier == threads - done) open_barrier();
  for (Meeting& meeting : warp.meetings) {
    if (meeting.arrived && all_here(warp, meeting)) close(meeting, me->warp);
  }
  switch_to_scheduler(true);
}

// Poisons the thread-local block, which holds the __shared__ arrays, of the module that contains `function`.
int poison_shared(dl_phdr_info* module, size_t, void* function) {
  const char* address = static_cast<const char*>(function);
  bool holds = false;
  const ElfW(Phdr)* local = nullptr;
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& header = module->dlpi_phdr[i];
    const char* begin = reinterpret_cast<const char*>(module->dlpi_addr + header.p_vaddr);
    if (header.p_type == PT_LOAD && address >= begin && address < begin + header.p_memsz) holds = true;
    if (header.p_type == PT_TLS) local = &header;
  }
  if (holds && local && module->dlpi_tls_data) memset(module->dlpi_tls_data, 0xFF, local->p_memsz);
  return holds;
}

void start(int number) {
  Fiber& fiber = *fibers[number];
  fiber.number = number;
  fiber.index = {number % block_size.x, number / block_size.x % block_size.y, number / (block_size.x * block_size.y)};
  fiber.lane = number % 32;
  fiber.warp = number / 32;
  fiber.file = "";
  fiber.line = 0;
  fiber.fake_stack = nullptr;
  warps[fiber.warp].exists |= 1u << fiber.lane;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, thread_main, 0);
  if (scheduler_tsan && !fiber.tsan) fiber.tsan = __tsan_create_fiber(0);  // reused: creating one is slow
  wake(fiber);
}

void report_deadlock() {
  int barriers = 0, collectives = 0;
  const Fiber* waiting = nullptr;
  for (int i = 0; i < threads; ++i) {
    barriers += fibers[i]->state == State::at_barrier;
    collectives += fibers[i]->state == State::in_collective;
    if (fibers[i]->state == State::in_collective) waiting = fibers[i].get();
  }
  fail(
      "deadlock: %d threads at __syncthreads, %d in a warp's collective (one is %d, at %s:%d), %d exited", barriers,
      collectives, waiting ? waiting->number : -1, waiting ? waiting->file : "", waiting ? waiting->line : 0, done);
}

size_t pick() {
  if (order == random_order) return next_random() % ready.size();
  size_t best = 0;
  for (size_t i = 1; i < ready.size(); ++i) {
    if ((order == forward) == (ready[i] < ready[best])) best = i;
  }
  return best;
}

void run_block() {
  warps.assign((threads + 31) / 32, Warp());
  ready.clear();
  done = at_barrier = barrier_turn = 0;
  for (int i = 0; i < threads; ++i) start(i);
  dl_iterate_phdr(poison_shared, reinterpret_cast<void*>(body));
  dynamic = static_cast<char*>(malloc(dynamic_bytes ? dynamic_bytes : 1));
  memset(dynamic, 0xFF, dynamic_bytes);
  release(&block_tag);
  while (!failed && done < threads) {
    if (ready.empty()) {
      report_deadlock();
      break;
    }
    const size_t at = pick();
    Fiber& fiber = *fibers[ready[at]];
    ready[at] = ready.back();
    ready.pop_back();
    switch_to(fiber);
  }
  // The next block reuses the shared memory, as on a GPU: this block must be done with it.
  acquire(&grid_tag);
  free(dynamic);
}

void need_fibers(int n) {
  while (static_cast<int>(fibers.size()) < n) {
    fibers.push_back(std::make_unique<Fiber>());
    void* memory =
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, kGuard, PROT_NONE);  // a stack overflow faults
    fibers.back()->stack = static_cast<char*>(memory) + kGuard;
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*function)(void*), void* argument) {
  if (last_error != cudaSuccess) return;  // sticky until read, as on a GPU
  failed = false;
  const unsigned blocks = grid.x * grid.y * grid.z;
  threads = block.x * block.y * block.z;
  if (!blocks || !threads || threads > kMaxThreads || shared_bytes > kMaxSharedBytes) {
    last_error = cudaErrorInvalidConfiguration;
    last_message = "cuda_on_cpu: impossible launch of " + std::to_string(blocks) + " blocks of " +
                   std::to_string(threads) + " threads";
    return;
  }
  scheduler_tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  need_fibers(threads);
  body = function;
  body_argument = argument;
  grid_size = grid;
  block_size = block;
  dynamic_bytes = shared_bytes;
  std::vector<unsigned> numbers(blocks);
  for (unsigned i = 0; i < blocks; ++i) numbers[i] = order == reverse ? blocks - 1 - i : i;
  if (order == random_order) {
    for (unsigned i = blocks - 1; i > 0; --i) std::swap(numbers[i], numbers[next_random() % (i + 1)]);
  }
  for (unsigned i : numbers) {
    block_index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block();
    if (failed) break;
  }
}

void* dynamic_shared() { return dynamic; }

void barrier(const char* file, int line) {
  auto* me = static_cast<Fiber*>(current);
  const int turn = barrier_turn;
  me->file = file;
  me->line = line;
  me->state = State::at_barrier;
  ++at_barrier;
  release(&barrier_tag[turn]);
  if (at_barrier == threads - done) open_barrier();
  switch_to_scheduler(false);
  acquire(&barrier_tag[turn]);
}

Exchanged exchange(unsigned mask, const void* value, int n, Kind kind, const char* file, int line) {
  auto* me = static_cast<Fiber*>(current);
  me->file = file;
  me->line = line;
  Warp& warp = warps[me->warp];
  const unsigned bit = 1u << me->lane;
  if (!(mask & bit)) fail("mask %08x at %s:%d leaves out the calling lane %d", mask, file, line, me->lane);
  Meeting& meeting = *meeting_of(warp, mask);
  if (!meeting.arrived) {
    meeting.kind = kind;
    meeting.file = file;
    meeting.line = line;
  } else if (meeting.kind != kind || meeting.line != line || strcmp(meeting.file, file)) {
    fail(
        "warp divergence: mask %08x waits at %s:%d, this lane came to %s:%d", mask, meeting.file, meeting.line, file,
        line);
  }
  const int turn = meeting.turn;
  memcpy(meeting.value[turn][me->lane], value, n);
  meeting.arrived |= bit;
  me->state = State::in_collective;
  if (kind == Kind::sync) release(&meeting.tag[turn]);
  if (all_here(warp, meeting)) close(meeting, me->warp);
  switch_to_scheduler(false);
  if (kind == Kind::sync) acquire(&meeting.tag[turn]);
  return {meeting.value[turn], meeting.complete[turn]};
}

unsigned active_lanes() { return 1u << current->lane; }  // a legal answer that promises no convergence

void maybe_switch() {
  if (order != random_order || next_random() % 2) return;
  wake(*static_cast<Fiber*>(current));
  switch_to_scheduler(false);
}

void count(Counter counter, uint64_t bytes) { counts[static_cast<int>(counter)] += bytes; }

cudaError_t error() { return last_error; }
cudaError_t take_error() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* message() { return last_message.c_str(); }

}  // namespace cuda_on_cpu

void cuda_on_cpu_set_order(int order, uint64_t seed) {
  cuda_on_cpu::order = order;
  cuda_on_cpu::random_state = 88172645463325252ull ^ (seed * 0x9E3779B97F4A7C15ull);
  if (!cuda_on_cpu::random_state) cuda_on_cpu::random_state = 1;
}
void cuda_on_cpu_set_error(int error) {
  cuda_on_cpu::last_error = static_cast<cudaError_t>(error);
  cuda_on_cpu::last_message = "cuda_on_cpu: an error set by a test";
}
void cuda_on_cpu_reset_counts() { memset(cuda_on_cpu::counts, 0, sizeof cuda_on_cpu::counts); }
uint64_t cuda_on_cpu_counted(int counter) { return cuda_on_cpu::counts[counter]; }
