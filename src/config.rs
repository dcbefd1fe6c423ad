//! One validated [`Config`] from the TOML file, the environment and the command line, in that
//! order of precedence from low to high.
//!
//! `config/byokfs.toml` lists every key with its default. An unknown key, a bad unit and a
//! contradiction are refused with the file and line, or the variable or flag, that has it. The
//! environment variable of `watcher.interval` is `BYOKFS_WATCHER_INTERVAL`, and so on.
//!
//! No secret is in here: only the paths of the files that hold them.

mod key;
mod service;
pub mod units;
mod validate;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
pub use key::{Identity, Key, VerifyChallenge};
pub use service::Service;
use units::{duration, optional_path};

pub const DEFAULT_PATH: &str = "/etc/byokfs/byokfs.toml";
pub const PATH_VARIABLE: &str = "BYOKFS_CONFIG";

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub key: Key,
    /// For the keys that they name, in the place of `key`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service: Vec<Service>,
    pub watcher: Watcher,
    pub fence: Fence,
    pub mount: Mount,
    pub audit: Audit,
    pub alert: Alert,
    pub log: Log,
    pub run: Run,
    /// Where volume pins live (`volumes.d/`): the directory of the file this came from.
    #[serde(skip)]
    pub dir: Dir,
    /// That file, absolute; None: the default one, there or not.
    #[serde(skip)]
    pub file: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Watcher {
    /// From the start of one probe to the start of the next.
    #[serde(with = "duration")]
    pub interval: Duration,
    /// Of one whole probe, however slowly the service answers.
    #[serde(with = "duration")]
    pub deadline: Duration,
    /// A denial that may be a slip is tried again after this.
    #[serde(with = "duration")]
    pub confirm_after: Duration,
    /// Such a denial counts when no success came within this.
    #[serde(with = "duration")]
    pub confirm_within: Duration,
    /// From the start of the last full success to the gate shut, fence included.
    #[serde(with = "duration")]
    pub max_staleness: Duration,
    pub on_expired: OnExpired,
    /// A revocation heals by itself for this long after it; 0: only `revalidate` brings it back.
    #[serde(with = "duration")]
    pub auto_heal_window: Duration,
    /// Rewrap a volume whose key was named without a version when there is a newer one.
    pub follow_versions: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnExpired {
    #[default]
    Inaccessible,
    /// The service still unwraps with an expired key: serve on, warn.
    Warn,
}

impl Default for Watcher {
    fn default() -> Watcher {
        Watcher {
            interval: Duration::from_secs(30),
            deadline: Duration::from_secs(10),
            confirm_after: Duration::from_secs(5),
            confirm_within: Duration::from_secs(60),
            max_staleness: Duration::from_secs(9 * 60),
            on_expired: OnExpired::default(),
            auto_heal_window: Duration::ZERO,
            follow_versions: true,
        }
    }
}

/// The stop of the database server when the volume is cut off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fence {
    /// Where nothing is said: if a socket or a pid file names the server.
    pub enabled: bool,
    /// The server's unix socket.
    #[serde(with = "optional_path")]
    pub socket: Option<PathBuf>,
    #[serde(with = "optional_path")]
    pub pid_file: Option<PathBuf>,
    /// `[client]` with user and password of the account that may shut the server down.
    #[serde(with = "optional_path")]
    pub option_file: Option<PathBuf>,
    /// Where neither leads to it: take a process that uses the mount and has a server's name.
    pub search: bool,
    #[serde(with = "duration")]
    pub timeout: Duration,
}

impl Default for Fence {
    fn default() -> Fence {
        Fence {
            enabled: false,
            socket: None,
            pid_file: None,
            option_file: None,
            search: true,
            timeout: Duration::from_secs(20),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mount {
    pub errno: CutOffErrno,
    pub transport: Transport,
    /// Worker threads; 0: chosen by the daemon.
    pub threads: u16,
}

/// What every operation answers while the volume is Inaccessible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CutOffErrno {
    #[default]
    Eio,
    /// EKEYREVOKED, EKEYEXPIRED, ENOKEY.
    Key,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    #[default]
    Auto,
    Uring,
    Dev,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Audit {
    /// None: no trail of its own; events still reach the log.
    #[serde(with = "optional_path")]
    pub file: Option<PathBuf>,
}

impl Default for Audit {
    fn default() -> Audit {
        Audit { file: Some("/var/log/byokfs/audit.jsonl".into()) }
    }
}

/// A program that is run for each change of state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Alert {
    /// None: no program.
    #[serde(with = "optional_path")]
    pub command: Option<PathBuf>,
    /// It is killed then.
    #[serde(with = "duration")]
    pub timeout: Duration,
}

impl Default for Alert {
    fn default() -> Alert {
        Alert { command: None, timeout: Duration::from_secs(30) }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Of a daemon in the background; in the foreground the log is standard error.
    #[serde(with = "optional_path")]
    pub file: Option<PathBuf>,
    pub level: Level,
}

impl Default for Log {
    fn default() -> Log {
        Log { file: Some("/var/log/byokfs/byokfs.log".into()), level: Level::default() }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl From<Level> for log::LevelFilter {
    fn from(level: Level) -> log::LevelFilter {
        match level {
            Level::Error => log::LevelFilter::Error,
            Level::Warn => log::LevelFilter::Warn,
            Level::Info => log::LevelFilter::Info,
            Level::Debug => log::LevelFilter::Debug,
            Level::Trace => log::LevelFilter::Trace,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Control sockets; made with mode 0700.
    pub dir: PathBuf,
}

impl Default for Run {
    fn default() -> Run {
        Run { dir: "/run/byokfs".into() }
    }
}

/// The directory of the configuration file.
#[derive(Clone, Debug, PartialEq)]
pub struct Dir(pub PathBuf);

impl Default for Dir {
    fn default() -> Dir {
        let dir = Path::new(DEFAULT_PATH).parent();
        Dir(dir.unwrap_or(Path::new("/")).to_owned())
    }
}

/// Where a value that overrides the file comes from, for messages.
#[derive(Clone, Debug)]
pub struct Override {
    pub section: String,
    pub key: String,
    pub value: String,
    pub origin: String,
}

impl Config {
    /// Reads the file (`path`, else the environment's, else the default one if it exists), then
    /// the environment, then `flags` on top.
    pub fn load(path: Option<&Path>, flags: &[Override]) -> Result<Config> {
        let from_environment = std::env::var_os(PATH_VARIABLE).filter(|value| !value.is_empty());
        let chosen = path.map(Path::to_owned).or(from_environment.map(PathBuf::from));
        let file = chosen.clone().unwrap_or_else(|| DEFAULT_PATH.into());
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && chosen.is_none() => {
                String::new()
            }
            Err(error) => {
                let message = format!("cannot read the configuration {}", file.display());
                return Err(Error::new(Kind::Config, message).with_source(error));
            }
        };
        let mut overrides = from_variables(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }))?;
        overrides.extend_from_slice(flags);
        let mut config = Config::parse(&text, &file, &overrides)?;
        let file = std::path::absolute(&file)
            .map_err(|error| Error::io(format!("cannot resolve {}", file.display()), error))?;
        if let Some(dir) = file.parent() {
            config.dir = Dir(dir.to_owned());
        }
        config.file = chosen.is_some().then_some(file);
        Ok(config)
    }

    /// This one, with `[key]` and each `[[service]]` as the file has them by now.
    pub fn with_services_of_today(&self) -> Result<Config> {
        let Config { key, service, .. } = Config::load(self.file.as_deref(), &[])?;
        Ok(Config { key, service, ..self.clone() })
    }

    /// For a mount. Other verbs do without: a mount option may have named the server.
    pub fn expect_server_of_fence(&self) -> Result<()> {
        let Fence { enabled, socket, pid_file, .. } = &self.fence;
        if *enabled && socket.is_none() && pid_file.is_none() {
            let message = "fence.enabled needs fence.socket or fence.pid_file to know the server";
            return Err(Error::new(Kind::Config, message));
        }
        Ok(())
    }

    /// Time that a cut-off may take until the gate is shut: the fence's, or what dirty mappings
    /// need where there is no fence, and a little for threads to be woken.
    pub fn cut_off_lead(&self) -> Duration {
        const WRITE_BACK: Duration = Duration::from_secs(2);
        const SLACK: Duration = Duration::from_secs(1);
        let fence = if self.fence.enabled { self.fence.timeout } else { WRITE_BACK };
        fence.saturating_add(SLACK)
    }

    /// How the service of that key is reached, and as whom.
    pub fn key_for(&self, kid: &str) -> &Key {
        let fits =
            self.service.iter().filter_map(|service| Some((service.scope.fit(kid)?, service)));
        fits.max_by_key(|(fit, _)| *fit).map_or(&self.key, |(_, service)| &service.key)
    }

    /// `[key]` and each `[[service]]`, as messages name them.
    pub fn services(&self) -> impl Iterator<Item = (String, &Key)> {
        let named = |service: &Service| format!("service \"{}\": ", service.keys);
        let more = self.service.iter().map(move |service| (named(service), &service.key));
        std::iter::once(("key.".to_owned(), &self.key)).chain(more)
    }

    /// As [`Config::load`], from text.
    pub fn parse(text: &str, file: &Path, overrides: &[Override]) -> Result<Config> {
        let mut config: Config =
            toml::from_str(text).map_err(|error| located(&error, text, file))?;
        let mut table: toml::Table =
            toml::from_str(text).map_err(|error| located(&error, text, file))?;
        for over in overrides {
            let section = table
                .entry(over.section.clone())
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
            let toml::Value::Table(section) = section else {
                return Err(refused(&over.origin, "[[service]] is for the file alone"));
            };
            section.insert(over.key.clone(), loose_value(&over.value));
            config = Config::deserialize(table.clone())
                .map_err(|error| refused(&over.origin, error.message()))?;
        }
        if table.get("fence").is_none_or(|fence| fence.get("enabled").is_none()) {
            config.fence.enabled = config.fence.socket.is_some() || config.fence.pid_file.is_some();
        }
        validate::check(&config).map_err(|message| {
            Error::new(Kind::Config, format!("{}: {message}", file.display()))
        })?;
        Ok(config)
    }
}

/// `BYOKFS_<SECTION>_<KEY>`; other variables of byokfs (`BYOKFS_CONFIG`, `BYOKFS_VAULT`) have
/// no section's name.
fn from_variables(vars: impl Iterator<Item = (String, String)>) -> Result<Vec<Override>> {
    let sections = toml::Table::try_from(Config::default())
        .map_err(|error| Error::new(Kind::Config, "cannot list the keys").with_source(error))?;
    let mut found: Vec<Override> = vars
        .filter_map(|(name, value)| {
            let rest = name.strip_prefix("BYOKFS_")?.to_ascii_lowercase();
            let (section, key) = rest.split_once('_')?;
            sections.contains_key(section).then(|| Override {
                section: section.to_owned(),
                key: key.to_owned(),
                value,
                origin: format!("environment variable {name}"),
            })
        })
        .collect();
    found.sort_by(|a, b| a.origin.cmp(&b.origin));
    Ok(found)
}

/// A variable or flag has no quotes: what is not a TOML number or boolean is a string.
fn loose_value(value: &str) -> toml::Value {
    if let Ok(flag) = value.parse::<bool>() {
        return toml::Value::Boolean(flag);
    }
    if let Ok(number) = value.parse::<i64>() {
        return toml::Value::Integer(number);
    }
    toml::Value::String(value.to_owned())
}

fn refused(origin: &str, message: &str) -> Error {
    Error::new(Kind::Config, format!("{origin}: {message}"))
}

fn located(error: &toml::de::Error, text: &str, file: &Path) -> Error {
    let message = error.message();
    let place = match error.span() {
        Some(span) => {
            let before = text.bytes().take(span.start);
            let number = before.filter(|byte| *byte == b'\n').count() + 1;
            let line = text.lines().nth(number - 1).unwrap_or_default();
            match line.split_once('=') {
                Some((key, _)) => format!("{}:{number}: {}", file.display(), key.trim()),
                None => format!("{}:{number}", file.display()),
            }
        }
        None => file.display().to_string(),
    };
    Error::new(Kind::Config, format!("{place}: {message}"))
}

#[cfg(test)]
mod tests;
