/* Preloaded, it makes a local file system behave like NFS as seen by one client:
 *
 *   - removing a file that this process has open, or renaming another over it, leaves it as .nfsXXXX until it is closed;
 *   - flock fails with $SHIM_FLOCK_ERRNO, where that is set;
 *   - for $SHIM_STALE_MS after a directory was first looked at, names that others made in it since then do not show,
 *     neither in listings nor to stat or open; what this process changes there itself shows everything.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MAX_HELD 4096
#define MAX_DIRS 4096

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct { dev_t dev; ino_t ino; char path[4300]; } held[MAX_HELD];
static int n_held, serial;
static struct { char path[4096]; char *names; long until; } dirs[MAX_DIRS];
static int n_dirs;

static long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static long stale_ms(void) {
    const char *text = getenv("SHIM_STALE_MS");
    return text ? atol(text) : 0;
}

/* Only below $SHIM_ROOT: Python's own files are none of our business. */
static int absolute(int dirfd, const char *path, char *out) {
    const char *root = getenv("SHIM_ROOT");
    char base[2048], link[64];
    if (!root) return 0;
    if (path[0] == '/') snprintf(out, 4096, "%s", path);
    else {
        ssize_t n;
        if (dirfd == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
            n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
        snprintf(out, 4096, "%s/%s", base, path);
    }
    return !strncmp(out, root, strlen(root));
}

static int is_open(dev_t dev, ino_t ino) {
    DIR *dir = REAL(opendir)("/proc/self/fd");
    struct dirent *entry;
    struct stat status;
    int found = 0;
    if (!dir) return 0;
    while (!found && (entry = REAL(readdir)(dir)))
        if (entry->d_name[0] != '.' && !fstat(atoi(entry->d_name), &status))
            found = status.st_dev == dev && status.st_ino == ino && S_ISREG(status.st_mode);
    REAL(closedir)(dir);
    return found;
}

/* Keeps an open file under another name in its directory. */
static int silly_rename(const char *path) {
    struct stat status;
    char name[4200];
    const char *slash = strrchr(path, '/');
    if (lstat(path, &status) || !S_ISREG(status.st_mode) || status.st_nlink > 1 || !is_open(status.st_dev, status.st_ino))
        return 0;
    pthread_mutex_lock(&mutex);
    snprintf(name, sizeof name, "%.*s/.nfs%08d%06d", (int)(slash - path), path, getpid(), serial++);
    int done = n_held < MAX_HELD && !REAL(rename)(path, name);
    if (done) {
        held[n_held].dev = status.st_dev;
        held[n_held].ino = status.st_ino;
        snprintf(held[n_held++].path, sizeof held->path, "%s", name);
    }
    pthread_mutex_unlock(&mutex);
    return done;
}

/* Stale views */

static char *listing(const char *path) {
    DIR *dir = REAL(opendir)(path);
    struct dirent *entry;
    size_t length = 1;
    char *names = calloc(1, 2);
    names[0] = '/';
    if (!dir) return names;
    while ((entry = REAL(readdir)(dir))) {
        size_t n = strlen(entry->d_name);
        names = realloc(names, length + n + 2);
        memcpy(names + length, entry->d_name, n);
        length += n;
        names[length++] = '/';
        names[length] = 0;
    }
    REAL(closedir)(dir);
    return names;
}

static int contains(const char *names, const char *name) {
    char wanted[512];
    snprintf(wanted, sizeof wanted, "/%s/", name);
    return strstr(names, wanted) != NULL;
}

/* Whether a name that is there is not seen yet. */
static int hidden(const char *directory, const char *name) {
    int found = -1, result = 0;
    if (!stale_ms() || !strcmp(name, ".") || !strcmp(name, "..")) return 0;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < n_dirs; i++) if (!strcmp(dirs[i].path, directory)) found = i;
    if (found < 0 && n_dirs < MAX_DIRS) {
        found = n_dirs++;
        snprintf(dirs[found].path, 4096, "%s", directory);
        dirs[found].names = NULL;
    }
    if (found >= 0) {
        if (!dirs[found].names || now_ms() > dirs[found].until) {
            free(dirs[found].names);
            dirs[found].names = listing(directory);
            dirs[found].until = now_ms() + stale_ms();
        }
        result = !contains(dirs[found].names, name);
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

static void changed(const char *path) {
    const char *slash = strrchr(path, '/');
    if (!stale_ms() || !slash) return;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < n_dirs; i++)
        if (strlen(dirs[i].path) == (size_t)(slash - path) && !strncmp(dirs[i].path, path, slash - path)) {
            free(dirs[i].names);
            dirs[i].names = NULL;
        }
    pthread_mutex_unlock(&mutex);
}

static int unseen(const char *path) {
    char directory[4096];
    const char *slash = strrchr(path, '/');
    if (!slash) return 0;
    snprintf(directory, sizeof directory, "%.*s", (int)(slash - path), path);
    return hidden(directory, slash + 1);
}

/* Calls */

int unlinkat(int dirfd, const char *path, int flags) {
    char full[4096];
    if (absolute(dirfd, path, full)) {
        if (!(flags & AT_REMOVEDIR) && silly_rename(full)) { changed(full); return 0; }
        int result = REAL(unlinkat)(dirfd, path, flags);
        int error = errno;
        changed(full);
        errno = error;
        return result;
    }
    return REAL(unlinkat)(dirfd, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rename(const char *from, const char *to) {
    char full[4096], target[4096];
    if (absolute(AT_FDCWD, from, full) && absolute(AT_FDCWD, to, target)) {
        silly_rename(target);
        changed(full);
        changed(target);
    }
    return REAL(rename)(from, to);
}

int link(const char *from, const char *to) {
    char target[4096];
    if (absolute(AT_FDCWD, to, target)) changed(target);
    return REAL(link)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    char full[4096];
    if (absolute(AT_FDCWD, path, full)) changed(full);
    return REAL(mkdir)(path, mode);
}

static int opened(int dirfd, const char *path, int flags, mode_t mode) {
    char full[4096];
    if (absolute(dirfd, path, full)) {
        if (flags & O_CREAT) changed(full);
        else if (unseen(full)) { errno = ENOENT; return -1; }
    }
    return REAL(openat)(dirfd, path, flags, mode);
}

#define OPEN(name)                                                     \
    int name(const char *path, int flags, ...) {                       \
        va_list rest;                                                  \
        va_start(rest, flags);                                         \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                  \
        return opened(AT_FDCWD, path, flags, mode);                    \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                   \
    int name(int dirfd, const char *path, int flags, ...) {            \
        va_list rest;                                                  \
        va_start(rest, flags);                                         \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                  \
        return opened(dirfd, path, flags, mode);                       \
    }
OPENAT(openat64)

#define STAT(name, kind)                                               \
    int name(const char *path, struct kind *status) {                  \
        char full[4096];                                               \
        if (absolute(AT_FDCWD, path, full) && unseen(full)) { errno = ENOENT; return -1; } \
        return REAL(name)(path, status);                               \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

/* Also what close leaves: the last descriptor of a kept file removes it. */
int close(int fd) {
    struct stat status;
    int known = n_held > 0 && !fstat(fd, &status);
    int result = REAL(close)(fd);
    if (known && !is_open(status.st_dev, status.st_ino)) {
        pthread_mutex_lock(&mutex);
        for (int i = 0; i < n_held; i++)
            if (held[i].dev == status.st_dev && held[i].ino == status.st_ino) {
                REAL(unlinkat)(AT_FDCWD, held[i].path, 0);
                held[i] = held[--n_held];
                break;
            }
        pthread_mutex_unlock(&mutex);
    }
    return result;
}

struct dirent *readdir(DIR *dir) {
    struct dirent *entry;
    char link[64], path[4096];
    const char *root = getenv("SHIM_ROOT");
    snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd(dir));
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    do entry = REAL(readdir)(dir);
    while (entry && root && !strncmp(path, root, strlen(root)) && hidden(path, entry->d_name));
    return entry;
}

struct dirent64 *readdir64(DIR *dir) { return (struct dirent64 *)readdir(dir); }

int flock(int fd, int operation) {
    const char *text = getenv("SHIM_FLOCK_ERRNO");
    if (text) { errno = atoi(text); return -1; }
    return REAL(flock)(fd, operation);
}
