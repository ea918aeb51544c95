//! No byte reaches a guest unless its chunk's digest matched, and what was verified once stays.

use std::time::Duration;

use crate::support::{LOWER, Open, RAFSD, Served, open};
use rafsd_frontend::daemon::Builder;
use rafsd_frontend::{Guest, Options};

const CHUNK: usize = 1 << 20;

/// Where a piece of the file stands in the blob; only for images that are not compressed.
fn position(blob: &[u8], piece: &[u8]) -> u64 {
    blob.windows(piece.len())
        .position(|window| window == piece)
        .unwrap() as u64
}

fn read(guest: &Guest, file: &Open, offset: usize, len: usize) -> Result<Vec<u8>, Option<i32>> {
    guest
        .read(file.node, file.fh, offset as u64, len as u32)
        .map_err(|e| e.errno())
}

/// A bit flips in chunk 9 of `z-cold`, at byte `at` of the blob.
fn flipped(served: &Served, at: u64) {
    let (_daemon, guest) = served.start();
    let cold = open(&guest, &format!("{LOWER}/z-cold"));
    served.registry.set(|fault| fault.flip = Some(at));
    for _ in 0..2 {
        // Whatever part of the chunk is read, even one that does not hold the bit.
        for offset in [9 * CHUNK, 9 * CHUNK + 4096, 10 * CHUNK - 4096] {
            assert_eq!(read(&guest, &cold, offset, 4096), Err(Some(libc::EIO)));
        }
        assert_eq!(read(&guest, &cold, 9 * CHUNK - 8192, 16384), Err(Some(libc::EIO)));
    }
    assert!(read(&guest, &cold, 3 * CHUNK, 65536).unwrap() == served.cold[3 * CHUNK..][..65536]);
    served.registry.set(|fault| fault.flip = None);
    let mut tries = 0;
    let healed = loop {
        match read(&guest, &cold, 9 * CHUNK, 65536) {
            Ok(bytes) => break bytes,
            Err(errno) => assert_eq!(errno, Some(libc::EIO)),
        }
        tries += 1;
        assert!(tries < 100, "a healed source is not asked again");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(healed == served.cold[9 * CHUNK..][..65536]);
    assert!(guest.read_file(format!("{LOWER}/z-cold")).unwrap() == served.cold);
}

#[test]
fn a_flipped_bit_in_stored_bytes_is_an_error_never_a_byte() {
    let served = Served::new(&["--compressor", "none", "--digester", "sha256"]);
    let blob = std::fs::read(served.image.blob().unwrap()).unwrap();
    flipped(&served, position(&blob, &served.cold[9 * CHUNK..][..64]) + 70_000);
}

#[test]
fn a_flipped_bit_in_compressed_bytes_is_an_error_never_a_byte() {
    let served = Served::new(&[]);
    let blob = std::fs::read(served.image.blob().unwrap()).unwrap();
    // Noise does not compress: even in a zstd frame its bytes stand as they are.
    flipped(&served, position(&blob, &served.cold[9 * CHUNK..][..64]) + 70_000);
}

#[test]
fn what_is_resident_needs_no_registry_after_a_restart() {
    let served = Served::new(&[]);
    let (mut daemon, guest) = served.start();
    assert!(guest.read_file(format!("{LOWER}/z-cold")).unwrap() == served.cold);
    assert_eq!(guest.read_file(format!("{LOWER}/a-warm")).unwrap(), served.warm);
    drop(guest);
    daemon.terminate(Duration::from_secs(60)).unwrap();
    let connections = served.registry.connections();
    served.registry.set(|fault| fault.status = Some(500));
    let (_daemon, guest) = served.start();
    assert!(guest.read_file(format!("{LOWER}/z-cold")).unwrap() == served.cold);
    assert_eq!(guest.read_file(format!("{LOWER}/a-warm")).unwrap(), served.warm);
    assert_eq!(served.registry.connections(), connections);
}

#[test]
fn what_was_resident_before_a_kill_is_right_after_it() {
    let served = Served::new(&["--chunk-size", "64KiB"]);
    let (mut daemon, guest) = served.start();
    let cold = open(&guest, &format!("{LOWER}/z-cold"));
    for chunk in 0..100 {
        read(&guest, &cold, chunk * 65536, 4096).unwrap();
    }
    daemon.kill().unwrap();
    let requests = served.registry.requests();
    let (_daemon, guest) = served.start();
    assert!(guest.read_file(format!("{LOWER}/z-cold")).unwrap() == served.cold);
    let again = served.registry.requests() - requests;
    assert!(again > 0, "chunks that were never read came from nowhere");
}

#[test]
fn one_chunk_is_fetched_once_however_many_mounts_read_it() {
    let served = Served::new(&[]);
    let daemon = Builder::new(RAFSD).unwrap().start().unwrap();
    served.mount(&daemon, 0);
    let config = rafsd_frontend::image::remote(&served.registry, &served.cache(), 60, 0);
    daemon
        .mount_rafs("/rafs/two/lowerdir", &served.image.bootstrap, &config)
        .unwrap();
    let guest = daemon.guest(Options::default()).unwrap();
    let one = open(&guest, &format!("{LOWER}/z-cold"));
    let two = open(&guest, "/rafs/two/lowerdir/z-cold");
    served
        .registry
        .set(|fault| fault.latency = Duration::from_millis(300));
    let requests = served.registry.requests();
    let tickets: Vec<_> = (0..20)
        .map(|number| {
            let file = if number % 2 == 0 { &one } else { &two };
            let read = rafsd_frontend::ops::read(file.node, file.fh, (9 << 20) + number * 4096, 4096);
            guest.submit(&read).unwrap()
        })
        .collect();
    for (number, ticket) in tickets.into_iter().enumerate() {
        let bytes = guest.wait(ticket).unwrap().ok().unwrap();
        assert!(bytes == served.cold[(9 << 20) + number * 4096..][..4096]);
    }
    assert_eq!(served.registry.requests() - requests, 1);
}
