//! Memory for secrets: locked in RAM, left out of core dumps and forks, overwritten when freed.
//!
//! Slots of a few sizes are carved out of mapped regions of 256 KiB; a region is never unmapped,
//! its slots are reused. `mlock` counts against RLIMIT_MEMLOCK for whoever lacks CAP_IPC_LOCK: a
//! failure is returned, since a secret that may be swapped out is not one.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::ptr::NonNull;

use crate::sync::Mutex;

const REGION: usize = 256 * 1024;
/// Slot sizes; the largest holds an AES-GCM key schedule with its GHASH tables many times over.
const SLOT_SIZES: [usize; 6] = [64, 128, 256, 1024, 4096, 16384];
const ALIGNMENT: usize = 64;

static FREE: Mutex<[Vec<Slot>; SLOT_SIZES.len()]> = Mutex::new([const { Vec::new() }; 6]);

#[derive(Clone, Copy)]
struct Slot(NonNull<u8>);

// SAFETY: a slot is plain memory, owned by whoever holds it: the free list or one `Locked`.
unsafe impl Send for Slot {}

/// A value in locked memory. Dropping it drops the value and overwrites its memory.
///
/// The value must own no memory elsewhere that is itself secret.
pub struct Locked<T> {
    place: NonNull<T>,
    class: usize,
}

// SAFETY: `Locked` owns its `T` as a `Box` does.
unsafe impl<T: Send> Send for Locked<T> {}
// SAFETY: as above; only `&T` is given out through a shared reference.
unsafe impl<T: Sync> Sync for Locked<T> {}

impl<T> Locked<T> {
    /// Moves what `make` returns into locked memory, and burns the stack that it was made on.
    pub fn new_with(make: impl FnOnce() -> T) -> io::Result<Locked<T>> {
        let class = class_for::<T>()?;
        let slot = take(class)?;
        super::stack::with_burnt_stack(|| {
            let place = slot.0.cast::<T>();
            // SAFETY: the slot is large enough and aligned for T (`class_for`), and ours alone.
            unsafe { place.write(make()) };
            Ok(Locked { place, class })
        })
    }

    pub fn get_mut(&mut self) -> &mut T {
        // SAFETY: the place holds a valid T and `&mut self` is the only access to it.
        unsafe { self.place.as_mut() }
    }
}

impl<T> Deref for Locked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the place holds a valid T for as long as `self` lives.
        unsafe { self.place.as_ref() }
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        // SAFETY: the value is dropped once, and its memory is not used afterwards but as a slot.
        unsafe {
            std::ptr::drop_in_place(self.place.as_ptr());
            super::alloc::overwrite(self.place.as_ptr().cast(), SLOT_SIZES[self.class]);
        }
        FREE.lock()[self.class].push(Slot(self.place.cast()));
    }
}

impl<T> fmt::Debug for Locked<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

fn class_for<T>() -> io::Result<usize> {
    let fits = align_of::<T>() <= ALIGNMENT;
    SLOT_SIZES
        .iter()
        .position(|&size| fits && size_of::<T>() <= size)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "secret too large to lock"))
}

fn take(class: usize) -> io::Result<Slot> {
    let mut free = FREE.lock();
    if let Some(slot) = free[class].pop() {
        return Ok(slot);
    }
    let region = map_region()?;
    let size = SLOT_SIZES[class];
    for offset in (0..REGION).step_by(size) {
        // SAFETY: `offset` lies within the region just mapped.
        free[class].push(Slot(unsafe { region.add(offset) }));
    }
    free[class].pop().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

fn map_region() -> io::Result<NonNull<u8>> {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
    // SAFETY: a fresh anonymous mapping touches no memory in use; the calls after it get exactly
    // that mapping, and it is unmapped only while nobody has seen it.
    unsafe {
        let start = mmap_anonymous(
            std::ptr::null_mut(),
            REGION,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )?;
        let protect = || -> rustix::io::Result<()> {
            madvise(start, REGION, Advice::LinuxDontDump)?;
            madvise(start, REGION, Advice::LinuxDontFork)?;
            mlock(start, REGION)
        };
        if let Err(error) = protect() {
            munmap(start, REGION)?;
            return Err(io::Error::other(format!(
                "cannot lock memory for keys ({error}); run as root or raise LimitMEMLOCK"
            )));
        }
        NonNull::new(start.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_overwritten_on_drop_and_reused() {
        let mut secret = Locked::new_with(|| [0x5a_u8; 2000]).unwrap();
        secret.get_mut()[7] = 1;
        let place = secret.place;
        drop(secret);
        // SAFETY: regions are never unmapped; no other test uses slots of this class.
        let content = unsafe { std::slice::from_raw_parts(place.as_ptr().cast::<u8>(), 2000) };
        assert!(content.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn values_are_aligned_and_separate() {
        let secrets: Vec<_> = (0..9000_u64).map(|i| Locked::new_with(|| [i; 4]).unwrap()).collect();
        for (i, secret) in (0_u64..).zip(&secrets) {
            assert_eq!(secret.place.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(**secret, [i; 4]);
        }
    }

    #[test]
    fn too_large_is_refused() {
        assert!(Locked::new_with(|| [0_u8; 20000]).is_err());
    }
}
