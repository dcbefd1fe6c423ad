//! A global allocator that zeroes every block it takes back.
//!
//! Secrets of byokfs live in [`super::locked`]. But a token or an unwrapped key passes through
//! buffers of the HTTP, TLS and JSON libraries first, and those are freed as they are. Zeroing all
//! freed memory covers them without trusting each library. Large I/O buffers are pooled by their
//! users, so the cost falls on small blocks only.

use std::alloc::{GlobalAlloc, Layout, System};

#[derive(Debug)]
pub struct ZeroOnFree;

/// Overwrites `len` bytes in a way the compiler must keep, although nobody reads them again.
///
/// # Safety
/// `start..start + len` is writable memory that nobody else uses.
pub(super) unsafe fn overwrite(start: *mut u8, len: usize) {
    // SAFETY: the caller's promise. The barrier takes the pointer, so the stores before it
    // cannot be dropped as dead.
    unsafe {
        std::ptr::write_bytes(start, 0, len);
        std::arch::asm!("/* {0} */", in(reg) start, options(nostack, preserves_flags));
    }
}

// SAFETY: every call is passed on to the system allocator with the layout it came with.
unsafe impl GlobalAlloc for ZeroOnFree {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block is the caller's, whole, until it is handed back here.
        unsafe {
            overwrite(block, layout.size());
            System.dealloc(block, layout);
        }
    }

    // `realloc` stays with the default: allocate, copy, `dealloc`. The system's own would leave
    // the old copy behind when it moves a block.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_blocks_are_zero() {
        let layout = Layout::from_size_align(4096, 16).unwrap();
        // SAFETY: the block is written within its size and read only before it is freed.
        unsafe {
            let block = ZeroOnFree.alloc(layout);
            assert!(!block.is_null());
            std::ptr::write_bytes(block, 0xa5, 4096);
            overwrite(block, 4096);
            let content = std::slice::from_raw_parts(block, 4096);
            assert!(content.iter().all(|&byte| byte == 0));
            ZeroOnFree.dealloc(block, layout);
        }
    }
}
