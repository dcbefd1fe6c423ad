//! A backing directory whose calls fail when told to: for tests of everything above it.
//!
//! [`Faults`] is shared by the backing and every node and file that came from it. A rule names
//! a kind of call, which one of them fails, and whether those after it fail too.

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::{
    Access, Backing, DirStream, File, FileKind, FileRef, Metadata, Node, NodeId, NodeRef,
    RenameMode, SetTime, StatFs, XattrMode,
};
use crate::sync::Mutex;

/// Kinds of calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Any,
    Read,
    /// Both kinds of writes.
    Write,
    SetLen,
    Allocate,
    PunchHole,
    /// `sync_data`, `sync_all` and `write_out` of a file.
    Sync,
    StartWriteOut,
    /// Everything of a directory that changes it.
    Name,
    SyncDir,
    Open,
    Lookup,
    Metadata,
    Attribute,
}

/// One kind of failure, armed.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub call: Call,
    /// How many such calls succeed before.
    pub after: usize,
    /// Whether every later one fails as well.
    pub lasting: bool,
    pub errno: Errno,
    /// Bytes that a failing write leaves on the disk, for which a failing request for space leaves some,
    /// or that a failing read returns without error.
    pub partial: Option<usize>,
}

/// What a call does first.
struct Hook {
    call: Call,
    run: Box<dyn FnOnce() + Send>,
}

impl Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hook").field(&self.call).finish()
    }
}

/// How what is said of a panic begins that [`Faults::arm_panic`] ordered.
pub const ORDERED_PANIC: &str = "a panic, as ordered,";

/// The armed rules and a count of all calls.
#[derive(Debug, Default)]
pub struct Faults(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    panic: Option<Call>,
    hook: Option<Hook>,
    calls: usize,
    failed: bool,
}

impl Faults {
    pub fn arm(&self, rule: Rule) {
        self.0.lock().rules.push(rule);
    }

    /// The next such call panics: a mistake of the code above, not of the disk.
    pub fn arm_panic(&self, call: Call) {
        self.0.lock().panic = Some(call);
    }

    /// The next such call runs `hook` first: something that happens just then.
    pub fn arm_hook(&self, call: Call, hook: impl FnOnce() + Send + 'static) {
        self.0.lock().hook = Some(Hook { call, run: Box::new(hook) });
    }

    /// Takes all rules back; true if any call has failed since the last time.
    pub fn disarm(&self) -> bool {
        let mut state = self.0.lock();
        state.rules.clear();
        std::mem::take(&mut state.failed)
    }

    /// True if any call has failed since the last [`Faults::disarm`].
    pub fn has_failed(&self) -> bool {
        self.0.lock().failed
    }

    /// Calls made so far, failed ones too.
    pub fn calls(&self) -> usize {
        self.0.lock().calls
    }

    fn hit(&self, call: Call) -> Option<Rule> {
        let hook = self.0.lock().hook.take_if(|hook| hook.call == call);
        if let Some(hook) = hook {
            (hook.run)();
        }
        let mut state = self.0.lock();
        state.calls += 1;
        if state.panic == Some(call) {
            state.panic = None;
            drop(state);
            panic!("{ORDERED_PANIC} in {call:?}");
        }
        let mut hit = None;
        for rule in &mut state.rules {
            if rule.call != call && rule.call != Call::Any {
                continue;
            }
            if rule.after > 0 {
                rule.after -= 1;
            } else {
                hit.get_or_insert(*rule);
            }
        }
        state.failed |= hit.is_some();
        if let Some(spent) = hit.filter(|rule| !rule.lasting) {
            let same = |rule: &Rule| rule.after == 0 && !rule.lasting && rule.call == spent.call;
            if let Some(at) = state.rules.iter().position(same) {
                state.rules.remove(at);
            }
        }
        hit
    }

    fn check(&self, call: Call) -> io::Result<()> {
        self.hit(call).map_or(Ok(()), |rule| Err(rule.errno.into()))
    }
}

#[derive(Debug)]
pub struct FaultBacking {
    inner: Arc<dyn Backing>,
    faults: Arc<Faults>,
}

impl FaultBacking {
    pub fn new(inner: Arc<dyn Backing>) -> (Arc<FaultBacking>, Arc<Faults>) {
        let faults = Arc::new(Faults::default());
        (Arc::new(FaultBacking { inner, faults: faults.clone() }), faults)
    }
}

impl Backing for FaultBacking {
    fn root(&self) -> NodeRef {
        wrap_node(self.inner.root(), &self.faults)
    }

    fn statfs(&self) -> io::Result<StatFs> {
        self.faults.check(Call::Metadata)?;
        self.inner.statfs()
    }

    fn sync_fs(&self) -> io::Result<()> {
        self.faults.check(Call::Sync)?;
        self.inner.sync_fs()
    }

    fn lock(&self, name: &[u8]) -> io::Result<Box<dyn Debug + Send + Sync>> {
        self.faults.check(Call::Open)?;
        self.inner.lock(name)
    }

    fn lock_existing(&self, name: &[u8]) -> io::Result<Box<dyn Debug + Send + Sync>> {
        self.faults.check(Call::Open)?;
        self.inner.lock_existing(name)
    }

    fn display_path(&self) -> String {
        self.inner.display_path()
    }

    fn elsewhere(&self, path: &Path) -> crate::Result<Arc<dyn Backing>> {
        self.inner.elsewhere(path)
    }
}

#[derive(Debug)]
struct FaultNode {
    inner: NodeRef,
    faults: Arc<Faults>,
}

fn wrap_node(inner: NodeRef, faults: &Arc<Faults>) -> NodeRef {
    Arc::new(FaultNode { inner, faults: faults.clone() })
}

fn wrap_file(inner: FileRef, faults: &Arc<Faults>) -> FileRef {
    Arc::new(FaultFile { inner, faults: faults.clone() })
}

fn inner_node(node: &dyn Node) -> io::Result<&dyn Node> {
    let node: Option<&FaultNode> = node.as_any().downcast_ref();
    node.map(|node| &*node.inner).ok_or_else(|| Errno::XDEV.into())
}

impl Node for FaultNode {
    fn id(&self) -> NodeId {
        self.inner.id()
    }

    fn metadata(&self) -> io::Result<Metadata> {
        self.faults.check(Call::Metadata)?;
        self.inner.metadata()
    }

    fn open(&self, access: Access) -> io::Result<FileRef> {
        self.faults.check(Call::Open)?;
        Ok(wrap_file(self.inner.open(access)?, &self.faults))
    }

    fn lookup(&self, name: &[u8]) -> io::Result<NodeRef> {
        self.faults.check(Call::Lookup)?;
        Ok(wrap_node(self.inner.lookup(name)?, &self.faults))
    }

    fn read_dir(&self) -> io::Result<Box<dyn DirStream>> {
        self.faults.check(Call::Open)?;
        self.inner.read_dir()
    }

    fn create_unnamed(&self) -> io::Result<FileRef> {
        self.faults.check(Call::Name)?;
        Ok(wrap_file(self.inner.create_unnamed()?, &self.faults))
    }

    fn link_file(&self, file: &dyn File, name: &[u8]) -> io::Result<()> {
        self.faults.check(Call::Name)?;
        let file: Option<&FaultFile> = file.as_any().downcast_ref();
        let file = file.ok_or_else(|| io::Error::from(Errno::XDEV))?;
        self.inner.link_file(&*file.inner, name)
    }

    fn link_node(&self, target: &dyn Node, name: &[u8]) -> io::Result<()> {
        self.faults.check(Call::Name)?;
        self.inner.link_node(inner_node(target)?, name)
    }

    fn mkdir(&self, name: &[u8], mode: u32) -> io::Result<NodeRef> {
        self.faults.check(Call::Name)?;
        Ok(wrap_node(self.inner.mkdir(name, mode)?, &self.faults))
    }

    fn mknod(&self, name: &[u8], kind: FileKind, mode: u32, rdev: u64) -> io::Result<NodeRef> {
        self.faults.check(Call::Name)?;
        Ok(wrap_node(self.inner.mknod(name, kind, mode, rdev)?, &self.faults))
    }

    fn symlink(&self, name: &[u8], target: &[u8]) -> io::Result<NodeRef> {
        self.faults.check(Call::Name)?;
        Ok(wrap_node(self.inner.symlink(name, target)?, &self.faults))
    }

    fn read_link(&self) -> io::Result<Vec<u8>> {
        self.faults.check(Call::Metadata)?;
        self.inner.read_link()
    }

    fn unlink(&self, name: &[u8]) -> io::Result<()> {
        self.faults.check(Call::Name)?;
        self.inner.unlink(name)
    }

    fn rmdir(&self, name: &[u8]) -> io::Result<()> {
        self.faults.check(Call::Name)?;
        self.inner.rmdir(name)
    }

    fn rename(
        &self,
        name: &[u8],
        to: &dyn Node,
        to_name: &[u8],
        mode: RenameMode,
    ) -> io::Result<()> {
        self.faults.check(Call::Name)?;
        self.inner.rename(name, inner_node(to)?, to_name, mode)
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.check(Call::SyncDir)?;
        self.inner.sync()
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.faults.check(Call::Attribute)?;
        self.inner.set_mode(mode)
    }

    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        self.faults.check(Call::Attribute)?;
        self.inner.set_owner(uid, gid)
    }

    fn set_times(&self, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        self.faults.check(Call::Attribute)?;
        self.inner.set_times(atime, mtime)
    }

    fn get_xattr(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        self.faults.check(Call::Attribute)?;
        self.inner.get_xattr(name)
    }

    fn set_xattr(&self, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()> {
        self.faults.check(Call::Attribute)?;
        self.inner.set_xattr(name, value, mode)
    }

    fn list_xattrs(&self) -> io::Result<Vec<Vec<u8>>> {
        self.faults.check(Call::Attribute)?;
        self.inner.list_xattrs()
    }

    fn remove_xattr(&self, name: &[u8]) -> io::Result<()> {
        self.faults.check(Call::Attribute)?;
        self.inner.remove_xattr(name)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct FaultFile {
    inner: FileRef,
    faults: Arc<Faults>,
}

impl File for FaultFile {
    fn metadata(&self) -> io::Result<Metadata> {
        self.faults.check(Call::Metadata)?;
        self.inner.metadata()
    }

    fn node(&self) -> io::Result<NodeRef> {
        Ok(wrap_node(self.inner.node()?, &self.faults))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self.faults.hit(Call::Read) {
            None => self.inner.read_at(buf, offset),
            Some(Rule { partial: Some(most), .. }) => {
                let most = most.min(buf.len());
                self.inner.read_at(&mut buf[..most], offset)
            }
            Some(rule) => Err(rule.errno.into()),
        }
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let Some(rule) = self.faults.hit(Call::Write) else {
            return self.inner.write_at(data, offset);
        };
        if let Some(most) = rule.partial {
            self.inner.write_at(&data[..most.min(data.len())], offset)?;
        }
        Err(rule.errno.into())
    }

    fn write_parts_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let Some(rule) = self.faults.hit(Call::Write) else {
            return self.inner.write_parts_at(parts, offset);
        };
        if let Some(most) = rule.partial {
            let all = parts.concat();
            self.inner.write_at(&all[..most.min(all.len())], offset)?;
        }
        Err(rule.errno.into())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.faults.check(Call::SetLen)?;
        self.inner.set_len(len)
    }

    fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> io::Result<()> {
        let Some(rule) = self.faults.hit(Call::Allocate) else {
            return self.inner.allocate(offset, len, keep_size);
        };
        if let Some(most) = rule.partial {
            self.inner.allocate(offset, len.min(most as u64), true)?;
        }
        Err(rule.errno.into())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.faults.check(Call::PunchHole)?;
        self.inner.punch_hole(offset, len)
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.inner.seek_data(offset)
    }

    fn seek_hole(&self, offset: u64) -> io::Result<Option<u64>> {
        self.inner.seek_hole(offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.faults.check(Call::Sync)?;
        self.inner.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.faults.check(Call::Sync)?;
        self.inner.sync_all()
    }

    fn write_out(&self, offset: u64, len: u64) -> io::Result<()> {
        self.faults.check(Call::Sync)?;
        self.inner.write_out(offset, len)
    }

    fn start_write_out(&self, offset: u64, len: u64) -> io::Result<()> {
        self.faults.check(Call::StartWriteOut)?;
        self.inner.start_write_out(offset, len)
    }

    fn overwrite_in_place(&self) {
        self.inner.overwrite_in_place();
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::linux::LinuxBacking;

    #[test]
    fn the_nth_call_fails_once_or_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let (backing, faults) = FaultBacking::new(LinuxBacking::open(dir.path()).unwrap());
        let file = backing.root().create_unnamed().unwrap();
        let rule = Rule {
            call: Call::Write,
            after: 1,
            lasting: false,
            errno: Errno::NOSPC,
            partial: Some(2),
        };
        faults.arm(rule);
        file.write_at(b"abcd", 0).unwrap();
        let error = file.write_parts_at(&[b"1", b"234"], 0).unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC));
        let mut buf = [0; 4];
        file.read_at(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"12cd");
        file.write_at(b"abcd", 0).unwrap();
        faults.arm(Rule { call: Call::Any, after: 0, lasting: true, partial: None, ..rule });
        assert!(file.sync_all().is_err() && file.metadata().is_err());
        assert!(faults.disarm() && !faults.disarm());
        file.sync_all().unwrap();
    }
}
