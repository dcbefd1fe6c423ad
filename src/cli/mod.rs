//! The command line: one file per verb. A verb returns a [`Result`]; this module alone turns an
//! error into a message on standard error and an exit code.

pub mod args;
mod check_key;
mod escrow;
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
    let (result, heard) = if called_as_mount_helper(&argv) {
        (mount_options::parse_helper(&argv[1..]).and_then(mount::run), true)
    } else {
        match Cli::try_parse_from(&argv) {
            // The internal verbs report to whoever started them, and to the log.
            Ok(Cli { verb: Verb::Guard { .. } }) => (guard::main(), false),
            Ok(Cli { verb: Verb::Daemon { .. } }) => (start::run(), false),
            Ok(Cli { verb: Verb::Pkcs11 }) => (serve_pkcs11(), false),
            Ok(cli) => (run(cli.verb), true),
            Err(error) => return clap_exit(&error),
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
        Verb::Guard { .. } => guard::main(),
        Verb::Daemon { .. } => start::run(),
        Verb::Pkcs11 => serve_pkcs11(),
    }
}

fn serve_pkcs11() -> Result<()> {
    harden::process("byokfs-pkcs11")?;
    pkcs11::serve()
}

/// mount(8) calls `mount.byokfs`, or `mount.fuse.byokfs` for the type that /proc/mounts shows.
fn called_as_mount_helper(argv: &[OsString]) -> bool {
    argv.first()
        .and_then(|name| Path::new(name).file_name())
        .is_some_and(|name| name == "mount.byokfs" || name == "mount.fuse.byokfs")
}

/// Help and version go to standard output with exit 0; wrong arguments are exit 2.
fn clap_exit(error: &clap::Error) -> ExitCode {
    if error.use_stderr() {
        let text = error.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        output::error(&Error::usage(text.trim_end()));
        return ExitCode::from(Kind::Usage.exit_code());
    }
    match output::text(&error.render().to_string()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(error.kind.exit_code()),
    }
}
