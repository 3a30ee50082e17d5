"""Limits of an untrusted process: time, memory, files, and system calls (Linux)."""

import os
import sys

MIB = 1024**2
_MAX_FILES = 64

# struct sock_filter, and its operations (linux/bpf_common.h, linux/seccomp.h)
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000  # bit of x86_64's second set of system-call numbers

# AUDIT_ARCH, clone, and the calls that create processes, hold memory outside of the limits, access
# other processes, or open parts of the kernel that no solution needs: fork vfork unshare setns
# shmget semget msgget mq_open memfd_create ptrace process_vm_readv process_vm_writev add_key
# request_key keyctl bpf perf_event_open userfaultfd io_uring_setup mount umount2 pivot_root
_MACHINES = {
    "x86_64": (0xC000003E, 56, [57, 58, 272, 308, 29, 64, 68, 240, 319, 101, 310, 311, 248, 249,
                                250, 321, 298, 323, 425, 165, 166, 155]),
    "aarch64": (0xC00000B7, 220, [97, 268, 194, 190, 186, 180, 279, 117, 270, 271, 217, 218,
                                  219, 280, 241, 282, 425, 40, 39, 41]),
}  # fmt: skip
_CLONE3 = 435  # denied: a filter cannot read its flags; glibc then falls back to clone


def limit(seconds: int, memory_mib: int) -> None:
    """Limit this process's processor time, address space and open files; forbid writing files.

    A privileged process could raise its limits again; in a user namespace no process can.
    """
    import resource

    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _MAX_FILES,
    }
    if sys.platform != "darwin":  # macOS rejects this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib * MIB, memory_mib * MIB))
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def system_call_filter() -> bytes:
    """Return a seccomp program that lets a process create threads, but no other process.

    Raises OSError on a machine whose system-call numbers are not listed here.
    """
    import struct  # imported here, because a candidate's process must start fast

    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES:
        raise OSError(f"no list of system calls for {sys.platform} on {machine}")
    architecture, clone, denied = _MACHINES[machine]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    for number in denied:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    program += [
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
