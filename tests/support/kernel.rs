//! What this machine's kernel can do, for tests of what only newer ones can.

/// False where it refuses MAP_SHARED of files that are open for direct I/O (FUSE before Linux 6.6), so
/// that a test that needs it says why it is skipped.
pub fn maps_shared() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let does = version >= (6, 6);
    if !does {
        eprintln!("skipped: Linux {release} maps no file of the mount shared");
    }
    does
}
