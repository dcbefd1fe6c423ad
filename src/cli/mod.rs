//! The command line: one file per verb. A verb returns a [`Result`]; this module alone turns an
//! error into a message on standard error and an exit code.

pub mod args;
mod check_key;
mod escrow;
mod fsck;
mod info;
mod init;
mod log;
mod mount;
pub mod mount_options;
pub mod output;
mod remount;
mod revalidate;
mod rotate;
mod rotate_dek;
mod rotate_volume;
mod status;
mod sync;
mod target;
mod umount;
pub mod vault;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

use crate::daemon::{guard, harden, start};
use crate::error::{Error, Kind, Result};
use crate::key::provider::pkcs11;
use args::{Cli, RotateVerb, Verb};

/// The binary's whole life: `mount.byokfs` by its own name, else the verb of the arguments.
pub fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    if called_as(&argv, &["fsck.byokfs"]) {
        return fsck::helper(&argv[1..]);
    }
    // mount(8) calls `mount.byokfs`, or `mount.fuse.byokfs` for the type that /proc/mounts shows.
    let as_mount_helper = called_as(&argv, &["mount.byokfs", "mount.fuse.byokfs"]);
    let (result, heard) = if as_mount_helper {
        (mount_options::parse_helper(&argv[1..]).and_then(mount::run), true)
    } else {
        match Cli::try_parse_from(&argv) {
            // The internal verbs report to whoever started them, and to the log.
            Ok(Cli { verb: Verb::Guard { .. } }) => (guard::main(), false),
            Ok(Cli { verb: Verb::Daemon { .. } }) => (start::run(), false),
            Ok(Cli { verb: Verb::Pkcs11 }) => (serve_pkcs11(), false),
            // With exit codes of its own.
            Ok(Cli { verb: Verb::Fsck(args) }) => return fsck::main(args.into()),
            Ok(cli) => (run(cli.verb), true),
            Err(error) => return clap_exit(&error, argv.get(1).is_some_and(|verb| verb == "fsck")),
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if heard {
                output::error(&error);
            }
            ExitCode::from(error.kind.exit_code())
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Init(args) => init::run(args),
        Verb::Mount(args) => mount::run(args.try_into()?),
        Verb::Umount(args) => umount::run(args),
        Verb::Status(args) => status::run(args),
        Verb::Revalidate(args) => revalidate::run(args),
        Verb::CheckKey(args) => check_key::run(args),
        Verb::Rotate(RotateVerb::Kek(args)) => rotate::kek(args),
        Verb::Rotate(RotateVerb::Dek(args)) => rotate_dek::run(args),
        Verb::Rotate(RotateVerb::Volume(args)) => rotate_volume::run(args),
        Verb::Rekey(args) => rotate::rekey(args),
        Verb::Escrow(args) => escrow::run(args),
        Verb::ForgetKey(args) => rotate::forget(args),
        Verb::Sync(args) => sync::run(args),
        Verb::Log(verb) => log::run(verb),
        Verb::Info(args) => info::run(args),
        Verb::Vault(args) => vault::run(args),
        // Dealt with before.
        Verb::Fsck(_) => Ok(()),
        Verb::Guard { .. } => guard::main(),
        Verb::Daemon { .. } => start::run(),
        Verb::Pkcs11 => serve_pkcs11(),
    }
}

fn serve_pkcs11() -> Result<()> {
    harden::process("byokfs-pkcs11")?;
    pkcs11::serve()
}

fn called_as(argv: &[OsString], names: &[&str]) -> bool {
    argv.first()
        .and_then(|name| Path::new(name).file_name())
        .is_some_and(|called| names.iter().any(|name| called == *name))
}

/// Help and version go to standard output with exit 0; wrong arguments are exit 2, of `fsck` 16.
fn clap_exit(error: &clap::Error, of_fsck: bool) -> ExitCode {
    if error.use_stderr() {
        let text = error.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        output::error(&Error::usage(text.trim_end()));
        return ExitCode::from(if of_fsck { fsck::USAGE } else { Kind::Usage.exit_code() });
    }
    match output::text(&error.render().to_string()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(error.kind.exit_code()),
    }
}
