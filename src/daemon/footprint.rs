//! What starting and mounting took and serving does not need: memory that was freed since, and pages of the program and its
//! libraries.
//!
//! A host runs one daemon for each sandbox, most of them idle. Reading the command line, compiling the system call
//! filters, linking, and reading a mount request touch several megabytes of code once, and leave holes in the heap.
//!
//! The only place of the daemon that gives mapped memory back, and `unsafe` for that.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;

use rustix::mm::{Advice, madvise};

/// Heaps that threads are spread over. Each costs some pages, whatever is in it, and by default there are eight for each
/// processor of the host. Queue threads hardly allocate, and small blocks come from a cache of each thread.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 4;

/// Bounds the number of heaps. To be called before there are threads.
pub(super) fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number of the allocator, under its own lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// What of the process can be given back.
pub(super) struct Footprint {
    code: Vec<Range<usize>>,
}

impl Footprint {
    /// To be made when everything has been loaded, and before `/proc` is out of reach.
    pub(super) fn of_process() -> Self {
        Self {
            code: unmodified_code(),
        }
    }

    /// Gives back what is not in use. What is needed after all is mapped again when it is touched, from the page cache.
    /// Breakpoints that a debugger made since are lost with it.
    pub(super) fn shrink(&self) {
        for range in &self.code {
            let start = std::ptr::with_exposed_provenance_mut::<c_void>(range.start);
            // SAFETY: the range is a private mapping of a file, which the process cannot write to and had no page of its
            // own in: the next access, by whatever thread, finds the bytes of the file, as the last one did. Libraries
            // are not unloaded in this program, so it is still mapped.
            let given = unsafe { madvise(start, range.len(), Advice::LinuxDontNeed) };
            if let Err(error) = given {
                tracing::debug!("code at {:#x} is kept in memory: {error}", range.start);
            }
        }
        #[cfg(target_env = "gnu")]
        // SAFETY: the allocator gives back what is free and keeps what is not; it takes its own locks.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

/// Mappings of code that have no page of their own, such as a debugger's breakpoints would make. None if the system
/// does not tell.
fn unmodified_code() -> Vec<Range<usize>> {
    File::open("/proc/self/smaps").map_or_else(|_| Vec::new(), |smaps| find(BufReader::new(smaps)))
}

/// Finds them in the lines of `/proc/PID/smaps` (`proc_pid_smaps(5)`).
fn find(smaps: impl BufRead) -> Vec<Range<usize>> {
    let mut code = Vec::new();
    let mut current = None;
    for line in smaps.lines().map_while(Result::ok) {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some("Anonymous:"), Some("0")) => code.extend(current.take()),
            (Some(field), Some(flags)) if !field.ends_with(':') => {
                let file = words.nth(3).is_some_and(|path| path.starts_with('/'));
                current = (flags == "r-xp" && file).then(|| addresses(field)).flatten();
            }
            _ => {}
        }
    }
    code
}

fn addresses(field: &str) -> Option<Range<usize>> {
    let (start, end) = field.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0a000-55d0b000 r--p 00000000 fe:00 10087714                   /usr/bin/program
Size:                  4 kB
Anonymous:             0 kB
55d0b000-55d0f000 r-xp 00001000 fe:00 10087714                   /usr/bin/program with a space
Size:                 16 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
55d10000-55d12000 r-xp 00001000 fe:00 10087715                   /usr/lib/with-a-breakpoint.so
Size:                  8 kB
Anonymous:             4 kB
55d13000-55d14000 rw-p 00001000 fe:00 10087715                   /usr/lib/with-a-breakpoint.so
Anonymous:             0 kB
7ffd6f7c5000-7ffd6f7c7000 r-xp 00000000 00:00 0                  [vdso]
Anonymous:             0 kB
7ffd6f7d5000-7ffd6f7d7000 r-xp 00000000 00:00 0
Anonymous:             0 kB
";

    #[test]
    fn only_code_that_nobody_changed_is_found() {
        let found = find(SMAPS.as_bytes());
        assert_eq!(found.first(), Some(&(0x55d0_b000..0x55d0_f000)));
        assert_eq!(found.len(), 1);
        assert!(find(&[][..]).is_empty());
    }

    #[test]
    fn code_is_given_back_while_it_runs() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(2).unwrap().parse::<u64>().unwrap()
        };
        let footprint = Footprint::of_process();
        assert!(footprint.code.len() > 1, "the program and its libraries");
        // Touch all of it.
        for range in &footprint.code {
            for address in range.clone().step_by(4096) {
                // SAFETY: mapped and readable, by what the system said just now.
                std::hint::black_box(unsafe {
                    std::ptr::with_exposed_provenance::<u8>(address).read_volatile()
                });
            }
        }
        let before = resident();
        let worker = std::thread::spawn(|| (0..1000u64).map(|x| format!("{x}").len()).sum::<usize>());
        footprint.shrink();
        assert_eq!(worker.join().unwrap(), 2890);
        let after = resident();
        assert!(after < before, "{before} pages of files before, {after} after");
    }
}
