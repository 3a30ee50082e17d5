"""Linux namespaces through system calls, for machines without bubblewrap.

    python namespaces.py VIEW MODULE ARGUMENT...

runs `MODULE.main(ARGUMENT...)` as process 1 of its own user, process, mount, network, IPC and host
name namespaces. `VIEW` is the encoded list of the contents of its read-only file system.
"""

import ctypes
import importlib
import os
import signal

from liger_trainer.runs.rewards.judge.wire import decode

_NEW = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # NS UTS IPC ...
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _REMOUNT, _BIND = 1, 2, 4, 32, 4096
_RECURSIVE, _PRIVATE, _DETACH = 16384, 1 << 18, 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD = 442, 0x8000, -100
_SET_DEATH_SIGNAL, _SET_SECCOMP, _DROP_BOUND, _NO_NEW_PRIVILEGES = 1, 22, 24, 38
_CAPABILITIES_V3 = 0x20080522
_NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """The C struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def main(view: str, module: str, *arguments: str) -> None:
    """Enter the namespaces, run the module, and exit with its exit code."""
    user, group = os.getuid(), os.getgid()
    _call("prctl", _SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _call("unshare", _NEW)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{_NOBODY} {group} 1")
    first = os.fork()
    if first:
        os.dup2(1, 0)  # close the socket here, so that its other end notices when process 1 exits
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)
    _call("prctl", _SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    run = importlib.import_module(f"liger_trainer.runs.rewards.judge.{module}").main
    _change_root(decode(os.fsencode(view)))
    _drop_privileges()
    run(*arguments)


def install_filter(program: bytes) -> None:
    """Make seccomp run `program` on every further system call of this process."""
    struct = _Program(len(program) // 8, program)
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("prctl", _SET_SECCOMP, 2, ctypes.byref(struct), 0, 0)


def _change_root(view: list[tuple]) -> None:
    """Make a read-only file system the root that holds only what `view` lists."""
    _call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
    _call("mount", b"tmpfs", b"/tmp", b"tmpfs", _NO_SETUID | _NO_DEVICES, b"mode=755")
    os.mkdir("/tmp/old")
    _call("syscall", _PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/old")
    os.chdir("/")
    for operation, *paths in view:
        path = paths[-1]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if operation == "symlink":
            os.symlink(*paths)
        elif operation == "tmpfs":
            _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", _READ_ONLY, None)
        else:
            _bind("/old" + paths[0], path)
    _call("umount2", b"/old", _DETACH)
    os.rmdir("/old")
    flags = _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID | _NO_DEVICES
    _call("mount", None, b"/", None, flags, None)


def _bind(source: str, path: str) -> None:
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT))
    _call("mount", os.fsencode(source), os.fsencode(path), None, _BIND | _RECURSIVE, None)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SETUID | _NO_DEVICES, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    where = (_AT_FDCWD, os.fsencode(path), _AT_RECURSIVE)
    _call("syscall", _MOUNT_SETATTR, *where, ctypes.byref(attributes), ctypes.c_size_t(size))


def _drop_privileges() -> None:
    for capability in range(64):
        if _libc.prctl(_DROP_BOUND, capability, 0, 0, 0):
            break  # beyond the last one
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _call(name: str, *arguments) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
