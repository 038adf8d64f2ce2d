/* Counts the file operations of a process below one folder, and fails the k-th of them.
 *
 * Loaded with LD_PRELOAD, it stands between the program and libc, so it sees Python's writes and those of the Rust in
 * safetensors and tokenizers alike. An operation is: open for writing, write, rename, unlink, mkdir, rmdir, fsync, copy.
 *
 *   arm(folder, k, how)   how 0: only count; 1: end the process before operation k, as SIGKILL would;
 *                         2: the disk is full from operation k on; 3: the same, but the first write is cut short;
 *                         4: write half of what operation k writes, then end the process
 *   operations()          how many there were since arm
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int target, how, count, cut;

void arm(const char *where, int k, int what) {
    snprintf(folder, sizeof folder, "%s", where);
    target = k, how = what, count = 0, cut = 0;
}
void disarm(void) { folder[0] = 0; }
int operations(void) { return count; }

static int below(int at, const char *path) {
    char full[PATH_MAX + 64];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') {
        snprintf(full, sizeof full, "%s", path);
    } else {
        char base[PATH_MAX], link[64];
        if (at == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
        snprintf(full, sizeof full, "%s/%s", base, path);
    }
    return !strncmp(full, folder, strlen(folder));
}

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    if (!folder[0] || fd < 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return !strncmp(path, folder, strlen(folder));
}

/* One operation: -1 where it must fail with ENOSPC, 1 where a write is cut short, 0 where it goes on. */
static int operation(int needs_space, int writes) {
    int now = ++count;
    if (how == 1 && now == target) _exit(137);
    if (how == 4 && now == target) {
        if (!writes) _exit(137);
        return 1;
    }
    if ((how == 2 || how == 3) && now >= target && needs_space) {
        if (how == 3 && writes && !cut) return cut = 1;
        errno = ENOSPC;
        return -1;
    }
    return 0;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }

static int may_open(int at, const char *path, int flags) {
    if (!(flags & (O_WRONLY | O_RDWR | O_CREAT)) || !below(at, path)) return 0;
    struct stat found;
    return operation(fstatat(at, path, &found, 0) != 0, 0); /* a new file needs a block, an old one is there */
}
int open(const char *path, int flags, ...) {
    MODE REAL(int, "open", const char *, int, ...);
    return may_open(AT_FDCWD, path, flags) < 0 ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE REAL(int, "open64", const char *, int, ...);
    return may_open(AT_FDCWD, path, flags) < 0 ? -1 : real(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    MODE REAL(int, "openat", int, const char *, int, ...);
    return may_open(at, path, flags) < 0 ? -1 : real(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    MODE REAL(int, "openat64", int, const char *, int, ...);
    return may_open(at, path, flags) < 0 ? -1 : real(at, path, flags, mode);
}

static ssize_t (*real_write)(int, const void *, size_t);
ssize_t write(int fd, const void *data, size_t size) {
    if (!real_write) real_write = dlsym(RTLD_NEXT, "write");
    if (!fd_below(fd)) return real_write(fd, data, size);
    int what = operation(1, 1);
    if (what < 0) return -1;
    ssize_t written = real_write(fd, data, what && size > 1 ? size / 2 : size);
    if (what && how == 4) _exit(137);
    return written;
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (!fd_below(fd) || !number) return real(fd, parts, number);
    return write(fd, parts[0].iov_base, parts[0].iov_len); /* a short write is allowed */
}
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t);
    return fd_below(out) && operation(1, 0) < 0 ? -1 : real(out, in, offset, size);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t);
    return fd_below(out) && operation(1, 0) < 0 ? -1 : real(out, in, offset, size);
}
int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    return fd_below(fd) && operation(0, 0) < 0 ? -1 : real(fd, size);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return below(AT_FDCWD, to) && operation(0, 0) < 0 ? -1 : real(from, to);
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return below(to_at, to) && operation(0, 0) < 0 ? -1 : real(from_at, from, to_at, to);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return below(AT_FDCWD, path) && operation(0, 0) < 0 ? -1 : real(path);
}
int unlinkat(int at, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    return below(at, path) && operation(0, 0) < 0 ? -1 : real(at, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return below(AT_FDCWD, path) && operation(1, 0) < 0 ? -1 : real(path, mode);
}
int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    return below(AT_FDCWD, path) && operation(0, 0) < 0 ? -1 : real(path);
}
int fsync(int fd) {
    REAL(int, "fsync", int);
    return fd_below(fd) && operation(0, 0) < 0 ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return fd_below(fd) && operation(0, 0) < 0 ? -1 : real(fd);
}
