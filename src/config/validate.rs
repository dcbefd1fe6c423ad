//! Contradictions that parse: each is refused with the keys that cause it.

use std::path::Path;
use std::time::Duration;

use super::{Config, Identity, Key, Service, units::format_duration as text};

/// What byokfs promises: a refused key is cut off within this.
const CUT_OFF_PROMISE: Duration = Duration::from_secs(600);
const MIN_FENCE: Duration = Duration::from_secs(1);
const MAX_THREADS: u16 = 512;

pub(super) fn check(config: &Config) -> Result<(), String> {
    watcher(config)?;
    fence(config)?;
    if config.mount.threads > MAX_THREADS {
        return Err(format!("mount.threads is {}: at most {MAX_THREADS}", config.mount.threads));
    }
    services(config)?;
    if config.alert.timeout.is_zero() {
        return Err("alert.timeout is 0s: it must be longer".into());
    }
    // The daemon works in /: a relative path would mean another file there.
    absolute("run.dir", Some(&config.run.dir))?;
    absolute("audit.file", config.audit.file.as_deref())?;
    absolute("alert.command", config.alert.command.as_deref())?;
    absolute("log.file", config.log.file.as_deref())?;
    absolute("fence.socket", config.fence.socket.as_deref())?;
    absolute("fence.pid_file", config.fence.pid_file.as_deref())?;
    absolute("fence.option_file", config.fence.option_file.as_deref())
}

fn services(config: &Config) -> Result<(), String> {
    for (section, key) in config.services() {
        identity(&section, key)?;
        for (name, path) in key.files() {
            absolute(&format!("{section}{name}"), path)?;
        }
    }
    for (number, one) in config.service.iter().enumerate() {
        let same = |other: &&Service| other.scope == one.scope;
        if let Some(other) = config.service[..number].iter().find(same) {
            return Err(format!(
                "two [[service]] sections are for the same keys: \"{}\" and \"{}\"",
                other.keys, one.keys
            ));
        }
    }
    Ok(())
}

/// `section` as a message begins with it.
fn identity(section: &str, key: &Key) -> Result<(), String> {
    for (name, value) in
        [("identity_endpoint", &key.identity_endpoint), ("authority", &key.authority)]
    {
        let Some(text) = value else { continue };
        let url = url::Url::parse(text)
            .map_err(|error| format!("{section}{name} \"{text}\": {error}"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("{section}{name} \"{text}\" is not an http(s) URL"));
        }
    }
    let needed = match key.identity {
        Identity::ClientSecret => ("client-secret", "client_secret_file", &key.client_secret_file),
        Identity::ClientCertificate => {
            ("client-certificate", "client_certificate_file", &key.client_certificate_file)
        }
        Identity::AppService | Identity::Imds | Identity::WorkloadIdentity => return Ok(()),
    };
    match needed {
        (identity, file, None) => {
            let needs = format!("needs {section}{file}, the file that holds it");
            Err(format!("{section}identity = \"{identity}\" {needs}"))
        }
        _ => Ok(()),
    }
}

fn watcher(config: &Config) -> Result<(), String> {
    let watcher = &config.watcher;
    for (name, value) in [
        ("interval", watcher.interval),
        ("deadline", watcher.deadline),
        ("confirm_after", watcher.confirm_after),
        ("confirm_within", watcher.confirm_within),
    ] {
        if value.is_zero() {
            return Err(format!("watcher.{name} is 0s: it must be longer"));
        }
    }
    if watcher.max_staleness > CUT_OFF_PROMISE {
        return Err(format!(
            "watcher.max_staleness is {}: a lost key must be cut off within {}",
            text(watcher.max_staleness),
            text(CUT_OFF_PROMISE)
        ));
    }
    if watcher.confirm_after >= watcher.confirm_within {
        return Err(format!(
            "watcher.confirm_after ({}) must be shorter than watcher.confirm_within ({})",
            text(watcher.confirm_after),
            text(watcher.confirm_within)
        ));
    }
    // Staleness counts to the gate shut, the fence included; and otherwise the volume would be
    // cut off between two healthy probes.
    let lead = config.cut_off_lead();
    let round = watcher.interval.saturating_add(watcher.deadline).saturating_add(lead);
    if round >= watcher.max_staleness {
        let cut_off = if config.fence.enabled { "fence.timeout" } else { "the cut-off's own time" };
        return Err(format!(
            "watcher.max_staleness ({}) is too short: it must be longer than watcher.interval + \
             watcher.deadline + {cut_off} ({})",
            text(watcher.max_staleness),
            text(round)
        ));
    }
    Ok(())
}

fn fence(config: &Config) -> Result<(), String> {
    let fence = &config.fence;
    if fence.timeout < MIN_FENCE {
        return Err(format!(
            "fence.timeout is {}: at least {}",
            text(fence.timeout),
            text(MIN_FENCE)
        ));
    }
    Ok(())
}

fn absolute(key: &str, path: Option<&Path>) -> Result<(), String> {
    match path {
        Some(path) if !path.is_absolute() => {
            Err(format!("{key} \"{}\" is not an absolute path", path.display()))
        }
        _ => Ok(()),
    }
}
