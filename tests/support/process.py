# Evaluates each line of its input, and answers with a line. See process.rs.
import errno, fcntl, mmap, os, signal, sqlite3, struct, sys, threading

FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
KINDS = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}
OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38


# One number with two names.
errno.errorcode[errno.EDEADLK] = "EDEADLK"


class Interrupted(Exception):
    pass


def heard(*_):
    raise Interrupted


# Python tries a call that was interrupted again, unless the handler raises.
signal.signal(signal.SIGUSR1, heard)


def call(command, fd, kind, start, length):
    lock = struct.pack(FLOCK, KINDS[kind], os.SEEK_SET, start, length, 0)
    return struct.unpack(FLOCK, fcntl.fcntl(fd, command, lock))


def lock(fd, kind, start, length=1):
    call(fcntl.F_SETLK, fd, kind, start, length)


def wait(fd, kind, start, length=1):
    call(fcntl.F_SETLKW, fd, kind, start, length)


def ofd(fd, kind, start, length=1):
    call(OFD_SETLK, fd, kind, start, length)


def ofd_wait(fd, kind, start, length=1):
    call(OFD_SETLKW, fd, kind, start, length)


def query(fd, kind, start, length=1, command=fcntl.F_GETLK):
    kind, _, start, length, pid = call(command, fd, kind, start, length)
    name = {value: name for name, value in KINDS.items()}[kind]
    return "free" if name == "u" else f"{name} {start} {length} {pid}"


class Place:
    """Files, and descriptors of this process for them: three for each, in the order of the files."""

    def __init__(self, *paths):
        self.paths, self.fds = paths, {}
        for at in range(3 * len(paths)):
            self.open(at)

    def open(self, at, flags=os.O_RDWR):
        self.put(at, os.open(self.paths[at // 3], flags))

    def dup(self, at, other):
        self.put(at, os.dup(self.fds[other]))

    def put(self, at, fd):
        """Sets a descriptor; the file that had its place is unlocked (POSIX) and closed."""
        old = self.fds.get(at)
        self.fds[at] = fd
        if old is not None:
            # The end of an open file, and of its locks, is told to nobody who could wait for it.
            ofd(old, "u", 0, 0)
            os.close(old)

    def in_the_way(self, at, kind, start, length, command):
        """Whether something is, how it is held, and whether the range that is named is there."""
        kind, _, found, size, _ = call(command, self.fds[at], kind, start, length)
        if kind == fcntl.F_UNLCK:
            return "free"
        meets = found < start + length and start < found + size
        return f"{'rw'[kind == fcntl.F_WRLCK]} {meets}"


def both(expression):
    """What an expression about a place, `p`, comes to in each of the two `places`."""
    global p
    answers = []
    for p in places:
        answers.append(answer(expression))
    return " | ".join(answers)


def again(fd):
    """Runs this program in this process once more (execve), with `fd` for its first descriptor."""
    os.set_inheritable(fd, True)
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "PROCESS_F": str(fd)})


def answer(expression):
    try:
        return str(eval(expression, globals()))
    except Interrupted:
        return "EINTR"
    except OSError as error:
        return errno.errorcode[error.errno]
    except (ValueError, sqlite3.Error) as error:
        return str(error)


def child(expression):
    """What a child of this process comes to, which ends then."""
    back, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(out, answer(expression).encode())
        os._exit(0)
    os.close(out)
    text = os.read(back, 10000).decode()
    os.close(back)
    os.waitpid(pid, 0)
    return text


def thread(expression):
    """What a thread of this process comes to, which ends then."""
    found = []
    one = threading.Thread(target=lambda: found.append(answer(expression)))
    one.start()
    one.join()
    return found[0]


def mapped(fd, length, access=mmap.ACCESS_READ):
    return mmap.mmap(fd, length, access=access)


if "PROCESS_F" in os.environ:
    f = int(os.environ["PROCESS_F"])
    print(None, flush=True)

for line in sys.stdin:
    print(answer(line.strip()), flush=True)
