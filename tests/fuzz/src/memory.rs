//! How much memory this thread has allocated, and the most that it had at once.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes now; frees of what another thread allocated can make it negative.
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

fn count(change: isize) {
    // Fails while a thread ends, when nobody asks any more.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now.get())));
    });
}

// SAFETY: Everything is passed on to the system's allocator; counting neither allocates nor fails.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: The caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: The caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: The caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: The caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `work`; panics if it had more than `limit` bytes at once.
pub(crate) fn bounded<R>(what: &str, limit: usize, work: impl FnOnce() -> R) -> R {
    let before = NOW.get();
    PEAK.set(before);
    let result = work();
    let most = PEAK.get() - before;
    assert!(
        most <= limit as isize,
        "{what} took {most} bytes at once, allowed are {limit}"
    );
    result
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_taken_is_counted() {
        let take = || std::hint::black_box(vec![1u8; 1 << 16]).len();
        super::bounded("a vector", 1 << 16, take);
        assert!(std::panic::catch_unwind(|| super::bounded("a vector", (1 << 16) - 1, take)).is_err());
    }
}
