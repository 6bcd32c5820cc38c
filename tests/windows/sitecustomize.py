"""Makes Python on Linux as hard to please as on Windows, where nnturbo's own code and its tests are concerned.

    PYTHONPATH=tests/windows python -m pytest tests/engine tests/training

Python imports this module when it starts, and processes that are started inherit it. Windows has no fcntl, no fork and
few signals; opens text in cp1252; does not move, replace or remove what is open; syncs only what is open for writing;
moves no folder onto another; knows names that cannot be; and ends a process whatever signal is sent to it.
"""

import builtins
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import types

MISSING_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
MISSING = {
    "os": {
        *(
            "fork",
            "forkpty",
            "getgid",
            "getloadavg",
            "getpgid",
            "getuid",
            "geteuid",
            "killpg",
            "mkfifo",
            "nice",
            "pipe2",
        ),
        *(
            "register_at_fork",
            "sched_getaffinity",
            "sched_setaffinity",
            "setsid",
            "statvfs",
            "sync",
            "sysconf",
            "uname",
        ),
        *(
            "pipe2",
            "uname",
            "wait",
            "waitid",
            "chown",
            "fchmod",
            "O_NONBLOCK",
            "O_DIRECTORY",
            "O_NOFOLLOW",
            "WIFSIGNALED",
        ),
    },
    "signal": {
        *("SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2"),
        *("alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"),
    },
    "time": {"tzset"},
}
OURS = ("nnturbo", "tests", "engine", "kernels", "training", "benchmarks", "conftest")
TEXT = "cp1252"
FORBIDDEN = frozenset('<>:"|?*') | {chr(code) for code in range(32)}
RESERVED = {"aux", "con", "nul", "prn", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


class WindowsError(PermissionError):
    """With the number that Windows gives."""

    def __init__(self, winerror, path):
        super().__init__(13, "Permission denied", str(path))
        self.winerror = winerror


class Without(types.ModuleType):
    """A module without some of its names; the rest, its dictionary included, is that of the module itself."""

    __slots__ = ("_missing", "_module")

    def __init__(self, module, missing):
        super().__init__(module.__name__)
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_missing", missing)

    def __getattribute__(self, name):
        module = object.__getattribute__(self, "_module")
        if name in object.__getattribute__(self, "_missing"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}: it is not on Windows")
        return getattr(module, name)

    def __setattr__(self, name, value):
        setattr(object.__getattribute__(self, "_module"), name, value)

    def __delattr__(self, name):
        delattr(object.__getattribute__(self, "_module"), name)


def is_open(path):
    """Whether this process has a file open, or one in a folder."""
    path = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd"):
        try:
            held = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the one that lists them
            continue
        if held == path or held.startswith(path + "/"):
            return True
    with real_open("/proc/self/maps", "rb") as maps:
        return f" {path}\n".encode(errors="surrogateescape") in maps.read()


def check_name(path):
    if isinstance(path, int) or str(os.fspath(path)).startswith("/proc/"):
        return
    for part in os.path.normpath(os.fsdecode(path)).split("/"):
        ends_badly = part not in (".", "..") and part[-1:] in (" ", ".")
        if FORBIDDEN & set(part) or ends_badly or part.lower().partition(".")[0] in RESERVED:
            raise OSError(22, "Invalid argument", os.fsdecode(path))


def opened(file, mode="r", buffering=-1, encoding=None, *more, **named):
    if set(mode) & set("wxa+"):
        check_name(file)
    if "b" not in mode and encoding in (None, "locale"):
        encoding = TEXT
    return real_open(file, mode, buffering, encoding, *more, **named)


def moved(source, target, *, replaces):
    check_name(target)
    for path in (source, target):
        if os.path.lexists(path) and not os.path.islink(path) and is_open(path):
            raise WindowsError(32, path)
    if os.path.isdir(target):
        raise WindowsError(5, target)
    if not replaces and os.path.lexists(target):
        raise FileExistsError(17, "File exists", os.fsdecode(source), None, os.fsdecode(target))
    return real_replace(source, target)


def removed(path, *, dir_fd=None):
    if dir_fd is None and os.path.isfile(path) and not os.path.islink(path):
        if is_open(path):
            raise WindowsError(32, path)
        if not os.stat(path).st_mode & stat.S_IWUSR:
            raise WindowsError(5, path)
    return real_remove(path, dir_fd=dir_fd)


def made(path, *more, **named):
    check_name(path)
    return real_mkdir(path, *more, **named)


def synced(number):
    import fcntl

    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    return real_fsync(number)


def killed(process, number):
    return real_kill(process, signal.SIGKILL)


def imported(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002 - Python's own names
    asked_by = str((globals or {}).get("__name__", ""))
    if level == 0 and asked_by.partition(".")[0] in OURS:
        if name in MISSING_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}: it is not on Windows", name=name)
        if name in MISSING:
            return Without(sys.modules.get(name) or real_import(name), MISSING[name])
    return real_import(name, globals, locals, fromlist, level)


class TextPopen(subprocess.Popen):
    """Talks cp1252 where nobody says what."""

    def __init__(self, *arguments, **named):
        is_text = named.get("text") or named.get("universal_newlines")
        if is_text and named.get("encoding") is None and named.get("errors") is None:
            named["encoding"] = TEXT
        super().__init__(*arguments, **named)


real_open, real_replace, real_remove, real_mkdir, real_fsync, real_kill, real_import = (
    *(io.open, os.replace, os.unlink, os.mkdir, os.fsync, os.kill),
    builtins.__import__,
)
builtins.open = io.open = opened
os.replace = lambda source, target, **folders: moved(source, target, replaces=True)
os.rename = lambda source, target, **folders: moved(source, target, replaces=False)
os.unlink = os.remove = removed
os.mkdir, os.fsync, os.kill = made, synced, killed
shutil._use_fd_functions = False  # as there, `rmtree` goes by names
subprocess.Popen = TextPopen
builtins.__import__ = imported
