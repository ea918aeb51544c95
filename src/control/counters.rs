//! What is counted of a mounted image: operations, their errors and latencies, and on demand single files.
//!
//! A thread counts in a set of its own, made when it first counts something, so that queues do not fight for them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kata::config::Rafs;
use kata::control::metrics::{AccessRecord, FileMetrics, FsMetrics};
use parking_lot::Mutex;

use crate::metrics::{SHARDS, Shard};

/// Bounds of the classes of reads by size, bytes: below, and for the last class above.
const SIZES: [u64; 7] = [
    1 << 10,
    4 << 10,
    16 << 10,
    64 << 10,
    128 << 10,
    512 << 10,
    1 << 20,
];

/// Bounds of the classes of reads by latency, microseconds: up to, and for the last class above.
const LATENCIES: [u64; 7] = [200, 1_000, 20_000, 50_000, 500_000, 1_000_000, 2_000_000];

/// Files of a mount that single counters are kept of. Guests choose what they ask for, and may ask for what there is not.
const FILES: usize = 65_536;

/// Operations, numbered as the API's arrays have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Getattr,
    Readlink,
    Open,
    Release,
    Read,
    Statfs,
    Getxattr,
    Listxattr,
    Opendir,
    Lookup,
    Readdir,
    Readdirplus,
    Access,
    Forget,
    BatchForget,
}

#[derive(Default)]
#[repr(align(128))]
struct Numbers {
    hits: [AtomicU64; 15],
    errors: [AtomicU64; 15],
    micros: [AtomicU64; 15],
    sizes: [AtomicU64; 8],
    latencies: [AtomicU64; 8],
    bytes: AtomicU64,
    absent: AtomicU64,
}

/// Counters of a mounted image.
pub(super) struct Counters {
    shards: [OnceLock<Box<Numbers>>; SHARDS],
    /// Reads whose latency was counted when what they waited for arrived, and that have not been executed again yet.
    waited: AtomicU64,
    files: Option<Mutex<BTreeMap<u64, FileMetrics>>>,
    latest: Option<Mutex<BTreeSet<u64>>>,
    pattern: Option<Mutex<BTreeMap<u64, AccessRecord>>>,
}

impl Counters {
    /// Counts single files as far as the configuration asks for it.
    pub fn new(options: &Rafs) -> Self {
        Self {
            shards: Default::default(),
            waited: AtomicU64::new(0),
            files: options.iostats_files.then(Mutex::default),
            latest: options.latest_read_files.then(Mutex::default),
            pattern: options.access_pattern.then(Mutex::default),
        }
    }

    /// Counts an operation that has ended.
    pub fn count(&self, operation: Operation, inode: u64, failed: bool, took: Duration) {
        let (mine, numbers) = self.mine();
        let index = operation as usize;
        add(mine, &numbers.hits, index, 1);
        add(mine, &numbers.errors, index, failed.into());
        add(mine, &numbers.micros, index, micros(took));
        if let Some(files) = &self.files
            && let Some(file) = of_file(&mut files.lock(), inode, FileMetrics::default)
        {
            file.total_fops += 1;
            bump(&mut file.fop_hits, index);
            if failed {
                bump(&mut file.fop_errors, index);
            }
        }
    }

    /// Counts the data of a read of `size` bytes that gave `read`. Its latency is `took`, unless it waited for absent
    /// data: then it has been counted by [`Counters::count_wait`].
    pub fn count_read(&self, inode: u64, size: u64, read: u64, took: Duration) {
        let (mine, numbers) = self.mine();
        mine.add(&numbers.bytes, read);
        let class = class(&SIZES, size + 1);
        add(mine, &numbers.sizes, class, 1);
        if self
            .waited
            .fetch_update(Relaxed, Relaxed, |waited| waited.checked_sub(1))
            .is_err()
        {
            let class = self::class(&LATENCIES, micros(took));
            add(mine, &numbers.latencies, class, 1);
        }
        if let Some(files) = &self.files
            && let Some(file) = of_file(&mut files.lock(), inode, FileMetrics::default)
        {
            file.data_read += read;
            bump(&mut file.block_count_read, class);
        }
        if let Some(latest) = &self.latest {
            let mut latest = latest.lock();
            if latest.len() < FILES {
                latest.insert(inode);
            }
        }
        if let Some(pattern) = &self.pattern
            && let Some(record) = of_file(&mut pattern.lock(), inode, || first_access(inode))
        {
            record.nr_read += 1;
        }
    }

    /// Counts a read that found data absent.
    pub fn count_absent(&self) {
        let (mine, numbers) = self.mine();
        mine.add(&numbers.absent, 1);
    }

    /// Counts the time that a read waited until its data had arrived, or would not.
    pub fn count_wait(&self, arrived: bool, took: Duration) {
        let (mine, numbers) = self.mine();
        add(mine, &numbers.micros, Operation::Read as usize, micros(took));
        add(mine, &numbers.latencies, class(&LATENCIES, micros(took)), 1);
        if arrived {
            self.waited.fetch_add(1, Relaxed);
        } else {
            add(mine, &numbers.hits, Operation::Read as usize, 1);
            add(mine, &numbers.errors, Operation::Read as usize, 1);
        }
    }

    /// Operations so far, and reads that still wait.
    pub fn operations(&self) -> u64 {
        let hits: [u64; 15] = self.sum(|numbers| &numbers.hits);
        hits.iter().sum::<u64>() + self.absent()
    }

    /// Reads so far that found data absent.
    pub fn absent(&self) -> u64 {
        self.all().map(|numbers| numbers.absent.load(Relaxed)).sum()
    }

    /// The sums, for the mount at `id`.
    pub fn metrics(&self, id: &str) -> FsMetrics {
        let hits: [u64; 15] = self.sum(|numbers| &numbers.hits);
        FsMetrics {
            files_account_enabled: self.files.is_some(),
            access_pattern_enabled: self.pattern.is_some(),
            record_latest_read_files_enabled: self.latest.is_some(),
            measure_latency: true,
            id: id.to_owned(),
            nr_opens: at(&hits, Operation::Open).saturating_sub(at(&hits, Operation::Release)),
            data_read: self.all().map(|numbers| numbers.bytes.load(Relaxed)).sum(),
            block_count_read: self.sum(|numbers| &numbers.sizes),
            fop_hits: hits,
            fop_errors: self.sum(|numbers| &numbers.errors),
            fop_cumulative_latency_total: self.sum(|numbers| &numbers.micros),
            read_latency_dist: self.sum(|numbers| &numbers.latencies),
        }
    }

    /// Counters by inode number, if they are kept.
    pub fn files(&self) -> Option<BTreeMap<u64, FileMetrics>> {
        self.files.as_ref().map(|files| files.lock().clone())
    }

    /// Inode numbers of the files read since the last call as ranges, if they are kept.
    pub fn take_latest(&self) -> Option<Vec<Vec<u64>>> {
        let latest = std::mem::take(&mut *self.latest.as_ref()?.lock());
        let mut ranges: Vec<Vec<u64>> = Vec::new();
        for inode in latest {
            match ranges.last_mut().map(Vec::as_mut_slice) {
                Some([.., last]) if *last + 1 == inode => {
                    if let Some(range) = ranges.last_mut() {
                        range.truncate(1);
                        range.push(inode);
                    }
                }
                _ => ranges.push(vec![inode]),
            }
        }
        Some(ranges)
    }

    /// First accesses in their order, if they are kept.
    pub fn pattern(&self) -> Option<Vec<AccessRecord>> {
        let mut records: Vec<_> = self.pattern.as_ref()?.lock().values().cloned().collect();
        records.sort_by_key(|record| (record.first_access_time_secs, record.first_access_time_nanos));
        Some(records)
    }

    /// The numbers in which this thread counts.
    fn mine(&self) -> (Shard, &Numbers) {
        let mine = Shard::mine();
        let [first, ..] = &self.shards;
        let numbers = self.shards.get(mine.index()).unwrap_or(first);
        (mine, numbers.get_or_init(Box::default))
    }

    /// Those of all threads.
    fn all(&self) -> impl Iterator<Item = &Numbers> {
        self.shards.iter().filter_map(OnceLock::get).map(Box::as_ref)
    }

    fn sum<const N: usize>(&self, of: impl Fn(&Numbers) -> &[AtomicU64; N]) -> [u64; N] {
        let mut sums = [0; N];
        for numbers in self.all() {
            for (sum, counter) in sums.iter_mut().zip(of(numbers)) {
                *sum += counter.load(Relaxed);
            }
        }
        sums
    }
}

fn add(mine: Shard, counters: &[AtomicU64], index: usize, by: u64) {
    if let Some(counter) = counters.get(index).filter(|_| by > 0) {
        mine.add(counter, by);
    }
}

/// What is kept of `inode`, as long as there is room.
fn of_file<T>(kept: &mut BTreeMap<u64, T>, inode: u64, make: impl FnOnce() -> T) -> Option<&mut T> {
    let full = kept.len() >= FILES;
    match kept.entry(inode) {
        Entry::Occupied(entry) => Some(entry.into_mut()),
        Entry::Vacant(_) if full => None,
        Entry::Vacant(entry) => Some(entry.insert(make())),
    }
}

fn bump(counters: &mut [u64], index: usize) {
    if let Some(counter) = counters.get_mut(index) {
        *counter += 1;
    }
}

fn at(counters: &[u64; 15], operation: Operation) -> u64 {
    counters.get(operation as usize).copied().unwrap_or(0)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The number of bounds below `value`.
fn class(bounds: &[u64; 7], value: u64) -> usize {
    bounds.iter().take_while(|bound| **bound < value).count()
}

fn first_access(inode: u64) -> AccessRecord {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    AccessRecord {
        ino: inode,
        nr_read: 0,
        first_access_time_secs: now.as_secs(),
        first_access_time_nanos: now.subsec_nanos(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn all() -> Counters {
        Counters::new(&Rafs {
            iostats_files: true,
            access_pattern: true,
            latest_read_files: true,
            ..Rafs::default()
        })
    }

    #[test]
    fn operations_are_counted_by_kind() {
        let counters = all();
        counters.count(Operation::Lookup, 1, true, MILLISECOND);
        counters.count(Operation::Open, 2, false, MILLISECOND);
        counters.count(Operation::Open, 2, false, MILLISECOND);
        counters.count(Operation::Release, 2, false, MILLISECOND);
        let metrics = counters.metrics("/m");
        assert_eq!(
            (
                metrics.fop_hits[9],
                metrics.fop_errors[9],
                metrics.fop_cumulative_latency_total[9]
            ),
            (1, 1, 1000)
        );
        assert_eq!(
            (metrics.fop_hits[2], metrics.fop_errors[2], metrics.nr_opens),
            (2, 0, 1)
        );
        assert_eq!(counters.files().unwrap()[&2].total_fops, 3);
        assert_eq!(
            Operation::BatchForget as usize,
            kata::control::metrics::FILE_OPERATIONS.len() - 1
        );
    }

    #[test]
    fn reads_are_classed_by_size_and_latency() {
        let counters = all();
        for (size, class) in [
            (0, 0),
            (1023, 0),
            (1024, 1),
            (4095, 1),
            (4096, 2),
            (131_072, 5),
            (1 << 20, 7),
            (1 << 24, 7),
        ] {
            let before = counters.metrics("").block_count_read[class];
            counters.count_read(9, size, size, Duration::ZERO);
            assert_eq!(counters.metrics("").block_count_read[class], before + 1, "{size}");
        }
        for (time, class) in [
            (200, 0),
            (201, 1),
            (1_000, 1),
            (50_000, 3),
            (2_000_000, 6),
            (2_000_001, 7),
        ] {
            let before = counters.metrics("").read_latency_dist[class];
            counters.count_read(9, 1, 1, Duration::from_micros(time));
            assert_eq!(
                counters.metrics("").read_latency_dist[class],
                before + 1,
                "{time}"
            );
        }
    }

    #[test]
    fn a_read_that_waited_is_one_read_with_its_whole_latency() {
        let counters = all();
        counters.count_absent();
        counters.count_wait(true, Duration::from_secs(3));
        counters.count_read(9, 1, 1, Duration::ZERO);
        let metrics = counters.metrics("");
        assert_eq!(metrics.read_latency_dist, [0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(counters.absent(), 1);
    }

    #[test]
    fn a_guest_that_asks_for_everything_costs_a_bounded_number_of_files() {
        let counters = all();
        for inode in 0..FILES as u64 + 1000 {
            counters.count(Operation::Getattr, inode, true, Duration::ZERO);
            counters.count_read(inode, 1, 1, Duration::ZERO);
        }
        // What is known is counted on.
        counters.count(Operation::Getattr, 7, false, Duration::ZERO);
        let files = counters.files().unwrap();
        assert_eq!((files.len(), files[&7].total_fops), (FILES, 2));
        assert_eq!(counters.pattern().unwrap().len(), FILES);
        assert_eq!(
            counters.take_latest().unwrap(),
            [[0, FILES as u64 - 1]],
            "and room again after each look"
        );
        assert_eq!(
            counters.metrics("").fop_hits[0],
            FILES as u64 + 1001,
            "all are counted"
        );
    }

    #[test]
    fn files_read_lately_are_told_once() {
        let counters = all();
        for inode in [150, 7, 8, 9, 136] {
            counters.count_read(inode, 1, 1, Duration::ZERO);
        }
        assert_eq!(
            counters.take_latest().unwrap(),
            [vec![7, 9], vec![136], vec![150]]
        );
        assert!(counters.take_latest().unwrap().is_empty());
        assert_eq!(counters.pattern().unwrap().len(), 5);
        let none = Counters::new(&Rafs::default());
        assert!(none.take_latest().is_none() && none.pattern().is_none() && none.files().is_none());
    }
}
