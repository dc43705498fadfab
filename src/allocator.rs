//! The system's allocator, which ends the process with an error message where it has no memory.
//! Rust alone would abort without naming what the process was doing.

use std::alloc::{GlobalAlloc, Layout, System};

use bireme::device::memory;

struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn checked(memory: *mut u8, n_bytes: usize) -> *mut u8 {
    if memory.is_null() { memory::end_process(n_bytes) } else { memory }
}

// SAFETY: each call is passed on to the system's allocator unchanged, and its result is returned.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps what the system's allocator asks for.
        checked(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        checked(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, n_bytes: usize) -> *mut u8 {
        // SAFETY: as above.
        checked(unsafe { System.realloc(memory, layout, n_bytes) }, n_bytes)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}
