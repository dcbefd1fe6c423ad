//! One entry of a FUSE-over-io_uring queue, on a ring of its own (linux/fuse.h, fs/fuse/dev_uring.c).
//!
//! The kernel writes a request into memory that was registered with it and completes the command that
//! waits there; the next command answers it out of the same memory and waits for the request after it.
//! Of that memory nothing can be seen here but between the two.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// `FUSE_IO_URING_CMD_REGISTER`, `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`.
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;

/// `struct fuse_uring_req_header`: `in_out[128]`, `op_in[128]`, `struct fuse_uring_ent_in_out`.
const HEADER_LEN: usize = 288;
const OP_IN: usize = 128;
const OP_IN_LEN: usize = 128;
const COMMIT_ID: usize = 264;
const PAYLOAD_LEN: usize = 272;

/// `struct fuse_in_header`, `struct fuse_out_header`.
const IN_HEADER_LEN: usize = 40;
const OUT_HEADER_LEN: usize = 16;
const UNIQUE: usize = 8;

/// Where the payload begins in the memory of an entry: on a page of its own.
const PAYLOAD: usize = 4096;

/// Where the number of buffers is in a submission: `struct io_uring_sqe.len`.
const SQE_LEN: usize = 24;

/// Used by the thread that made it, which no other may be.
pub struct Entry {
    ring: IoUring<Entry128, cqueue::Entry>,
    memory: Memory,
    /// Read by the kernel as the entry is registered.
    buffers: Box<[libc::iovec; 2]>,
    /// The device and the queue that the entry is registered with.
    at: Option<(Arc<OwnedFd>, u16)>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not with the kernel, which has never had it or will not have it again.
    Idle,
    /// The kernel may write to the memory.
    WithKernel,
    /// A request is in the memory.
    Request,
}

/// A request, and where its reply goes.
#[derive(Debug)]
pub struct Request<'a> {
    /// `struct fuse_in_header`.
    pub header: &'a [u8],
    /// The fixed arguments of the operation.
    pub fixed: &'a [u8],
    /// How much of `payload` is part of the request.
    pub payload_len: usize,
    /// Names and data; the body of the reply.
    pub payload: &'a mut [u8],
}

/// What a wait has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    Request,
    /// No request, and no failure: a signal, or there was no wait.
    Nothing,
    /// The mount is gone.
    Gone,
}

impl Entry {
    /// A ring, and memory for requests and replies of up to `payload_len` bytes beside their headers.
    /// Not yet known to FUSE.
    ///
    /// Fails where the kernel has no io_uring, or keeps it from this process.
    pub fn new(payload_len: usize) -> io::Result<Entry> {
        let ring = IoUring::<Entry128, cqueue::Entry>::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .dontfork()
            .build(2)?;
        let memory = Memory::new(PAYLOAD + payload_len)?;
        let part = |from: usize, len: usize| libc::iovec {
            iov_base: memory.at(from).as_ptr().cast(),
            iov_len: len,
        };
        let buffers = Box::new([part(0, HEADER_LEN), part(PAYLOAD, payload_len)]);
        Ok(Entry { ring, memory, buffers, at: None, state: State::Idle })
    }

    /// Gives the entry to a queue of the session of `device`, which agreed on the ring in its INIT:
    /// `queue` is the number of a CPU. Once every queue has one, requests come this way.
    ///
    /// After an error it is not certain which way they come, if any.
    pub fn register(&mut self, device: Arc<OwnedFd>, queue: u16) -> io::Result<()> {
        if self.at.is_some() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.at = Some((device, queue));
        self.push(REGISTER, 0)?;
        self.ring.submit()?;
        // One that was taken is completed with a request, and that is not lost by looking.
        let completion = self.ring.completion().next();
        match completion {
            Some(completion) => self.completed(completion.result()).map(drop),
            None => Ok(()),
        }
    }

    /// Sends the reply that was committed, if one was. The next request may be there by then.
    ///
    /// After an error, and when the mount is gone, nothing will come any more.
    pub fn send(&mut self) -> io::Result<Waited> {
        self.enter(0)
    }

    /// [`Entry::send`], and waits for the next request.
    pub fn wait(&mut self) -> io::Result<Waited> {
        self.enter(1)
    }

    fn enter(&mut self, wanted: usize) -> io::Result<Waited> {
        match self.state {
            // It came as the entry was registered, or with what was sent.
            State::Request => return Ok(Waited::Request),
            State::Idle => return Ok(Waited::Gone),
            State::WithKernel => {}
        }
        let entered = self.ring.submit_and_wait(wanted);
        let completion = self.ring.completion().next();
        if let Some(completion) = completion {
            return self.completed(completion.result());
        }
        match entered.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::EINTR | libc::EAGAIN | libc::EBUSY), _)) => Ok(Waited::Nothing),
            Err((_, error)) => Err(error),
        }
    }

    /// The request that [`Entry::wait`] has found; None before, and after [`Entry::commit`].
    pub fn request(&mut self) -> Option<Request<'_>> {
        if self.state != State::Request {
            return None;
        }
        let len = |word: [u8; 4]| u32::from_ne_bytes(word) as usize;
        let payload_len = len(self.memory.word(PAYLOAD_LEN));
        // The length of it all is said as for the device, where everything comes in one piece.
        let fixed_len = len(self.memory.word(0)).saturating_sub(IN_HEADER_LEN + payload_len);
        let (head, payload) = self.memory.bytes().split_at_mut(PAYLOAD);
        Some(Request {
            header: &head[..IN_HEADER_LEN],
            fixed: &head[OP_IN..OP_IN + fixed_len.min(OP_IN_LEN)],
            payload_len: payload_len.min(payload.len()),
            payload,
        })
    }

    /// Ends the request: with `error`, a negative errno, or with 0 and the first `len` bytes of the
    /// payload. It is sent by the next [`Entry::send`] or [`Entry::wait`].
    pub fn commit(&mut self, error: i32, len: usize) -> io::Result<()> {
        if self.state != State::Request {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let commit_id = u64::from_ne_bytes(self.memory.word(COMMIT_ID));
        let unique: [u8; 8] = self.memory.word(UNIQUE);
        let head = self.memory.bytes();
        head[..4].copy_from_slice(&((OUT_HEADER_LEN + len) as u32).to_ne_bytes());
        head[4..8].copy_from_slice(&error.to_ne_bytes());
        head[UNIQUE..OUT_HEADER_LEN].copy_from_slice(&unique);
        head[PAYLOAD_LEN..PAYLOAD_LEN + 4].copy_from_slice(&(len as u32).to_ne_bytes());
        self.push(COMMIT_AND_FETCH, commit_id)
    }

    /// Overwrites that part of the payload. Of a reply that was committed nothing is left then, unless
    /// it was sent: false if it cannot be told that it was.
    ///
    /// A request that is there, [`Entry::request`], is the caller's to spare.
    pub fn overwrite(&mut self, part: Range<usize>) -> bool {
        if !self.ring.submission().is_empty() {
            return false;
        }
        let end = part.end.min(self.memory.len - PAYLOAD);
        let start = part.start.min(end);
        // SAFETY: the range lies within the mapping. The kernel fills it in this thread's calls of `enter`
        // only (IORING_SETUP_DEFER_TASKRUN: what completes a command runs in its submitter), so not now;
        // what it has filled in is known, since `enter` looks for a completion before it returns.
        unsafe { super::alloc::overwrite(self.memory.at(PAYLOAD + start).as_ptr(), end - start) };
        true
    }

    fn completed(&mut self, result: i32) -> io::Result<Waited> {
        self.state = State::Idle;
        match -result {
            0 => {
                self.state = State::Request;
                Ok(Waited::Request)
            }
            // The kernel says so as soon as a connection begins to end, when the device does not yet.
            libc::ENOTCONN => Ok(Waited::Gone),
            // A reply that meets the end of the mount may fail in other ways too.
            _ if self.is_unmounted() => Ok(Waited::Gone),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// The device says so by POLLERR.
    fn is_unmounted(&self) -> bool {
        let Some((device, _)) = &self.at else { return false };
        let mut device = [PollFd::new(device, PollFlags::empty())];
        poll(&mut device, Some(&Timespec::default())).is_ok()
            && device[0].revents().contains(PollFlags::ERR)
    }

    fn push(&mut self, command: u32, commit_id: u64) -> io::Result<()> {
        let Some((device, queue)) = &self.at else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        // struct fuse_uring_cmd_req: flags, commit_id, qid.
        let mut arguments = [0; 80];
        arguments[8..16].copy_from_slice(&commit_id.to_ne_bytes());
        arguments[16..18].copy_from_slice(&queue.to_ne_bytes());
        let mut submission = opcode::UringCmd80::new(types::Fd(device.as_raw_fd()), command)
            .cmd(arguments)
            .addr(Some(self.buffers.as_ptr() as u64))
            .build();
        // SAFETY: an Entry128 is a `struct io_uring_sqe` of 128 bytes, in which `len`, for which the
        // crate has no setter here, is the u32 at that offset.
        unsafe {
            let len = (&raw mut submission).cast::<u8>().add(SQE_LEN).cast::<u32>();
            len.write(self.buffers.len() as u32);
        }
        // SAFETY: the descriptor, the two buffers and the memory they name live as long as the ring:
        // see `Drop`. Nothing refers to that memory while the kernel has it.
        unsafe { self.ring.submission().push(&submission) }
            .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        self.state = State::WithKernel;
        Ok(())
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // A ring is taken down in the background. Until then the kernel may write a request into the
        // entry, so what it writes to is left to it.
        if self.state == State::WithKernel {
            self.memory.leak();
        }
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("state", &self.state).finish_non_exhaustive()
    }
}

/// A mapping of its own: page-aligned, left out of core dumps and forks.
struct Memory {
    start: NonNull<u8>,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> io::Result<Memory> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh anonymous mapping touches no memory in use.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, access, MapFlags::PRIVATE) }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let memory = Memory { start, len };
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: exactly the mapping made above, which stays as it is but for dumps and forks.
            unsafe { madvise(memory.start.as_ptr().cast(), len, advice) }?;
        }
        Ok(memory)
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        debug_assert!(offset <= self.len);
        // SAFETY: callers stay within the mapping.
        unsafe { self.start.add(offset) }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is this value's own, initialised with zeros, and borrowed with it. Callers
        // do not ask for it while the kernel may write to it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    fn word<const N: usize>(&mut self, offset: usize) -> [u8; N] {
        let mut word = [0; N];
        word.copy_from_slice(&self.bytes()[offset..offset + N]);
        word
    }

    fn leak(&mut self) {
        self.len = 0;
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping is this value's own, and nobody uses it after this.
            let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
            debug_assert!(unmapped.is_ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_takes_no_commands_is_refused() {
        let Ok(mut entry) = Entry::new(1 << 20) else {
            return println!("skipped: this machine has no io_uring");
        };
        assert!(entry.request().is_none());
        assert!(entry.commit(0, 0).is_err());
        let file = tempfile::tempfile().unwrap();
        assert!(entry.register(Arc::new(file.into()), 0).is_err());
        assert!(entry.request().is_none());
        assert_eq!(entry.wait().unwrap(), Waited::Gone);
    }

    #[test]
    fn the_payload_lies_on_pages_of_its_own_and_is_overwritten() {
        let mut memory = Memory::new(PAYLOAD + 4096).unwrap();
        assert_eq!(memory.at(PAYLOAD).as_ptr() as usize % 4096, 0);
        memory.bytes().fill(7);
        assert_eq!(memory.word::<4>(COMMIT_ID), [7; 4]);
    }
}
