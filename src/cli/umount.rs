//! `byokfs umount`.

use crate::error::{Error, Kind, Result};

use super::args::TargetArgs;

pub(super) fn run(_args: TargetArgs) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "umount is not built yet"))
}
