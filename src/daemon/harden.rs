//! What the kernel may do with a process that holds keys, or guards one that does.

use std::ffi::CString;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

use crate::error::{Context, Error, Result};

/// No core dump, no debugger without privileges, no new privileges; works in `/`, so that it keeps
/// no mount busy; takes as many descriptors as it may. To be called before threads are started.
/// `name` is what `ps` shows.
pub fn process(name: &str) -> Result<()> {
    let name =
        CString::new(name).map_err(|error| Error::usage("a name with a NUL").with_source(error))?;
    rustix::thread::set_name(&name).context(|| "cannot name this process".to_owned())?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .context(|| "cannot turn core dumps off".to_owned())?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context(|| "cannot keep other processes out of this one's memory".to_owned())?;
    rustix::thread::set_no_new_privs(true)
        .context(|| "cannot give up new privileges".to_owned())?;
    rustix::process::chdir("/").context(|| "cannot change to /".to_owned())?;
    // Modes on the backing storage are those that callers asked for, their umask already applied.
    rustix::process::umask(rustix::fs::Mode::empty());
    raise_open_files().context(|| "cannot raise the limit of open files".to_owned())
}

/// Every inode that the kernel remembers costs a descriptor, so as many as the kernel allows; a
/// process without the right to raise its hard limit keeps that.
fn raise_open_files() -> rustix::io::Result<()> {
    let hard = getrlimit(Resource::Nofile).maximum;
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open");
    let most = most.ok().and_then(|text| text.trim().parse().ok()).or(hard);
    match setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }) {
        Err(rustix::io::Errno::PERM) => {
            setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard })
        }
        done => done,
    }
}
