//! Mounting a FUSE file system, cloning its device, and waking a thread that waits on it.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::Once;

/// `mount(2)` with a `data` string.
pub fn mount(
    source: &CStr,
    target: &CStr,
    fs_type: &CStr,
    flags: libc::c_ulong,
    data: &CStr,
) -> io::Result<()> {
    // SAFETY: all four are NUL-terminated and outlive the call.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fs_type.as_ptr(),
            flags,
            data.as_ptr().cast::<libc::c_void>(),
        )
    })
}

/// What becomes of those who use a mount that is unmounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// There are none, or it fails with EBUSY.
    IfUnused,
    /// They keep it until they have done with it.
    Lazy,
    /// The same, and every call of theirs fails from now on.
    Forced,
}

/// `umount2(2)`; a symbolic link at `target` is not followed.
pub fn unmount(target: &CStr, how: Unmount) -> io::Result<()> {
    let flags = match how {
        Unmount::IfUnused => 0,
        Unmount::Lazy => libc::MNT_DETACH,
        Unmount::Forced => libc::MNT_DETACH | libc::MNT_FORCE,
    };
    // SAFETY: NUL-terminated, outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::UMOUNT_NOFOLLOW | flags) })
}

/// FUSE_DEV_IOC_CLONE: makes `device`, newly opened, another channel of `session`.
pub fn clone_device(device: BorrowedFd<'_>, session: BorrowedFd<'_>) -> io::Result<()> {
    const FUSE_DEV_IOC_CLONE: libc::Ioctl = 0x8004_e500u32 as libc::Ioctl;
    let session = session.as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32, which lives through the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const session) })
}

/// A thread of this process that [`Waiter::interrupt`] can get out of a blocking system call.
///
/// The signal may come just before the call: whoever needs the thread awake repeats it until
/// the thread has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter(libc::pid_t);

impl Waiter {
    /// The calling thread, made ready to be interrupted.
    pub fn current() -> Waiter {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: an all-zero sigaction is a valid one: no flags (so no SA_RESTART, calls
            // end with EINTR) and an empty mask; the handler does nothing.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
                libc::sigaction(signal(), &raw const action, ptr::null_mut());
            }
        });
        // Whoever has started this process may have left it blocked.
        mask(libc::SIG_UNBLOCK);
        // SAFETY: has no preconditions.
        Waiter(unsafe { libc::gettid() })
    }

    /// A system call that the thread is blocked in fails with EINTR. A thread that has ended
    /// is no error.
    pub fn interrupt(self) {
        // SAFETY: has no preconditions; both ids are of this process, so no other can be hit.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, signal()) };
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// Not used by any library in the process, and ignored by nobody's default.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

/// Puts [`signal`] into the calling thread's mask, or takes it out; whether it was in it.
fn mask(how: libc::c_int) -> bool {
    // SAFETY: all-zero sets are valid ones, and they live through the calls.
    unsafe {
        let (mut set, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
        libc::sigaddset(&raw mut set, signal());
        libc::pthread_sigmask(how, &raw const set, &raw mut before);
        libc::sigismember(&raw const before, signal()) == 1
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_blocked_read_is_interrupted() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            tell.send(Waiter::current()).unwrap();
            rustix::io::read(&reader, &mut [0u8; 1])
        });
        let waiter = told.recv().unwrap();
        while !thread.is_finished() {
            waiter.interrupt();
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(thread.join().unwrap(), Err(rustix::io::Errno::INTR));
    }

    #[test]
    fn a_signal_that_was_inherited_blocked_comes_through() {
        let blocked = thread::spawn(|| {
            mask(libc::SIG_BLOCK);
            Waiter::current();
            mask(libc::SIG_UNBLOCK)
        });
        assert!(!blocked.join().unwrap());
    }
}
