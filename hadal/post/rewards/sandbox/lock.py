"""A process takes away its own rights, for good: seccomp (Linux), no privilege needed.

After `lock` the kernel answers every system call that is not on the list below with EPERM. What is left can
compute, read and write the descriptors that are open, and end itself. Two profiles:

    "compute"   no file can be opened, for reading neither; no thread
    "read"      files can be opened for reading, and threads started: for libraries that import late

Neither can open a file for writing, create, rename or remove one, open a socket, start a process, or send a
signal to another. This file imports the standard library alone, since the jail loads it by its path.

A filter is a program for the kernel's BPF machine over call number, architecture, arguments: see seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# Numbers of the system calls by architecture: x86_64, aarch64 (-1: it has none of the name).
_ALWAYS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "newfstatat": (262, 79),
    "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "alarm": (37, -1), "setitimer": (38, 103), "getitimer": (36, 102),
    "dup": (32, 23), "dup2": (33, -1), "dup3": (292, 24), "fcntl": (72, 25), "poll": (7, -1),
    "ppoll": (271, 73), "select": (23, -1), "pselect6": (270, 72), "futex": (202, 98),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, -1), "times": (100, 153),
    "getrusage": (98, 165), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getpid": (39, 172),
    "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getcwd": (79, 17), "getrandom": (318, 278),
    "uname": (63, 160), "sysinfo": (99, 179), "set_robust_list": (273, 99), "rseq": (334, 293),
    "membarrier": (324, 283), "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_READING = {
    "stat": (4, -1), "lstat": (6, -1), "statx": (332, 291), "access": (21, -1), "faccessat": (269, 48),
    "faccessat2": (439, 439), "getdents64": (217, 61), "readlink": (89, -1), "readlinkat": (267, 78),
    "fstatfs": (138, 44),
}  # fmt: skip
_OPEN, _OPENAT = (2, -1), (257, 56)
_IOCTL, _PRLIMIT, _KILL, _TGKILL = (16, 29), (302, 261), (62, 129), (234, 131)
_CLONE, _CLONE3, _SECCOMP = (56, 220), (435, 435), (317, 277)

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm64": (1, 0xC00000B7)}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0x400000  # O_TMPFILE's own bit
_TCGETS = 0x5401  # what isatty() asks
_CLONE_THREAD = 0x10000

_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_REFUSE = _ERRNO | errno.EPERM
_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


class LockError(OSError):
    """This machine cannot take the rights away."""


def _load(offset: int) -> _Instruction:
    return 0x20, 0, 0, offset


def _equal(value: int, otherwise: int) -> _Instruction:
    """Go on if the loaded word is `value`, else skip so many instructions."""
    return 0x15, 0, otherwise, value


def _answer(value: int) -> _Instruction:
    return 0x06, 0, 0, value


def _argument(index: int, high: bool = False) -> _Instruction:
    """Load half of a 64-bit argument (both architectures are little-endian)."""
    return _load(16 + 8 * index + 4 * high)


def _if_equal(index: int, value: int, refusal: int = _REFUSE) -> list[_Instruction]:
    return [_argument(index), _equal(value, 1), _answer(_ALLOW), _answer(refusal)]


def _if_bits(index: int, mask: int, *, are_set: bool) -> list[_Instruction]:
    first, second = (_ALLOW, _REFUSE) if are_set else (_REFUSE, _ALLOW)
    return [_argument(index), (0x45, 0, 1, mask), _answer(first), _answer(second)]


def _if_null(index: int) -> list[_Instruction]:
    return [_argument(index, high=True), _equal(0, 3), _argument(index), _equal(0, 1), _answer(_ALLOW),
            _answer(_REFUSE)]  # fmt: skip


def _filter(profile: str, column: int, architecture: int) -> list[_Instruction]:
    """The whole program. Each rule is: if the call is this one, a body that always answers."""
    pid = os.getpid()
    rules: list[tuple[tuple[int, int], list[_Instruction]]] = [
        (call, [_answer(_ALLOW)]) for call in _ALWAYS.values()
    ]
    rules += [
        (_IOCTL, _if_equal(1, _TCGETS, _ERRNO | errno.ENOTTY)),
        (_PRLIMIT, _if_null(2)),  # limits may be read, not set
        (_KILL, _if_equal(0, pid)),
        (_TGKILL, _if_equal(0, pid)),
        (_CLONE3, [_answer(_ERRNO | errno.ENOSYS)]),  # its flags lie in memory; libraries then use clone
    ]
    if profile == "read":
        rules += [(call, [_answer(_ALLOW)]) for call in _READING.values()]
        rules += [
            (_OPEN, _if_bits(1, _WRITES, are_set=False)),
            (_OPENAT, _if_bits(2, _WRITES, are_set=False)),
            (_CLONE, _if_bits(0, _CLONE_THREAD, are_set=True)),
        ]
    program = [_load(4), (0x15, 1, 0, architecture), _answer(_KILL_PROCESS), _load(0)]
    for call, body in rules:
        if call[column] >= 0:
            program += [_equal(call[column], len(body)), *body]
    return [*program, _answer(_REFUSE)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def lock(profile: str) -> None:
    """Take the rights of all threads of this process away. Raises LockError where that cannot be done."""
    if platform.system() != "Linux" or platform.machine() not in _ARCHITECTURES:
        where = f"{platform.system()} on {platform.machine()}"
        raise LockError(f"system calls can be filtered on Linux, x86_64 or aarch64; this is {where}")
    column, architecture = _ARCHITECTURES[platform.machine()]
    program = _filter(profile, column, architecture)
    packed = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    described = _Program(len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise LockError(ctypes.get_errno(), "no_new_privs was refused")
    # SECCOMP_SET_MODE_FILTER for all threads (TSYNC)
    if libc.syscall(_SECCOMP[column], 1, 1, ctypes.byref(described)):
        raise LockError(ctypes.get_errno(), f"seccomp was refused ({os.strerror(ctypes.get_errno())})")


def die_with_parent(parent: int) -> None:
    """Be killed when the process `parent` ends (Linux; elsewhere nothing happens)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
        if os.getppid() != parent:
            os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends, so that none gets out of sight (Linux)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
