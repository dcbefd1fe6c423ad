//! `byokfs mount`.

use crate::error::{Error, Kind, Result};

use super::mount_options::MountRequest;

pub(super) fn run(_request: MountRequest) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "mount is not built yet"))
}
