//! The decode threads: run jobs by priority, survive what a job does.
//!
//! A job may be queued a second time, at a higher priority, when somebody begins to wait for it: it is run once.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread;

use parking_lot::{Condvar, Mutex};

use super::Priority;
use crate::codec::Decoder;
use crate::config::{StoreThread, ThreadStart};

/// Work for a decode thread. Whoever waits for its outcome must be told by its `Drop`, should it not be run.
pub(crate) type Job = Box<dyn FnOnce(&mut Decoder) + Send>;

/// A job that can be queued again. Runs at most once.
pub(crate) struct Queued(Mutex<Option<Job>>);

impl Queued {
    pub(crate) fn new(job: Job) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(job))))
    }
}

/// Knows a job as long as it is queued. Keeps nothing alive.
pub(crate) type QueuedRef = Weak<Queued>;

/// The queue in front of the decode threads. Dropping the last handle ends them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: usize,
}

struct Shared {
    lanes: Mutex<Lanes>,
    work: Condvar,
}

#[derive(Default)]
struct Lanes {
    by_priority: [VecDeque<Arc<Queued>>; 3],
    closed: bool,
}

impl Pool {
    pub(crate) fn new(threads: usize, start: &ThreadStart) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            lanes: Mutex::default(),
            work: Condvar::new(),
        });
        let pool = Self {
            shared: Arc::clone(&shared),
            threads: threads.max(1),
        };
        for number in 0..pool.threads {
            let (shared, start) = (Arc::clone(&shared), start.clone());
            thread::Builder::new()
                .name(format!("decode-{number}"))
                .spawn(move || {
                    (start.0)(StoreThread::Decode);
                    shared.run();
                })?;
        }
        Ok(pool)
    }

    /// Decode threads.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    pub(crate) fn push(&self, priority: Priority, job: Job) {
        self.queue(priority, Queued::new(job));
    }

    /// Queues a job, perhaps once more.
    pub(crate) fn queue(&self, priority: Priority, job: Arc<Queued>) {
        let mut lanes = self.shared.lanes.lock();
        if let Some(lane) = lanes.by_priority.get_mut(priority as usize) {
            lane.push_back(job);
        }
        drop(lanes);
        self.shared.work.notify_one();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lanes.lock().closed = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn run(&self) {
        let mut decoder = Decoder::new();
        while let Some(job) = self.next() {
            // A panic is a bug of ours. It must cost the waiters of this job an error, and nobody a thread.
            if catch_unwind(AssertUnwindSafe(|| job(&mut decoder))).is_err() {
                tracing::error!("a decode job panicked");
                decoder = Decoder::new();
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut lanes = self.lanes.lock();
        loop {
            match lanes.by_priority.iter_mut().find_map(VecDeque::pop_front) {
                // Nothing is left of one that was queued twice.
                Some(queued) => match queued.0.lock().take() {
                    Some(job) => return Some(job),
                    None => continue,
                },
                None if lanes.closed => return None,
                None => self.work.wait(&mut lanes),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn demand_goes_before_what_was_queued_earlier() {
        let pool = Pool::new(1, &ThreadStart::default()).unwrap();
        let (gate, closed) = mpsc::channel::<()>();
        let (order, seen) = mpsc::channel();
        pool.push(Priority::Background, Box::new(move |_| closed.recv().unwrap()));
        for priority in [Priority::Background, Priority::Hinted, Priority::Demand] {
            let order = order.clone();
            pool.push(priority, Box::new(move |_| order.send(priority).unwrap()));
        }
        gate.send(()).unwrap();
        let seen: Vec<_> = (0..3).map(|_| seen.recv().unwrap()).collect();
        assert_eq!(seen, [Priority::Demand, Priority::Hinted, Priority::Background]);
    }

    #[test]
    fn a_job_that_is_queued_again_goes_forward_and_runs_once() {
        let pool = Pool::new(1, &ThreadStart::default()).unwrap();
        let (gate, closed) = mpsc::channel::<()>();
        let (order, seen) = mpsc::channel();
        pool.push(Priority::Background, Box::new(move |_| closed.recv().unwrap()));
        let job = |name: &'static str| {
            let order = order.clone();
            Queued::new(Box::new(move |_| order.send(name).unwrap()))
        };
        let (first, second) = (job("first"), job("second"));
        pool.queue(Priority::Background, first);
        pool.queue(Priority::Background, Arc::clone(&second));
        pool.queue(Priority::Demand, second);
        pool.queue(Priority::Background, job("last"));
        gate.send(()).unwrap();
        let seen: Vec<_> = (0..3).map(|_| seen.recv().unwrap()).collect();
        assert_eq!(seen, ["second", "first", "last"]);
    }

    #[test]
    fn a_panicking_job_leaves_the_thread_alive() {
        let pool = Pool::new(1, &ThreadStart::default()).unwrap();
        let (done, seen) = mpsc::channel();
        pool.push(Priority::Demand, Box::new(|_| panic!("on purpose")));
        pool.push(Priority::Demand, Box::new(move |_| done.send(()).unwrap()));
        seen.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
    }
}
