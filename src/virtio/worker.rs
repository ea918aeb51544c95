//! Threads for what may block for long: host disk, and completing reads whose data has arrived.
//!
//! A thread is made when a job finds none idle, up to a limit, and ends after a while without work. All are made by one
//! thread that does nothing else, because a new thread may do no more than its maker, and those who hand jobs over
//! are confined to work of other kinds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::sandbox::{Role, Sandbox};

/// Threads at most.
const MAX_THREADS: usize = 16;
/// A thread without work for so long ends.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// The pool. Dropping it lets the threads finish what has been handed over.
pub struct Workers {
    jobs: Sender<Job>,
    /// Asks for one more thread, which `counts` has been told of.
    more: Sender<()>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    threads: AtomicUsize,
    /// Jobs handed over and not finished.
    jobs: AtomicUsize,
}

/// Makes workers for as long as there is a pool.
struct Starter {
    jobs: Receiver<Job>,
    more: Receiver<()>,
    counts: Arc<Counts>,
    sandbox: Sandbox,
}

impl Workers {
    /// A pool without workers, and the thread that makes them.
    pub fn start(sandbox: Sandbox) -> std::io::Result<Self> {
        let (jobs, waiting) = unbounded();
        let (more, wanted) = unbounded();
        let counts = Arc::<Counts>::default();
        let starter = Starter {
            jobs: waiting,
            more: wanted,
            counts: Arc::clone(&counts),
            sandbox,
        };
        std::thread::Builder::new()
            .name("worker-starter".to_owned())
            .spawn(move || starter.run())?;
        Ok(Workers { jobs, more, counts })
    }

    /// Runs `job` on one of the threads, soon. The number of waiting jobs is bounded by whoever hands them over.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let jobs = self.counts.jobs.fetch_add(1, Ordering::SeqCst) + 1;
        // The other ends live as long as `self`.
        let _ = self.jobs.send(Box::new(job));
        if self.counts.takes_one_more(jobs) {
            let _ = self.more.send(());
        }
    }
}

impl Counts {
    /// Counts one more thread, if so many jobs want one and the limit allows it.
    fn takes_one_more(&self, jobs: usize) -> bool {
        let more = |threads| (jobs > threads && threads < MAX_THREADS).then_some(threads + 1);
        self.threads
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, more)
            .is_ok()
    }
}

impl Starter {
    fn run(self) {
        self.sandbox.enter(Role::WorkerStarter);
        while self.more.recv().is_ok() {
            let (jobs, counts, sandbox) = (self.jobs.clone(), Arc::clone(&self.counts), self.sandbox.clone());
            let started = std::thread::Builder::new()
                .name("worker".to_owned())
                .spawn(move || {
                    sandbox.enter(Role::Worker);
                    work(&jobs, &counts);
                });
            let Err(error) = started else { continue };
            tracing::warn!(%error, "cannot start a worker thread");
            // With no thread at all the job would wait for ever.
            let others = self.counts.threads.fetch_sub(1, Ordering::SeqCst) - 1;
            if others == 0
                && let Ok(job) = self.jobs.try_recv()
            {
                job();
                self.counts.jobs.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

/// Does jobs until none comes for a while.
fn work(jobs: &Receiver<Job>, counts: &Counts) {
    loop {
        while let Ok(job) = jobs.recv_timeout(IDLE) {
            job();
            counts.jobs.fetch_sub(1, Ordering::SeqCst);
        }
        counts.threads.fetch_sub(1, Ordering::SeqCst);
        // A job handed over just now may have counted on this thread.
        match jobs.try_recv() {
            Ok(job) => {
                counts.threads.fetch_add(1, Ordering::SeqCst);
                job();
                counts.jobs.fetch_sub(1, Ordering::SeqCst);
            }
            Err(_) => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn blocked_jobs_do_not_stop_the_next_one() {
        let workers = Workers::start(Sandbox::default()).unwrap();
        let (release, blocked) = unbounded::<()>();
        for _ in 0..MAX_THREADS - 1 {
            let blocked = blocked.clone();
            workers.run(move || {
                let _ = blocked.recv();
            });
        }
        let (done, wait) = mpsc::channel();
        workers.run(move || done.send(()).unwrap());
        wait.recv_timeout(Duration::from_secs(5)).unwrap();
        drop(release);
    }

    #[test]
    fn every_job_runs_once() {
        let workers = Workers::start(Sandbox::default()).unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let (done, wait) = mpsc::channel();
        for _ in 0..1000 {
            let (count, done) = (Arc::clone(&count), done.clone());
            workers.run(move || {
                count.fetch_add(1, Ordering::SeqCst);
                done.send(()).unwrap();
            });
        }
        for _ in 0..1000 {
            wait.recv_timeout(Duration::from_secs(5)).unwrap();
        }
        assert_eq!(count.load(Ordering::SeqCst), 1000);
        assert!(workers.counts.threads.load(Ordering::SeqCst) <= MAX_THREADS);
    }
}
