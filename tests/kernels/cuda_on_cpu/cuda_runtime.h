// Enough of CUDA to run the kernels without a GPU: g++ -x c++ -I <this folder> compiles the .cu files as they are.
//
// The threads of a thread block are contexts on one CPU thread; thread blocks run one after the other. A thread runs
// until a barrier or a warp operation, which it passes when all others have come to one: a barrier that only some
// threads reach ends the process with a message. What this shows is the kernels' logic: not their speed, and not
// how a GPU orders memory.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
    return memset(p, value, size), cudaSuccess;
}

struct int4 {
    int x, y, z, w;
};
struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr int MAX = 1024, STACK = 128 * 1024;
enum State { READY, AT_WARP, AT_BARRIER, DONE };

// A context starts a thread; afterwards jumps switch, which cost no system call.
struct Thread {
    ucontext_t context;
    jmp_buf jump;
    bool started;
    State state;
    unsigned operations;  // warp operations so far; their values alternate between two places
    uint64_t value[2];
};

inline Thread threads[MAX];
inline char* stacks = nullptr;
inline jmp_buf scheduler;
inline void (*body)(const void*);
inline const void* closure;

inline void enter() {
    body(closure);
    threads[threadIdx.x].state = DONE;
    _longjmp(scheduler, 1);
}

inline void wait(State state) {
    Thread& me = threads[threadIdx.x];
    me.state = state;
    if (!_setjmp(me.jump)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(unsigned t) {
    threadIdx.x = t;
    if (_setjmp(scheduler)) return;
    if (threads[t].started) _longjmp(threads[t].jump, 1);
    threads[t].started = true;
    setcontext(&threads[t].context);
}

// Lets those go on whose whole group waits at the same kind of barrier; false where there is none.
inline bool release(int begin, int end, State state) {
    bool any = false;
    for (int t = begin; t < end; ++t) {
        if (threads[t].state == DONE && state == AT_BARRIER) continue;
        if (threads[t].state != state) return false;
        any = true;
    }
    for (int t = begin; any && t < end; ++t)
        if (threads[t].state == state) threads[t].state = READY;
    return any;
}

template <class Closure>
void run_block(int size, const Closure& kernel) {
    if (!stacks) stacks = (char*)malloc((size_t)MAX * STACK);
    closure = &kernel;
    body = [](const void* c) { (*(const Closure*)c)(); };
    for (int t = 0; t < size; ++t) {
        getcontext(&threads[t].context);
        threads[t].context.uc_stack.ss_sp = stacks + (size_t)t * STACK;
        threads[t].context.uc_stack.ss_size = STACK;
        threads[t].state = READY;
        threads[t].operations = 0;
        threads[t].started = false;
        makecontext(&threads[t].context, enter, 0);
    }
    for (;;) {
        int done = 0;
        for (int t = 0; t < size; ++t) {
            if (threads[t].state == READY) resume((unsigned)t);
            done += threads[t].state == DONE;
        }
        if (done == size) return;
        bool progress = release(0, size, AT_BARRIER);
        for (int w = 0; w < size; w += 32) progress |= release(w, w + 32, AT_WARP);
        if (!progress) {
            fprintf(stderr, "thread block %u: a barrier that not all threads reach\n", blockIdx.x);
            abort();
        }
    }
}

template <class Closure>
void launch(unsigned grid, int size, const Closure& kernel) {
    gridDim.x = grid;
    for (unsigned b = 0; b < grid; ++b) {
        blockIdx.x = b;
        run_block(size, kernel);
    }
}

// What `lane` of this warp passed to the operation at hand.
template <class T>
struct Exchange {
    unsigned place, base;

    explicit Exchange(T mine) : place(threads[threadIdx.x].operations++ % 2), base(threadIdx.x / 32 * 32) {
        threads[threadIdx.x].value[place] = (uint64_t)mine;
        wait(AT_WARP);
    }
    T of(unsigned lane) const { return (T)threads[base + lane].value[place]; }
};

}  // namespace emulation

#define TREADLE_LAUNCH(kernel, grid, lane, ...) \
    emulation::launch((unsigned)(grid), treadle::THREADS, [&] { (void)(lane), kernel(__VA_ARGS__); })

inline void __syncthreads() { emulation::wait(emulation::AT_BARRIER); }
inline void __threadfence_system() {}
template <class T>
T __shfl_up_sync(unsigned, T mine, int by) {
    int lane = (int)(threadIdx.x % 32);
    return emulation::Exchange<T>(mine).of((unsigned)(lane >= by ? lane - by : lane));
}
template <class T>
T __shfl_down_sync(unsigned, T mine, int by) {
    int lane = (int)(threadIdx.x % 32);
    return emulation::Exchange<T>(mine).of((unsigned)(lane + by < 32 ? lane + by : lane));
}
inline unsigned __ballot_sync(unsigned, bool mine) {
    emulation::Exchange<unsigned> exchange(mine);
    unsigned word = 0;
    for (unsigned lane = 0; lane < 32; ++lane) word |= exchange.of(lane) << lane;
    return word;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T, class U>
T atomicAdd(T* p, U x) {
    T old = *p;
    return *p = old + x, old;
}
template <class T, class U>
T atomicOr(T* p, U x) {
    T old = *p;
    return *p = old | x, old;
}
template <class T, class U>
T atomicMin(T* p, U x) {
    T old = *p;
    return *p = x < old ? x : old, old;
}
template <class T, class U>
T atomicMax(T* p, U x) {
    T old = *p;
    return *p = x > old ? x : old, old;
}
