//! `-o` options, and the arguments that mount(8) passes to `mount.byokfs`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use crate::config::Override;
use crate::error::{Error, Result};

use super::args::MountArgs;

/// Options for boot and for mount(8) itself, which mean nothing to a mount in progress.
const IGNORED: [&str; 17] = [
    "defaults",
    "rw",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "nouser",
    "nousers",
    "noowner",
    "nogroup",
    "async",
    "exec",
    "relatime",
    "noiversion",
    "silent",
    "loud",
    // What byokfs always is.
    "allow_other",
];
const ALWAYS: [&str; 3] = ["default_permissions", "nosuid", "nodev"];
/// Would turn a protection off, or promise what does not happen.
const REFUSED: [(&str, &str); 8] = [
    ("suid", "byokfs mounts are always nosuid"),
    ("dev", "byokfs mounts are always nodev"),
    ("user", "only root mounts a volume"),
    ("users", "only root mounts a volume"),
    ("owner", "only root mounts a volume"),
    ("group", "only root mounts a volume"),
    ("sync", "open files O_SYNC instead"),
    ("dirsync", "fsync the directory instead"),
];

/// What the kernel shows of every FUSE mount, and mount(8) hands back with a remount.
const SHOWN: [&str; 5] = ["user_id", "group_id", "rootmode", "max_read", "blksize"];

/// A whole mount request, whichever way it came.
#[derive(Debug, Default)]
pub struct MountRequest {
    pub back: PathBuf,
    pub mnt: PathBuf,
    pub foreground: bool,
    pub options: MountOptions,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct MountOptions {
    pub read_only: bool,
    pub no_exec: bool,
    pub no_atime: bool,
    /// mount(8)'s `-f`: check only.
    pub fake: bool,
    /// Change the flags of a mount that is there.
    pub remount: bool,
    /// An option of [`SHOWN`], which only a remount may have.
    shown: Option<String>,
    pub config: Option<PathBuf>,
    pub overrides: Vec<OptionOverride>,
}

/// A configuration key set by a mount option or flag.
#[derive(Clone, Debug, PartialEq)]
pub struct OptionOverride {
    pub section: &'static str,
    pub key: &'static str,
    pub value: String,
    pub origin: String,
}

impl From<OptionOverride> for Override {
    fn from(from: OptionOverride) -> Override {
        Override {
            section: from.section.to_owned(),
            key: from.key.to_owned(),
            value: from.value,
            origin: from.origin,
        }
    }
}

impl MountOptions {
    /// Adds a comma-separated list, later ones winning.
    pub fn apply(&mut self, list: &str) -> Result<()> {
        list.split(',').filter(|option| !option.is_empty()).try_for_each(|option| self.one(option))
    }

    /// What is only known when all options are.
    pub(super) fn check(&self) -> Result<()> {
        match &self.shown {
            Some(option) if !self.remount => Err(unknown(option)),
            _ => Ok(()),
        }
    }

    fn one(&mut self, option: &str) -> Result<()> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        if name.starts_with("x-") || name.starts_with("X-") || name == "comment" {
            return Ok(());
        }
        if let Some((_, instead)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            return Err(Error::usage(format!("mount option \"{name}\" is refused: {instead}")));
        }
        match (name, value) {
            ("ro", None) => self.read_only = true,
            ("rw", None) => self.read_only = false,
            ("remount", None) => self.remount = true,
            ("noexec", None) => self.no_exec = true,
            ("exec", None) => self.no_exec = false,
            ("noatime", None) => self.no_atime = true,
            ("atime" | "strictatime" | "relatime", None) => self.no_atime = false,
            ("nodiratime" | "diratime" | "lazytime" | "nolazytime", None) => {}
            ("config", Some(path)) => self.config = Some(absolute("config", path)?),
            ("errno" | "transport" | "threads", Some(value)) => self.set_mount(name, value),
            ("fence_socket" | "fence_pid_file" | "option_file", Some(path)) => {
                self.set_fence(name.trim_start_matches("fence_"), absolute(name, path)?, option);
            }
            ("subtype", Some("byokfs")) => {}
            (name, None) if IGNORED.contains(&name) || ALWAYS.contains(&name) => {}
            (name, Some(_)) if SHOWN.contains(&name) => self.shown = Some(option.to_owned()),
            _ => return Err(unknown(option)),
        }
        Ok(())
    }

    fn set_mount(&mut self, key: &str, value: &str) {
        let key = match key {
            "errno" => "errno",
            "threads" => "threads",
            _ => "transport",
        };
        self.overrides.push(OptionOverride {
            section: "mount",
            key,
            value: value.to_owned(),
            origin: format!("mount option {key}={value}"),
        });
    }

    /// A path that names the server also turns the fence on.
    pub(super) fn set_fence(&mut self, key: &str, path: PathBuf, origin: &str) {
        let key = match key {
            "socket" => "socket",
            "pid_file" => "pid_file",
            _ => "option_file",
        };
        let mut set = |key, value: String| {
            self.overrides.push(OptionOverride {
                section: "fence",
                key,
                value,
                origin: origin.to_owned(),
            });
        };
        set(key, path.to_string_lossy().into_owned());
        if key != "option_file" {
            set("enabled", "true".to_owned());
        }
    }
}

fn unknown(option: &str) -> Error {
    Error::usage(format!("mount option \"{option}\" is not one that byokfs knows"))
}

fn absolute(name: &str, path: &str) -> Result<PathBuf> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(Error::usage(format!("mount option {name} needs an absolute path")))
}

impl TryFrom<MountArgs> for MountRequest {
    type Error = Error;

    fn try_from(args: MountArgs) -> Result<MountRequest> {
        let mut options = MountOptions { config: args.config.config, ..MountOptions::default() };
        for list in &args.options {
            options.apply(list)?;
        }
        for (key, flag, path) in [
            ("socket", "--fence-socket", args.fence_socket),
            ("pid_file", "--fence-pid-file", args.fence_pid_file),
            ("option_file", "--option-file", args.option_file),
        ] {
            if let Some(path) = path {
                let path = std::path::absolute(&path)
                    .map_err(|error| Error::io(format!("{flag} {}", path.display()), error))?;
                options.set_fence(key, path, flag);
            }
        }
        if let Some(transport) = args.transport {
            options.set_mount("transport", &transport);
        }
        Ok(MountRequest { back: args.back, mnt: args.mnt, foreground: args.foreground, options })
    }
}

/// `mount.byokfs BACK MNT [-sfnv] [-N NS] [-t TYPE] [-o OPTIONS]`, options anywhere.
pub fn parse_helper(args: &[OsString]) -> Result<MountRequest> {
    let mut request = MountRequest::default();
    let mut places: Vec<&OsStr> = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let Some(text) = arg.to_str().filter(|text| text.starts_with('-') && text.len() > 1) else {
            places.push(arg);
            continue;
        };
        let mut value = || {
            args.next()
                .and_then(|value| value.to_str())
                .ok_or_else(|| Error::usage(format!("mount.byokfs: {text} needs a value in UTF-8")))
        };
        match text {
            "-o" => request.options.apply(value()?)?,
            "-t" => {
                value()?;
            }
            "-N" => {
                return Err(Error::usage("mount.byokfs: -N (another namespace) is not supported"));
            }
            _ => {
                for flag in text[1..].chars() {
                    match flag {
                        'f' => request.options.fake = true,
                        'r' => request.options.read_only = true,
                        // Sloppy, no mtab, verbose, read-write: nothing to do.
                        's' | 'n' | 'v' | 'w' => {}
                        _ => {
                            return Err(Error::usage(format!(
                                "mount.byokfs: unknown option {text}"
                            )));
                        }
                    }
                }
            }
        }
    }
    let [back, mnt] = places[..] else {
        return Err(Error::usage("usage: mount.byokfs BACK MNT [-o OPTIONS]"));
    };
    request.back = back.into();
    request.mnt = mnt.into();
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<MountOptions> {
        let mut options = MountOptions::default();
        options.apply(list)?;
        options.check()?;
        Ok(options)
    }

    fn helper(args: &[&str]) -> Result<MountRequest> {
        parse_helper(&args.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn an_fstab_line() {
        let options = parse(
            "ro,noauto,nofail,_netdev,x-systemd.requires=vault.service,config=/etc/b.toml,noatime",
        )
        .unwrap();
        assert!(options.read_only && options.no_atime && !options.no_exec);
        assert_eq!(options.config, Some("/etc/b.toml".into()));
        assert!(!parse("ro,rw").unwrap().read_only);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (list, part) in [
            ("bogus", "\"bogus\""),
            ("config=rel.toml", "config needs an absolute path"),
            ("config", "\"config\""),
            ("ro=1", "\"ro=1\""),
            ("suid", "always nosuid"),
            ("user_id=0", "\"user_id=0\""),
            ("errno", "\"errno\""),
        ] {
            let error = parse(list).unwrap_err();
            assert!(error.to_string().contains(part), "{list}: {error}");
        }
    }

    #[test]
    fn a_remount_comes_with_what_the_kernel_shows() {
        let shown = "rw,nosuid,nodev,relatime,user_id=0,group_id=0,default_permissions,allow_other";
        let options = parse(&format!("{shown},remount,ro")).unwrap();
        assert!(options.remount && options.read_only);
    }

    #[test]
    fn a_fence_path_turns_the_fence_on() {
        let overrides = parse("fence_socket=/run/m.sock").unwrap().overrides;
        assert_eq!((overrides[0].key, overrides[0].value.as_str()), ("socket", "/run/m.sock"));
        assert_eq!((overrides[1].key, overrides[1].value.as_str()), ("enabled", "true"));
    }

    #[test]
    fn as_mount_8_calls_it() {
        let request = helper(&["/back", "/mnt", "-sv", "-o", "rw,noexec"]).unwrap();
        assert_eq!((request.back, request.mnt), ("/back".into(), "/mnt".into()));
        assert!(request.options.no_exec && !request.options.read_only);
        assert!(helper(&["/back", "/mnt", "-f"]).unwrap().options.fake);
        for wrong in [&["/back"][..], &["/b", "/m", "/x"], &["/b", "/m", "-o"], &["/b", "/m", "-Z"]]
        {
            assert!(helper(wrong).is_err(), "{wrong:?}");
        }
    }
}
