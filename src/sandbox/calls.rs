//! Which system calls each kind of thread makes.
//!
//! The lists are kept generous where C libraries, allocators and runtimes differ between versions, and narrow where a
//! call opens a way out: no role runs programs, forks, traces, signals others, mounts, changes its root, loads
//! code into the kernel or uses io_uring. One unmounts, in FUSE mode.

use libc::c_long;

use super::Role;

/// System calls that belong together.
#[derive(Debug)]
pub struct List {
    /// What `docs/security.md` calls it.
    #[cfg(test)]
    name: &'static str,
    /// Numbers, and names of the numbers.
    calls: &'static [(c_long, &'static str)],
}

impl List {
    /// The numbers.
    pub fn numbers(&self) -> impl Iterator<Item = c_long> {
        self.calls.iter().map(|(number, _)| *number)
    }
}

/// A list by the names of the numbers.
macro_rules! list {
    ($name:literal: $($(#[$condition:meta])* $call:ident)*) => {
        List { #[cfg(test)] name: $name, calls: &[$($(#[$condition])* (libc::$call, stringify!($call))),*] }
    };
}

/// Lists whose calls a role may make.
pub fn lists(role: Role) -> Vec<&'static List> {
    let mut lists = vec![&RUN, &OPEN_FILES, &CACHE_FILES];
    match role {
        Role::Main => lists.extend([&SPAWN, &EVENTS, &TALK]),
        Role::Control => lists.extend([&SPAWN, &CONFINE, &EVENTS, &TALK, &LISTEN, &SERVE, &ACT_AS]),
        Role::Queue => lists.extend([&EVENTS, &SERVE, &ACT_AS]),
        Role::Worker => lists.extend([&SERVE, &ACT_AS]),
        Role::WorkerStarter => lists.extend([&SPAWN, &CONFINE, &SERVE, &ACT_AS]),
        Role::Deadlines | Role::Decode | Role::Lane | Role::Log => {}
        Role::Unmount => lists.push(&UNMOUNT),
        Role::Api => lists.extend([&SPAWN, &CONFINE, &EVENTS, &TALK, &LISTEN, &CONNECT, &SERVE]),
        // A runtime has each of its threads confine itself, also those that such a thread starts.
        Role::Metrics => lists.extend([&SPAWN, &EVENTS, &TALK, &LISTEN]),
        Role::Net => lists.extend([&SPAWN, &CONFINE, &EVENTS, &TALK, &CONNECT]),
        Role::Helper => lists.extend([&EVENTS]),
    }
    lists
}

/// Whether threads of this role, or those that they start, load libraries: the resolver of names does.
pub fn loads_libraries(role: Role) -> bool {
    matches!(role, Role::Api | Role::Net)
}

/// Every thread: memory, time, locks between threads, descriptors that are open, the log, its end.
static RUN: List = list! { "run":
    SYS_brk
    SYS_munmap
    SYS_mremap
    SYS_madvise
    SYS_msync
    SYS_mincore
    SYS_membarrier
    SYS_futex
    SYS_futex_waitv
    SYS_get_robust_list
    SYS_set_robust_list
    SYS_rseq
    SYS_set_tid_address
    SYS_sched_yield
    SYS_sched_getaffinity
    SYS_sched_getparam
    SYS_sched_getscheduler
    SYS_getcpu
    SYS_clock_gettime
    SYS_clock_getres
    SYS_clock_nanosleep
    SYS_nanosleep
    SYS_gettimeofday
    SYS_getrandom
    SYS_getpid
    SYS_getppid
    SYS_gettid
    SYS_getuid
    SYS_geteuid
    SYS_getgid
    SYS_getegid
    SYS_getresuid
    SYS_getresgid
    SYS_getgroups
    SYS_getrusage
    SYS_times
    SYS_sysinfo
    SYS_uname
    SYS_capget
    SYS_rt_sigaction
    SYS_rt_sigprocmask
    SYS_rt_sigreturn
    SYS_rt_sigpending
    SYS_sigaltstack
    SYS_restart_syscall
    SYS_exit
    SYS_exit_group
    SYS_read
    SYS_readv
    SYS_write
    SYS_writev
    // The handler of a signal, which the kernel may run in any thread, wakes who waits for it through a socket.
    SYS_sendto
    SYS_lseek
    SYS_fstat
    SYS_statx
    SYS_newfstatat
    SYS_fcntl
    SYS_flock
    SYS_dup
    SYS_dup3
    SYS_close
    SYS_close_range
    SYS_ppoll
    SYS_eventfd2
    SYS_pipe2
    #[cfg(target_arch = "x86_64")]
    SYS_time
    #[cfg(target_arch = "x86_64")]
    SYS_arch_prctl
    #[cfg(target_arch = "x86_64")]
    SYS_poll
    #[cfg(target_arch = "x86_64")]
    SYS_dup2
    #[cfg(target_arch = "x86_64")]
    SYS_stat
    #[cfg(target_arch = "x86_64")]
    SYS_lstat
};

/// Opening files and looking at them, also as the last one to let go of an image, which saves what is known of its cache.
static OPEN_FILES: List = list! { "open-files":
    SYS_openat
    SYS_openat2
    SYS_readlinkat
    SYS_faccessat
    SYS_faccessat2
    SYS_getdents64
    SYS_getcwd
    SYS_statfs
    SYS_fstatfs
    SYS_pread64
    SYS_preadv
    SYS_preadv2
    SYS_fadvise64
    SYS_readahead
    #[cfg(target_arch = "x86_64")]
    SYS_open
    #[cfg(target_arch = "x86_64")]
    SYS_access
    #[cfg(target_arch = "x86_64")]
    SYS_readlink
};

/// Making, filling and removing plain files: the cache's, the log's, sockets that are the daemon's own.
static CACHE_FILES: List = list! { "cache-files":
    SYS_pwrite64
    SYS_pwritev
    SYS_pwritev2
    SYS_ftruncate
    SYS_fallocate
    SYS_fsync
    SYS_fdatasync
    SYS_sync_file_range
    SYS_copy_file_range
    SYS_sendfile
    SYS_mkdirat
    SYS_unlinkat
    SYS_renameat2
    SYS_linkat
    SYS_fchmod
    SYS_fchmodat
    SYS_utimensat
    SYS_memfd_create
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    SYS_renameat
    #[cfg(target_arch = "x86_64")]
    SYS_rename
    #[cfg(target_arch = "x86_64")]
    SYS_mkdir
    #[cfg(target_arch = "x86_64")]
    SYS_rmdir
    #[cfg(target_arch = "x86_64")]
    SYS_unlink
    #[cfg(target_arch = "x86_64")]
    SYS_link
    #[cfg(target_arch = "x86_64")]
    SYS_chmod
};

/// Starting threads. `clone` is allowed for threads only; `clone3`, whose flags a filter cannot see, does not exist for
/// the whole process (see `seccomp`), which the C library knows how to take.
static SPAWN: List = list! { "spawn":
    SYS_clone3
};

/// A new thread taking from itself what it does not need. Those that also act as users may `unshare` their working
/// directory and umask, and nothing else.
static CONFINE: List = list! { "confine":
    SYS_seccomp
    SYS_capset
    SYS_landlock_create_ruleset
    SYS_landlock_add_rule
    SYS_landlock_restrict_self
};

/// Waiting for one of many descriptors.
static EVENTS: List = list! { "events":
    SYS_epoll_create1
    SYS_epoll_ctl
    SYS_epoll_pwait
    SYS_epoll_pwait2
    SYS_timerfd_create
    SYS_timerfd_settime
    SYS_pselect6
    #[cfg(target_arch = "x86_64")]
    SYS_epoll_wait
    #[cfg(target_arch = "x86_64")]
    SYS_select
};

/// Using sockets that are open.
static TALK: List = list! { "talk":
    SYS_recvfrom
    SYS_recvmsg
    SYS_recvmmsg
    SYS_sendto
    SYS_sendmsg
    SYS_sendmmsg
    SYS_shutdown
    SYS_getsockname
    SYS_getpeername
    SYS_getsockopt
    SYS_setsockopt
    // Of descriptors: blocking or not, bytes to be read, size of a block device.
    SYS_ioctl
};

/// Taking connections.
static LISTEN: List = list! { "listen":
    SYS_accept4
    #[cfg(target_arch = "x86_64")]
    SYS_accept
};

/// Making connections. `socket` is allowed for Unix, IP and (for the resolver) netlink sockets only; `bind` is what the
/// resolver does before it asks.
static CONNECT: List = list! { "connect":
    SYS_connect SYS_bind SYS_socketpair
};

/// What requests for host directories come down to.
static SERVE: List = list! { "serve":
    SYS_mknodat
    SYS_symlinkat
    SYS_fchown
    SYS_fchownat
    SYS_fchmodat2
    SYS_truncate
    SYS_syncfs
    SYS_getxattr
    SYS_lgetxattr
    SYS_fgetxattr
    SYS_setxattr
    SYS_lsetxattr
    SYS_fsetxattr
    SYS_listxattr
    SYS_llistxattr
    SYS_flistxattr
    SYS_removexattr
    SYS_lremovexattr
    SYS_fremovexattr
    SYS_name_to_handle_at
    SYS_open_by_handle_at
};

/// Taking a FUSE mount away.
static UNMOUNT: List = list! { "unmount": SYS_umount2 };

/// Acting as the user who asks, for one call.
static ACT_AS: List = list! { "act-as":
    SYS_setresuid
    SYS_setresgid
    SYS_setgroups
    SYS_capset
    SYS_umask
};

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    const PAGE: &str = include_str!("../../docs/security.md");

    /// Words in the second column of the rows of the page whose first column is one name in backquotes.
    fn rows() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
        let row = |line: &'static str| {
            let (name, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
            Some((name, rest.trim_end_matches([' ', '|']).split(' ').collect()))
        };
        PAGE.lines().filter_map(row).collect()
    }

    #[test]
    fn the_page_lists_what_each_role_may_call() {
        let rows = rows();
        for role in Role::ALL {
            let lists = lists(role);
            let names: BTreeSet<&str> = lists.iter().map(|list| list.name).collect();
            let title = format!("{role:?}");
            assert_eq!(rows.get(title.as_str()), Some(&names), "row `{title}`");
            for list in lists {
                let calls = list.calls.iter().map(|(_, name)| name.trim_start_matches("SYS_"));
                let calls: BTreeSet<&str> = calls.collect();
                assert_eq!(rows.get(list.name), Some(&calls), "row `{}`", list.name);
            }
        }
    }

    #[test]
    fn no_role_makes_calls_that_lead_out() {
        let out = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_pidfd_send_signal,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_mount_setattr,
            libc::SYS_setns,
            libc::SYS_chroot,
            libc::SYS_pivot_root,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_io_uring_setup,
            libc::SYS_keyctl,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_kexec_load,
            libc::SYS_reboot,
            libc::SYS_listen,
        ];
        for role in Role::ALL {
            let numbers: BTreeSet<c_long> = lists(role).iter().flat_map(|list| list.numbers()).collect();
            let may = |call: c_long| role == Role::Unmount && call == libc::SYS_umount2;
            assert!(
                out.iter().all(|call| !numbers.contains(call) || may(*call)),
                "{role:?}"
            );
        }
    }
}
