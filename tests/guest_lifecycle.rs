//! What happens to machines: killed and started again, stopped and continued, reset, their driver taken away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::busybox_tree;
use rafsd_guest::kernel::Kernel;
use rafsd_guest::{Boot, Cache, Container, Image, Sandbox, config};
use tempfile::TempDir;

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");
const IMAGE: Container = Container::named("image");

/// A daemon with a directory and an image to serve, and no guest yet.
fn sandbox(cache: &Cache) -> (Sandbox, TempDir) {
    let directory = scratch(cache).unwrap();
    let store = directory.path().join("store");
    let image = Image::build(Path::new(RAFS), &busybox_tree(cache).unwrap(), &store).unwrap();
    let sandbox = Sandbox::prepare(Path::new(RAFSD), directory.path()).unwrap();
    sandbox
        .mount_image(
            &IMAGE,
            &image,
            &config::of_directory(&image.directory, &directory.path().join("cache")),
        )
        .unwrap();
    (sandbox, directory)
}

fn containers(directory: &TempDir) -> PathBuf {
    directory.path().join("containers")
}

/// Whether image and directory are served to the guest as they should be.
fn is_served(sandbox: &mut Sandbox, round: &str) {
    let guest = sandbox.guest().unwrap();
    let image = format!("{SHARED}{}", IMAGE.mountpoint());
    assert_eq!(
        guest.check(&format!("cat {image}/etc/os-release")).unwrap(),
        "NAME=busybox\n"
    );
    assert_eq!(
        guest
            .check(&format!("cmp {image}/bin/busybox /bin/busybox && echo same"))
            .unwrap(),
        "same\n"
    );
    guest
        .check(&format!("echo {round} >{SHARED}/containers/{round}; sync"))
        .unwrap();
}

#[test]
fn a_guest_that_is_killed_and_booted_again_mounts_again() {
    let cache = Cache::open().unwrap();
    let (mut sandbox, directory) = sandbox(&cache);
    let boot = Boot::new(&cache).unwrap();
    for round in ["killed", "powered-off", "killed-while-writing", "last"] {
        sandbox.boot(&boot).unwrap();
        is_served(&mut sandbox, round);
        assert_eq!(
            fs::read_to_string(containers(&directory).join(round)).unwrap(),
            format!("{round}\n")
        );
        let mut guest = sandbox.take_guest().unwrap();
        match round {
            "powered-off" => guest.power_off().unwrap(),
            "killed-while-writing" => {
                let written = format!("{SHARED}/containers/written");
                let script =
                    format!("while :; do dd if=/dev/zero of={written} bs=64k count=64 2>/dev/null; done");
                guest.start(Duration::from_secs(300), &script).unwrap();
                guest
                    .check(&format!("until [ -s {written} ]; do usleep 5000; done"))
                    .unwrap();
                guest.kill().unwrap();
            }
            _ => guest.kill().unwrap(),
        }
    }
    assert_eq!(sandbox.daemon().state().unwrap(), "RUNNING");
    sandbox.end().unwrap();
}

#[test]
fn a_stopped_and_continued_guest_loses_no_request() {
    let cache = Cache::open().unwrap();
    let (mut sandbox, _directory) = sandbox(&cache);
    sandbox.boot(&Boot::new(&cache).unwrap()).unwrap();
    let limit = Duration::from_secs(300);
    let guest = sandbox.guest().unwrap();
    // Files written, read back and compared, and the image read uncached, until told to stop.
    let writer = format!(
        "cd {SHARED}/containers; n=0; until [ -e /run/enough ]; do
            dd if=/bin/busybox of=copy bs=64k 2>/dev/null || exit 1
            echo 1 >/proc/sys/vm/drop_caches
            cmp copy /bin/busybox || exit 2
            echo $((n += 1)) >/run/writes
        done"
    );
    let reader = format!(
        "cd {SHARED}{}; n=0; until [ -e /run/enough ]; do
            cmp bin/busybox /bin/busybox || exit 1
            ls -lR . >/dev/null || exit 2
            echo $((n += 1)) >/run/reads
        done",
        IMAGE.mountpoint()
    );
    let jobs = [
        guest.start(limit, &writer).unwrap(),
        guest.start(limit, &reader).unwrap(),
    ];
    for _ in 0..10 {
        guest
            .check(
                "for f in writes reads; do rm -f /run/$f; until [ -s /run/$f ]; do usleep 3000; done; done",
            )
            .unwrap();
        guest.stop().unwrap();
        guest.cont().unwrap();
    }
    guest.check("touch /run/enough").unwrap();
    for job in &jobs {
        let done = guest.finish(job).unwrap();
        assert_eq!(done.status, 0, "{}", done.text);
    }
    sandbox.end().unwrap();
}

#[test]
fn a_guest_reset_in_the_middle_of_its_work_and_one_whose_driver_is_rebound_are_served() {
    let cache = Cache::open().unwrap();
    let (mut sandbox, _directory) = sandbox(&cache);
    sandbox.boot(&Boot::new(&cache).unwrap()).unwrap();
    is_served(&mut sandbox, "before");

    let guest = sandbox.guest().unwrap();
    let written = format!("{SHARED}/containers/written");
    let script = format!("while :; do dd if=/dev/zero of={written} bs=64k count=64 2>/dev/null; done");
    guest.start(Duration::from_secs(300), &script).unwrap();
    guest
        .check(&format!("until [ -s {written} ]; do usleep 5000; done"))
        .unwrap();
    guest.reset().unwrap();
    guest.mount_device().unwrap();
    is_served(&mut sandbox, "after-reset");

    let guest = sandbox.guest().unwrap();
    guest
        .check(&format!(
            "umount {SHARED}; cd /sys/bus/virtio/drivers/virtiofs; device=$(ls -d virtio*)
             echo $device >unbind; echo $device >bind"
        ))
        .unwrap();
    guest.mount_device().unwrap();
    is_served(&mut sandbox, "after-rebind");
    sandbox.end().unwrap();
}

#[test]
fn the_daemon_ends_soon_when_told_to_with_a_guest_at_work() {
    let cache = Cache::open().unwrap();
    let (mut sandbox, _directory) = sandbox(&cache);
    sandbox.boot(&Boot::new(&cache).unwrap()).unwrap();
    is_served(&mut sandbox, "once");
    let guest = sandbox.take_guest().unwrap();
    // Kata kills a daemon that takes five seconds.
    let (status, time) = sandbox.terminate().unwrap();
    assert!(status.success(), "{status}");
    assert!(time < Duration::from_secs(5), "{time:?}");
    guest.kill().unwrap();
}

#[test]
#[ignore = "long: a newer kernel; run by make test-guest-full"]
fn a_newer_kernel_spreads_its_work_over_four_request_queues() {
    let cache = Cache::open().unwrap();
    let kernel = Kernel::of_backports(&cache).unwrap();
    assert!(
        kernel.version() >= (6, 11),
        "{} does not use several queues",
        kernel.release()
    );
    let (mut sandbox, _directory) = sandbox(&cache);
    sandbox
        .boot(
            &Boot::with_kernel(&cache, kernel)
                .unwrap()
                .processors(4)
                .queues(4, 256),
        )
        .unwrap();
    is_served(&mut sandbox, "once");
    let guest = sandbox.guest().unwrap();
    let image = format!("{SHARED}{}", IMAGE.mountpoint());
    guest
        .check(&format!(
            "for cpu in 0 1 2 3; do (
                mkdir {SHARED}/containers/$cpu; cd {SHARED}/containers/$cpu
                for n in 1 2 3 4 5; do
                    taskset -c $cpu dd if={image}/bin/busybox of=$n bs=64k 2>/dev/null && taskset -c $cpu cmp $n /bin/busybox || exit
                done
                echo done >ok
             ) & done; wait; cd {SHARED}/containers; cat 0/ok 1/ok 2/ok 3/ok"
        ))
        .unwrap();
    let interrupts = guest
        .check("grep -E 'virtio[0-9]+-requests' /proc/interrupts")
        .unwrap();
    let used = interrupts
        .lines()
        .filter(|line| {
            line.split_whitespace()
                .skip(1)
                .take(4)
                .any(|count| count.parse::<u64>().is_ok_and(|count| count > 0))
        })
        .count();
    assert!(used >= 4, "not every queue was used:\n{interrupts}");
    sandbox.end().unwrap();
}
