//! vhost-user messages that no front-end sends.

use std::time::{Duration, Instant};

use super::options;
use crate::support::passthrough_with;
use rafsd_frontend::message::{Request as Message, words};
use rafsd_frontend::ops;
use rafsd_frontend::{Guest, Options, Order};

#[test]
fn malformed_vhost_user_messages_end_a_connection_at_most() {
    let (mut daemon, guest, _) = passthrough_with(options());
    drop(guest);
    let fresh = || {
        let start = Instant::now();
        loop {
            match Guest::boot(
                &daemon.socket,
                Options {
                    order: Order::Qemu,
                    ..options()
                },
            ) {
                Ok(guest) => return guest,
                Err(e) => assert!(start.elapsed() < Duration::from_secs(60), "{e}"),
            }
        }
    };
    let junk = vec![0xff; 4096];
    for request in (0..60).chain([255, 1 << 16, u32::MAX]) {
        for (flags, size, payload) in [
            (1, 0, &junk[..0]),
            (1, 8, &junk[..8]),
            (1, 12, &junk[..12]),
            (1, 40, &junk[..40]),
            (9, 8, &[0; 8][..]),
            (1, 4096, &junk[..]),
            (1, u32::MAX, &junk[..8]),
            (5, 8, &junk[..8]),
            (2, 8, &junk[..8]),
        ] {
            let guest = fresh();
            let vmm = guest.vmm();
            if vmm
                .connection
                .send_raw(request, flags, size, payload, &[])
                .is_ok()
            {
                // Whatever the device makes of it, it does not wait for ever.
                let _ = vmm.connection.send(Message::GetFeatures, &[], &[]);
            }
        }
    }
    let guest = fresh();
    guest.getattr(ops::ROOT).unwrap();
    drop(guest);
    assert!(daemon.is_alive());
}

#[test]
fn rings_in_impossible_places_are_refused() {
    let (mut daemon, guest, _) = passthrough_with(options());
    drop(guest);
    let user = |guest: &Guest| guest.lane(1).queue.descriptors.user_address();
    for attempt in 0..8 {
        let start = Instant::now();
        let guest = loop {
            match Guest::boot(&daemon.socket, options()) {
                Ok(guest) => break guest,
                Err(e) => assert!(start.elapsed() < Duration::from_secs(60), "{e}"),
            }
        };
        guest.stop().unwrap();
        let at = user(&guest);
        let vmm = guest.vmm();
        let address = |table: u64, used: u64, available: u64| {
            [
                1u32.to_le_bytes().to_vec(),
                vec![0; 4],
                words(&[table, used, available, 0]),
            ]
            .concat()
        };
        let send = |request, payload: &[u8]| vmm.connection.send_acked(request, payload, &[]);
        let outcome = match attempt {
            0 => send(Message::SetVringAddr, &address(0, 0, 0)),
            1 => send(Message::SetVringAddr, &address(at + 1, at + 0x3002, at + 0x1001)),
            2 => send(Message::SetVringAddr, &address(u64::MAX - 15, at, at)),
            3 => send(Message::SetVringNum, &words(&[1 | 3 << 32])),
            4 => send(Message::SetVringNum, &words(&[1])),
            5 => send(Message::SetVringNum, &words(&[1 | 65_536 << 32])),
            6 => send(Message::SetVringBase, &words(&[200 | 5 << 32])),
            _ => send(Message::SetVringEnable, &words(&[77 | 1 << 32])),
        };
        assert!(outcome.is_err(), "attempt {attempt} was accepted");
    }
    drop(daemon.guest(options()));
    assert!(daemon.is_alive());
}
