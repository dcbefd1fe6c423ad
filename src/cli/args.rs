//! The verbs and their arguments.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::units::parse_size;
use crate::key::provider::pkcs11;
use crate::store::MIN_LOG_SIZE;

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  the disk, the kernel or the network failed
   2  wrong arguments
   3  the configuration has an unknown key, a bad unit or a contradiction
   4  not a byokfs volume
   5  a newer format, or features this version does not know
   6  something on disk fails its authentication
   7  the key service, or a requirement on the key, says no
   8  the key service cannot be reached or trusted now
   9  mounted elsewhere, not empty, or in use
  10  nothing is mounted there, or no daemon answers
  11  the volume is mounted and its key is lost";

const FSCK_EXIT_CODES: &str = "\
Exit codes, those of fsck(8); they add up:
    0  clean; there may be notes
    1  something was corrected
    4  errors or warnings are left
    8  the check could not be done: the volume is mounted, the key is not to be had, the disk fails
   16  wrong arguments
  128  a mistake of byokfs

A link to byokfs called /sbin/fsck.byokfs is what fsck(8) looks for: -n, -C and no option check, -a
and -p restore copies and bring the log home, -y is --repair.";

/// Encrypted MySQL and MariaDB data directories whose key stays with its owner
#[derive(Debug, Parser)]
#[command(name = "byokfs", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a volume in an empty directory
    Init(InitArgs),
    /// Mount a volume; returns when the mount serves
    Mount(MountArgs),
    /// Unmount, and wait for the daemon to end
    Umount(TargetArgs),
    /// State of a mounted volume: Available, Degraded or Inaccessible, and why
    Status(ReportArgs),
    /// Check a key against every requirement, before or while a volume uses it
    CheckKey(CheckKeyArgs),
    /// Check the key again, and bring an Inaccessible volume back
    Revalidate(RevalidateArgs),
    /// Give a volume another key or another version of it, another volume key, or its files other keys
    #[command(subcommand)]
    Rotate(RotateVerb),
    /// Give a copy of a volume a key of its own; data is not touched
    Rekey(RekeyArgs),
    /// Back a volume's key up by its key service, or note that it was
    Escrow(EscrowArgs),
    /// Take a key version off the list of those that copies of a volume need
    ForgetKey(ForgetKeyArgs),
    /// Make everything acknowledged so far durable
    Sync(TargetArgs),
    /// Another size or place for a volume's intent log, while it is not mounted
    #[command(subcommand)]
    Log(LogVerb),
    /// What a volume says about itself, without its key
    Info(InfoArgs),
    /// Check a volume that is not mounted, and repair it
    #[command(after_help = FSCK_EXIT_CODES)]
    Fsck(FsckArgs),
    /// The embedded key vault
    Vault(super::vault::VaultArgs),
    /// The keyless parent of a mount's daemon
    #[command(name = "__guard", hide = true)]
    Guard { mnt: PathBuf },
    /// The daemon of a mount
    #[command(name = "__daemon", hide = true)]
    Daemon { mnt: PathBuf },
    /// The process that loads a hardware security module's library
    #[command(name = pkcs11::VERB, hide = true)]
    Pkcs11,
}

#[derive(Debug, Args)]
pub struct ConfigArg {
    /// Configuration file [default: the one that BYOKFS_CONFIG names, or /etc/byokfs/byokfs.toml if
    /// it exists]
    // Not clap's `env`, to which an empty variable is a wrong argument.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct InitArgs {
    /// The backing directory: missing or empty
    pub back: PathBuf,
    /// The customer's key: its URL in the key vault, with or without a version, or a PKCS#11 URI
    #[arg(long, value_name = "URL")]
    pub kek: String,
    /// Leave file names unencrypted, for those who need to find files on the disk; contents, link
    /// targets and extended attributes are encrypted all the same. Cannot be changed later
    #[arg(long)]
    pub plaintext_names: bool,
    /// Space of the intent log, in which every change is durable before it goes to its file
    /// [at least 8MiB; default: 256MiB, or an eighth of the free space if that is less]
    #[arg(long, value_name = "SIZE", value_parser = parse_log_size)]
    pub log_size: Option<u64>,
    /// Do not refuse a key that misses a requirement that byokfs could do without
    #[arg(long)]
    pub no_requirements: bool,
    /// Have the key service back the key up to this new file first; the identity needs the
    /// permission `backup` for that
    #[arg(long, value_name = "FILE")]
    pub escrow: Option<PathBuf>,
    #[command(flatten)]
    pub config: ConfigArg,
}

#[derive(Debug, Args)]
pub struct MountArgs {
    /// The backing directory
    pub back: PathBuf,
    /// The mount point: an empty directory
    pub mnt: PathBuf,
    /// Mount options, as in fstab
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Stay in the foreground and log to standard error, as a service does
    #[arg(long)]
    pub foreground: bool,
    /// fence.socket: the database server's unix socket; turns the fence on
    #[arg(long, value_name = "PATH")]
    pub fence_socket: Option<PathBuf>,
    /// fence.pid_file: the server's pid file; turns the fence on
    #[arg(long, value_name = "PATH")]
    pub fence_pid_file: Option<PathBuf>,
    /// fence.option_file: [client] user and password of the fence's account
    #[arg(long, value_name = "PATH")]
    pub option_file: Option<PathBuf>,
    /// mount.transport: auto, dev or uring
    #[arg(long, value_name = "NAME")]
    pub transport: Option<String>,
    #[command(flatten)]
    pub config: ConfigArg,
}

#[derive(Debug, Args)]
pub struct TargetArgs {
    /// The mount point, or the backing directory
    #[arg(value_name = "MNT|BACK")]
    pub target: PathBuf,
    #[command(flatten)]
    pub config: ConfigArg,
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    #[command(flatten)]
    pub target: TargetArgs,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CheckKeyArgs {
    /// The key's URL, or a volume that has it: its backing directory or mount point
    #[arg(value_name = "KEY|BACK|MNT")]
    pub key: String,
    /// Refuse what is otherwise only warned of (key.strict_requirements)
    #[arg(long)]
    pub strict: bool,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub config: ConfigArg,
}

#[derive(Debug, Args)]
pub struct RevalidateArgs {
    #[command(flatten)]
    pub report: ReportArgs,
    /// The key version that the envelope of a restored older copy names, to confirm that one
    #[arg(long, value_name = "URL")]
    pub accept_key: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum RotateVerb {
    /// The key that wraps the volume key: rewraps one small file
    Kek(RotateKekArgs),
    /// The keys that files are encrypted with: encrypts them anew, while they are used
    Dek(RotateDekArgs),
    /// The key that wraps those of the files, while the volume is not mounted: whoever has had the
    /// old one in his hands opens nothing of later with it
    Volume(ReportArgs),
}

#[derive(Debug, Args)]
pub struct RotateKekArgs {
    #[command(flatten)]
    pub report: ReportArgs,
    /// The new key: with a version, or without one, which follows newer versions from then on
    /// [default: the current version of the key there is]
    #[arg(long, value_name = "URL")]
    pub to: Option<String>,
    /// How it wraps: RSA-OAEP-256, RSA-OAEP or A256KW [default: as before, if the key can]
    #[arg(long, value_name = "NAME")]
    pub algorithm: Option<String>,
}

#[derive(Debug, Args)]
pub struct RotateDekArgs {
    #[command(flatten)]
    pub report: ReportArgs,
    /// Files and directories of the mount [default: all, or what is unfinished]
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// So much a second, of what the files hold; 0B: as much as goes [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub rate: Option<u64>,
    /// Return when it has begun; `byokfs status` shows how far it is
    #[arg(long)]
    pub no_wait: bool,
    /// Stop it where it is; `byokfs rotate dek` goes on with it
    #[arg(long, conflicts_with_all = ["paths", "rate", "no_wait"])]
    pub pause: bool,
}

#[derive(Debug, Subcommand)]
pub enum LogVerb {
    /// Give the log another size
    Resize {
        #[command(flatten)]
        target: TargetArgs,
        /// Of the log in all, as in 256MiB; at least 8MiB
        #[arg(value_name = "SIZE", value_parser = parse_log_size)]
        size: u64,
    },
    /// Have the log in another directory: on a fast disk of its own, for example
    Move {
        #[command(flatten)]
        target: TargetArgs,
        /// An empty directory of a local file system; the backing directory takes the log home
        #[arg(value_name = "DIR")]
        to: PathBuf,
    },
    /// Give up a log that is lost or damaged, and all that only it has: changes that were
    /// acknowledged, too. Restoring a backup is better
    Discard {
        #[command(flatten)]
        target: TargetArgs,
        /// Of the new log in all [at least 8MiB; default: as for a new volume]
        #[arg(long, value_name = "SIZE", value_parser = parse_log_size)]
        size: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub struct RekeyArgs {
    #[command(flatten)]
    pub report: ReportArgs,
    /// The copy's own key, with or without a version
    #[arg(long, value_name = "URL")]
    pub to: String,
    /// How it wraps: RSA-OAEP-256, RSA-OAEP or A256KW [default: as before, if the key can]
    #[arg(long, value_name = "NAME")]
    pub algorithm: Option<String>,
}

#[derive(Debug, Args)]
pub struct EscrowArgs {
    #[command(flatten)]
    pub target: TargetArgs,
    /// The new file for the backup
    #[arg(long, value_name = "FILE", required_unless_present = "made_elsewhere")]
    pub file: Option<PathBuf>,
    /// The key officer has backed the volume's current key version up and keeps that
    #[arg(long, conflicts_with = "file")]
    pub made_elsewhere: bool,
}

#[derive(Debug, Args)]
pub struct ForgetKeyArgs {
    #[command(flatten)]
    pub target: TargetArgs,
    /// The key version, as `byokfs info --keys` names it
    #[arg(value_name = "URL")]
    pub kid: String,
    /// No copy of the volume from the time of that version is kept
    #[arg(long)]
    pub no_copies: bool,
}

#[derive(Debug, Args)]
pub struct InfoArgs {
    /// The backing directory, or the mount point
    #[arg(value_name = "BACK|MNT")]
    pub back: PathBuf,
    /// The key versions that the volume and its copies need; warns where this host knows another
    /// envelope of the volume, or none
    #[arg(long)]
    pub keys: bool,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub config: ConfigArg,
}

#[derive(Debug, Args)]
pub struct FsckArgs {
    /// The backing directory of a volume that is not mounted
    pub back: PathBuf,
    /// Restore damaged copies, bring the log home, and move what nobody can reach to lost/; nothing
    /// is removed. Otherwise nothing on the disk changes
    #[arg(long)]
    pub repair: bool,
    /// Check what can be checked without the key, the configuration and the key service
    #[arg(long, conflicts_with = "repair")]
    pub no_key: bool,
    /// One JSON object a line on standard output: the findings, then a summary
    #[arg(long)]
    pub json: bool,
    /// No notes, no progress, and nothing at all of a clean volume
    #[arg(long, short)]
    pub quiet: bool,
    #[command(flatten)]
    pub config: ConfigArg,
}

fn parse_log_size(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size < MIN_LOG_SIZE {
        return Err(format!("the intent log has at least {}MiB", MIN_LOG_SIZE >> 20));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use clap::CommandFactory;

    #[test]
    fn the_parser_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_log_that_is_too_small_is_refused_and_help_says_so() {
        assert_eq!(parse_log_size("8MiB"), Ok(8 << 20));
        for text in ["0B", "8191KiB", "8388607B"] {
            assert!(parse_log_size(text).unwrap_err().contains("at least 8MiB"), "{text}");
        }
        for verb in [&["init"][..], &["log", "resize"], &["log", "discard"]] {
            let mut root = Cli::command();
            let mut command = &mut root;
            for name in verb {
                command = command.find_subcommand_mut(name).unwrap();
            }
            // However it is wrapped.
            let help = command.render_long_help().to_string();
            let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(help.contains("at least 8MiB"), "{verb:?}: {help}");
        }
    }

    #[test]
    fn every_exit_code_is_listed() {
        for kind in Kind::ALL {
            let listed = EXIT_CODES
                .lines()
                .any(|line| line.split_whitespace().next() == Some(&kind.exit_code().to_string()));
            assert!(listed, "{kind:?}");
        }
    }
}
