// Enough of CUDA to run kernels on a CPU. Thread blocks run one after the other. The threads of one are fibers, each of
// which runs until it waits for its warp or for all others. Each launch runs twice: in order, and with threads reversed
// and thread blocks shuffled. If the results differ, there is a race. The order of the thread blocks also decides which
// of them is the last to count.

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ thread_local  // nothing else is thread_local; poison() relies on that
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

using std::sqrt;

struct Index {
    unsigned x;
};

thread_local unsigned char shared_memory[256 * 1024] __align__(16);
static Index threadIdx, blockIdx;

namespace emulator {

constexpr size_t STACK = 128 * 1024;
constexpr unsigned WARP = 32;

struct Fiber {
    ucontext_t entry;
    jmp_buf context;  // swapcontext would be simpler, but calls the kernel of the operating system
    std::vector<char> stack = std::vector<char>(STACK);
    bool begun, done, waits_for_warp;
};

static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static std::function<void()> body;

static void run() {
    body();
    fibers[threadIdx.x].done = true;
    _longjmp(scheduler, 1);
}

// Runs a thread until it waits or ends.
__attribute__((noinline)) static void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.context, 1);
    fiber.begun = true;
    setcontext(&fiber.entry);
}

// Fills shared memory, which is this library's thread-local variables, with NaN. A thread block may not rely on what it
// holds at the start.
static void poison() {
    const auto fill = [](dl_phdr_info* info, size_t, void* variable) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            char* start = static_cast<char*>(info->dlpi_tls_data);
            if (segment.p_type == PT_TLS && start && variable >= start && variable < start + segment.p_memsz)
                std::memset(start, 0xff, segment.p_memsz);
        }
        return 0;
    };
    dl_iterate_phdr(fill, shared_memory);
}

// Runs the threads of a warp until they wait for other warps or end. Returns how many end, or -1 if some threads of the
// warp wait for it while others don't.
static int run_warp(unsigned first, unsigned threads, bool reverse) {
    for (;;) {
        unsigned done = 0, wait = 0;
        for (unsigned i = 0; i < threads; ++i) {
            threadIdx.x = first + (reverse ? threads - 1 - i : i);
            Fiber& fiber = fibers[threadIdx.x];
            fiber.waits_for_warp = false;
            resume(fiber);
            done += fiber.done;
            wait += fiber.waits_for_warp;
        }
        if (!wait) return done;
        if (wait < threads) return -1;
    }
}

// Runs a thread block. Returns 1 if some threads wait in vain for others, else 0.
static int run_block(unsigned threads, bool reverse) {
    poison();
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.begun = fiber.done = fiber.waits_for_warp = false;
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.data();
        fiber.entry.uc_stack.ss_size = STACK;
        makecontext(&fiber.entry, run, 0);
    }
    const unsigned warps = (threads + WARP - 1) / WARP;
    for (;;) {
        unsigned done = 0;
        for (unsigned i = 0; i < warps; ++i) {
            const unsigned first = (reverse ? warps - 1 - i : i) * WARP;
            const int done_of_warp = run_warp(first, threads - first < WARP ? threads - first : WARP, reverse);
            if (done_of_warp < 0) return 1;
            done += done_of_warp;
        }
        if (done) return done < threads;
    }
}

template <typename... P, size_t... I>
int launch(void (*kernel)(P...), unsigned thread_blocks, unsigned threads, bool other_order, void** arguments,
           std::index_sequence<I...>) {
    body = [=] { kernel(*static_cast<P*>(arguments[I])...); };
    const unsigned prime = 7919;  // steps of it reach all thread blocks, unless their number is a multiple of it
    for (unsigned i = 0; i < thread_blocks; ++i) {
        blockIdx.x = other_order ? (thread_blocks / 2 + size_t(i) * prime) % thread_blocks : i;
        if (run_block(threads, other_order)) return 1;
    }
    return 0;
}

template <typename... P>
int launch(void (*kernel)(P...), unsigned thread_blocks, unsigned threads, bool other_order, void** arguments) {
    return launch(kernel, thread_blocks, threads, other_order, arguments, std::index_sequence_for<P...>());
}

}  // namespace emulator

inline void __syncthreads() {
    if (!_setjmp(emulator::fibers[threadIdx.x].context)) _longjmp(emulator::scheduler, 1);
}

inline void __syncwarp() {
    emulator::fibers[threadIdx.x].waits_for_warp = true;
    __syncthreads();
}

// There is nothing to do, as thread blocks run one after the other.
inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* counter, unsigned increment) {
    const unsigned before = *counter;
    *counter += increment;
    return before;
}

inline float __fsub_rn(float a, float b) { return a - b; }

template <typename T> T __ldcg(const T* pointer) { return *pointer; }
