// Threads that live for one call: an idle pool would be one more thing to survive a fork.
#pragma once
#include <pthread.h>
#include <stdint.h>

namespace treadle {

constexpr int MAX_THREADS = 256;

template <class Body>
struct Range {
    Body* body;
    int64_t begin, end;
    int index;

    static void* run(void* self) {
        Range* range = static_cast<Range*>(self);
        (*range->body)(range->begin, range->end, range->index);
        return nullptr;
    }
};

// Calls body(begin, end, index) on disjoint ranges that cover [0, count) in order, one per thread, with boundaries
// at multiples of `grain`. Returns when all are done.
template <class Body>
void parallel(uint64_t threads, int64_t count, int64_t grain, Body body) {
    int64_t grains = (count + grain - 1) / grain;
    int64_t parts = (int64_t)(threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads);
    if (parts > grains) parts = grains;
    Range<Body> ranges[MAX_THREADS];
    pthread_t handles[MAX_THREADS];
    bool started[MAX_THREADS];
    for (int64_t t = 0; t < parts; ++t) {
        int64_t begin = grains * t / parts * grain, end = grains * (t + 1) / parts * grain;
        ranges[t] = {&body, begin, end < count ? end : count, (int)t};
        started[t] = t > 0 && pthread_create(&handles[t], nullptr, Range<Body>::run, &ranges[t]) == 0;
    }
    // Where the system refuses a thread, its share is done here.
    for (int64_t t = 0; t < parts; ++t)
        if (!started[t]) Range<Body>::run(&ranges[t]);
    for (int64_t t = 1; t < parts; ++t)
        if (started[t]) pthread_join(handles[t], nullptr);
}

}  // namespace treadle
