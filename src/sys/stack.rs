//! Overwrites dead stack frames, where the set-up of a cipher leaves copies of its key.

/// More than the deepest chain of calls that handles key bytes.
const DEPTH: usize = 64 * 1024;

/// Overwrites the part of the stack below the caller's frame. To be called by a function after
/// the calls that handled key bytes have returned.
#[inline(never)]
pub fn burn() {
    let mut dead = std::mem::MaybeUninit::<[u8; DEPTH]>::uninit();
    // SAFETY: the array is this frame's own.
    unsafe { super::alloc::overwrite(dead.as_mut_ptr().cast(), DEPTH) };
}

/// Runs `work` and then [`burn`]s the stack it used, on return and on panic alike.
#[inline(never)]
pub fn with_burnt_stack<T>(work: impl FnOnce() -> T) -> T {
    struct Burn;
    impl Drop for Burn {
        fn drop(&mut self) {
            burn();
        }
    }
    let _burn = Burn;
    run(work)
}

/// Keeps the frames of `work` below the frame that burns them.
#[inline(never)]
fn run<T>(work: impl FnOnce() -> T) -> T {
    work()
}
