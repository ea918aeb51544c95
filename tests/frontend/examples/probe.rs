//! Drives whatever vhost-user-fs device listens on the given socket, in all layouts and orders.
//!
//! `probe SOCKET [DIRECTORY]`: below DIRECTORY (of the tag, `/` by default) files are made and removed.
//! Set in the environment, PROBE_LOOSE accepts wrong used lengths, PROBE_RECONNECT connects many times,
//! PROBE_CROSSING uses descriptors that cross memory regions.

use std::time::{Duration, Instant};

use rafsd_frontend::guest::Layout;
use rafsd_frontend::memory::Place;
use rafsd_frontend::{Error, Guest, Options, Order, Result, Ticket, ops};

const BORDER: u64 = 32 << 20;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = || Error::Usage("probe SOCKET [DIRECTORY]".into());
    let socket = args.next().ok_or_else(usage)?;
    let directory = args.next().unwrap_or_else(|| "/".into());
    let strict_length = std::env::var_os("PROBE_LOOSE").is_none();
    let mut variants = Vec::new();
    for order in [Order::Qemu, Order::CloudHypervisor] {
        for event_idx in [true, false] {
            for (indirect, queue_size) in [(true, 128), (false, 64), (true, 16)] {
                variants.push(Options {
                    order,
                    event_idx,
                    indirect,
                    queue_size,
                    strict_length,
                    ..Options::default()
                });
            }
        }
    }
    if std::env::var_os("PROBE_RECONNECT").is_none() {
        variants.truncate(1);
    }
    for options in variants {
        println!("{options:?}");
        drive(&connect(&socket, options)?, &directory)?;
    }
    Ok(())
}

/// The device may be about to listen again.
fn connect(socket: &str, options: Options) -> Result<Guest> {
    let mut tries = 0;
    loop {
        match Guest::connect(socket, options.clone()) {
            Err(Error::Io { .. }) if tries < 20 => tries += 1,
            result => return result,
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn drive(guest: &Guest, directory: &str) -> Result<()> {
    let init = guest.init(&ops::Init::default())?;
    println!(
        "  INIT: 7.{} flags {:#x} max_write {}",
        init.minor, init.flags, init.max_write
    );
    let top = guest.resolve(directory)?.nodeid;
    let mut layouts = vec![Layout::Linux, Layout::Compact, Layout::Ragged(7)];
    if std::env::var_os("PROBE_CROSSING").is_some() {
        layouts.push(Layout::Crossing(BORDER));
    }
    for layout in layouts {
        let start = Instant::now();
        guest.set_layout(layout);
        files(guest, top)?;
        many(guest, top)?;
        println!("  {layout:?}: ok in {:?}, {:?}", start.elapsed(), guest.counts());
    }
    guest.add_memory(Place {
        address: 2 << 32,
        size: 16 << 20,
    })?;
    files(guest, top)?;
    guest.pause()?;
    let ticket = guest.submit(&ops::getattr(top, None))?;
    if guest.poll(ticket)?.is_some() {
        return Err(Error::Device("answered while paused".into()));
    }
    guest.resume()?;
    guest.wait(ticket)?;
    let bases = guest.stop()?;
    guest.check_drained(&bases)?;
    guest.start(&bases)?;
    files(guest, top)?;
    println!("  memory added, paused, stopped, started: ok");
    Ok(())
}

fn files(guest: &Guest, top: u64) -> Result<()> {
    let data: Vec<u8> = (0..300_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
    let entry = guest.write_file(top, "probe", &data)?;
    if guest.read_all(entry.nodeid, 100_000)? != data {
        return Err(Error::Device("a file reads back as something else".into()));
    }
    guest.setxattr(entry.nodeid, "user.probe", b"value", 0)?;
    if guest.getxattr(entry.nodeid, "user.probe")? != b"value" {
        return Err(Error::Device("an attribute reads back as something else".into()));
    }
    let names: Vec<_> = guest
        .list(top, false, 4096)?
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    if !names.iter().any(|name| name == b"probe") {
        return Err(Error::Device("a file is not listed".into()));
    }
    guest.list(top, true, 4096)?;
    guest.rename2(top, "probe", top, "probe2", 0)?;
    guest.unlink(top, "probe2")?;
    guest.forget(entry.nodeid, 1)?;
    match guest.lookup(top, "probe2") {
        Err(e) if e.errno() == Some(2) => Ok(()),
        // A negative entry says the same.
        Ok(entry) if entry.nodeid == 0 => Ok(()),
        other => Err(Error::Device(format!("a removed file is still there: {other:?}"))),
    }
}

fn many(guest: &Guest, top: u64) -> Result<()> {
    let requests: Vec<_> = (0..500).map(|_| ops::getattr(top, None)).collect();
    let tickets: Vec<Ticket> = guest.submit_all(1, &requests)?;
    for ticket in tickets {
        guest.wait(ticket)?.ok()?;
    }
    Ok(())
}
