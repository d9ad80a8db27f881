// A wall clock that a test can set, for the processes that preload this library. The file named by
// TREADLE_TEST_CLOCK holds one 64-bit integer: nanoseconds that the wall clock is ahead. All processes map it, so that
// all clocks jump at the same moment. Monotonic clocks are the kernel's own, as on a machine whose time is set.
//
// A wait until a moment of the wall clock is handed to the kernel with the kernel's idea of that moment.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL

static const volatile int64_t *ahead;
static int (*kernel_clock)(clockid_t, struct timespec *);

__attribute__((constructor)) static void open_clock(void) {
    kernel_clock = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("TREADLE_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) ahead = found;
    close(file);
}

static int64_t offset(void) { return ahead ? *ahead : 0; }

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

static struct timespec moved(struct timespec at, int64_t by) {
    int64_t whole = (int64_t)at.tv_sec * SECOND + at.tv_nsec + by;
    if (whole < 0) whole = 0;
    return (struct timespec){.tv_sec = whole / SECOND, .tv_nsec = whole % SECOND};
}

// The kernel's idea of a moment of the wall clock; `into` is room for it.
static const struct timespec *of_kernel(const struct timespec *until, struct timespec *into) {
    if (!until) return until;
    *into = moved(*until, -offset());
    return into;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int code = kernel_clock ? kernel_clock(clock, now) : (int)syscall(SYS_clock_gettime, clock, now);
    if (!code && is_wall(clock)) *now = moved(*now, offset());
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &fine)) return -1;
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *into) {
    struct timespec fine;
    if (clock_gettime(CLOCK_REALTIME, &fine)) return -1;
    if (into) *into = fine.tv_sec;
    return fine.tv_sec;
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && !clock_gettime(CLOCK_REALTIME, now) ? base : 0;
}

// The function of the C library behind ours, in the version that programs are linked with today.
static void *behind(void **kept, const char *name, const char *version) {
    if (!*kept) *kept = dlvsym(RTLD_NEXT, name, version);
    if (!*kept) *kept = dlsym(RTLD_NEXT, name);
    return *kept;
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *until) {
    static void *kept;
    int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *) =
        behind(&kept, "pthread_cond_timedwait", "GLIBC_2.3.2");
    struct timespec room;
    int monotonic = cond->__data.__wrefs & 2;  // set by pthread_condattr_setclock
    return next(cond, mutex, monotonic ? until : of_kernel(until, &room));
}

int pthread_cond_clockwait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
    static void *kept;
    int (*next)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *) =
        behind(&kept, "pthread_cond_clockwait", "GLIBC_2.34");
    struct timespec room;
    return next(cond, mutex, clock, is_wall(clock) ? of_kernel(until, &room) : until);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
    static void *kept;
    int (*next)(pthread_mutex_t *, const struct timespec *) =
        behind(&kept, "pthread_mutex_timedlock", "GLIBC_2.34");
    struct timespec room;
    return next(mutex, of_kernel(until, &room));
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    static void *kept;
    int (*next)(sem_t *, const struct timespec *) = behind(&kept, "sem_timedwait", "GLIBC_2.34");
    struct timespec room;
    return next(semaphore, of_kernel(until, &room));
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
    static void *kept;
    int (*next)(sem_t *, clockid_t, const struct timespec *) = behind(&kept, "sem_clockwait", "GLIBC_2.34");
    struct timespec room;
    return next(semaphore, clock, is_wall(clock) ? of_kernel(until, &room) : until);
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *wanted, struct timespec *left) {
    static void *kept;
    int (*next)(clockid_t, int, const struct timespec *, struct timespec *) =
        behind(&kept, "clock_nanosleep", "GLIBC_2.17");
    struct timespec room;
    int until_wall = is_wall(clock) && (flags & TIMER_ABSTIME);
    return next(clock, flags, until_wall ? of_kernel(wanted, &room) : wanted, left);
}

// Ray's and gRPC's locks wait by system call.
long syscall(long number, ...) {
    static void *kept;
    long (*next)(long, ...) = behind(&kept, "syscall", "GLIBC_2.2.5");
    long words[6];
    va_list given;
    va_start(given, number);
    for (int i = 0; i < 6; i++) words[i] = va_arg(given, long);
    va_end(given);
    struct timespec room;
    int waits_for_wall = number == SYS_futex && (words[1] & FUTEX_CLOCK_REALTIME);
    if (waits_for_wall) words[3] = (long)of_kernel((const struct timespec *)words[3], &room);
    return next(number, words[0], words[1], words[2], words[3], words[4], words[5]);
}
