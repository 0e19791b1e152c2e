//! Counts what is allocated, so that tests can hold it against a limit.
//!
//! The whole test program allocates through [`Counting`]; each thread has its own count, so that tests that run beside
//! one another do not count together.
#![expect(unsafe_code, reason = "an allocator is unsafe by its nature; this one hands everything on")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

thread_local! {
    static NOW: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

fn count(change: i64) {
    // A thread that ends frees after its counters are gone.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now.get())));
    });
}

fn signed(len: usize) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

// SAFETY: every call is handed on to the system's allocator unchanged; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        // SAFETY: the caller's promise is handed on.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count(signed(len) - signed(layout.size()));
        // SAFETY: the caller's promise is handed on.
        unsafe { System.realloc(place, layout, len) }
    }
}

/// Run `work` and say how many bytes this thread had allocated at most, beyond what it had before.
pub fn peak_of<R>(work: impl FnOnce() -> R) -> (R, i64) {
    let before = begin();
    let result = work();
    (result, peak_since(before))
}

/// What this thread has allocated now, for [`peak_since`].
pub fn begin() -> i64 {
    PEAK.set(NOW.get());
    NOW.get()
}

/// The most that this thread had beyond that at any time since.
pub fn peak_since(before: i64) -> i64 {
    PEAK.get() - before
}
