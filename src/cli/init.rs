//! `byokfs init`.

use crate::error::{Error, Kind, Result};

use super::args::InitArgs;

pub(super) fn run(_args: InitArgs) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "init is not built yet"))
}
