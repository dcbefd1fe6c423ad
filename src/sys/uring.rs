//! Entries of FUSE-over-io_uring queues, and the rings that they wait in (linux/fuse.h,
//! fs/fuse/dev_uring.c).
//!
//! The kernel writes a request into memory that was registered with it and completes the command that
//! waits there; the next command answers it out of the same memory and waits for the request after it.
//! Of that memory nothing can be seen here but between the two. Which ring a command is sent by is all
//! the same to FUSE: an entry with a request belongs to nobody, and to the ring that answers it after
//! that.

use std::collections::VecDeque;
use std::io;
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

/// Memory that requests come in and replies go out by, one after the other.
pub struct Entry {
    memory: Memory,
    /// Read by the kernel as the entry is registered.
    buffers: Box<[libc::iovec; 2]>,
    /// The device and the queue that the entry is registered with.
    at: Option<(Arc<OwnedFd>, u16)>,
    state: State,
    /// How much of the payload has held something since it was last overwritten.
    used: usize,
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

impl Entry {
    /// Memory for requests and replies of up to `payload_len` bytes beside their headers. Not yet known
    /// to FUSE.
    pub fn new(payload_len: usize) -> io::Result<Entry> {
        let memory = Memory::new(PAYLOAD + payload_len)?;
        let part = |from: usize, len: usize| libc::iovec {
            iov_base: memory.at(from).as_ptr().cast(),
            iov_len: len,
        };
        let buffers = Box::new([part(0, HEADER_LEN), part(PAYLOAD, payload_len)]);
        Ok(Entry { memory, buffers, at: None, state: State::Idle, used: 0 })
    }

    /// The CPU whose queue it was registered with.
    pub fn queue(&self) -> usize {
        self.at.as_ref().map_or(0, |&(_, queue)| usize::from(queue))
    }

    /// The request that is there: from when a ring has it arrive until one answers it.
    pub fn request(&mut self) -> Option<Request<'_>> {
        if self.state != State::Request {
            return None;
        }
        let payload_len = self.request_len();
        // The length of it all is said as for the device, where everything comes in one piece.
        let len = u32::from_ne_bytes(self.memory.word(0)) as usize;
        let fixed_len = len.saturating_sub(IN_HEADER_LEN + payload_len);
        let (head, payload) = self.memory.bytes().split_at_mut(PAYLOAD);
        Some(Request {
            header: &head[..IN_HEADER_LEN],
            fixed: &head[OP_IN..OP_IN + fixed_len.min(OP_IN_LEN)],
            payload_len: payload_len.min(payload.len()),
            payload,
        })
    }

    /// So much of the payload may hold something.
    pub fn has_used(&mut self, len: usize) {
        self.used = self.used.max(len).min(self.memory.len - PAYLOAD);
    }

    /// Overwrites what the payload holds beside a request that is there.
    pub fn overwrite(&mut self) {
        let keep = if self.state == State::Request { self.request_len() } else { 0 };
        self.overwrite_after(keep);
    }

    /// The same, and the request too, of which nothing is needed any more but the answer.
    pub fn overwrite_all(&mut self) {
        self.overwrite_after(0);
    }

    fn overwrite_after(&mut self, keep: usize) {
        if keep < self.used {
            let start = self.memory.at(PAYLOAD + keep).as_ptr();
            // SAFETY: `used` is never past the end of the mapping, which nothing refers to now. The kernel
            // does not write to it: either it does not have the entry, or see `Ring::overwrite`.
            unsafe { super::alloc::overwrite(start, self.used - keep) };
            self.used = keep;
        }
    }

    /// Of the payload.
    fn request_len(&mut self) -> usize {
        let len = u32::from_ne_bytes(self.memory.word(PAYLOAD_LEN)) as usize;
        len.min(self.memory.len - PAYLOAD)
    }

    /// The header of the reply.
    fn set_reply(&mut self, error: i32, len: usize) {
        let unique: [u8; 8] = self.memory.word(UNIQUE);
        let head = self.memory.bytes();
        head[..4].copy_from_slice(&((OUT_HEADER_LEN + len) as u32).to_ne_bytes());
        head[4..8].copy_from_slice(&error.to_ne_bytes());
        head[UNIQUE..OUT_HEADER_LEN].copy_from_slice(&unique);
        head[PAYLOAD_LEN..PAYLOAD_LEN + 4].copy_from_slice(&(len as u32).to_ne_bytes());
    }

    /// The device says so by POLLERR.
    fn is_unmounted(&self) -> bool {
        let Some((device, _)) = &self.at else { return false };
        let mut device = [PollFd::new(device, PollFlags::empty())];
        poll(&mut device, Some(&Timespec::default())).is_ok()
            && device[0].revents().contains(PollFlags::ERR)
    }
}

// SAFETY: its pointers are to memory that is its own alone, mapped or on the heap, and that nothing ties
// to a thread. The kernel reaches it by its address, in whichever thread of this process.
unsafe impl Send for Entry {}

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

/// Where entries wait for their next request. Used by the thread that made it, which no other may be.
pub struct Ring {
    ring: IoUring<Entry128, cqueue::Entry>,
    /// The entries that the kernel has, under the numbers of their commands.
    waiting: Vec<Option<Entry>>,
    free: Vec<usize>,
    arrived: VecDeque<Entry>,
    gone: usize,
}

impl Ring {
    /// For that many entries at most.
    ///
    /// Fails where the kernel has no io_uring, or keeps it from this process.
    pub fn new(entries: usize) -> io::Result<Ring> {
        let ring = IoUring::<Entry128, cqueue::Entry>::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            // Whatever it is made for, each call then brings in what has arrived.
            .setup_taskrun_flag()
            .setup_submit_all()
            .dontfork()
            .build(entries as u32)?;
        let waiting = (0..entries).map(|_| None).collect();
        let free = (0..entries).rev().collect();
        Ok(Ring { ring, waiting, free, arrived: VecDeque::new(), gone: 0 })
    }

    /// Gives an entry to a queue of the session of `device`, which agreed on the ring in its INIT:
    /// `queue` is the number of a CPU. Once every queue has one, requests come this way.
    ///
    /// After an error it is not certain which way they come, if any.
    pub fn register(
        &mut self,
        mut entry: Entry,
        device: Arc<OwnedFd>,
        queue: u16,
    ) -> io::Result<()> {
        if entry.at.is_some() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        entry.at = Some((device, queue));
        self.push(entry, REGISTER, 0)?;
        // One that is taken is completed with a request, and that is not lost by looking.
        self.enter(0)
    }

    /// Ends the request in `entry`: with `error`, a negative errno, or with 0 and the first `len` bytes
    /// of the payload. It is sent with the next [`Ring::send`] or [`Ring::wait`].
    ///
    /// For as many entries as [`Ring::room`] says.
    pub fn answer(&mut self, mut entry: Entry, error: i32, len: usize) -> io::Result<()> {
        if entry.state != State::Request {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        entry.has_used(len);
        let commit_id = u64::from_ne_bytes(entry.memory.word(COMMIT_ID));
        entry.set_reply(error, len);
        self.push(entry, COMMIT_AND_FETCH, commit_id)
    }

    /// How many more entries there can be here, beside those that have arrived and were not taken.
    pub fn room(&self) -> usize {
        self.free.len().saturating_sub(self.arrived.len())
    }

    /// No entry waits here, and none has arrived.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.waiting.len() && self.arrived.is_empty()
    }

    /// Sends the answers that were not sent, and looks for what has arrived.
    ///
    /// After an error nothing will come any more.
    pub fn send(&mut self) -> io::Result<()> {
        if self.is_sent() { Ok(()) } else { self.enter(0) }
    }

    /// The same, and waits until something has arrived, or a signal comes.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter(usize::from(self.arrived.is_empty() && self.gone == 0))
    }

    /// The next entry with a request.
    pub fn next_request(&mut self) -> Option<Entry> {
        self.arrived.pop_front()
    }

    pub fn has_request(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// How many entries have ended with the mount, since this was last asked.
    pub fn take_gone(&mut self) -> usize {
        std::mem::take(&mut self.gone)
    }

    /// Overwrites what the payloads of all its entries hold, but for requests that are there. Of an
    /// answer nothing is left then, unless it was sent: false if it cannot be told that all were.
    pub fn overwrite(&mut self) -> bool {
        if !self.is_sent() {
            return false;
        }
        // The kernel fills entries in this thread's calls of `enter` only (IORING_SETUP_DEFER_TASKRUN: what
        // completes a command runs in its submitter), so not now; and those that it has filled have
        // arrived, since `enter` looks for all completions before it returns.
        self.waiting.iter_mut().flatten().for_each(Entry::overwrite);
        self.arrived.iter_mut().for_each(Entry::overwrite);
        true
    }

    fn is_sent(&mut self) -> bool {
        self.ring.submission().is_empty()
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        let entered = self.ring.submit_and_wait(wanted);
        let mut failed = Ok(());
        loop {
            let completion = self.ring.completion().next();
            let Some(completion) = completion else { break };
            let completed = self.completed(completion.user_data(), completion.result());
            failed = failed.and(completed);
        }
        failed?;
        match entered.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::EINTR | libc::EAGAIN | libc::EBUSY), _)) => Ok(()),
            Err((_, error)) => Err(error),
        }
    }

    fn completed(&mut self, number: u64, result: i32) -> io::Result<()> {
        let number = number as usize;
        let Some(mut entry) = self.waiting.get_mut(number).and_then(Option::take) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        self.free.push(number);
        match -result {
            0 => {
                entry.state = State::Request;
                let len = entry.request_len();
                entry.has_used(len);
                self.arrived.push_back(entry);
                return Ok(());
            }
            // A reply that meets the end of the mount may fail in other ways than by ENOTCONN.
            _ if entry.is_unmounted() => self.gone += 1,
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        entry.state = State::Idle;
        Ok(())
    }

    fn push(&mut self, mut entry: Entry, command: u32, commit_id: u64) -> io::Result<()> {
        let Some((device, queue)) = &entry.at else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let Some(number) = self.free.pop() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        // struct fuse_uring_cmd_req: flags, commit_id, qid.
        let mut arguments = [0; 80];
        arguments[8..16].copy_from_slice(&commit_id.to_ne_bytes());
        arguments[16..18].copy_from_slice(&queue.to_ne_bytes());
        let mut submission = opcode::UringCmd80::new(types::Fd(device.as_raw_fd()), command)
            .cmd(arguments)
            .addr(Some(entry.buffers.as_ptr() as u64))
            .build()
            .user_data(number as u64);
        // SAFETY: an Entry128 is a `struct io_uring_sqe` of 128 bytes, in which `len`, for which the
        // crate has no setter here, is the u32 at that offset.
        unsafe {
            let len = (&raw mut submission).cast::<u8>().add(SQE_LEN).cast::<u32>();
            len.write(entry.buffers.len() as u32);
        }
        // SAFETY: the descriptor, the two buffers and the memory they name live as long as the kernel has
        // the entry, or for ever: see its `Drop`. Nothing refers to that memory meanwhile.
        unsafe { self.ring.submission().push(&submission) }
            .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        entry.state = State::WithKernel;
        self.waiting[number] = Some(entry);
        Ok(())
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("free", &self.free.len()).finish_non_exhaustive()
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
        let Ok(mut ring) = Ring::new(2) else {
            return println!("skipped: this machine has no io_uring");
        };
        let mut entry = Entry::new(1 << 20).unwrap();
        assert!(entry.request().is_none());
        assert!(ring.answer(entry, 0, 0).is_err());
        let entry = Entry::new(1 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(ring.register(entry, Arc::new(file.into()), 0).is_err());
        assert!(ring.is_empty());
        assert_eq!((ring.room(), ring.take_gone()), (2, 0));
        ring.send().unwrap();
        assert!(ring.next_request().is_none());
    }

    #[test]
    fn the_payload_lies_on_pages_of_its_own_and_is_overwritten() {
        let mut memory = Memory::new(PAYLOAD + 4096).unwrap();
        assert_eq!(memory.at(PAYLOAD).as_ptr() as usize % 4096, 0);
        memory.bytes().fill(7);
        assert_eq!(memory.word::<4>(COMMIT_ID), [7; 4]);
        let mut entry = Entry::new(4096).unwrap();
        entry.memory.bytes().fill(7);
        entry.memory.bytes()[PAYLOAD_LEN..][..4].copy_from_slice(&1000u32.to_ne_bytes());
        entry.state = State::Request;
        entry.has_used(3000);
        entry.overwrite();
        let is = |entry: &mut Entry, range: std::ops::Range<usize>, byte| {
            entry.memory.bytes()[PAYLOAD..][range].iter().all(|&b| b == byte)
        };
        assert!(is(&mut entry, 0..1000, 7) && is(&mut entry, 1000..3000, 0));
        assert!(is(&mut entry, 3000..4096, 7), "nothing was there");
        entry.overwrite_all();
        assert!(is(&mut entry, 0..3000, 0));
    }
}
