//! `byokfs info`.

use crate::error::{Error, Kind, Result};

use super::args::InfoArgs;

pub(super) fn run(_args: InfoArgs) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "info is not built yet"))
}
