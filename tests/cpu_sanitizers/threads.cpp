// The part of OpenMP's runtime that csrc/cpu needs, on POSIX threads. ThreadSanitizer cannot see the barriers and joins
// of libgomp, which is not instrumented, and would report races everywhere; it sees these, which are compiled with the
// kernels.
#include <pthread.h>

#include <vector>

namespace at {
int get_num_threads();
}

namespace {

struct Team {
  pthread_barrier_t barrier;
  int size;
  void (*body)(void*);
  void* data;
};

thread_local Team* team = nullptr;
thread_local int id = 0;

struct Member {
  Team* team;
  int id;
};

void* run(void* member) {
  team = static_cast<Member*>(member)->team;
  id = static_cast<Member*>(member)->id;
  team->body(team->data);
  return nullptr;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return team ? id : 0; }
int omp_get_num_threads() { return team ? team->size : 1; }
int omp_get_max_threads() { return at::get_num_threads(); }
int omp_in_parallel() { return team && team->size > 1; }

void GOMP_barrier() {
  if (team) pthread_barrier_wait(&team->barrier);
}

// Inside a team: a team of one, as without nested parallelism.
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team* const outer_team = team;
  const int outer_id = id;
  Team own{{}, outer_team ? 1 : threads ? static_cast<int>(threads) : at::get_num_threads(), body, data};
  pthread_barrier_init(&own.barrier, nullptr, own.size);
  std::vector<pthread_t> handles(own.size);
  std::vector<Member> members(own.size);
  for (int i = 1; i < own.size; ++i) {
    members[i] = {&own, i};
    pthread_create(&handles[i], nullptr, run, &members[i]);
  }
  team = &own;
  id = 0;
  body(data);
  team = outer_team;
  id = outer_id;
  for (int i = 1; i < own.size; ++i) pthread_join(handles[i], nullptr);
  pthread_barrier_destroy(&own.barrier);
}
}
