//! The bytes of the protocol (linux/fuse.h, 7.45), in the machine's byte order.

use super::reply::Errno;
use crate::backing::{FileKind, StatFs, Timestamp};
use crate::vfs::{Attr, Caller, DirItem, DirSink, Entry, Plus};

pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 45;

pub(super) const IN_HEADER_LEN: usize = 40;
pub(super) const OUT_HEADER_LEN: usize = 16;

/// What a reply to READDIR takes beside the name, and what READDIRPLUS adds to that.
const DIRENT_LEN: usize = 24;
const ENTRY_LEN: usize = 128;

pub(super) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const NOTIFY_REPLY: u32 = 41;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const COPY_FILE_RANGE_64: u32 = 53;
}

/// `struct fuse_in_header`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) caller: Caller,
}

impl Header {
    /// None for anything but a header.
    pub(super) fn parse(bytes: &[u8]) -> Option<Header> {
        let mut reader = Reader::new(bytes, &[]);
        let mut parse = || -> Result<Header, Errno> {
            reader.skip(4)?;
            let opcode = reader.u32()?;
            let (unique, node) = (reader.u64()?, reader.u64()?);
            let caller = Caller { uid: reader.u32()?, gid: reader.u32()?, pid: reader.u32()? };
            reader.skip(4)?;
            Ok(Header { opcode, unique, node, caller })
        };
        parse().ok()
    }

    /// How much of the reply an operation that has failed may have put together. Those that do it
    /// piece by piece say how much they want: `struct fuse_read_in`.
    pub(super) fn most_of_reply(&self, mut args: Reader<'_>) -> usize {
        const FIXED: usize = 4096;
        match self.opcode {
            opcode::READ | opcode::READDIR | opcode::READDIRPLUS => {
                args.skip(16).and_then(|()| args.u32()).map_or(FIXED, |size| size as usize)
            }
            _ => FIXED,
        }
    }
}

/// Reads the arguments of a request. Over /dev/fuse they are one run of bytes; a ring hands over
/// the fixed part and the rest apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    fixed: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(fixed: &'a [u8], payload: &'a [u8]) -> Reader<'a> {
        Reader { fixed, payload }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (head, tail) = self.fixed.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.fixed = tail;
        Ok(*head)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        Ok(u32::from_ne_bytes(self.take()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        Ok(u64::from_ne_bytes(self.take()?))
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.fixed = self.fixed.get(count..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// Everything that is left.
    pub(super) fn rest(self) -> &'a [u8] {
        if self.fixed.is_empty() { self.payload } else { self.fixed }
    }

    /// The next of the NUL-terminated strings at the end, and what comes after it.
    pub(super) fn name(self) -> Result<(&'a [u8], Reader<'a>), Errno> {
        let rest = self.rest();
        let end = rest.iter().position(|&byte| byte == 0).ok_or(Errno::INVAL)?;
        Ok((&rest[..end], Reader::new(&[], &rest[end + 1..])))
    }
}

/// Puts a reply together in a buffer that is large enough for every fixed one.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    buf: &'a mut [u8],
    len: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(buf: &'a mut [u8]) -> Writer<'a> {
        Writer { buf, len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// What does not fit is left out: the kernel refuses a reply of the wrong length, which is
    /// all that can be done with one.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        if let Some(to) = self.buf.get_mut(self.len..self.len + bytes.len()) {
            to.copy_from_slice(bytes);
            self.len += bytes.len();
        }
        self
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn zeros(&mut self, count: usize) -> &mut Self {
        for _ in 0..count {
            self.bytes(&[0]);
        }
        self
    }

    /// `struct fuse_attr`.
    fn attr(&mut self, attr: &Attr) -> &mut Self {
        self.u64(attr.ino).u64(attr.size).u64(attr.blocks);
        let times = [attr.atime, attr.mtime, attr.ctime];
        for time in times {
            self.u64(time.sec.cast_unsigned());
        }
        for time in times {
            self.u32(time.nsec);
        }
        self.u32(type_bits(attr.kind) | attr.mode);
        self.u32(attr.nlink.min(u32::MAX.into()) as u32).u32(attr.uid).u32(attr.gid);
        self.u32(encode_rdev(attr.rdev)).u32(4096).u32(0)
    }

    /// `struct fuse_attr_out`.
    pub(super) fn attr_out(&mut self, attr: &Attr) -> &mut Self {
        self.u64(attr_valid(attr)).u32(0).u32(0).attr(attr)
    }

    /// `struct fuse_entry_out`. Node ids are never reused, so the generation is always 0.
    pub(super) fn entry_out(&mut self, entry: &Entry) -> &mut Self {
        self.u64(entry.node).u64(0).u64(VALID_SECONDS).u64(attr_valid(&entry.attr));
        self.u32(0).u32(0);
        self.attr(&entry.attr)
    }

    /// An entry that says that there is none, and for how long.
    pub(super) fn no_entry_out(&mut self) -> &mut Self {
        self.u64(0).u64(0).u64(VALID_SECONDS).zeros(ENTRY_LEN - 24)
    }

    /// `struct fuse_open_out`.
    pub(super) fn open_out(&mut self, handle: u64, flags: u32) -> &mut Self {
        self.u64(handle).u32(flags).u32(0)
    }

    /// `struct fuse_statfs_out`.
    pub(super) fn statfs_out(&mut self, numbers: &StatFs) -> &mut Self {
        self.u64(numbers.blocks).u64(numbers.blocks_free).u64(numbers.blocks_available);
        self.u64(numbers.files).u64(numbers.files_free);
        let block = numbers.block_size as u32;
        self.u32(block).u32(numbers.name_max as u32).u32(block).zeros(28)
    }
}

/// Names and attributes change through this mount only, so the kernel may keep them; a cut-off
/// invalidates them.
const VALID_SECONDS: u64 = 3600;

/// Set-id bits go with a write, and the kernel does not look for that.
fn attr_valid(attr: &Attr) -> u64 {
    if attr.mode & 0o6000 != 0 && attr.kind == FileKind::Regular { 0 } else { VALID_SECONDS }
}

/// Collects a reply to READDIR or READDIRPLUS.
#[derive(Debug)]
pub(super) struct Listing<'a> {
    writer: Writer<'a>,
    plus: Plus,
}

impl<'a> Listing<'a> {
    pub(super) fn new(buf: &'a mut [u8], plus: Plus) -> Listing<'a> {
        Listing { writer: Writer::new(buf), plus }
    }

    pub(super) fn len(&self) -> usize {
        self.writer.len()
    }
}

impl DirSink for Listing<'_> {
    fn has_room(&self, name_len: usize) -> bool {
        let entry = if self.plus == Plus::Yes { ENTRY_LEN } else { 0 };
        let needed = entry + (DIRENT_LEN + name_len).next_multiple_of(8);
        self.writer.buf.len() - self.writer.len >= needed
    }

    fn push(&mut self, item: &DirItem<'_>) {
        let writer = &mut self.writer;
        if self.plus == Plus::Yes {
            match &item.entry {
                Some(entry) => writer.entry_out(entry),
                // The kernel takes the name and looks the rest up.
                None => writer.zeros(ENTRY_LEN),
            };
        }
        writer.u64(item.ino).u64(item.next).u32(item.name.len() as u32);
        writer.u32(type_bits(item.kind) >> 12).bytes(item.name);
        let padding = item.name.len().next_multiple_of(8) - item.name.len();
        writer.zeros(padding);
    }
}

/// `S_IF*`.
fn type_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::Regular => libc::S_IFREG,
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::Fifo => libc::S_IFIFO,
        FileKind::Socket => libc::S_IFSOCK,
        FileKind::CharDevice => libc::S_IFCHR,
        FileKind::BlockDevice => libc::S_IFBLK,
    }
}

/// The kind in a `mode_t`; a file where it names none, as mknod(2) has it.
pub(super) fn kind_of(mode: u32) -> Option<FileKind> {
    Some(match mode & libc::S_IFMT {
        0 | libc::S_IFREG => FileKind::Regular,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        _ => return None,
    })
}

/// The kernel's 32-bit form of a device number.
fn encode_rdev(rdev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

pub(super) fn decode_rdev(rdev: u32) -> u64 {
    let (major, minor) = ((rdev >> 8) & 0xfff, rdev & 0xff | (rdev >> 12) & 0xfff00);
    rustix::fs::makedev(major, minor)
}

pub(super) fn timestamp(sec: u64, nsec: u32) -> Timestamp {
    Timestamp { sec: sec.cast_signed(), nsec }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_the_kernel_writes_it() {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&56u32.to_ne_bytes());
        bytes.extend_from_slice(&3u32.to_ne_bytes());
        bytes.extend_from_slice(&77u64.to_ne_bytes());
        bytes.extend_from_slice(&1u64.to_ne_bytes());
        for word in [1000u32, 1001, 42, 0] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        assert_eq!(bytes.len(), IN_HEADER_LEN);
        let caller = Caller { uid: 1000, gid: 1001, pid: 42 };
        let header = Header { opcode: 3, unique: 77, node: 1, caller };
        assert_eq!(Header::parse(&bytes), Some(header));
        assert_eq!(Header::parse(&bytes[..39]), None);
    }

    #[test]
    fn what_a_failed_read_has_left_is_as_long_as_was_asked_for() {
        let mut args = [0; 40];
        args[16..20].copy_from_slice(&70_000u32.to_ne_bytes());
        let caller = Caller { uid: 0, gid: 0, pid: 1 };
        let most = |opcode| {
            Header { opcode, unique: 1, node: 1, caller }.most_of_reply(Reader::new(&args, &[]))
        };
        assert_eq!(most(opcode::READ), 70_000);
        assert_eq!(most(opcode::READDIRPLUS), 70_000);
        assert!(most(opcode::GETATTR) < 70_000);
    }

    #[test]
    fn names_come_one_after_the_other_wherever_they_lie() {
        let both = Reader::new(b"\x01\0\0\0old\0new\0", &[]);
        let apart = Reader::new(b"\x01\0\0\0", b"old\0new\0");
        for mut reader in [both, apart] {
            assert_eq!(reader.u32().unwrap(), 1);
            let (old, reader) = reader.name().unwrap();
            let (new, _) = reader.name().unwrap();
            assert_eq!((old, new), (&b"old"[..], &b"new"[..]));
        }
        assert!(Reader::new(b"no end", &[]).name().is_err());
        assert!(Reader::new(b"abc", &[]).u32().is_err());
    }

    #[test]
    fn structures_have_the_kernel_s_sizes() {
        let attr = Attr {
            ino: 1,
            kind: FileKind::Regular,
            mode: 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 5,
            blocks: 8,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
        };
        let entry = Entry { node: 9, attr };
        let len = |put: &dyn Fn(&mut Writer<'_>)| {
            let mut buf = [0; 256];
            let mut writer = Writer::new(&mut buf);
            put(&mut writer);
            writer.len()
        };
        assert_eq!(
            len(&|w| {
                w.attr_out(&attr);
            }),
            104
        );
        assert_eq!(
            len(&|w| {
                w.entry_out(&entry);
            }),
            ENTRY_LEN
        );
        assert_eq!(
            len(&|w| {
                w.no_entry_out();
            }),
            ENTRY_LEN
        );
        assert_eq!(
            len(&|w| {
                w.open_out(1, 2);
            }),
            16
        );
    }

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(1, 3), (8, 17), (259, 300_000), (4095, 0xfffff)] {
            let rdev = rustix::fs::makedev(major, minor);
            assert_eq!(decode_rdev(encode_rdev(rdev)), rdev);
        }
    }

    #[test]
    fn a_listing_stops_before_it_overflows() {
        let mut buf = [0; 64];
        let mut listing = Listing::new(&mut buf, Plus::No);
        let item = DirItem { ino: 1, kind: FileKind::Regular, name: b"name", next: 3, entry: None };
        assert!(listing.has_room(4));
        listing.push(&item);
        assert_eq!(listing.len(), 32);
        listing.push(&item);
        assert!(!listing.has_room(1));
        assert_eq!(listing.len(), 64);
    }
}
