"""Locks of several processes, on a file of the file system under test and on one of a file system that is known.

Every operation is done on both files, and both must say the same. Operations are chosen at random: record locks and
OFD locks of ranges, flock, what F_GETLK tells, and what closing, reopening and duplicating a file does to locks.
Then the waiting kinds, one after the other: granted in the end, or interrupted by a signal, or refused since two would wait
for each other.

Arguments: the two files, how many random operations, a seed, and "interrupts" where signals end a wait.
"""
import errno, fcntl, multiprocessing, os, random, signal, struct, sys, time

LOCK = "hhqqi4x"
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
PROCESSES, SLOTS = 3, 3


def lock_of(kind, start, length):
    return struct.pack(LOCK, kind, os.SEEK_SET, start, length, 0)


def attempt(action):
    try:
        return action() or "done"
    except OSError as error:
        return errno.errorcode[error.errno]


class Files:
    """The open files of one process on one path."""

    def __init__(self, path):
        self.path = path
        self.slots = [os.open(path, os.O_RDWR) for _ in range(SLOTS)]

    def record(self, slot, command, kind, start, length):
        return attempt(lambda: fcntl.fcntl(self.slots[slot], command, lock_of(kind, start, length)) and None)

    def holder(self, slot, command, kind, start, length):
        """Who is in the way: nobody, or whom the kernel names. With locks of several in the way any may be named."""
        told = fcntl.fcntl(self.slots[slot], command, lock_of(kind, start, length))
        return "free" if struct.unpack(LOCK, told)[0] == fcntl.F_UNLCK else "held"

    def flock(self, slot, operation):
        return attempt(lambda: fcntl.flock(self.slots[slot], operation | fcntl.LOCK_NB))

    def reopen(self, slot):
        os.close(self.slots[slot])
        self.slots[slot] = os.open(self.path, os.O_RDWR)
        return "done"

    def duplicate(self, slot):
        os.close(os.dup(self.slots[slot]))
        return "done"

    def wait(self, slot, how, kind):
        """Takes a lock of the whole file, waiting for at most two seconds of a lock that nobody gives up."""
        def late(*_):
            raise InterruptedError(errno.EINTR, "late")

        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, how[1])
        try:
            if how[0] == "flock":
                fcntl.flock(self.slots[slot], fcntl.LOCK_EX if kind == fcntl.F_WRLCK else fcntl.LOCK_SH)
            else:
                command = fcntl.F_SETLKW if how[0] == "posix" else F_OFD_SETLKW
                fcntl.fcntl(self.slots[slot], command, lock_of(kind, 0, 0))
            return "granted"
        except InterruptedError:
            return "interrupted"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def work(pipe, paths):
    files = [Files(path) for path in paths]
    while (message := pipe.recv()) is not None:
        which, method, arguments = message
        chosen = files if which is None else [files[which]]
        pipe.send([getattr(each, method)(*arguments) for each in chosen])


class Process:
    def __init__(self, paths):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=work, args=(theirs, paths), daemon=True)
        self.process.start()

    def start(self, method, *arguments, which=None):
        self.pipe.send((which, method, arguments))

    def finish(self, limit=120):
        if not self.pipe.poll(limit):
            sys.exit("a process hangs")
        return self.pipe.recv()

    def do(self, method, *arguments, which=None):
        self.start(method, *arguments, which=which)
        return self.finish()

    def end(self):
        self.pipe.send(None)
        self.process.join()


def choose(chance):
    slot = chance.randrange(SLOTS)
    kind = chance.choice([fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK])
    span = (chance.randrange(24), chance.randrange(9))
    asked = (slot, chance.choice([fcntl.F_RDLCK, fcntl.F_WRLCK]), *span)
    return chance.choices(
        [
            ("record", slot, fcntl.F_SETLK, kind, *span),
            ("record", slot, F_OFD_SETLK, kind, *span),
            ("holder", asked[0], fcntl.F_GETLK, *asked[1:]),
            ("holder", asked[0], F_OFD_GETLK, *asked[1:]),
            ("flock", slot, chance.choice([fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN])),
            ("reopen", slot),
            ("duplicate", slot),
        ],
        weights=[30, 30, 10, 10, 20, 5, 3],
    )[0]


def at_random(paths, operations, seed):
    chance = random.Random(seed)
    processes = [Process(paths) for _ in range(PROCESSES)]
    answers = {}
    for number in range(operations):
        process = chance.randrange(PROCESSES)
        operation = choose(chance)
        tested, known = processes[process].do(*operation)
        if tested != known:
            sys.exit(f"operation {number}, seed {seed}, process {process}: {operation}: {tested}, not {known}")
        key = (operation[0], known)
        answers[key] = answers.get(key, 0) + 1
    for process in processes:
        process.end()
    print("compared", ", ".join(f"{name} {answer}: {count}" for (name, answer), count in sorted(answers.items())))


def deadlock(paths):
    """Two processes hold a byte each and wait for the other's: one of them is told, the other gets it."""
    one, two = Process(paths), Process(paths)
    for which in (0, 1):
        assert one.do("record", 0, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 1, which=which) == ["done"]
        assert two.do("record", 0, fcntl.F_SETLK, fcntl.F_WRLCK, 1, 1, which=which) == ["done"]
        one.start("record", 0, fcntl.F_SETLKW, fcntl.F_WRLCK, 1, 1, which=which)
        time.sleep(0.3)
        assert not one.pipe.poll(0), "did not wait"
        told = two.do("record", 0, fcntl.F_SETLKW, fcntl.F_WRLCK, 0, 1, which=which)
        assert told == [errno.errorcode[errno.EDEADLK]], told
        assert two.do("record", 0, fcntl.F_SETLK, fcntl.F_UNLCK, 0, 0, which=which) == ["done"]
        assert one.finish() == ["done"]
        assert one.do("record", 0, fcntl.F_SETLK, fcntl.F_UNLCK, 0, 0, which=which) == ["done"]
    one.end()
    two.end()


def waiting(paths):
    holder, waiter = Process(paths), Process(paths)
    take = {
        "posix": lambda kind: ("record", 0, fcntl.F_SETLK, kind, 0, 0),
        "ofd": lambda kind: ("record", 0, F_OFD_SETLK, kind, 0, 0),
        "flock": lambda kind: (
            "flock", 0, {fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_UNLCK: fcntl.LOCK_UN}[kind],
        ),
    }
    for which in (0, 1):
        for how, taking in take.items():
            for held, wanted in ((fcntl.F_WRLCK, fcntl.F_RDLCK), (fcntl.F_RDLCK, fcntl.F_WRLCK)):
                assert holder.do(*taking(held), which=which) == ["done"], (how, held)
                waiter.start("wait", 0, (how, 100), wanted, which=which)
                time.sleep(0.3)
                assert not waiter.pipe.poll(0), (how, "did not wait")
                assert holder.do(*taking(fcntl.F_UNLCK), which=which) == ["done"]
                assert waiter.finish() == ["granted"], how
                assert waiter.do(*taking(fcntl.F_UNLCK), which=which) == ["done"]
                # Two readers do not wait for each other.
                assert holder.do(*taking(fcntl.F_RDLCK), which=which) == ["done"]
                assert waiter.do("wait", 0, (how, 100), fcntl.F_RDLCK, which=which) == ["granted"]
                # A signal ends the wait, and the lock is free to others afterwards.
                assert waiter.do(*taking(fcntl.F_UNLCK), which=which) == ["done"]
                if INTERRUPTS:
                    assert waiter.do("wait", 0, (how, 0.3), fcntl.F_WRLCK, which=which) == ["interrupted"], how
                assert holder.do(*taking(fcntl.F_WRLCK), which=which) == ["done"]
                assert holder.do(*taking(fcntl.F_UNLCK), which=which) == ["done"]
    holder.end()
    waiter.end()
    print("waited")


tested, known, operations, seed, interrupts = sys.argv[1:]
INTERRUPTS = interrupts == "interrupts"
for path in (tested, known):
    with open(path, "w") as file:
        file.write("x" * 100)
waiting([tested, known])
deadlock([tested, known])
at_random([tested, known], int(operations), int(seed))
