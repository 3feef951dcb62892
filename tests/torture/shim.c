/* Counts the calls that change a file below one folder, and makes one of them fail, do half of its work, or be the last.

   Loaded with LD_PRELOAD before libc, so calls of Python, of Rust (safetensors, tokenizers) and of C++ (torch) pass it.
   Not seen: what libc does inside itself (fwrite); nothing here writes weights or state that way. Not counted: calls that
   would change nothing, as mkdir of what exists and unlink of what does not.
   gemma2_torture_arm() starts the count in the process that calls it; its forks are left alone. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READ_ONLY = -6, VANISHED = -5, FULL = -4, INTERRUPTED = -3, KILL = -2, HALF = -1, COUNT = 0 }; /* other modes: an errno, once */

static char root[PATH_MAX];
static size_t root_length;
static long fail_at;
static int mode, log_descriptor = -1;
static atomic_long calls;
static pid_t armed;
static __thread char full[2 * PATH_MAX]; /* the path of the call that is judged */

void gemma2_torture_arm(const char *folder, long number, int how, const char *log) {
    snprintf(root, sizeof root, "%s", folder);
    fail_at = number;
    mode = how;
    log_descriptor = *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    atomic_store(&calls, 0);
    armed = getpid();
    root_length = strlen(root);
}

static int inside(const char *path) {
    return root_length && armed == getpid() && !strncmp(path, root, root_length) &&
           (path[root_length] == '/' || path[root_length] == 0);
}

/* Whether a path lies below the folder; a relative one counts from the folder that a descriptor holds. */
static int below_at(int folder, const char *path) {
    if (!root_length || !path) return 0;
    if (path[0] == '/') {
        snprintf(full, sizeof full, "%s", path);
        return inside(full);
    }
    char link[64] = "/proc/self/cwd", from[PATH_MAX];
    if (folder != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, from, sizeof from - 1);
    if (length < 0) return 0;
    from[length] = 0;
    snprintf(full, sizeof full, "%s/%s", from, path);
    return inside(full);
}

static int below(const char *path) { return below_at(AT_FDCWD, path); }

static int exists_at(int folder, const char *path) {
    char link[8];
    return syscall(SYS_readlinkat, folder, path, link, sizeof link) >= 0 || errno == EINVAL;
}

static int of_descriptor(int descriptor) {
    if (!root_length) return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, full, PATH_MAX - 1);
    if (length < 0) return 0;
    full[length] = 0;
    return inside(full);
}

/* 0: make the call; 1: it fails with errno; 2: half of its bytes. `grows`: a full disk refuses it. */
static int due(const char *name, int grows) {
    long number = atomic_fetch_add(&calls, 1);
    if (log_descriptor >= 0) {
        char line[2 * PATH_MAX + 64];
        const char *below = full[root_length] ? full + root_length + 1 : ".";
        int length = snprintf(line, sizeof line, "%ld %s %d %s\n", number, name, grows, below);
        syscall(SYS_write, log_descriptor, line, (size_t)length);
    }
    if (mode == READ_ONLY && number >= fail_at) {
        errno = EROFS;
        return 1;
    }
    if (mode == VANISHED) {
        char moved[PATH_MAX + 8];
        snprintf(moved, sizeof moved, "%s.gone", root);
        if (number == fail_at) syscall(SYS_renameat2, AT_FDCWD, root, AT_FDCWD, moved, 0);
        return 0;
    }
    if (mode == FULL && number >= fail_at && grows) {
        errno = ENOSPC;
        return 1;
    }
    if (number != fail_at || mode == COUNT || mode == FULL) return 0;
    if (mode == KILL) {
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;) pause();
    }
    if (mode == HALF) return 2;
    errno = mode == INTERRUPTED ? EINTR : mode;
    return 1;
}

#define REAL(type, name, ...)                                              \
    static type (*real)(__VA_ARGS__);                                      \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name)                                                          \
    int name(const char *path, int flags, ...) {                            \
        REAL(int, #name, const char *, int, ...);                           \
        va_list more;                                                       \
        va_start(more, flags);                                              \
        mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                       \
        int changes = (flags & O_CREAT) && syscall(SYS_faccessat, AT_FDCWD, path, F_OK) != 0; \
        if ((changes || (flags & O_TRUNC)) && below(path) && due("open", 1) == 1) return -1; \
        return real(path, flags, bits);                                     \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                        \
    int name(int folder, const char *path, int flags, ...) {                \
        REAL(int, #name, int, const char *, int, ...);                      \
        va_list more;                                                       \
        va_start(more, flags);                                              \
        mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                       \
        int changes = (flags & O_CREAT) && syscall(SYS_faccessat, folder, path, F_OK) != 0; \
        if ((changes || (flags & O_TRUNC)) && below_at(folder, path) && due("open", 1) == 1) return -1; \
        return real(folder, path, flags, bits);                             \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                         \
    FILE *name(const char *path, const char *how) {                         \
        REAL(FILE *, #name, const char *, const char *);                    \
        int changes = *how == 'w' || (*how == 'a' && !exists_at(AT_FDCWD, path)); \
        if (changes && below(path) && due("open", 1) == 1) return NULL;     \
        return real(path, how);                                             \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define WRITE(name, parameters, types, arguments, halved)                   \
    ssize_t name parameters {                                               \
        REAL(ssize_t, #name, types);                                        \
        if (of_descriptor(descriptor)) {                              \
            int what = due(#name, 1);                                 \
            if (what == 1) return -1;                                       \
            if (what == 2 && size > 1) return real halved;                  \
        }                                                                   \
        return real arguments;                                              \
    }
#define LIST(...) __VA_ARGS__
WRITE(write, (int descriptor, const void *data, size_t size), LIST(int, const void *, size_t), (descriptor, data, size), (descriptor, data, size / 2))
WRITE(pwrite, (int descriptor, const void *data, size_t size, off_t at), LIST(int, const void *, size_t, off_t), (descriptor, data, size, at), (descriptor, data, size / 2, at))
WRITE(pwrite64, (int descriptor, const void *data, size_t size, off64_t at), LIST(int, const void *, size_t, off64_t), (descriptor, data, size, at), (descriptor, data, size / 2, at))
WRITE(writev, (int descriptor, const struct iovec *data, int size), LIST(int, const struct iovec *, int), (descriptor, data, size), (descriptor, data, size / 2))
WRITE(sendfile, (int descriptor, int from, off_t *at, size_t size), LIST(int, int, off_t *, size_t), (descriptor, from, at, size), (descriptor, from, at, size / 2))
WRITE(sendfile64, (int descriptor, int from, off64_t *at, size_t size), LIST(int, int, off64_t *, size_t), (descriptor, from, at, size), (descriptor, from, at, size / 2))

ssize_t copy_file_range(int from, off64_t *at, int descriptor, off64_t *to, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    if (of_descriptor(descriptor)) {
        int what = due("copy_file_range", 1);
        if (what == 1) return -1;
        if (what == 2 && size > 1) size /= 2;
    }
    return real(from, at, descriptor, to, size, flags);
}

#define BY_DESCRIPTOR(name, grows, parameters, types, arguments)            \
    int name parameters {                                                   \
        REAL(int, #name, types);                                            \
        if (of_descriptor(descriptor) && due(#name, grows) == 1) return -1; \
        return real arguments;                                              \
    }
BY_DESCRIPTOR(fsync, 0, (int descriptor), LIST(int), (descriptor))
BY_DESCRIPTOR(fdatasync, 0, (int descriptor), LIST(int), (descriptor))
BY_DESCRIPTOR(ftruncate, 1, (int descriptor, off_t size), LIST(int, off_t), (descriptor, size))
BY_DESCRIPTOR(ftruncate64, 1, (int descriptor, off64_t size), LIST(int, off64_t), (descriptor, size))
BY_DESCRIPTOR(fallocate, 1, (int descriptor, int how, off_t from, off_t size), LIST(int, int, off_t, off_t), (descriptor, how, from, size))
BY_DESCRIPTOR(fchmod, 0, (int descriptor, mode_t bits), LIST(int, mode_t), (descriptor, bits))

/* These two return the error and leave errno alone. */
#define ALLOCATE(name, offset)                                              \
    int name(int descriptor, offset from, offset size) {                    \
        REAL(int, #name, int, offset, offset);                              \
        if (of_descriptor(descriptor) && due(#name, 1) == 1) return errno; \
        return real(descriptor, from, size);                                \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

/* there: 1 if it changes something only where the path exists, 0 if only where it does not, -1 always */
#define BY_PATH(name, grows, there, folder_of, which, parameters, types, arguments)\
    int name parameters {                                                   \
        REAL(int, #name, types);                                            \
        if (below_at(folder_of, which) && (there < 0 || exists_at(folder_of, which) == there) && due(#name, grows) == 1) \
            return -1;                                                      \
        return real arguments;                                              \
    }
BY_PATH(rename, 0, -1, AT_FDCWD, new, (const char *old, const char *new), LIST(const char *, const char *), (old, new))
BY_PATH(renameat, 0, -1, b, new, (int a, const char *old, int b, const char *new), LIST(int, const char *, int, const char *), (a, old, b, new))
BY_PATH(renameat2, 0, -1, b, new, (int a, const char *old, int b, const char *new, unsigned how), LIST(int, const char *, int, const char *, unsigned), (a, old, b, new, how))
BY_PATH(link, 0, 0, AT_FDCWD, new, (const char *old, const char *new), LIST(const char *, const char *), (old, new))
BY_PATH(linkat, 0, 0, b, new, (int a, const char *old, int b, const char *new, int how), LIST(int, const char *, int, const char *, int), (a, old, b, new, how))
BY_PATH(symlink, 1, 0, AT_FDCWD, new, (const char *old, const char *new), LIST(const char *, const char *), (old, new))
BY_PATH(mkdir, 1, 0, AT_FDCWD, path, (const char *path, mode_t bits), LIST(const char *, mode_t), (path, bits))
BY_PATH(mkdirat, 1, 0, folder, path, (int folder, const char *path, mode_t bits), LIST(int, const char *, mode_t), (folder, path, bits))
BY_PATH(rmdir, 0, 1, AT_FDCWD, path, (const char *path), LIST(const char *), (path))
BY_PATH(unlink, 0, 1, AT_FDCWD, path, (const char *path), LIST(const char *), (path))
BY_PATH(unlinkat, 0, 1, folder, path, (int folder, const char *path, int how), LIST(int, const char *, int), (folder, path, how))
BY_PATH(chmod, 0, -1, AT_FDCWD, path, (const char *path, mode_t bits), LIST(const char *, mode_t), (path, bits))
