//! Which set of counters a thread counts in.
//!
//! A thread that counts takes a place of its own and gives it back when it ends. In the set that belongs to the place no
//! other thread counts, so an addition is a load and a store; an atomic addition would cost a request as much as all the
//! rest of its accounting. Threads that find no place left share one set, and there additions are atomic.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Sets of counters: one for each place, and the shared one.
pub(crate) const SHARDS: usize = PLACES + 1;
const PLACES: usize = 31;

static TAKEN: [AtomicBool; PLACES] = [const { AtomicBool::new(false) }; PLACES];

/// A thread's place, given back when the thread ends.
struct Place(Shard);

impl Place {
    fn take() -> Self {
        Place(Shard(take(&TAKEN)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        give_back(&TAKEN, self.0.0);
    }
}

/// The first place that is free, or the index behind the last one.
fn take(places: &[AtomicBool]) -> usize {
    // Acquire, and release below: who takes a place again sees all that was counted in it.
    let free = |taken: &AtomicBool| !taken.swap(true, Ordering::Acquire);
    places.iter().position(free).unwrap_or(places.len())
}

fn give_back(places: &[AtomicBool], index: usize) {
    if let Some(taken) = places.get(index) {
        taken.store(false, Ordering::Release);
    }
}

/// The set of counters of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shard(usize);

impl Shard {
    /// That of this thread.
    pub fn mine() -> Self {
        thread_local! {
            static PLACE: Place = Place::take();
        }
        // A thread that is ending has given its place back.
        PLACE.try_with(|place| place.0).unwrap_or(Shard(PLACES))
    }

    /// Its index, below [`SHARDS`].
    pub fn index(self) -> usize {
        self.0
    }

    /// Adds to a counter in this set.
    pub fn add(self, counter: &AtomicU64, by: u64) {
        if self.0 < PLACES {
            counter.store(
                counter.load(Ordering::Relaxed).wrapping_add(by),
                Ordering::Relaxed,
            );
        } else {
            counter.fetch_add(by, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn no_two_living_threads_have_the_same_place() {
        const THREADS: usize = PLACES * 2;
        let together = Barrier::new(THREADS);
        let counter = AtomicU64::new(0);
        let places: Vec<Shard> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|_| {
                    scope.spawn(|| {
                        let mine = Shard::mine();
                        together.wait();
                        assert_eq!(mine, Shard::mine());
                        if mine.index() == PLACES {
                            (0..1000).for_each(|_| mine.add(&counter, 1));
                        }
                        mine
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let own: Vec<usize> = places
            .iter()
            .map(|place| place.index())
            .filter(|index| *index < PLACES)
            .collect();
        assert_eq!(own.iter().collect::<BTreeSet<_>>().len(), own.len());
        let shared = THREADS - own.len();
        assert!(shared >= THREADS - PLACES);
        assert_eq!(counter.into_inner(), shared as u64 * 1000);
    }

    #[test]
    fn places_are_given_back() {
        let places = [const { AtomicBool::new(false) }; 2];
        assert_eq!([take(&places), take(&places), take(&places)], [0, 1, 2]);
        give_back(&places, 2);
        assert_eq!(take(&places), 2);
        give_back(&places, 0);
        assert_eq!([take(&places), take(&places)], [0, 2]);
    }
}
