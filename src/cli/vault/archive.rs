//! `vault backup` and `vault restore`: the whole vault.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Target;
use crate::cli::output;
use crate::error::Result;
use crate::vault::{self, VaultDir};

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// The file to write; must not be there yet
    #[arg(long, short)]
    file: PathBuf,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The new vault's directory: missing or empty
    #[arg(env = "BYOKFS_VAULT")]
    dir: PathBuf,
    /// The file that `backup` wrote
    #[arg(long, short)]
    file: PathBuf,
    /// The vault's root key, which is not in the backup
    #[arg(long, value_name = "FILE")]
    root_key_file: PathBuf,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn backup(args: BackupArgs) -> Result<()> {
    let dir = VaultDir::new(&args.target.vault);
    vault::backup(&dir, &args.file)?;
    if args.target.json {
        return output::json(&json!({ "vault": dir.path(), "file": args.file }));
    }
    output::text(&format!(
        "wrote {}\nit opens with {} alone: keep a copy of that elsewhere\n",
        args.file.display(),
        dir.path().join("root.key").display()
    ))
}

pub(super) fn restore(args: RestoreArgs) -> Result<()> {
    let dir = VaultDir::new(args.dir);
    let restored = vault::restore(&dir, &args.file, &args.root_key_file)?;
    if args.json {
        return output::json(&json!({
            "vault": dir.path(),
            "name": restored.name,
            "caFile": restored.ca_certificate,
        }));
    }
    output::text(&format!(
        "vault   {}\nname    {}\nCA file {}\nstart it with `byokfs vault serve {0}`\n",
        dir.path().display(),
        restored.name,
        restored.ca_certificate.display()
    ))
}
