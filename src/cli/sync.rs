//! `byokfs sync`.

use crate::error::{Error, Kind, Result};

use super::args::TargetArgs;

pub(super) fn run(_args: TargetArgs) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "sync is not built yet"))
}
