"""Access control lists of two directories, one whose mount has them and one whose mount has none.

Arguments: the two directories. Prints what holds in each.
"""
import errno, os, struct, sys

with_acls, without = sys.argv[1:]
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 1, 2, 4, 16, 32
NONE = 0xFFFFFFFF


def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def attempt(action):
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno]


def reads(user, path):
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        os._exit(0 if attempt(lambda: open(path).read()) == "content" else 1)
    return os.waitpid(child, 0)[1] == 0


FOR_1000 = acl((USER_OBJ, 6, NONE), (USER, 4, 1000), (GROUP_OBJ, 0, NONE), (MASK, 4, NONE), (OTHER, 0, NONE))
DEFAULT = acl((USER_OBJ, 7, NONE), (USER, 6, 1000), (GROUP_OBJ, 4, NONE), (MASK, 6, NONE), (OTHER, 0, NONE))
ACCESS, OF_NEW = "system.posix_acl_access", "system.posix_acl_default"

for name, top in (("with", with_acls), ("without", without)):
    os.umask(0o027)
    file = top + "/file"
    with open(file, "w") as opened:
        opened.write("content")
    os.chmod(file, 0o600)
    print(name, "set:", attempt(lambda: os.setxattr(file, ACCESS, FOR_1000)))
    print(name, "list:", *os.listxattr(file))
    print(name, "get:", attempt(lambda: os.getxattr(file, ACCESS) == FOR_1000))
    print(name, "read:", reads(1000, file), reads(1001, file))
    print(name, "mode: %o" % (os.stat(file).st_mode & 0o7777))
    print(name, "default:", attempt(lambda: os.setxattr(top, OF_NEW, DEFAULT)))
    # The umask counts where there is no default list.
    os.umask(0o077)
    os.close(os.open(top + "/new", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mkdir(top + "/directory", 0o777)
    os.mknod(top + "/pipe", 0o010666)
    print(name, "new:", *("%o" % (os.stat(top + made).st_mode & 0o7777) for made in ("/new", "/directory", "/pipe")))
    print(name, "inherited:", *os.listxattr(top + "/new"), attempt(lambda: os.getxattr(top + "/directory", OF_NEW) == DEFAULT))
    # Set on the host before, with the mode rw-r-----: 1000 may read by the list alone.
    print(name, "of the host:", attempt(lambda: os.getxattr(top + "/of-the-host", ACCESS) == FOR_1000), *os.listxattr(top + "/of-the-host"))
    print(name, "read:", reads(1000, top + "/of-the-host"), reads(1001, top + "/of-the-host"))
