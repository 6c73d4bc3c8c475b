// A team of threads. OpenMP in the library, so that torch and it share one runtime; standard threads
// in the sanitizer driver, because thread sanitizers do not understand an OpenMP barrier.
#pragma once
#include <stdint.h>
#ifdef RETORT_STD_THREADS
#include <pthread.h>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace RETORT_ISA {

struct Team {
  int rank, size;
  void* gate;
  // Every thread of the team waits here for the others.
  void barrier() const {
    if (size <= 1) return;
#ifdef RETORT_STD_THREADS
    pthread_barrier_wait((pthread_barrier_t*)gate);
#elif defined(_OPENMP)
#pragma omp barrier
#endif
  }
  int64_t begin(int64_t n) const { return n * rank / size; }
  int64_t end(int64_t n) const { return n * (rank + 1) / size; }
};

template <class Body>
static void run_team(int threads, const Body& body) {
  if (threads <= 1) return body(Team{0, 1, nullptr});
#ifdef RETORT_STD_THREADS
  pthread_barrier_t gate;
  pthread_barrier_init(&gate, nullptr, threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; t++) team.emplace_back([&, t] { body(Team{t, threads, &gate}); });
  for (auto& t : team) t.join();
  pthread_barrier_destroy(&gate);
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads(), nullptr});
#else
  body(Team{0, 1, nullptr});
#endif
}

}  // namespace RETORT_ISA
