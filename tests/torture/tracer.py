"""System calls of forked processes, seen one by one: let through, cut short, refused, or the last thing a process does.

A small ptrace(2) tracer for Linux on x86-64 and aarch64. A child asks to be traced and installs a seccomp(2) filter, so
that only calls which can change files stop it; its threads and children are followed. Of those calls the tracer
looks at the ones below one directory, one at a time over all threads and processes: who comes while another
is inside waits at its entry. So the order in which they are seen is one in which they have happened.

A call is known by what it is and how often it has come (`Call.key`), never by its number among all: threads come in
another order each time.
"""

import contextlib
import ctypes
import errno
import os
import signal
import struct
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import attrs

from tests.torture.calls import MACHINES, NAMES, SHAPES, Call, Machine

TRACEME, CONT, SYSCALL, SETOPTIONS, GETREGSET, SETREGSET, GET_SYSCALL_INFO = 0, 7, 24, 0x4200, 0x4204, 0x4205, 0x420E
OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x80 | 0x100000  # calls' stops marked; forks, clones, seccomp; killed with the tracer
SECCOMP_STOP, EXIT_STOP, WALL = signal.SIGTRAP | 7 << 8, signal.SIGTRAP | 0x80, 0x40000000
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER, RET_TRACE, RET_ALLOW = 22, 38, 2, 0x7FF00000, 0x7FFF0000
AT_FDCWD, AT_REMOVEDIR = -100, 0x200
UNTRACEABLE = 96


class NotPermitted(Exception):
    """This machine does not let a process trace its own children."""


@attrs.frozen(kw_only=True)
class Do:
    """What becomes of a call; nothing said: it is made.

    answer: what the process gets, a result or a negative errno, and the call is not made. most: bytes that a write may
    write. kill: the process dies "before" the call, or "after" it without knowing what it came to.
    """

    answer: int | None = None
    most: int | None = None
    kill: str = ""


MADE = Do()


def run(
    bodies: Sequence[Callable[[], int]],
    directory: Path,
    decide: Callable[[Call], Do],
    *,
    told: Callable[[Call, int], None] = lambda call, result: None,
    traced: Collection[int] | None = None,
    limit_s: float = 120.0,
) -> list[str]:
    """Fork a process for each body, all traced or those that are named, and see to their ends: "exit 0", "signal 9".

    decide: asked at the entry of each call below `directory`. told: of its result, unless somebody died.
    After limit_s all are killed. NotPermitted where nobody may trace.
    """
    machine = MACHINES.get(os.uname().machine)
    if machine is None or sys.platform != "linux":
        known = " and ".join(MACHINES)
        raise NotPermitted(f"the tracer knows Linux on {known}, not {sys.platform} on {os.uname().machine}")
    wanted = set(range(len(bodies)) if traced is None else traced)
    pids = {_fork(body, machine if rank in wanted else None): rank for rank, body in enumerate(bodies)}
    tracer = _Tracer(machine, pids, Path(directory).resolve(), decide, told)

    def end() -> None:
        for pid, rank in pids.items():
            if rank not in tracer.ends:
                with contextlib.suppress(ProcessLookupError):  # it could not be traced, and has ended
                    os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    try:
        for pid in [pid for pid, rank in pids.items() if rank in wanted]:
            tracer.begin(pid)
        timer.start()
        tracer.follow()
    except BaseException:
        end()
        raise
    finally:
        timer.cancel()
    return [tracer.ends[rank] for rank in range(len(bodies))]


def _fork(body: Callable[[], int], machine: Machine | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if machine is not None:
            _ask_to_be_traced(machine)
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ask_to_be_traced(machine: Machine) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(TRACEME, 0, 0, 0) != 0:
        os._exit(UNTRACEABLE)
    os.kill(os.getpid(), signal.SIGSTOP)
    known = sorted(machine.numbers.values())
    program = [(0x20, 0, 0, 4), (0x15, 0, len(known) + 1, machine.audit), (0x20, 0, 0, 0)]  # the ABI, the number
    program += [(0x15, len(known) - index, 0, number) for index, number in enumerate(known)]
    program += [(0x06, 0, 0, RET_ALLOW), (0x06, 0, 0, RET_TRACE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    header = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(code)))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, FILTER, header, 0, 0):
        os._exit(UNTRACEABLE)


class _Tracer:
    """The loop over stops; whoever makes it must be the one thread that forked, and that goes on."""

    def __init__(self, machine, pids, directory, decide, told):
        self.machine, self.pids, self.directory = machine, pids, str(directory)
        self.decide, self.told = decide, told
        self.names = {number: name for name, number in machine.numbers.items()}
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.ends: dict[int, str] = {}
        self.rank_of: dict[int, int] = dict(pids)
        self.times: Counter[str] = Counter()
        self.inside: tuple[int, Call, Do] | None = None
        self.waiting: deque[tuple[int, Call]] = deque()

    def begin(self, pid: int) -> None:
        _, status = os.waitpid(pid, WALL)
        if not os.WIFSTOPPED(status):
            raise NotPermitted(
                "a child cannot ask to be traced here: allow ptrace (in a container, --cap-add=SYS_PTRACE or "
                "--security-opt seccomp=unconfined)"
            )
        self._ptrace(SETOPTIONS, pid, 0, OPTIONS)
        self._ptrace(CONT, pid, 0, 0)

    def follow(self) -> None:
        """Until all processes have ended."""
        while len(self.ends) < len(self.pids):
            tid, status = os.waitpid(-1, WALL)
            if not os.WIFSTOPPED(status):
                self._ended(tid, status)
                continue
            stop = status >> 8
            try:
                if stop == SECCOMP_STOP:
                    self._entered(tid)
                elif stop == EXIT_STOP:
                    self._left(tid)
                elif stop >> 8 or stop in (signal.SIGSTOP, signal.SIGTRAP):  # a fork or clone, a thread's first stop
                    self._ptrace(CONT, tid, 0, 0)
                else:
                    self._ptrace(CONT, tid, 0, stop)
            except ProcessLookupError:
                pass  # killed meanwhile; its end is told as well

    def _ended(self, tid: int, status: int) -> None:
        if tid in self.pids:
            code = os.waitstatus_to_exitcode(status)
            if code == UNTRACEABLE:
                raise NotPermitted("a child may not install a seccomp filter here: the kernel lacks it, or forbids it")
            self.ends[self.pids[tid]] = f"exit {code}" if code >= 0 else f"signal {-code}"
        self.waiting = deque(one for one in self.waiting if one[0] != tid)
        if self.inside is not None and self.inside[0] == tid:
            self.inside = None
            self._next()

    def _entered(self, tid: int) -> None:
        call = self._call(tid)
        if call is None:
            self._ptrace(CONT, tid, 0, 0)
            return
        self.waiting.append((tid, call))
        self._next()

    def _next(self) -> None:
        """Let one of those that wait make its call, if nobody is making one."""
        while self.inside is None and self.waiting:
            tid, call = self.waiting.popleft()
            call = attrs.evolve(call, time=self.times[call.kind])
            self.times[call.kind] += 1
            do = self.decide(call)
            if do.kill == "before":
                self._kill(call.rank)
                continue
            with contextlib.suppress(ProcessLookupError):  # killed while it waited
                if do.answer is not None:
                    self._poke(tid, number=-1)
                elif do.most is not None:
                    self._poke(tid, argument=(SHAPES["write"]["count"], min(do.most, call.count)))
                self._ptrace(SYSCALL, tid, 0, 0)
                self.inside = (tid, call, do)

    def _left(self, tid: int) -> None:
        assert self.inside is not None and self.inside[0] == tid
        _, call, do = self.inside
        self.inside = None
        if do.kill == "after":
            self._kill(call.rank)
        else:
            if do.answer is not None:
                self._poke(tid, result=do.answer)
                result = do.answer
            else:
                (result,) = struct.unpack_from("=q", self._info(tid), 24)
            self.told(call, result)
            self._ptrace(CONT, tid, 0, 0)
        self._next()

    def _kill(self, rank: int) -> None:
        os.kill(next(pid for pid, one in self.pids.items() if one == rank), signal.SIGKILL)

    def _call(self, tid: int) -> Call | None:
        """The call at whose entry a thread stands; None if it has to do with no file below the directory."""
        number, *arguments = struct.unpack_from("=7Q", self._info(tid), 24)
        name = self.names[number]
        at = {what: arguments[place] for what, place in SHAPES[name].items()}
        proc = f"/proc/{tid}"
        if "fd" in at:
            path = self._below(_link(f"{proc}/fd/{at['fd'] & 0xFFFFFFFF}"))
        else:
            path = self._place(tid, at["path"], at.get("at"))
        target = self._place(tid, at["path2"], at.get("at2")) if "path2" in at else ""
        if path is None or target is None:
            return None
        flags, data, offset = at.get("flags", 0), b"", None
        if name == "creat":
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        if NAMES.get(name, name) == "open" and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) == 0:
            return None
        if "fd" in at and name not in ("fsync", "fdatasync", "flock"):
            fields = dict(line.split(":\t", 1) for line in _text(f"{proc}/fdinfo/{at['fd']}").splitlines())
            flags = int(fields["flags"], 8)
            if flags & (os.O_WRONLY | os.O_RDWR) == 0:
                return None
            if "data" in at:
                data = self._memory(tid, at["data"], at["count"])
                offset = at.get("offset", int(fields["pos"]))
                offset = None if flags & os.O_APPEND else offset
        if name == "unlinkat":
            name = "rmdir" if flags & AT_REMOVEDIR else "unlink"
        return Call(
            rank=self._rank(tid), name=NAMES.get(name, name), path=path, target=target, flags=flags,
            count=at.get("count", 0), data=data, offset=offset,
        )  # fmt: skip

    def _place(self, tid: int, address: int, at: int | None) -> str | None:
        """The path at an address of a thread's memory, below the directory or None."""
        path, start = b"", address
        while b"\0" not in path:
            path += self._memory(tid, start, 256 - start % 256)  # never over a page's end
            start = address + len(path)
        text = os.fsdecode(path.partition(b"\0")[0])
        if not text.startswith("/"):
            number = ctypes.c_int32(AT_FDCWD if at is None else at & 0xFFFFFFFF).value
            text = f"{_link(f'/proc/{tid}/cwd' if number == AT_FDCWD else f'/proc/{tid}/fd/{number}')}/{text}"
        return self._below(text)

    def _below(self, path: str) -> str | None:
        path = os.path.normpath(path)
        if path == self.directory:
            return "."
        return path[len(self.directory) + 1 :] if path.startswith(f"{self.directory}/") else None

    def _rank(self, tid: int) -> int:
        """Of a thread, and of a process that a rank has forked: the rank's."""
        if tid not in self.rank_of:
            fields = dict(line.split(":\t", 1) for line in _text(f"/proc/{tid}/status").splitlines())
            group = int(fields["Tgid"])
            self.rank_of[tid] = self._rank(int(fields["PPid"]) if group == tid else group)
        return self.rank_of[tid]

    def _memory(self, tid: int, address: int, count: int) -> bytes:
        with Path(f"/proc/{tid}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(count)

    def _info(self, tid: int) -> bytes:
        """struct ptrace_syscall_info; from byte 24 on the number and the arguments, or the result."""
        found = ctypes.create_string_buffer(96)
        self._ptrace(GET_SYSCALL_INFO, tid, 96, found)
        return found.raw

    def _poke(self, tid: int, *, number=None, argument=None, result=None) -> None:
        machine = self.machine
        registers = (ctypes.c_uint64 * machine.registers)()
        vector = struct.pack("=QQ", ctypes.addressof(registers), ctypes.sizeof(registers))
        self._ptrace(GETREGSET, tid, 1, vector)
        if argument is not None:
            registers[machine.arguments[argument[0]]] = argument[1]
        if result is not None:
            registers[machine.result] = result & (2**64 - 1)
        if number is not None and machine.number is not None:
            registers[machine.number] = number & (2**64 - 1)
        self._ptrace(SETREGSET, tid, 1, vector)
        if number is not None and machine.number is None:
            alone = ctypes.c_int32(number)
            self._ptrace(SETREGSET, tid, 0x404, struct.pack("=QQ", ctypes.addressof(alone), 4))

    def _ptrace(self, request: int, tid: int, address: int, data: object) -> None:
        call = self.libc.ptrace
        call.restype = ctypes.c_long
        given = ctypes.c_void_p(data) if isinstance(data, int) else data
        if call(ctypes.c_long(request), ctypes.c_long(tid), ctypes.c_void_p(address), given) < 0:
            number = ctypes.get_errno()
            if number == errno.ESRCH:
                raise ProcessLookupError
            raise OSError(number, f"ptrace request {request:#x}: {os.strerror(number)}")


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        raise ProcessLookupError from None
