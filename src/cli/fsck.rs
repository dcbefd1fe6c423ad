//! `byokfs fsck`, and `fsck.byokfs` as fsck(8) calls it.
//!
//! Its exit codes are those of fsck(8), not those of the other verbs. The key is got as for a mount,
//! and watched as for a mount: a key that is lost ends the check.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::json;

use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::config::Config;
use crate::crypto;
use crate::daemon::check::resolve;
use crate::daemon::offline::WatchedKey;
use crate::daemon::{harden, hex, mountinfo, repair};
use crate::error::{Context, Error, Kind, Result};
use crate::key::gate::Gate;
use crate::maintenance::check::{Check, Finding, Options, Repair, Report, Severity, Summary};
use crate::store::VolumeInfo;

use super::args::FsckArgs;
use super::output;
use crate::sync::Mutex;

/// Those of fsck(8); they add up.
const CORRECTED: u8 = 1;
const LEFT: u8 = 4;
const OPERATIONAL: u8 = 8;
pub(super) const USAGE: u8 = 16;
const INTERNAL: u8 = 128;

/// For the daemon of a mount that is gone.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(10);

/// What cannot be seen without the key.
const NOT_CHECKED: [&str; 4] = [
    "whether blocks, names, link targets and attributes decrypt",
    "whether headers, tags and generations are authentic",
    "whether the session table and the log are authentic",
    "blocks that lie in the log, and records torn at its end",
];

/// A check, whichever way it was asked for.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    back: PathBuf,
    repair: Repair,
    no_key: bool,
    json: bool,
    quiet: bool,
    config: Option<PathBuf>,
}

impl From<FsckArgs> for Request {
    fn from(args: FsckArgs) -> Request {
        Request {
            back: args.back,
            repair: if args.repair { Repair::All } else { Repair::No },
            no_key: args.no_key,
            json: args.json,
            quiet: args.quiet,
            config: args.config.config,
        }
    }
}

pub(super) fn main(request: Request) -> ExitCode {
    ExitCode::from(match catch_unwind(AssertUnwindSafe(|| run(&request))) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => failed(&error),
        Err(_) => INTERNAL,
    })
}

pub(super) fn helper(args: &[OsString]) -> ExitCode {
    match parse_helper(args) {
        Ok(request) => main(request),
        Err(error) => ExitCode::from(failed(&error)),
    }
}

fn failed(error: &Error) -> u8 {
    output::error(error);
    if error.kind == Kind::Usage { USAGE } else { OPERATIONAL }
}

/// `fsck.byokfs [-a|-p|-y|-n] [-fvV] [-C[FD]] BACK`, options anywhere.
fn parse_helper(args: &[OsString]) -> Result<Request> {
    let mut repair = None;
    let mut places: Vec<&OsStr> = Vec::new();
    for arg in args {
        let Some(text) = arg.to_str().filter(|text| text.starts_with('-') && text.len() > 1) else {
            places.push(arg);
            continue;
        };
        // Where fsck(8) wants progress to go: there is a bar on a terminal anyway.
        let progress = text.strip_prefix("-C");
        if progress.is_some_and(|fd| fd.bytes().all(|byte| byte.is_ascii_digit())) {
            continue;
        }
        for flag in text[1..].chars() {
            let asked = match flag {
                'a' | 'p' => Repair::Safe,
                'y' => Repair::All,
                'n' => Repair::No,
                // Also if it looks clean, verbose: always so.
                'f' | 'v' | 'V' => continue,
                _ => return Err(Error::usage(format!("fsck.byokfs: unknown option {text}"))),
            };
            if repair.replace(asked).is_some_and(|other| other != asked) {
                return Err(Error::usage("fsck.byokfs: only one of -a, -p, -y and -n"));
            }
        }
    }
    let [back] = places[..] else {
        return Err(Error::usage("usage: fsck.byokfs [-a|-p|-y|-n] BACK"));
    };
    Ok(Request {
        back: back.into(),
        repair: repair.unwrap_or_default(),
        no_key: false,
        json: false,
        quiet: false,
        config: None,
    })
}

fn run(request: &Request) -> Result<u8> {
    let given = std::path::absolute(&request.back)
        .context(|| format!("cannot use {}", request.back.display()))?;
    expect_unmounted(&given)?;
    let back = resolve("the backing directory", &given)?;
    expect_unmounted(&back)?;
    // Before the working directory is another.
    let config = match request.no_key {
        true => None,
        false => Some(Config::load(request.config.as_deref(), &[])),
    };
    // It will hold the volume key.
    harden::process("byokfs-fsck")?;
    crypto::selftest::run()?;
    let backing: Arc<dyn Backing> = LinuxBacking::open_noatime(&back)?;
    let printer = Printer::new(request, io::stderr().is_terminal());
    let options =
        Options { repair: request.repair, progress: printer.bar.is_some(), ..Options::default() };
    let started = Instant::now();
    let check = match take(&backing, options) {
        Err(error) if error.kind == Kind::Corrupt => {
            printer.finding(&Finding::no_header(&*backing, &error))?;
            let summary = Summary { errors: 1, left: 1, ..Summary::default() };
            printer.summary(&back, None, request, &summary, started.elapsed(), LEFT)?;
            return Ok(LEFT);
        }
        check => check?,
    };
    let summary = match config {
        None => check.run(None, &printer)?,
        Some(config) => {
            let without_key = |error: Error| {
                let hint = format!(
                    "{error}; what needs no key can be checked with `byokfs fsck --no-key {}`",
                    back.display()
                );
                Error::new(error.kind, hint)
            };
            let config = config.map_err(without_key)?;
            let run = |report: &dyn Report| {
                let (root, info) = (backing.root(), check.info());
                let key = WatchedKey::get(&config, &back, &root, info, &Gate::new())
                    .map_err(without_key)?;
                check.run(Some(key.gate.clone()), report)
            };
            match request.repair {
                Repair::No => run(&printer)?,
                asked => {
                    repair::open_trail(&config, check.info())?;
                    repair::audited(asked, &printer, run)?
                }
            }
        }
    };
    let code =
        if summary.repaired > 0 { CORRECTED } else { 0 } + if summary.left > 0 { LEFT } else { 0 };
    printer.summary(&back, Some(check.info()), request, &summary, started.elapsed(), code)?;
    Ok(code)
}

/// umount(8) returns a moment before its daemon has ended.
fn take(backing: &Arc<dyn Backing>, options: Options) -> Result<Check> {
    let start = Instant::now();
    loop {
        match Check::new(backing.clone(), options) {
            Err(error) if error.kind == Kind::Busy && start.elapsed() < PREDECESSOR_LIMIT => {
                std::thread::sleep(Duration::from_millis(50));
            }
            taken => return taken,
        }
    }
}

fn expect_unmounted(back: &std::path::Path) -> Result<()> {
    match mountinfo::find(back)? {
        None => Ok(()),
        Some(mount) => {
            let (source, mnt) = (mount.source.display(), mount.mount_point.display());
            let message = format!(
                "{source} is mounted at {mnt}; only a volume that is not mounted can be checked: \
                 `byokfs umount {mnt}` first"
            );
            Err(Error::new(Kind::Busy, message))
        }
    }
}

/// Findings go to standard output, the progress bar to standard error.
struct Printer {
    json: bool,
    quiet: bool,
    bar: Option<ProgressBar>,
    /// Findings that `--repair` would do something about.
    repairable: Mutex<u64>,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(flatten)]
    finding: &'a Finding,
}

impl Printer {
    fn new(request: &Request, terminal: bool) -> Printer {
        let bar = (terminal && !request.quiet && !request.json).then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let template = "{bytes} of {total_bytes} [{bar:40}] {bytes_per_sec}, {eta} left";
            match ProgressStyle::with_template(template) {
                Ok(style) => bar.with_style(style.progress_chars("=> ")),
                Err(_) => bar,
            }
        });
        Printer { json: request.json, quiet: request.quiet, bar, repairable: Mutex::default() }
    }

    fn print(&self, text: &str) -> Result<()> {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::text(text)),
            None => output::text(text),
        }
    }

    fn summary(
        &self,
        back: &std::path::Path,
        info: Option<&VolumeInfo>,
        request: &Request,
        summary: &Summary,
        took: Duration,
        code: u8,
    ) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let not_checked: &[&str] = if request.no_key { &NOT_CHECKED } else { &[] };
        if self.json {
            let value = json!({
                "type": "summary",
                "volume": info.map(|info| hex::uuid(&info.uuid)),
                "back": back.to_string_lossy(),
                "key": !request.no_key,
                "repair": request.repair != Repair::No,
                "errors": summary.errors,
                "warnings": summary.warnings,
                "notes": summary.notes,
                "repaired": summary.repaired,
                "left": summary.left,
                "files": summary.files,
                "directories": summary.directories,
                "links": summary.links,
                "blocks": summary.blocks,
                "bytes": summary.bytes,
                "milliseconds": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                "not_checked": not_checked,
                "exit_code": code,
            });
            return output::line(&value.to_string());
        }
        if self.quiet && code == 0 {
            return Ok(());
        }
        let mut text = String::new();
        for what in not_checked {
            text += &format!("not checked without the key: {what}\n");
        }
        let seconds = took.as_secs_f64();
        let mebibytes = summary.bytes as f64 / f64::from(1 << 20);
        text += &format!(
            "{}: {}, {}, {}; {mebibytes:.1} MiB read in {seconds:.1} s ({:.0} MiB/s)\n",
            back.display(),
            counted(summary.files, "file", "files"),
            counted(summary.directories, "directory", "directories"),
            counted(summary.links, "symbolic link", "symbolic links"),
            mebibytes / seconds.max(0.001),
        );
        let of = [
            counted(summary.errors, "error", "errors"),
            counted(summary.warnings, "warning", "warnings"),
            counted(summary.notes, "note", "notes"),
        ];
        text += &format!("{}: ", of.join(", "));
        text += &match (summary.repaired, summary.left) {
            (0, 0) => "clean\n".to_owned(),
            (repaired, 0) => format!("{repaired} repaired, nothing left\n"),
            (0, left) => format!("{left} left\n"),
            (repaired, left) => format!("{repaired} repaired, {left} left\n"),
        };
        let repairable = *self.repairable.lock();
        if repairable > 0 && request.repair != Repair::All {
            text += &format!("--repair does something about {repairable} of these\n");
        }
        self.print(&text)
    }
}

impl Report for Printer {
    fn finding(&self, finding: &Finding) -> Result<()> {
        if finding.repair.is_some() && finding.repaired != Some(true) {
            *self.repairable.lock() += 1;
        }
        if self.quiet && finding.severity == Severity::Note {
            return Ok(());
        }
        if self.json {
            let line = serde_json::to_string(&Line { kind: "finding", finding })
                .map_err(|error| Error::new(Kind::Io, "cannot write JSON").with_source(error))?;
            return self.print(&format!("{line}\n"));
        }
        self.print(&render(finding))
    }

    fn trouble(&self, message: &str) {
        let warn = || {
            // Nowhere is left to say that standard error is gone.
            let _ = writeln!(io::stderr(), "byokfs: warning: {message}");
        };
        match &self.bar {
            Some(bar) => bar.suspend(warn),
            None => warn(),
        }
    }

    fn total(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(bytes);
        }
    }

    fn progress(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }
}

fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// What is wrong, where, what it means, what a repair does.
fn render(finding: &Finding) -> String {
    let mut text = format!("{}: {}: ", finding.severity.name(), finding.code.name());
    if let Some(path) = &finding.path {
        text += &printable(path);
        if let (Some(from), Some(to)) = (finding.from, finding.to) {
            text += &format!(", bytes {from} to {}", to - 1);
        }
        text += ": ";
    }
    text += &printable(&finding.detail);
    for other in &finding.also {
        text += &format!("\n    also called {}", printable(other));
    }
    text += &format!("\n    {}", printable(&finding.backing_path));
    if let Some(at) = finding.at {
        text += &format!(" at byte {at}");
    }
    text += &format!("\n    {}", finding.meaning);
    match (finding.repair, finding.repaired) {
        (Some(repair), None) => text += &format!("\n    --repair: {repair}"),
        (Some(repair), Some(true)) => text += &format!("\n    repaired: {repair}"),
        (Some(_), Some(false)) => text += "\n    could not be repaired",
        (None, _) => {}
    }
    text.push('\n');
    text
}

/// A name may hold anything; a terminal shall not do it.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|letter| match letter.is_control() {
            true => letter.escape_default().collect::<Vec<_>>(),
            false => vec![letter],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Request> {
        parse_helper(&args.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn as_fsck_8_calls_it() {
        let repair = |args: &[&str]| parse(args).unwrap().repair;
        assert_eq!(repair(&["/back"]), Repair::No);
        assert_eq!(repair(&["-a", "-C0", "/back"]), Repair::Safe);
        assert_eq!(repair(&["-pf", "/back"]), Repair::Safe);
        assert_eq!(repair(&["/back", "-y", "-V"]), Repair::All);
        assert_eq!(repair(&["-n", "-C", "/back"]), Repair::No);
        for wrong in [&["-x", "/b"][..], &[], &["/a", "/b"], &["-n", "-y", "/b"], &["-Cx", "/b"]] {
            assert_eq!(parse(wrong).unwrap_err().kind, Kind::Usage, "{wrong:?}");
        }
    }

    #[test]
    fn names_do_nothing_to_a_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n\u{e9}"), "a\\u{1b}[2Jb\\n\u{e9}");
    }
}
