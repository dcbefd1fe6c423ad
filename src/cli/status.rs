//! `byokfs status`.

use crate::error::{Error, Kind, Result};

use super::args::ReportArgs;

pub(super) fn run(_args: ReportArgs) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "status is not built yet"))
}
