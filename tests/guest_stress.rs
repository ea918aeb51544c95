//! Programs that are hard on file systems, in a real guest on a directory of the host: fsx, stress-ng, fio with
//! verification, and locks of several processes compared with those of a file system that is known.
//!
//! A short run of each is part of the default tests; `make test-stress` runs them at length, for the table in
//! docs/passthrough.md.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rafsd_guest::cache::scratch;
use rafsd_guest::console::Ticket;
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::stress_tree;
use rafsd_guest::share::{program, virtiofsd};
use rafsd_guest::{Boot, Cache, Guest, Share};
use tempfile::TempDir;

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");

/// The comparison of locks.
const LOCKS: &str = include_str!("guest_stress/locks.py");

/// Operations of up to 16 KiB instead of 64, on a file of up to 256 KiB. They cost an emulated guest half as much.
const SMALL_OPERATIONS: &str = "
[opsize]
max = 16384
";

/// All that fsx can do, its defaults being the five oldest operations. Of one byte at least: an allocation of none is
/// EINVAL, which fsx takes for a file system that cannot allocate.
const ALL_OPERATIONS: &str = "
[opsize]
min = 1
max = 16384
[weights]
close_open = 1
invalidate = 1
mapread = 1
mapwrite = 1
read = 1
write = 1
truncate = 1
fsync = 0.1
fdatasync = 0.1
posix_fallocate = 1
punch_hole = 1
sendfile = 1
posix_fadvise = 1
copy_file_range = 1
";

/// Operations of one run of fsx, which keeps its maps to its end: each truncation and each write of a page goes through
/// all of them in the guest's kernel.
const FSX_RUN: u64 = 4_000;

/// What stress-ng's stressors end with: 0 is well, these mean that the guest's kernel or processor cannot do it.
const NOT_POSSIBLE: [i32; 2] = [3, 4];

/// Stressors that report failures on every virtio file system, with the reason in docs/passthrough.md.
const KNOWN: [&str; 0] = [];

/// Stressors that run side by side.
const LANES: usize = 6;

/// How fio writes and verifies: engine and depth, cached or direct, sizes, order.
const JOBS: [(&str, &str); 8] = [
    ("psync", "--ioengine=psync --rw=randwrite --bs=4k"),
    (
        "psync-direct",
        "--ioengine=psync --rw=randwrite --bs=4k --direct=1",
    ),
    (
        "psync-synced",
        "--ioengine=psync --rw=randrw --bsrange=512-64k --fsync=64 --verify_backlog=128",
    ),
    (
        "libaio-1",
        "--ioengine=libaio --rw=write --bs=1m --iodepth=1 --direct=1",
    ),
    (
        "libaio-32",
        "--ioengine=libaio --rw=randwrite --bs=4k --iodepth=32 --direct=1",
    ),
    (
        "libaio-ranges",
        "--ioengine=libaio --rw=randwrite --bsrange=512-256k --iodepth=16",
    ),
    (
        "io_uring-32",
        "--ioengine=io_uring --rw=randwrite --bs=16k --iodepth=32 --direct=1",
    ),
    ("mmap", "--ioengine=mmap --rw=randwrite --bs=4k"),
];

/// A directory of the host with the programs and a place to work in.
struct Directory {
    directory: TempDir,
    boot: Boot,
}

impl Directory {
    fn prepare() -> Self {
        let cache = Cache::open().unwrap();
        let tree = stress_tree(&cache).unwrap();
        let directory = scratch(&cache).unwrap();
        let copied = Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(tree)
            .arg(directory.path().join("share"))
            .status();
        assert!(copied.unwrap().success());
        Self {
            boot: Boot::new(&cache).unwrap(),
            directory,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    fn by_rafsd(&self, arguments: &[&str]) -> Share {
        set_up(Share::by_rafsd(Path::new(RAFSD), arguments, &self.path(), &self.boot).unwrap())
    }

    fn by_virtiofsd(&self) -> Option<Share> {
        let program = virtiofsd()?;
        Some(set_up(
            Share::by_virtiofsd(&program, &self.path(), &self.boot).unwrap(),
        ))
    }
}

/// Makes the share a system to change the root to. What works does it in /mnt.
fn set_up(mut share: Share) -> Share {
    share
        .guest()
        .check(&format!(
            "mount -t proc proc {SHARED}/proc; mount -o rbind /dev {SHARED}/dev; mount -t sysfs sysfs {SHARED}/sys"
        ))
        .unwrap();
    share
}

/// Starts a command in the share. One that hangs is killed and ends with 137.
fn start(guest: &mut Guest, limit: Duration, command: &str) -> Ticket {
    let script = format!("cd {SHARED}; exec chroot . /bin/sh -c 'cd /mnt; {command}'");
    guest.start(limit, &script).unwrap()
}

/// Runs a command in the share: its status and output.
fn inside(guest: &mut Guest, limit: Duration, command: &str) -> (i32, String) {
    let ticket = start(guest, limit, command);
    let done = guest.finish(&ticket).unwrap();
    (done.status, done.text)
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

/// Runs stressors of stress-ng side by side, each in two processes, for this time or until it has done this much: how each ended, with
/// what it said.
fn stress(guest: &mut Guest, stressors: &[&str], seconds: u64, most: Option<u64>) -> Vec<(String, String)> {
    stress_with(guest, stressors, "", seconds, most)
}

/// The same with options for all of them.
fn stress_with(
    guest: &mut Guest,
    stressors: &[&str],
    options: &str,
    seconds: u64,
    most: Option<u64>,
) -> Vec<(String, String)> {
    let mut tickets = Vec::new();
    for stressor in stressors {
        let most = most.map_or(String::new(), |count| format!("--{stressor}-ops {count}"));
        let command = format!(
            "mkdir -p {stressor} && stress-ng --{stressor} 2 {most} {options} --timeout {seconds} --verify --temp-path /mnt/{stressor} --metrics-brief 2>&1"
        );
        tickets.push(start(guest, Duration::from_secs(10 * seconds + 120), &command));
    }
    let end = |ticket: &Ticket| {
        let done = guest.finish(ticket).unwrap();
        let outcome = match done.status {
            0 => "clean".to_owned(),
            137 => "hangs".to_owned(),
            status if NOT_POSSIBLE.contains(&status) => "not possible".to_owned(),
            // It disables what may hang a machine, whoever serves the files.
            _ if done.text.contains("No stress workers invoked") => "not possible".to_owned(),
            status => format!("failed ({status})"),
        };
        (outcome, done.text)
    };
    tickets.iter().map(end).collect()
}

/// Number of operations in stress-ng's metrics.
fn operations(text: &str, stressor: &str) -> u64 {
    let of = |line: &str| {
        let mut words = line.split_whitespace().skip_while(|word| *word != stressor);
        words.next()?;
        words.next()?.parse().ok()
    };
    text.lines().find_map(of).unwrap_or(0)
}

fn fio(guest: &mut Guest, (name, options): (&str, &str), mebibytes: u64) {
    let command = format!(
        "fio --name={name} {options} --size={mebibytes}m --verify=crc32c --verify_fatal=1 --minimal && rm -f {name}.*"
    );
    let (status, text) = inside(guest, Duration::from_secs(900), &command);
    assert_eq!(status, 0, "fio {name}: {text}");
}

fn locks(guest: &mut Guest, count: u64, seed: u64, interrupts: bool) -> String {
    let interrupts = if interrupts { "interrupts" } else { "uninterrupted" };
    let command = format!("python3 -B /mnt/locks.py /mnt/tested /dev/shm/known {count} {seed} {interrupts}");
    let (status, text) = inside(guest, Duration::from_secs(1800), &command);
    assert_eq!(status, 0, "{text}");
    text
}

fn does_not_complain(guest: &Guest) {
    let complaints = guest.complaints();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

#[test]
fn a_short_run_of_stressors_verified_writes_and_locks_is_clean() {
    let begun = Instant::now();
    let told = |what: &str| println!("{what}: {:.1} s", begun.elapsed().as_secs_f64());
    let directory = Directory::prepare();
    let mut share = directory.by_rafsd(&["--host-locks"]);
    let guest = share.guest();
    told("booted");
    let stressors = ["rename", "flock", "seek", "utime"];
    for ((outcome, text), stressor) in stress(guest, &stressors, 120, Some(50)).iter().zip(stressors) {
        assert_eq!(outcome, "clean", "{text}");
        assert!(operations(text, stressor) > 0, "{text}");
    }
    told("stressors");
    for job in [JOBS[2], JOBS[4], JOBS[7]] {
        fio(guest, job, 2);
        told(job.0);
    }
    fs::write(directory.path().join("mnt/locks.py"), LOCKS).unwrap();
    locks(guest, 300, 1, false);
    told("locks");
    does_not_complain(guest);
}

/// Runs fsx with each configuration so often.
fn fsx(configurations: &[(&str, &str, u64)]) {
    let directory = Directory::prepare();
    fs::copy(program("fsx").unwrap(), directory.path().join("mnt/fsx")).unwrap();
    let mut share = directory.by_rafsd(&[]);
    for (name, configuration, count) in configurations {
        fs::write(directory.path().join("mnt/fsx.toml"), configuration).unwrap();
        let begun = Instant::now();
        let mut done = 0;
        for seed in number("RAFSD_FSX_SEED", 1).. {
            let run = FSX_RUN.min(count - done);
            let command = format!("./fsx -q -f fsx.toml -S {seed} -N {run} file && rm file*");
            let (status, text) = inside(share.guest(), Duration::from_secs(900), &command);
            assert_eq!(status, 0, "{name} operations, seed {seed}: {text}");
            done += run;
            let last = done == *count;
            if last || done % (5 * FSX_RUN) == 0 {
                println!(
                    "fsx: {name}: {done} of {count} operations, clean, {:.0} s",
                    begun.elapsed().as_secs_f64()
                );
            }
            if last {
                break;
            }
        }
    }
    does_not_complain(share.guest());
}

fn fsx_operations() -> u64 {
    number("RAFSD_FSX_OPERATIONS", 1_000_000)
}

#[test]
#[ignore = "long: half of RAFSD_FSX_OPERATIONS, a million unless told; run by make test-stress"]
fn a_file_stays_what_was_written_to_it() {
    let total = fsx_operations();
    fsx(&[
        ("default", "", total / 10),
        ("small", SMALL_OPERATIONS, total * 2 / 5),
    ]);
}

#[test]
#[ignore = "long: the other half; run by make test-stress"]
fn a_file_stays_what_all_kinds_of_operations_made_of_it() {
    fsx(&[("all", ALL_OPERATIONS, fsx_operations() / 2)]);
}

#[test]
#[ignore = "long: RAFSD_STRESS_SECONDS for each stressor, 30 unless told; run by make test-stress"]
fn no_stressor_of_file_systems_finds_a_fault() {
    let seconds = number("RAFSD_STRESS_SECONDS", 30);
    let only = std::env::var("RAFSD_STRESSORS").ok();
    let directory = Directory::prepare();
    let mut share = directory.by_rafsd(&[]);
    let (_, listed) = inside(
        share.guest(),
        Duration::from_secs(60),
        "stress-ng --class filesystem? 2>&1",
    );
    let listed = only.unwrap_or(listed);
    let (_, names) = listed.rsplit_once(": ").unwrap_or(("", &listed));
    let names: Vec<&str> = names.split_whitespace().collect();
    let mut failed = Vec::new();
    let begun = Instant::now();
    for names in names.chunks(LANES) {
        println!(
            "stress-ng, after {:.0} s: {}",
            begun.elapsed().as_secs_f64(),
            names.join(" ")
        );
        for ((outcome, text), name) in stress(share.guest(), names, seconds, None).iter().zip(names) {
            println!(
                "stress-ng: {name}: {outcome}, {} operations",
                operations(text, name)
            );
            if outcome != "clean" || operations(text, name) == 0 {
                println!("{text}");
            }
            if !["clean", "not possible"].contains(&outcome.as_str()) {
                failed.push(*name);
            }
        }
    }
    does_not_complain(share.guest());
    drop(share);
    println!("{} stressors, {} with failures", names.len(), failed.len());
    // What fails for the peer as well is not ours alone, and says so; only what is known and explained may stay.
    match directory.by_virtiofsd().filter(|_| !failed.is_empty()) {
        Some(mut share) => {
            for names in failed.chunks(LANES) {
                for ((outcome, text), name) in stress(share.guest(), names, seconds, None).iter().zip(names) {
                    println!("virtiofsd: {name}: {outcome}\n{text}");
                }
            }
        }
        None => println!("virtiofsd: not compared"),
    }
    failed.retain(|name| !KNOWN.contains(name));
    assert!(names.len() > 40 || names.len() < 5, "stress-ng lists {names:?}");
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
#[ignore = "long: run by make test-stress"]
fn what_fio_writes_it_reads_back() {
    let size = number("RAFSD_FIO_MEBIBYTES", 64);
    let directory = Directory::prepare();
    let mut share = directory.by_rafsd(&[]);
    for job in JOBS {
        let begun = Instant::now();
        fio(share.guest(), job, size);
        println!(
            "fio: {}, {size} MiB: verified, {:.1} s",
            job.0,
            begun.elapsed().as_secs_f64()
        );
    }
    does_not_complain(share.guest());
}

/// Compares locks and runs the stressors of locks, with locks kept by the guest or, by these arguments, on the host.
fn locks_at_length(kept: &str, arguments: &[&str], options: &str) {
    let count = number("RAFSD_LOCK_OPERATIONS", 20_000);
    let seconds = number("RAFSD_STRESS_SECONDS", 30);
    let directory = Directory::prepare();
    fs::write(directory.path().join("mnt/locks.py"), LOCKS).unwrap();
    let mut share = directory.by_rafsd(arguments);
    for seed in [1, 2] {
        let text = locks(share.guest(), count, seed, arguments.is_empty());
        println!(
            "locks kept {kept}, seed {seed}: {}",
            text.trim().replace('\n', "; ")
        );
    }
    let stressors = ["flock", "fcntl", "locka", "lockf", "lockofd", "lease"];
    let outcomes = stress_with(share.guest(), &stressors, options, seconds, None);
    for ((outcome, text), stressor) in outcomes.iter().zip(stressors) {
        println!(
            "locks kept {kept}: stress-ng {stressor}: {outcome}, {} operations",
            operations(text, stressor)
        );
        assert_eq!(outcome, "clean", "{text}");
    }
    does_not_complain(share.guest());
}

#[test]
#[ignore = "long: run by make test-stress"]
fn locks_are_those_of_a_local_file_system() {
    locks_at_length("by the guest", &[], "");
}

#[test]
#[ignore = "long: run by make test-stress"]
fn locks_on_the_host_are_those_of_a_local_file_system() {
    // The parent of lockf holds locks while it waits for a child that it has killed, which a wait for a lock of the device
    // does not end (docs/fuse.md).
    locks_at_length("on the host", &["--host-locks"], "--lockf-nonblock");
}
