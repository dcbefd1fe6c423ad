//! `byokfs info`: what a volume says about itself, without its key and whether or not it is mounted.

use std::path::Path;

use serde_json::{Value, json};

use crate::backing::Backing;
use crate::backing::NodeRef;
use crate::backing::linux::LinuxBacking;
use crate::config::Config;
use crate::daemon::rotation::{self, Role, Site};
use crate::daemon::volume::expect_own_envelope;
use crate::daemon::{hex, mountinfo};
use crate::error::Result;
use crate::key::envelope::Envelope;
use crate::store::{FEATURE_PLAINTEXT_NAMES, Store, VolumeInfo};

use super::args::InfoArgs;
use super::escrow::backing_directory;
use super::output;

pub(super) fn run(args: InfoArgs) -> Result<()> {
    let back = backing_directory(&args.back)?;
    let backing = LinuxBacking::open(&back)?;
    let info = Store::inspect(&*backing)?;
    if args.keys {
        return keys(&backing.root(), &info, &back, &args);
    }
    let envelope = Envelope::load(&backing.root())?;
    if let Err(error) = expect_own_envelope(&envelope, &info) {
        output::warning(&error.to_string());
    }
    let mounted = mountinfo::find(&back)?.filter(|mount| mount.source == back);
    let value = json!({
        "volume": hex::uuid(&info.uuid),
        "format": info.format,
        "features": info.features,
        "encrypted_names": info.features & FEATURE_PLAINTEXT_NAMES == 0,
        "damaged_header_copy": info.damaged_copy,
        "back": back.to_string_lossy(),
        "mnt": mounted.map(|mount| mount.mount_point.to_string_lossy().into_owned()),
        "kek": envelope.kid,
        "provider": envelope.provider,
        "algorithm": envelope.algorithm.name(),
        "follows_new_versions": envelope.follow_versions,
        "volume_key": envelope.volume_key_id,
        "wrapped": envelope.created,
    });
    if args.json {
        return output::json(&value);
    }
    if info.damaged_copy {
        output::warning("one copy of the volume header is damaged; the other one serves");
    }
    output::text(&render(&value))
}

/// What a key officer must not destroy, and until when.
fn keys(dir: &NodeRef, info: &VolumeInfo, back: &Path, args: &InfoArgs) -> Result<()> {
    let keys = rotation::needed(dir, info)?;
    // The list is as good as the envelope that it is in.
    let known = Config::load(args.config.config.as_deref(), &[]).and_then(|config| {
        let config_dir = &config.dir.0;
        let site = Site { dir, back, info, config: &config, config_dir };
        rotation::expect_confirmed(&site, &Envelope::load(dir)?)
    });
    if let Err(error) = known {
        output::warning(&format!("this list may be another's, or an older one: {error}"));
    }
    if args.json {
        return output::json(&keys.iter().map(rotation::NeededKey::json).collect::<Vec<_>>());
    }
    let line = |key: &rotation::NeededKey| {
        let times = match (key.role, &key.from, &key.until) {
            (Role::Current, Some(from), _) => format!("the volume, since {from}"),
            (Role::Previous, Some(from), Some(until)) => {
                format!("envelope.prev.json, and copies made {from} to {until}")
            }
            (Role::Copies, Some(from), Some(until)) => format!("copies made {from} to {until}"),
            _ => "envelope.prev.json".to_owned(),
        };
        format!("{:<8}  {}  {times}\n", key.role.name(), key.kid)
    };
    output::text(&keys.iter().map(line).collect::<String>())
}

fn render(info: &Value) -> String {
    const LINES: [(&str, &str); 9] = [
        ("volume", "volume"),
        ("back", "backing directory"),
        ("mnt", "mounted at"),
        ("format", "format"),
        ("encrypted_names", "encrypted names"),
        ("kek", "key"),
        ("algorithm", "wrapped by"),
        ("follows_new_versions", "follows versions"),
        ("wrapped", "wrapped"),
    ];
    let line = |(field, label): &(&str, &str)| match &info[*field] {
        Value::Null => None,
        Value::String(text) => Some(format!("{:<18} {text}\n", format!("{label}:"))),
        Value::Bool(yes) => {
            Some(format!("{:<18} {}\n", format!("{label}:"), if *yes { "yes" } else { "no" }))
        }
        other => Some(format!("{:<18} {other}\n", format!("{label}:"))),
    };
    LINES.iter().filter_map(line).collect()
}
