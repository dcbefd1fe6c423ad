//! Everything a mount needs, resolved by the verb and handed down to guard and daemon as one
//! line of JSON on their standard input. It holds no secret.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::mountinfo::Device;
use crate::config::{Config, Dir};
use crate::error::{Context, Error, Kind, Result};
use crate::sys;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Absolute, without symbolic links.
    pub back: PathBuf,
    pub mnt: PathBuf,
    pub read_only: bool,
    pub no_exec: bool,
    pub no_atime: bool,
    /// Log to standard error.
    pub foreground: bool,
    pub config: Config,
    /// Directory of the configuration file, where the pins are.
    pub config_dir: PathBuf,
    /// That file, unless it is the default one.
    pub config_file: Option<PathBuf>,
    /// For a guard that takes over for one that ended: the daemon that already runs.
    pub watch: Option<Watch>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Watch {
    pub pid: i32,
    pub device: Device,
}

impl Plan {
    pub fn to_line(&self) -> Result<String> {
        let mut line = serde_json::to_string(self).map_err(|error| {
            Error::usage("the mount cannot be described; are its paths UTF-8?").with_source(error)
        })?;
        line.push('\n');
        Ok(line)
    }

    /// From standard input, and what is left of it: it ends when whoever wrote the plan ends.
    pub fn from_stdin() -> Result<(Plan, BufReader<File>)> {
        let failed = || "cannot read the mount's plan".to_owned();
        let input = io::stdin().as_fd().try_clone_to_owned().context(failed)?;
        let mut input = BufReader::new(File::from(input));
        let plan = Plan::read(&mut input)?;
        let null = File::open("/dev/null").context(failed)?;
        sys::stdio::replace_stdin(null).context(failed)?;
        Ok((plan, input))
    }

    pub fn read(input: &mut impl BufRead) -> Result<Plan> {
        let mut line = String::new();
        input.read_line(&mut line).context(|| "cannot read the mount's plan".to_owned())?;
        let mut plan: Plan = serde_json::from_str(&line).map_err(|error| {
            Error::new(Kind::Usage, "an internal verb, started by byokfs itself").with_source(error)
        })?;
        plan.config.dir = Dir(plan.config_dir.clone());
        plan.config.file.clone_from(&plan.config_file);
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_survives_its_line() {
        let service = "[[service]]\nkeys = \"pkcs11:\"\npkcs11_module = \"/m.so\"\n";
        let config = Config {
            dir: Dir("/etc/b".into()),
            file: Some("/etc/b/c.toml".into()),
            ..Config::parse(service, "c.toml".as_ref(), &[]).unwrap()
        };
        let plan = Plan {
            back: "/back".into(),
            mnt: "/m n\"t".into(),
            read_only: true,
            no_exec: false,
            no_atime: false,
            foreground: false,
            config: config.clone(),
            config_dir: "/etc/b".into(),
            config_file: config.file.clone(),
            watch: Some(Watch { pid: 7, device: Device { major: 0, minor: 57 } }),
        };
        let line = plan.to_line().unwrap();
        let read = Plan::read(&mut line.as_bytes()).unwrap();
        assert_eq!((read.mnt, read.config), (plan.mnt, config));
        assert!(Plan::read(&mut &b""[..]).is_err());
    }
}
