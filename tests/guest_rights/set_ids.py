"""What changes of a file by others, and by its owner, leave of its set-id bits and of its capabilities.

Argument: the directory to work in. The answer is the same on every file system of a disk.
"""
import os, struct, sys

os.chdir(sys.argv[1])
os.umask(0)
CAPABILITY = struct.pack("<5I", 0x2000001, 1 << 13, 0, 0, 0)


def write(offset):
    def change(path):
        with open(path, "r+b", buffering=0) as file:
            file.seek(offset)
            file.write(b"x")

    return change


def append(path):
    with open(path, "ab", buffering=0) as file:
        file.write(b"x")


def allocate(path):
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 9000)


def copied(path):
    with open("source", "rb") as source, open(path, "r+b") as file:
        os.copy_file_range(source.fileno(), file.fileno(), 3)


CHANGES = {
    "write": write(0),
    "append": append,
    "open to truncate": lambda path: open(path, "wb").close(),
    "truncate": lambda path: os.truncate(path, 2),
    "ftruncate": lambda path: os.ftruncate(os.open(path, os.O_RDWR), 2),
    "fallocate": allocate,
    "copy_file_range": copied,
    "nothing": lambda path: open(path, "r+b").close(),
}
# As owner only.
OWNERS = {
    "chown": lambda path: os.chown(path, 1002, -1),
    "chgrp": lambda path: os.chown(path, -1, 1002),
    "chmod": lambda path: os.chmod(path, 0o6771),
}


def as_user(user, group, change, path):
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        try:
            change(path)
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


with open("source", "wb") as file:
    file.write(b"abcdef")
for who, user, group in (("root", 0, 0), ("another", 1000, 1000), ("owner", 1001, 1001)):
    for mode in (0o6777, 0o4666):
        for name, change in (CHANGES | (OWNERS if who != "another" else {})).items():
            with open("file", "wb") as file:
                file.write(b"content")
            os.chown("file", 1001, 1001)
            os.chmod("file", mode)
            os.setxattr("file", "security.capability", CAPABILITY)
            outcome = as_user(user, group, change, "file")
            kept = "security.capability" in os.listxattr("file")
            print(f"{who} {mode:o} {name}: {outcome}, {os.stat('file').st_mode & 0o7777:o}{' capable' if kept else ''}")
            os.unlink("file")
