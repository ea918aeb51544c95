//! Threads for what may block for long: host disk, and completing reads whose data has arrived.
//!
//! A thread is made when a job finds none idle, up to a limit, and ends after a while without work.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

/// Threads at most.
const MAX_THREADS: usize = 16;
/// A thread without work for so long ends.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// The pool. Dropping it lets the threads finish what has been handed over.
pub struct Workers {
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    threads: AtomicUsize,
    /// Jobs handed over and not finished.
    jobs: AtomicUsize,
}

impl Default for Workers {
    fn default() -> Self {
        let (sender, receiver) = unbounded();
        Workers {
            sender,
            receiver,
            counts: Arc::default(),
        }
    }
}

impl Workers {
    /// Runs `job` on one of the threads, soon. The number of waiting jobs is bounded by whoever hands them over.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let jobs = self.counts.jobs.fetch_add(1, Ordering::SeqCst) + 1;
        // The channel lives as long as `self`.
        let _ = self.sender.send(Box::new(job));
        let threads = self.counts.threads.load(Ordering::SeqCst);
        if jobs > threads && threads < MAX_THREADS {
            self.spawn();
        }
    }

    fn spawn(&self) {
        let counts = Arc::clone(&self.counts);
        if counts.threads.fetch_add(1, Ordering::SeqCst) >= MAX_THREADS {
            counts.threads.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let receiver = self.receiver.clone();
        let thread = move || {
            loop {
                while let Ok(job) = receiver.recv_timeout(IDLE) {
                    job();
                    counts.jobs.fetch_sub(1, Ordering::SeqCst);
                }
                counts.threads.fetch_sub(1, Ordering::SeqCst);
                // A job handed over just now may have counted on this thread.
                match receiver.try_recv() {
                    Ok(job) => {
                        counts.threads.fetch_add(1, Ordering::SeqCst);
                        job();
                        counts.jobs.fetch_sub(1, Ordering::SeqCst);
                    }
                    Err(_) => break,
                }
            }
        };
        if let Err(error) = std::thread::Builder::new()
            .name("worker".to_owned())
            .spawn(thread)
        {
            self.counts.threads.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!(%error, "cannot start a worker thread");
            // With no thread at all the job would wait for ever.
            if self.counts.threads.load(Ordering::SeqCst) == 0
                && let Ok(job) = self.receiver.try_recv()
            {
                job();
                self.counts.jobs.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn blocked_jobs_do_not_stop_the_next_one() {
        let workers = Workers::default();
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
        let workers = Workers::default();
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
