//! `byokfs revalidate`.

use crate::error::{Error, Kind, Result};

use super::args::ReportArgs;

pub(super) fn run(_args: ReportArgs) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "revalidate is not built yet"))
}
