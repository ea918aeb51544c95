//! Who waits when a source is slow: times of requests that need nothing from it, while others read absent data.

use std::time::{Duration, Instant};

use rafsd_frontend::guest::Ticket;
use rafsd_frontend::image::remote;
use rafsd_frontend::ops;
use rafsd_frontend::registry::Registry;
use rafsd_frontend::{Guest, Result};

use crate::median;
use crate::peer::{Kind, Setting};

/// What the readers of absent data meet.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// There are none.
    Idle,
    /// Each answer takes so long.
    Slow(Duration),
    /// No answer ever comes.
    Dead,
}

/// Times of one kind of request.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Median, in microseconds.
    pub p50: f64,
    /// 99 of 100 are faster; in microseconds.
    pub p99: f64,
}

/// GETATTR on the passthrough tree and cached READ of the image, at depth 1, beside `readers` readers.
pub fn measure(
    kind: Kind,
    setting: &Setting,
    source: Source,
    readers: usize,
    time: Duration,
) -> Result<[Times; 2]> {
    let registry = Registry::start(&setting.image.blobs)?;
    let peer = kind.start(setting, 1, |cache| remote(&registry, cache, 60, 0))?;
    let guest = &peer.guest;
    let image = peer.image.unwrap_or("/");
    let warm = guest.resolve(format!("{image}/tree/0/0"))?.nodeid;
    let warm_fh = guest.open(warm, 0)?;
    guest.read(warm, warm_fh, 0, 4096)?;
    let cold = guest.resolve(format!("{image}/big"))?.nodeid;
    let cold_fh = guest.open(cold, 0)?;
    let shared = guest.resolve(peer.shared)?.nodeid;
    let mut readers = match source {
        Source::Idle => 0,
        Source::Slow(latency) => {
            registry.set(|fault| fault.latency = latency);
            readers
        }
        Source::Dead => {
            registry.set(|fault| fault.stalled = true);
            readers
        }
    };
    // Absent data as long as there is any: pieces far apart, so that each is a request of its own.
    let pieces = crate::BIG / STEP;
    let mut next = 0;
    let mut parked: Vec<Ticket> = Vec::new();
    let mut read = |guest: &Guest| {
        next += 1;
        guest.submit(&ops::read(cold, cold_fh, (next - 1) % pieces * STEP, 4096))
    };
    while readers > 0 {
        parked.push(read(guest)?);
        readers -= 1;
    }
    std::thread::sleep(Duration::from_millis(50));
    let (start, mut times) = (Instant::now(), [Vec::new(), Vec::new()]);
    while start.elapsed() < time {
        for (number, request) in [ops::getattr(shared, None), ops::read(warm, warm_fh, 0, 4096)]
            .iter()
            .enumerate()
        {
            let sent = Instant::now();
            let ticket = guest.submit(request)?;
            // A peer that serves in order answers when its source does.
            match guest.wait_for(ticket, time * 2) {
                Ok(_) => times[number].push(sent.elapsed().as_secs_f64() * 1e6),
                Err(e) if e.is_timeout() => times[number].push(f64::INFINITY),
                Err(e) => return Err(e),
            }
        }
        for ticket in &mut parked {
            if guest.poll(*ticket)?.is_some() {
                *ticket = read(guest)?;
            }
        }
    }
    registry.set(|fault| fault.stalled = false);
    Ok(times.map(|mut list| {
        list.sort_by(f64::total_cmp);
        Times {
            p50: median(&list),
            p99: list.get(list.len() * 99 / 100).copied().unwrap_or(f64::NAN),
        }
    }))
}

const STEP: u64 = 1 << 20;
