//! The envelope: the wrapped volume key, and what is needed to have it unwrapped.
//!
//! A small JSON file in the volume's root, `envelope.json`, with its predecessor beside it as
//! `envelope.prev.json`. An update is atomic: the new file is complete and on stable storage
//! before it gets the name, and there is always a file of that name.
//!
//! Everything in it is untrusted. Anyone can wrap a key of his own with a public key and plant
//! the result here, so the one who opens a volume compares the unwrapped key's fingerprint with
//! the one that `init` pinned in the host's configuration ([`super::custody`] does).

use std::fmt;
use std::io;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::provider::Algorithm;
use crate::backing::{NodeRef, RenameMode, small_file};
use crate::error::{Context, Error, Kind, Result};

pub const FILE: &str = "envelope.json";
pub const PREVIOUS_FILE: &str = "envelope.prev.json";
const NEW_FILE: &[u8] = b"envelope.new.json";
const NEW_PREVIOUS_FILE: &[u8] = b"envelope.new.prev.json";

/// The only format this version knows.
const FORMAT: u32 = 1;
/// Far more than any envelope; a larger file is not read.
const SIZE_LIMIT: u64 = 256 * 1024;
/// An RSA 4096 ciphertext is 512 bytes.
const WRAPPED_LIMIT: usize = 4096;
/// Of earlier keys that are remembered: as many versions of a key as a key vault backs up.
const EARLIER_LIMIT: usize = 500;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub volume: [u8; 16],
    /// The provider's name.
    pub provider: String,
    /// Full, with the version that everything here is wrapped with.
    pub kid: String,
    pub algorithm: Algorithm,
    /// The key was named without a version: newer versions are to be followed.
    pub follow_versions: bool,
    /// Counts the volume keys of this volume, from 1; file headers name it.
    pub volume_key_id: u32,
    pub wrapped_volume_key: Vec<u8>,
    /// Of the volume key. Public, and as untrusted as all of this: for messages only.
    pub fingerprint: [u8; 32],
    /// The volume key before it, while something on the disk may still need that.
    pub retiring: Option<RetiringKey>,
    pub canary: Canary,
    /// RFC 3339, UTC.
    pub created: String,
    /// What the volume key was wrapped with before, oldest first. Copies of the volume that were
    /// made meanwhile have that envelope, and need that key version.
    pub earlier: Vec<EarlierKey>,
}

/// A volume key that is being replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetiringKey {
    pub id: u32,
    pub wrapped: Vec<u8>,
}

/// A key version that an envelope of this volume named before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlierKey {
    pub kid: String,
    /// Copies that were made from then until then have its envelope. RFC 3339, UTC.
    pub from: String,
    pub until: String,
}

/// A random value under the same key version, which probes have unwrapped instead of the volume
/// key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canary {
    pub wrapped: Vec<u8>,
    pub sha256: [u8; 32],
}

/// The time, as envelopes write it.
pub(super) fn now_text() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

/// The file's form. Unknown fields are refused: a later format that adds one has a new number.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    volume: String,
    created: String,
    kek: KekPart,
    volume_key: VolumeKeyPart,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retiring_volume_key: Option<RetiringPart>,
    canary: CanaryPart,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier: Vec<EarlierKey>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KekPart {
    provider: String,
    kid: String,
    algorithm: String,
    follow_versions: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VolumeKeyPart {
    id: u32,
    wrapped: String,
    fingerprint: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RetiringPart {
    id: u32,
    wrapped: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CanaryPart {
    wrapped: String,
    sha256: String,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Envelope {
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let document = Document {
            format: FORMAT,
            volume: uuid_text(&self.volume),
            created: self.created.clone(),
            kek: KekPart {
                provider: self.provider.clone(),
                kid: self.kid.clone(),
                algorithm: self.algorithm.name().into(),
                follow_versions: self.follow_versions,
            },
            volume_key: VolumeKeyPart {
                id: self.volume_key_id,
                wrapped: encode(&self.wrapped_volume_key),
                fingerprint: encode(&self.fingerprint),
            },
            retiring_volume_key: self
                .retiring
                .as_ref()
                .map(|old| RetiringPart { id: old.id, wrapped: encode(&old.wrapped) }),
            canary: CanaryPart {
                wrapped: encode(&self.canary.wrapped),
                sha256: encode(&self.canary.sha256),
            },
            earlier: self.earlier.clone(),
        };
        let json = serde_json::to_vec_pretty(&document);
        let mut json = json.map_err(|error| {
            Error::new(Kind::Io, "cannot write the envelope").with_source(error)
        })?;
        json.push(b'\n');
        Ok(json)
    }

    pub fn from_json(json: &[u8]) -> Result<Envelope> {
        let bad = |why: &dyn fmt::Display| Error::corrupt(format!("{FILE}: {why}"));
        let FormatOnly { format } = serde_json::from_slice(json).map_err(|error| bad(&error))?;
        if format != FORMAT {
            return Err(Error::new(
                Kind::Unsupported,
                format!("{FILE} has format {format}; this version of byokfs knows {FORMAT}"),
            ));
        }
        let document: Document = serde_json::from_slice(json).map_err(|error| bad(&error))?;
        let Document { volume, created, kek, volume_key, canary, earlier, .. } = document;
        let retiring = match document.retiring_volume_key {
            None => None,
            Some(old) => Some(RetiringKey {
                id: old.id,
                wrapped: wrapped(&old.wrapped).ok_or_else(|| bad(&"malformed retiring key"))?,
            }),
        };
        if retiring.as_ref().is_some_and(|old| old.id == volume_key.id) {
            return Err(bad(&"two volume keys have one number"));
        }
        let algorithm = Algorithm::from_name(&kek.algorithm)
            .ok_or_else(|| bad(&format!("unknown algorithm {:?}", kek.algorithm)))?;
        Ok(Envelope {
            volume: parse_uuid(&volume).ok_or_else(|| bad(&"malformed volume id"))?,
            provider: kek.provider,
            kid: kek.kid,
            algorithm,
            follow_versions: kek.follow_versions,
            volume_key_id: volume_key.id,
            wrapped_volume_key: wrapped(&volume_key.wrapped)
                .ok_or_else(|| bad(&"malformed volume key"))?,
            fingerprint: digest(&volume_key.fingerprint)
                .ok_or_else(|| bad(&"malformed fingerprint"))?,
            retiring,
            canary: Canary {
                wrapped: wrapped(&canary.wrapped).ok_or_else(|| bad(&"malformed canary"))?,
                sha256: digest(&canary.sha256).ok_or_else(|| bad(&"malformed canary"))?,
            },
            created,
            earlier,
        })
    }

    /// What this envelope's successor, made now, has to remember: its own key version too.
    pub(super) fn earlier_for_successor(&self, now: &str) -> Result<Vec<EarlierKey>> {
        if self.earlier.len() >= EARLIER_LIMIT {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "{FILE} remembers {EARLIER_LIMIT} earlier key versions and takes no more: \
                     forget those that no copy of the volume needs (`byokfs info --keys`, `byokfs \
                     forget-key`)"
                ),
            ));
        }
        let last =
            EarlierKey { kid: self.kid.clone(), from: self.created.clone(), until: now.to_owned() };
        Ok(self.earlier.iter().cloned().chain([last]).collect())
    }

    /// The envelope before this one, where there is one that can be read.
    pub fn load_previous(dir: &NodeRef) -> Result<Option<Envelope>> {
        match small_file::read(dir, PREVIOUS_FILE.as_bytes(), SIZE_LIMIT) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            json => {
                let json = json.context(|| format!("cannot read {PREVIOUS_FILE}"))?;
                Envelope::from_json(&json).map(Some)
            }
        }
    }

    /// The current envelope; None where its file is missing.
    pub fn load_current(dir: &NodeRef) -> Result<Option<Envelope>> {
        match small_file::read(dir, FILE.as_bytes(), SIZE_LIMIT) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            json => Envelope::from_json(&json.context(|| format!("cannot read {FILE}"))?).map(Some),
        }
    }

    /// Whether a file of the volume's root has this name; with `leftover`, one that a rotation
    /// leaves which was cut short.
    pub fn is_file(name: &[u8], leftover: bool) -> bool {
        match leftover {
            true => [NEW_FILE, NEW_PREVIOUS_FILE].contains(&name),
            false => [FILE.as_bytes(), PREVIOUS_FILE.as_bytes()].contains(&name),
        }
    }

    /// Removes the predecessor, whose key opens the volume as well as the current one does.
    pub fn remove_previous(dir: &NodeRef) -> Result<()> {
        let message = || format!("cannot remove {PREVIOUS_FILE}");
        small_file::remove_if_there(dir, PREVIOUS_FILE.as_bytes()).context(message)?;
        dir.sync().context(message)
    }

    /// Reads the envelope below `dir`; the previous one, with a warning, where there is none.
    pub fn load(dir: &NodeRef) -> Result<Envelope> {
        match small_file::read(dir, FILE.as_bytes(), SIZE_LIMIT) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let json =
                    small_file::read(dir, PREVIOUS_FILE.as_bytes(), SIZE_LIMIT).map_err(|_| {
                        Error::new(
                            Kind::NotAVolume,
                            format!("{FILE} is missing: its volume cannot be opened without it"),
                        )
                    })?;
                log::warn!("{FILE} is missing; going on with {PREVIOUS_FILE}");
                Envelope::from_json(&json)
            }
            json => Envelope::from_json(&json.context(|| format!("cannot read {FILE}"))?),
        }
    }

    /// Makes this the envelope below `dir`, and the one there was its predecessor.
    pub fn save(&self, dir: &NodeRef) -> Result<()> {
        self.write_new(dir)?;
        keep_previous(dir).context(|| format!("cannot write {PREVIOUS_FILE}"))?;
        take_new(dir)
    }

    /// Makes this the envelope below `dir`; the one there was has no successor, and its
    /// predecessor stays. For what is not about keys.
    pub fn save_in_place(&self, dir: &NodeRef) -> Result<()> {
        self.write_new(dir)?;
        take_new(dir)
    }

    fn write_new(&self, dir: &NodeRef) -> Result<()> {
        let json = self.to_json()?;
        small_file::prepare(dir, NEW_FILE, &json).context(|| format!("cannot write {FILE}"))
    }
}

fn take_new(dir: &NodeRef) -> Result<()> {
    small_file::take(dir, NEW_FILE, FILE.as_bytes()).context(|| format!("cannot write {FILE}"))
}

/// By a second link, so that the current envelope never lacks its own name.
fn keep_previous(dir: &NodeRef) -> io::Result<()> {
    let current = match dir.lookup(FILE.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        current => current?,
    };
    small_file::remove_if_there(dir, NEW_PREVIOUS_FILE)?;
    dir.link_node(&*current, NEW_PREVIOUS_FILE)?;
    dir.rename(NEW_PREVIOUS_FILE, &**dir, PREVIOUS_FILE.as_bytes(), RenameMode::Replace)?;
    // A rename onto another name of the same file does nothing and leaves both.
    small_file::remove_if_there(dir, NEW_PREVIOUS_FILE)
}

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn wrapped(text: &str) -> Option<Vec<u8>> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    (1..=WRAPPED_LIMIT).contains(&bytes.len()).then_some(bytes)
}

fn digest(text: &str) -> Option<[u8; 32]> {
    URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()
}

/// In the usual form, 8-4-4-4-12 hexadecimal digits.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    let well_formed = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let uuid = u128::from_str_radix(&digits, 16).ok().filter(|_| well_formed)?.to_be_bytes();
    (uuid_text(&uuid) == text.to_ascii_lowercase()).then_some(uuid)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backing::Backing;
    use crate::backing::linux::LinuxBacking;

    fn sample() -> Envelope {
        Envelope {
            volume: [0x1f; 16],
            provider: "azure".into(),
            kid: "https://kv/keys/kek/0123".into(),
            algorithm: Algorithm::RsaOaep256,
            follow_versions: true,
            volume_key_id: 1,
            wrapped_volume_key: vec![7; 384],
            fingerprint: [3; 32],
            retiring: None,
            canary: Canary { wrapped: vec![8; 384], sha256: [4; 32] },
            created: now_text(),
            earlier: Vec::new(),
        }
    }

    fn volume() -> (tempfile::TempDir, NodeRef) {
        let dir = tempfile::tempdir().unwrap();
        let root = LinuxBacking::open(dir.path()).unwrap().root();
        (dir, root)
    }

    #[test]
    fn survives_the_disk() {
        let (_dir, root) = volume();
        assert_eq!(Envelope::load(&root).unwrap_err().kind, Kind::NotAVolume);
        let envelope = sample();
        envelope.save(&root).unwrap();
        assert_eq!(Envelope::load(&root).unwrap(), envelope);
        let retiring = Some(RetiringKey { id: 1, wrapped: vec![5; 384] });
        let envelope = Envelope { volume_key_id: 2, retiring, ..sample() };
        envelope.save(&root).unwrap();
        assert_eq!(Envelope::load(&root).unwrap(), envelope);
        let twice = Envelope { volume_key_id: 1, ..envelope };
        assert!(Envelope::from_json(&twice.to_json().unwrap()).is_err());
    }

    #[test]
    fn an_update_keeps_its_predecessor_and_no_leftovers() {
        let (dir, root) = volume();
        for version in 1..=3 {
            // What a crash in the middle of an update leaves must not be in the way.
            std::fs::write(dir.path().join("envelope.new.json"), "half").unwrap();
            std::fs::write(dir.path().join("envelope.new.prev.json"), "half").unwrap();
            Envelope { volume_key_id: version, ..sample() }.save(&root).unwrap();
        }
        assert_eq!(Envelope::load(&root).unwrap().volume_key_id, 3);
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [FILE, PREVIOUS_FILE]);
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        assert_eq!(Envelope::load(&root).unwrap().volume_key_id, 2);
    }

    #[test]
    fn earlier_keys_are_remembered_up_to_a_limit() {
        let (_dir, root) = volume();
        let mut envelope = sample();
        assert!(!String::from_utf8(envelope.to_json().unwrap()).unwrap().contains("earlier"));
        for version in 0..EARLIER_LIMIT {
            let earlier = envelope.earlier_for_successor("2026-01-02T03:04:05Z").unwrap();
            // The longest kind of key id there is.
            let kid = format!(
                "https://{}.vault.azure.net/keys/{:0>127}/{version:032x}",
                "v".repeat(24),
                "k"
            );
            envelope = Envelope { kid, earlier, ..sample() };
        }
        assert_eq!(envelope.earlier[0].kid, sample().kid);
        envelope.save(&root).unwrap();
        assert_eq!(Envelope::load(&root).unwrap(), envelope);
        assert_eq!(envelope.earlier_for_successor("now").unwrap_err().kind, Kind::Busy);
    }

    #[test]
    fn the_predecessor_can_be_read_and_removed() {
        let (_dir, root) = volume();
        sample().save(&root).unwrap();
        assert_eq!(Envelope::load_previous(&root).unwrap(), None);
        Envelope { volume_key_id: 2, ..sample() }.save(&root).unwrap();
        assert_eq!(Envelope::load_previous(&root).unwrap().unwrap().volume_key_id, 1);
        Envelope::remove_previous(&root).unwrap();
        Envelope::remove_previous(&root).unwrap();
        assert_eq!(Envelope::load_previous(&root).unwrap(), None);
    }

    /// Whatever a power cut leaves of an update, one of the two envelopes is there, whole; and
    /// after it has returned, the new one.
    #[test]
    fn no_power_cut_loses_the_envelope() {
        use crate::backing::memory::{MemoryBacking, Options};
        let backing = MemoryBacking::new();
        let root = backing.root();
        let versions = [1, 2, 3].map(|version| Envelope { volume_key_id: version, ..sample() });
        versions[0].save(&root).unwrap();
        versions[1].save(&root).unwrap();
        backing.settle();
        let start = backing.trace().len();
        versions[2].save(&root).unwrap();
        let trace = backing.trace();
        let mut states = 0;
        for cut in start..=trace.len() {
            for crash in trace.crashes(cut, &Options::default()) {
                let disk = trace.materialise(&crash);
                let found = Envelope::load(&disk.root())
                    .unwrap_or_else(|error| panic!("{error} after {crash:?}"));
                let allowed = if cut == trace.len() { &versions[2..] } else { &versions[1..] };
                assert!(allowed.contains(&found), "{crash:?}");
                // The next update is not in the way of what is left.
                versions[0].save(&disk.root()).unwrap();
                assert_eq!(Envelope::load(&disk.root()).unwrap(), versions[0]);
                states += 1;
            }
        }
        assert!(states > 10, "{states}");
    }

    #[test]
    fn no_failed_call_loses_the_envelope() {
        use crate::backing::fault::{Call, FaultBacking, Rule};
        use rustix::io::Errno;
        for nth in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let (backing, faults) = FaultBacking::new(LinuxBacking::open(dir.path()).unwrap());
            let root = backing.root();
            sample().save(&root).unwrap();
            faults.arm(Rule {
                call: Call::Any,
                after: nth,
                lasting: false,
                errno: Errno::IO,
                partial: None,
            });
            let newer = Envelope { volume_key_id: 2, ..sample() };
            let saved = newer.save(&root);
            if !faults.disarm() {
                saved.unwrap();
                assert!(nth > 5, "{nth}");
                break;
            }
            assert!(saved.is_err(), "call {nth}");
            let found = Envelope::load(&root).unwrap();
            assert!(found == newer || found.volume_key_id == 1, "call {nth}");
            newer.save(&root).unwrap();
            assert_eq!(Envelope::load(&root).unwrap(), newer);
        }
    }

    /// What was written as format 1 is read as long as there is one.
    #[test]
    fn an_envelope_of_format_1() {
        let text = r#"{
  "format": 1,
  "volume": "00112233-4455-6677-8899-aabbccddeeff",
  "created": "2026-11-26T08:00:00.5Z",
  "kek": {
    "provider": "azure",
    "kid": "https://v.vault.azure.net/keys/k/0123456789abcdef0123456789abcdef",
    "algorithm": "RSA-OAEP-256",
    "follow_versions": true
  },
  "volume_key": {
    "id": 2,
    "wrapped": "AQIDBA",
    "fingerprint": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
  },
  "retiring_volume_key": {
    "id": 1,
    "wrapped": "BQY"
  },
  "canary": {
    "wrapped": "Bw",
    "sha256": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE"
  },
  "earlier": [
    {
      "kid": "https://v.vault.azure.net/keys/k/00000000000000000000000000000000",
      "from": "2026-01-02T03:04:05Z",
      "until": "2026-11-26T08:00:00Z"
    }
  ]
}
"#;
        let envelope = Envelope::from_json(text.as_bytes()).unwrap();
        assert_eq!((envelope.volume_key_id, envelope.wrapped_volume_key.len()), (2, 4));
        assert_eq!((envelope.fingerprint, envelope.canary.sha256), ([0; 32], [1; 32]));
        assert_eq!(envelope.retiring, Some(RetiringKey { id: 1, wrapped: vec![5, 6] }));
        assert_eq!((envelope.volume[1], envelope.earlier.len()), (0x11, 1));
        assert_eq!(envelope.to_json().unwrap(), text.as_bytes());
    }

    #[test]
    fn unknown_formats_and_fields_are_refused() {
        let json = String::from_utf8(sample().to_json().unwrap()).unwrap();
        let newer = json.replace("\"format\": 1", "\"format\": 2");
        assert_eq!(Envelope::from_json(newer.as_bytes()).unwrap_err().kind, Kind::Unsupported);
        let odd = json.replace("\"format\": 1,", "\"format\": 1, \"extra\": true,");
        assert_eq!(Envelope::from_json(odd.as_bytes()).unwrap_err().kind, Kind::Corrupt);
        let algorithm = json.replace("RSA-OAEP-256", "ROT13");
        let error = Envelope::from_json(algorithm.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("ROT13"));
    }

    #[test]
    fn an_oversized_or_odd_file_is_not_read() {
        let (dir, root) = volume();
        let path = dir.path().join(FILE);
        std::fs::write(&path, vec![b' '; 270_000]).unwrap();
        assert!(Envelope::load(&root).is_err());
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(Envelope::load(&root).is_err());
    }

    #[test]
    fn uuids() {
        let uuid: [u8; 16] = std::array::from_fn(|index| index as u8 * 17);
        let text = uuid_text(&uuid);
        assert_eq!(text, "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(parse_uuid(&text), Some(uuid));
        for bad in
            ["", "0011", "00112233445566778899aabbccddeeff", "+0112233-4455-6677-8899-aabbccddeeff"]
        {
            assert_eq!(parse_uuid(bad), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Envelope::from_json(&bytes);
        }

        #[test]
        fn no_flipped_byte_makes_it_panic(at in 0..900_usize, byte in any::<u8>()) {
            let mut json = sample().to_json().unwrap();
            let at = at % json.len();
            json[at] = byte;
            let _ = Envelope::from_json(&json);
        }
    }
}
