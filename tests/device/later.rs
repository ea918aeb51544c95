//! Requests that are answered later: parked reads, worker jobs, and everything that can happen to them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::setup::Setup;
use crate::stub::{Image, SIZE, Slow, byte};
use rafsd::mounts::{Instance, MountOptions};
use rafsd_frontend::{Error, Guest, ops};

fn image(setup: &Setup, path: &str, deadline: Duration) -> Arc<Image> {
    let image = Arc::new(Image::default());
    let options = MountOptions {
        read_deadline: deadline,
        ..MountOptions::default()
    };
    setup
        .mounts
        .mount(path, Instance::Rafs(image.clone()), options)
        .unwrap();
    image
}

const LONG: Duration = Duration::from_secs(60);

fn expected(offset: u64, size: u64) -> Vec<u8> {
    (offset..(offset + size).min(SIZE)).map(byte).collect()
}

fn file(guest: &Guest, path: &str) -> u64 {
    guest.resolve(path).unwrap().nodeid
}

/// A device with an image whose data has not arrived, a guest, and the node of a file in it.
fn waiting() -> (Setup, Arc<Image>, Guest, u64) {
    let setup = Setup::new();
    let absent = image(&setup, "/absent", LONG);
    let guest = setup.guest();
    let node = file(&guest, "/absent/file");
    (setup, absent, guest, node)
}

#[test]
fn a_parked_read_holds_up_nothing_on_its_queue() {
    let setup = Setup::new();
    let absent = image(&setup, "/absent", LONG);
    let present = image(&setup, "/present", LONG);
    present.arrive();
    setup.host("/host", "host");
    let guest = setup.guest();
    let (slow, fast) = (file(&guest, "/absent/file"), file(&guest, "/present/file"));
    let top = file(&guest, "/host");

    let tickets: Vec<_> = (0..64)
        .map(|i| guest.submit(&ops::read(slow, 0, i * 4096, 4096)).unwrap())
        .collect();
    absent.wait_for_fetches(64);
    assert_eq!(guest.read(fast, 0, 8192, 4096).unwrap(), expected(8192, 4096));
    guest.write_file(top, "written", b"meanwhile").unwrap();
    guest.resolve("/absent/file").unwrap();
    assert!(
        tickets
            .iter()
            .all(|ticket| guest.poll(*ticket).unwrap().is_none())
    );

    absent.arrive();
    for (i, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(
            guest.wait(ticket).unwrap().ok().unwrap(),
            expected(i as u64 * 4096, 4096)
        );
    }
    assert_eq!(setup.device.as_ref().unwrap().parked(), 0);
}

#[test]
fn a_read_whose_data_never_comes_fails_by_its_deadline() {
    let setup = Setup::new();
    image(&setup, "/absent", Duration::from_millis(300));
    let guest = setup.guest();
    let node = file(&guest, "/absent/file");
    let start = Instant::now();
    assert_eq!(guest.errno(&ops::read(node, 0, 0, 4096)).unwrap(), libc::EIO);
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn an_unmount_answers_parked_reads_at_once() {
    let (setup, absent, guest, node) = waiting();
    let ticket = guest.submit(&ops::read(node, 0, 0, 4096)).unwrap();
    absent.wait_for_fetches(1);
    let start = Instant::now();
    setup.mounts.umount("/absent").unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "umount took {:?}",
        start.elapsed()
    );
    assert_eq!(
        guest.wait(ticket).unwrap().ok().unwrap_err().errno(),
        Some(libc::ESTALE)
    );
    assert_eq!(guest.errno(&ops::getattr(node, None)).unwrap(), libc::ESTALE);
    // The data comes after all: nobody is there to take it.
    absent.arrive();
}

#[test]
fn an_interrupted_read_gives_up() {
    let (_setup, absent, guest, node) = waiting();
    let ticket = guest.submit(&ops::read(node, 0, 0, 4096)).unwrap();
    absent.wait_for_fetches(1);
    guest.submit(&ops::interrupt(ticket.unique)).unwrap();
    assert_eq!(
        guest.wait(ticket).unwrap().ok().unwrap_err().errno(),
        Some(libc::EINTR)
    );
    absent.arrive();
    assert_eq!(guest.read(node, 0, 0, 4096).unwrap(), expected(0, 4096));
}

#[test]
fn an_interrupt_may_overtake_its_request() {
    let (_setup, absent, guest, node) = waiting();
    let read = |unique| ops::Request {
        unique: Some(unique),
        ..ops::read(node, 0, 0, 4096)
    };
    // More than are remembered; the last ones count.
    for unique in 1_000_000..1_000_100 {
        guest.submit(&ops::interrupt(unique)).unwrap();
    }
    guest.wait_idle(0).unwrap();
    let errno = |unique| guest.wait(guest.submit(&read(unique)).unwrap()).unwrap().errno;
    assert_eq!(errno(1_000_099), libc::EINTR);
    let forgotten = guest.submit(&read(1_000_000)).unwrap();
    absent.wait_for_fetches(1);
    // Once is enough, and a new session numbers its requests anew.
    let again = guest.submit(&read(1_000_099)).unwrap();
    absent.wait_for_fetches(2);
    guest.init(&ops::Init::default()).unwrap();
    let renumbered = guest.submit(&read(1_000_098)).unwrap();
    absent.wait_for_fetches(3);
    absent.arrive();
    for ticket in [forgotten, again, renumbered] {
        assert_eq!(guest.wait(ticket).unwrap().ok().unwrap(), expected(0, 4096));
    }
}

#[test]
fn data_that_is_evicted_before_it_is_read_is_fetched_again_but_not_for_ever() {
    let (_setup, absent, guest, node) = waiting();
    let ticket = guest.submit(&ops::read(node, 0, 0, 4096)).unwrap();
    for round in 1..100 {
        if guest.poll(ticket).unwrap().is_some() {
            break;
        }
        absent.answer_fetches();
        std::thread::sleep(Duration::from_millis(5));
        assert!(round < 90, "the read is fetched for ever");
    }
    let fetches = absent.fetches.load(std::sync::atomic::Ordering::SeqCst);
    assert!((2..=20).contains(&fetches), "{fetches} fetches");
}

#[test]
fn parked_reads_stay_put_while_their_ring_is_disabled() {
    let (_setup, absent, guest, node) = waiting();
    let ticket = guest.submit(&ops::read(node, 0, 0, 4096)).unwrap();
    absent.wait_for_fetches(1);
    guest.pause().unwrap();
    let before = guest.snapshot();
    absent.arrive();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.changed_pages(&before), Vec::<u64>::new());
    guest.resume().unwrap();
    assert_eq!(guest.wait(ticket).unwrap().ok().unwrap(), expected(0, 4096));
}

#[test]
fn stopping_a_ring_answers_what_is_parked() {
    let (_setup, absent, guest, node) = waiting();
    let tickets: Vec<_> = (0..32)
        .map(|i| guest.submit(&ops::read(node, 0, i * 4096, 4096)).unwrap())
        .collect();
    absent.wait_for_fetches(32);
    let start = Instant::now();
    let bases = guest.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(20));
    let before = guest.snapshot();
    absent.arrive();
    for ticket in tickets {
        assert_eq!(
            guest.wait(ticket).unwrap().ok().unwrap_err().errno(),
            Some(libc::EIO)
        );
    }
    guest.check_drained(&bases).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.changed_pages(&before), Vec::<u64>::new());
    guest.start(&bases).unwrap();
    assert_eq!(guest.read(node, 0, 0, 4096).unwrap(), expected(0, 4096));
}

#[test]
fn a_front_end_that_leaves_with_reads_parked_leaves_nothing_behind() {
    let (setup, absent, guest, node) = waiting();
    for i in 0..32 {
        guest.submit(&ops::read(node, 0, i * 4096, 4096)).unwrap();
    }
    absent.wait_for_fetches(32);
    drop(guest);
    let guest = setup.guest();
    assert_eq!(setup.device.as_ref().unwrap().parked(), 0);
    absent.arrive();
    assert_eq!(guest.read(node, 0, 0, 4096).unwrap(), expected(0, 4096));
}

#[test]
fn a_blocked_fsync_holds_up_neither_its_queue_nor_a_stop() {
    let setup = Setup::new();
    let slow = Arc::new(Slow::default());
    setup
        .mounts
        .mount(
            "/slow",
            Instance::Passthrough(slow.clone()),
            MountOptions::default(),
        )
        .unwrap();
    let guest = setup.guest();
    let node = file(&guest, "/slow/file");
    let blocked = slow.blocked.lock().unwrap();
    let ticket = guest.submit(&ops::fsync(node, 0, false)).unwrap();
    guest.getattr(node).unwrap();
    assert!(guest.poll(ticket).unwrap().is_none());

    let start = Instant::now();
    guest.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(matches!(
        guest.wait(ticket).unwrap().ok(),
        Err(Error::Errno(libc::EIO))
    ));
    drop(blocked);
}
