//! `byokfs vault`: the embedded key vault's verbs.

use clap::Args;

use crate::error::{Error, Kind, Result};

#[derive(Debug, Args)]
pub struct VaultArgs {}

pub fn run(_args: VaultArgs) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "vault is not built yet"))
}
