# Evaluates each line of its input, and answers with a line. See process.rs.
import errno, fcntl, mmap, os, signal, sqlite3, struct, sys, threading

FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
KINDS = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}
OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38


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


def query(fd, kind, start, length=1, command=fcntl.F_GETLK):
    kind, _, start, length, pid = call(command, fd, kind, start, length)
    name = {value: name for name, value in KINDS.items()}[kind]
    return "free" if name == "u" else f"{name} {start} {length} {pid}"


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


for line in sys.stdin:
    print(answer(line.strip()), flush=True)
