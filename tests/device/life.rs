//! Connections, rings and drains.

use std::time::{Duration, Instant};

use crate::setup::Setup;
use rafsd_frontend::{Guest, Options, Order};

#[test]
fn the_device_stops_within_a_second_in_any_state() {
    for state in 0..3 {
        let mut setup = Setup::new();
        setup.host("/", "host");
        let guest = match state {
            0 => None,
            1 => Some(Guest::connect(&setup.socket, Options::default()).unwrap()),
            _ => Some(setup.guest()),
        };
        let start = Instant::now();
        setup.device.take().unwrap().stop();
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "state {state}: {:?}",
            start.elapsed()
        );
        drop(guest);
    }
}

#[test]
fn front_ends_come_and_go() {
    let setup = Setup::new();
    let root = setup.host("/", "host");
    std::fs::write(root.join("file"), b"hello").unwrap();
    for round in 0..4 {
        let order = if round % 2 == 0 {
            Order::Qemu
        } else {
            Order::CloudHypervisor
        };
        let guest = setup.guest_with(Options {
            order,
            ..Options::default()
        });
        assert_eq!(guest.read_file("/file").unwrap(), b"hello");
        if round < 2 {
            guest.stop().unwrap();
        }
    }
    assert!(setup.socket.exists());
}

#[test]
fn a_paused_ring_goes_on_where_it_was() {
    let setup = Setup::new();
    let root = setup.host("/", "host");
    std::fs::write(root.join("file"), b"hello").unwrap();
    let guest = setup.guest();
    for _ in 0..3 {
        guest.pause().unwrap();
        guest.resume().unwrap();
        assert_eq!(guest.read_file("/file").unwrap(), b"hello");
    }
    guest.reboot().unwrap();
}
