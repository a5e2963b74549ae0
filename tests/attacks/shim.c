/* Preloaded into a process: sees every call of libc that changes files below one folder, whichever library makes it.
 *
 * Armed (attacks_arm), it counts these calls in memory shared with the parent process, and at the k-th one ends the
 * process with SIGKILL, or stops it with SIGSTOP, before the call is made (a write may be made by half first). It can
 * also log the calls with what they wrote, for the simulation of power losses. Nothing is really synced: no power is
 * lost here. The kernel is called directly, so nothing here depends on the order in which libraries are loaded.
 *
 * What is sent through sockets can be counted as well, so that a process can be ended between two requests.
 *
 * Not seen: system calls made without libc (some Rust libraries rename so), stdio's own buffers (fwrite), and stores
 * through writable mappings. The replay of a log is compared with the folder it was recorded in, so that none of these
 * can go unnoticed there.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL, KILL_TORN, STOP };

struct record {
  uint32_t kind, path_length, path2_length, flag;
  uint64_t inode, offset, length;
};

static atomic_long *count;
static char root[PATH_MAX];
static size_t root_length;
static int armed, action, sockets, log_fd = -1;
static long act_at;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void start(void) {
  count = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* Begin: folder to watch, what to do (enum above) at which operation (from 1), a descriptor for the log or -1, whether
 * to count what sockets send. */
void attacks_arm(const char *folder, int what, long at, int log, int network, atomic_long *counter) {
  snprintf(root, sizeof root, "%s", folder);
  root_length = strlen(root);
  action = what;
  act_at = at;
  log_fd = log;
  sockets = network;
  count = counter ? counter : count;
  atomic_store(count, 0);
  armed = 1;
}

/* A counter of its own for a child about to be forked. */
atomic_long *attacks_counter(void) {
  return mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

long attacks_count(atomic_long *counter) { return atomic_load(counter); }

void attacks_free(atomic_long *counter) { munmap((void *)counter, 4096); }

static long raw_write(int fd, const void *data, size_t n) { return syscall(SYS_write, fd, data, n); }

static int below(const char *path) {
  return !strncmp(path, root, root_length) && (path[root_length] == '/' || path[root_length] == 0);
}

/* The absolute form of (directory descriptor, path) in `out`; whether it is to be watched. */
static int watched(int dirfd, const char *path, char *out) {
  if (!armed || !path) return 0;
  out[0] = 0;
  if (path[0] != '/') {
    if (dirfd == AT_FDCWD) {
      if (!getcwd(out, PATH_MAX)) return 0;
    } else {
      char link[64];
      snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
      ssize_t n = readlink(link, out, PATH_MAX - 1);
      if (n < 0) return 0;
      out[n] = 0;
    }
    size_t n = strlen(out);
    while (path[0] == '.' && path[1] == '/') path += 2;
    snprintf(out + n, PATH_MAX - n, "/%s", path);
  } else
    snprintf(out, PATH_MAX, "%s", path);
  return below(out);
}

static int watched_fd(int fd, struct stat *status, char *out) {
  status->st_mode = 0;
  if (!armed || fd == log_fd || syscall(SYS_fstat, fd, status)) return 0;
  if (!S_ISREG(status->st_mode) && !S_ISDIR(status->st_mode)) return 0;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, out, PATH_MAX - 1);
  if (n < 0) return 0;
  out[n] = 0;
  return below(out);
}

/* Count one operation; returns 1 if it is a write of which half is to be made before the end. Holds the mutex. */
static int enter(void) {
  pthread_mutex_lock(&mutex);
  if (atomic_fetch_add(count, 1) + 1 != act_at) return 0;
  if (action == KILL) syscall(SYS_kill, getpid(), SIGKILL);
  if (action == STOP) syscall(SYS_kill, getpid(), SIGSTOP);
  return action == KILL_TORN;
}

static void note(char kind, const char *path, const char *path2, uint64_t inode, uint64_t offset, uint64_t length,
                 uint32_t flag) {
  if (log_fd < 0) return;
  struct record r = {kind, strlen(path), path2 ? strlen(path2) : 0, flag, inode, offset, length};
  raw_write(log_fd, &r, sizeof r);
  raw_write(log_fd, path, r.path_length);
  if (path2) raw_write(log_fd, path2, r.path2_length);
}

static void leave(void) {
  int saved = errno;
  pthread_mutex_unlock(&mutex);
  errno = saved;
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
}

/* One operation that is not of a file. */
static void between(void) {
  if (enter()) die();
  leave();
}

static int do_open(int dirfd, const char *path, int flags, mode_t mode) {
  char full[PATH_MAX];
  int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
  if (!writes || !watched(dirfd, path, full)) return syscall(SYS_openat, dirfd, path, flags, mode);
  struct stat before, after;
  if (enter()) die();
  int there = !syscall(SYS_newfstatat, AT_FDCWD, full, &before, AT_SYMLINK_NOFOLLOW);
  int fd = syscall(SYS_openat, dirfd, path, flags, mode);
  if (fd >= 0 && log_fd >= 0 && !syscall(SYS_fstat, fd, &after)) {
    if (!there) note('c', full, NULL, after.st_ino, 0, 0, after.st_mode);
    else if ((flags & O_TRUNC) && before.st_size) note('t', full, NULL, after.st_ino, 0, 0, 0);
    else note('o', full, NULL, after.st_ino, 0, 0, 0);
  }
  leave();
  return fd;
}

#define MODE(flags)                        \
  mode_t mode = 0;                         \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list list;                          \
    va_start(list, flags);                 \
    mode = va_arg(list, mode_t);           \
    va_end(list);                          \
  }

int open(const char *path, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, path, flags, mode); }
int openat(int fd, const char *path, int flags, ...) { MODE(flags) return do_open(fd, path, flags, mode); }
int openat64(int fd, const char *path, int flags, ...) { MODE(flags) return do_open(fd, path, flags, mode); }
int __open_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int creat(const char *path, mode_t mode) { return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* C++ streams and the like. Only that the file appears is seen; what stdio writes is not. */
static FILE *do_fopen(const char *path, const char *mode, const char *name) {
  FILE *(*next)(const char *, const char *) = dlsym(RTLD_NEXT, name);
  char full[PATH_MAX];
  if (mode[0] == 'r' || !watched(AT_FDCWD, path, full)) return next(path, mode);
  int flags = O_WRONLY | O_CREAT | (mode[0] == 'w' ? O_TRUNC : 0) | (strchr(mode, 'x') ? O_EXCL : 0);
  int fd = do_open(AT_FDCWD, path, flags, 0666);
  if (fd < 0) return NULL;
  syscall(SYS_close, fd);
  return next(path, strchr(mode, 'x') ? "w" : mode);
}
FILE *fopen(const char *path, const char *mode) { return do_fopen(path, mode, "fopen"); }
FILE *fopen64(const char *path, const char *mode) { return do_fopen(path, mode, "fopen64"); }

static ssize_t do_write(int fd, const struct iovec *parts, int n, off_t offset) {
  char full[PATH_MAX];
  struct stat status;
  int positioned = offset >= 0;
  if (!watched_fd(fd, &status, full)) {
    if (armed && sockets && S_ISSOCK(status.st_mode)) between();
    return positioned ? syscall(SYS_pwritev, fd, parts, n, (long)offset, 0L) : syscall(SYS_writev, fd, parts, n);
  }
  if (enter()) {
    size_t half = parts[0].iov_len / 2;
    if (positioned) syscall(SYS_pwrite64, fd, parts[0].iov_base, half, offset);
    else raw_write(fd, parts[0].iov_base, half);
    die();
  }
  ssize_t done =
      positioned ? syscall(SYS_pwritev, fd, parts, n, (long)offset, 0L) : syscall(SYS_writev, fd, parts, n);
  if (done > 0 && log_fd >= 0) {
    off_t at = positioned ? offset : (off_t)syscall(SYS_lseek, fd, 0L, SEEK_CUR) - done;
    note('w', full, NULL, status.st_ino, at, done, 0);
    size_t left = done;
    for (int i = 0; i < n && left; i++) {
      size_t take = parts[i].iov_len < left ? parts[i].iov_len : left;
      const char *data = parts[i].iov_base;
      for (size_t sent = 0; sent < take;) {
        long part = raw_write(log_fd, data + sent, take - sent);
        if (part <= 0) abort();
        sent += part;
      }
      left -= take;
    }
  }
  leave();
  return done;
}

ssize_t write(int fd, const void *data, size_t n) {
  struct iovec part = {(void *)data, n};
  return do_write(fd, &part, 1, -1);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) {
  struct iovec part = {(void *)data, n};
  return do_write(fd, &part, 1, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t offset) { return pwrite(fd, data, n, offset); }
ssize_t writev(int fd, const struct iovec *parts, int n) { return do_write(fd, parts, n, -1); }
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t offset) { return do_write(fd, parts, n, offset); }
ssize_t pwritev64(int fd, const struct iovec *parts, int n, off_t offset) { return do_write(fd, parts, n, offset); }

static void sending(int fd) {
  if (armed && sockets && fd != log_fd) between();
}
ssize_t send(int fd, const void *data, size_t n, int flags) {
  sending(fd);
  return syscall(SYS_sendto, fd, data, n, flags, NULL, 0);
}
ssize_t sendto(int fd, const void *data, size_t n, int flags, const struct sockaddr *to, socklen_t length) {
  sending(fd);
  return syscall(SYS_sendto, fd, data, n, flags, to, length);
}
ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
  sending(fd);
  return syscall(SYS_sendmsg, fd, message, flags);
}

/* Copies inside the kernel become reads and writes, which are seen. */
static ssize_t copy(int in, off_t *in_offset, int out, off_t *out_offset, size_t n) {
  char data[1 << 16];
  size_t take = n < sizeof data ? n : sizeof data;
  ssize_t got = in_offset ? syscall(SYS_pread64, in, data, take, *in_offset) : syscall(SYS_read, in, data, take);
  if (got <= 0) return got;
  struct iovec part = {data, got};
  ssize_t done = do_write(out, &part, 1, out_offset ? *out_offset : -1);
  if (done > 0 && in_offset) *in_offset += done;
  if (done > 0 && out_offset) *out_offset += done;
  return done;
}
ssize_t copy_file_range(int in, off_t *in_offset, int out, off_t *out_offset, size_t n, unsigned flags) {
  char full[PATH_MAX];
  struct stat status;
  if (!watched_fd(out, &status, full)) return syscall(SYS_copy_file_range, in, in_offset, out, out_offset, n, flags);
  return copy(in, in_offset, out, out_offset, n);
}
ssize_t sendfile(int out, int in, off_t *offset, size_t n) {
  char full[PATH_MAX];
  struct stat status;
  if (!watched_fd(out, &status, full)) return syscall(SYS_sendfile, out, in, offset, n);
  return copy(in, offset, out, NULL, n);
}
ssize_t sendfile64(int out, int in, off_t *offset, size_t n) { return sendfile(out, in, offset, n); }

static int do_sync(int fd, long call) {
  char full[PATH_MAX];
  struct stat status;
  if (!watched_fd(fd, &status, full)) return syscall(call, fd);
  if (enter()) die();
  note('s', full, NULL, status.st_ino, 0, 0, S_ISDIR(status.st_mode) != 0);
  leave();
  return 0;
}
int fsync(int fd) { return do_sync(fd, SYS_fsync); }
int fdatasync(int fd) { return do_sync(fd, SYS_fdatasync); }

int ftruncate(int fd, off_t length) {
  char full[PATH_MAX];
  struct stat status;
  if (!watched_fd(fd, &status, full)) return syscall(SYS_ftruncate, fd, length);
  if (enter()) die();
  int result = syscall(SYS_ftruncate, fd, length);
  if (!result) note('t', full, NULL, status.st_ino, 0, length, 0);
  leave();
  return result;
}
int ftruncate64(int fd, off_t length) { return ftruncate(fd, length); }
int posix_fallocate(int fd, off_t offset, off_t length) {
  struct stat status;
  if (syscall(SYS_fstat, fd, &status)) return errno;
  if (status.st_size >= offset + length) return 0;
  return ftruncate(fd, offset + length) ? errno : 0;
}
int posix_fallocate64(int fd, off_t offset, off_t length) { return posix_fallocate(fd, offset, length); }

static int do_truncate(const char *path, off_t length) {
  int fd = do_open(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
  if (fd < 0) return -1;
  int result = ftruncate(fd, length);
  syscall(SYS_close, fd);
  return result;
}
int truncate(const char *path, off_t length) { return do_truncate(path, length); }
int truncate64(const char *path, off_t length) { return do_truncate(path, length); }

static int do_rename(int from, const char *a, int to, const char *b, unsigned flags) {
  char full[PATH_MAX], full2[PATH_MAX];
  int first = watched(from, a, full), second = watched(to, b, full2);
  if (!first && !second) return syscall(SYS_renameat2, from, a, to, b, flags);
  if (enter()) die();
  int result = syscall(SYS_renameat2, from, a, to, b, flags);
  if (!result) note('r', full, full2, 0, 0, 0, flags);
  leave();
  return result;
}
int rename(const char *a, const char *b) { return do_rename(AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int from, const char *a, int to, const char *b) { return do_rename(from, a, to, b, 0); }
int renameat2(int from, const char *a, int to, const char *b, unsigned f) { return do_rename(from, a, to, b, f); }

static int do_link(int from, const char *a, int to, const char *b, int flags) {
  char full[PATH_MAX], full2[PATH_MAX];
  watched(from, a, full);
  if (!watched(to, b, full2)) return syscall(SYS_linkat, from, a, to, b, flags);
  if (enter()) die();
  int result = syscall(SYS_linkat, from, a, to, b, flags);
  if (!result) note('l', full, full2, 0, 0, 0, 0);
  leave();
  return result;
}
int link(const char *a, const char *b) { return do_link(AT_FDCWD, a, AT_FDCWD, b, 0); }
int linkat(int from, const char *a, int to, const char *b, int flags) { return do_link(from, a, to, b, flags); }

static int do_symlink(const char *target, int to, const char *path) {
  char full[PATH_MAX];
  if (!watched(to, path, full)) return syscall(SYS_symlinkat, target, to, path);
  if (enter()) die();
  int result = syscall(SYS_symlinkat, target, to, path);
  if (!result) note('y', full, target, 0, 0, 0, 0);
  leave();
  return result;
}
int symlink(const char *target, const char *path) { return do_symlink(target, AT_FDCWD, path); }
int symlinkat(const char *target, int to, const char *path) { return do_symlink(target, to, path); }

static int do_unlink(int dirfd, const char *path, int flags) {
  char full[PATH_MAX];
  if (!watched(dirfd, path, full)) return syscall(SYS_unlinkat, dirfd, path, flags);
  if (enter()) die();
  int result = syscall(SYS_unlinkat, dirfd, path, flags);
  if (!result) note(flags & AT_REMOVEDIR ? 'd' : 'u', full, NULL, 0, 0, 0, 0);
  leave();
  return result;
}
int unlink(const char *path) { return do_unlink(AT_FDCWD, path, 0); }
int unlinkat(int dirfd, const char *path, int flags) { return do_unlink(dirfd, path, flags); }
int rmdir(const char *path) { return do_unlink(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
  int result = do_unlink(AT_FDCWD, path, 0);
  return result && errno == EISDIR ? do_unlink(AT_FDCWD, path, AT_REMOVEDIR) : result;
}

static int do_mkdir(int dirfd, const char *path, mode_t mode) {
  char full[PATH_MAX];
  if (!watched(dirfd, path, full)) return syscall(SYS_mkdirat, dirfd, path, mode);
  if (enter()) die();
  int result = syscall(SYS_mkdirat, dirfd, path, mode);
  if (!result) note('m', full, NULL, 0, 0, 0, 0);
  leave();
  return result;
}
int mkdir(const char *path, mode_t mode) { return do_mkdir(AT_FDCWD, path, mode); }
int mkdirat(int dirfd, const char *path, mode_t mode) { return do_mkdir(dirfd, path, mode); }
