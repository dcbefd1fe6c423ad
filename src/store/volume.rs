//! The volume header: what kind of volume this is, readable without any key.
//!
//! The file `volume` is two pages with the same record. A checksum finds damage without a key;
//! a MAC, checked when the key is there, finds a forgery.

use ring::digest::{SHA256, digest};

use super::keys::{self, MacKeys, Wrapped};
use super::layout::BLOCK_LEN;
use super::page::{u32_at, u64_at};
use super::{FEATURE_PLAINTEXT_NAMES, FORMAT_VERSION, VolumeInfo};
use crate::backing::{FileRef, NodeRef};
use crate::crypto::mac::{MAC_LEN, MacKey};
use crate::crypto::random;
use crate::crypto::wrap::WRAPPED_LEN;
use crate::error::{Context, Error, Kind, Result};
use crate::key::gate::Keyring;

pub(super) const FILE: &[u8] = b"volume";
const MAGIC: &[u8; 8] = b"BYOKFSVL";
const DOMAIN: &[u8; 16] = b"byokfs volume 1\0";
const RECORD_LEN: usize = 512;
const SUM_LEN: usize = 32;
const METADATA_KEY_AT: usize = 112;
const MAC_AT: usize = RECORD_LEN - MAC_LEN;
const KNOWN_FEATURES: u64 = FEATURE_PLAINTEXT_NAMES;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VolumeHeader {
    pub uuid: [u8; 16],
    pub features: u64,
    pub generation: u64,
    /// Seconds since the epoch.
    pub created: u64,
    pub volume_key_id: u32,
    /// Of the intent log that belongs to the volume; a new log has a new one.
    pub log_id: [u8; 16],
    pub wrapped_metadata_key: Wrapped,
    mac: [u8; MAC_LEN],
}

impl VolumeHeader {
    /// Of a new volume.
    pub(super) fn new(keyring: &Keyring, features: u64, created: u64) -> Result<VolumeHeader> {
        let uuid = random::bytes()?;
        Ok(VolumeHeader {
            uuid,
            features,
            generation: 1,
            created,
            volume_key_id: keyring.id(),
            log_id: random::bytes()?,
            wrapped_metadata_key: keys::new_metadata_key(keyring, &uuid)?,
            mac: [0; MAC_LEN],
        })
    }

    fn record(&self) -> [u8; RECORD_LEN] {
        let mut record = [0; RECORD_LEN];
        record[32..40].copy_from_slice(MAGIC);
        record[40..44].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        record[44..48].copy_from_slice(&(BLOCK_LEN as u32).to_le_bytes());
        record[48..56].copy_from_slice(&self.features.to_le_bytes());
        record[56..64].copy_from_slice(&self.generation.to_le_bytes());
        record[64..80].copy_from_slice(&self.uuid);
        record[80..88].copy_from_slice(&self.created.to_le_bytes());
        record[88..92].copy_from_slice(&self.volume_key_id.to_le_bytes());
        record[96..112].copy_from_slice(&self.log_id);
        record[METADATA_KEY_AT..][..WRAPPED_LEN].copy_from_slice(&self.wrapped_metadata_key);
        record
    }

    /// Both pages. `key` is that of the volume key that the header names.
    pub(super) fn encode(&mut self, key: &MacKey) -> Vec<u8> {
        let mut record = self.record();
        self.mac = key.mac(&[DOMAIN, &record[SUM_LEN..MAC_AT]]);
        record[MAC_AT..].copy_from_slice(&self.mac);
        let sum = digest(&SHA256, &record[SUM_LEN..]);
        record[..SUM_LEN].copy_from_slice(sum.as_ref());
        let mut pages = vec![0; 2 * BLOCK_LEN];
        pages[..RECORD_LEN].copy_from_slice(&record);
        pages[BLOCK_LEN..][..RECORD_LEN].copy_from_slice(&record);
        pages
    }

    /// False for a header that was not written with a volume key that is here.
    pub(super) fn is_authentic(&self, keys: &MacKeys) -> bool {
        let key = keys.get(self.volume_key_id);
        key.is_some_and(|key| key.verify(&[DOMAIN, &self.record()[SUM_LEN..MAC_AT]], &self.mac))
    }

    pub(super) fn info(&self, damaged_copy: bool) -> VolumeInfo {
        VolumeInfo {
            uuid: self.uuid,
            format: FORMAT_VERSION,
            features: self.features,
            created: self.created,
            damaged_copy,
        }
    }
}

/// Reads the volume header below `root`; the flag says that one copy is damaged.
pub(super) fn read(root: &NodeRef, shown: &str) -> Result<(VolumeHeader, bool)> {
    decode(&read_pages(&open(root, shown)?, shown)?, shown)
}

/// The generation of each copy; None for a damaged one.
pub(super) fn copies(root: &NodeRef, shown: &str) -> Result<[Option<u64>; 2]> {
    let pages = read_pages(&open(root, shown)?, shown)?;
    let (a, b) = pages.split_at(BLOCK_LEN);
    Ok([a, b].map(|page| is_intact(page).then(|| u64_at(page, 56))))
}

fn open(root: &NodeRef, shown: &str) -> Result<FileRef> {
    let node = match root.lookup(FILE) {
        Ok(node) => node,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(not_a_volume(shown));
        }
        Err(error) => return Err(Error::io(format!("cannot open {shown}/volume"), error)),
    };
    if node.metadata().context(|| format!("cannot examine {shown}/volume"))?.kind
        != crate::backing::FileKind::Regular
    {
        return Err(not_a_volume(shown));
    }
    node.open(crate::backing::Access::Read).context(|| format!("cannot open {shown}/volume"))
}

fn is_intact(page: &[u8]) -> bool {
    page[..SUM_LEN] == *digest(&SHA256, &page[SUM_LEN..RECORD_LEN]).as_ref()
        && page[RECORD_LEN..].iter().all(|&byte| byte == 0)
}

/// Puts other pages in the place of those of the volume header below `root`, the second when the
/// first is on stable storage.
pub(super) fn rewrite(root: &NodeRef, pages: &[u8], shown: &str) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let file = root.lookup(FILE)?.open(crate::backing::Access::ReadWrite)?;
        for (page, at) in pages.chunks(BLOCK_LEN).zip([0, BLOCK_LEN as u64]) {
            file.write_at(page, at)?;
            file.sync_all()?;
        }
        Ok(())
    };
    write().context(|| format!("cannot write {shown}/volume"))
}

fn read_pages(file: &FileRef, shown: &str) -> Result<Vec<u8>> {
    let mut pages = vec![0; 2 * BLOCK_LEN];
    file.read_at(&mut pages, 0).context(|| format!("cannot read {shown}/volume"))?;
    Ok(pages)
}

fn not_a_volume(shown: &str) -> Error {
    Error::new(
        Kind::NotAVolume,
        format!("{shown} is not a byokfs volume; `byokfs init` makes one in an empty directory"),
    )
}

fn decode(pages: &[u8], shown: &str) -> Result<(VolumeHeader, bool)> {
    let copies: Vec<&[u8]> = pages.chunks_exact(BLOCK_LEN).collect();
    if !copies.iter().any(|page| &page[32..40] == MAGIC) {
        return Err(not_a_volume(shown));
    }
    let intact: Vec<&&[u8]> = copies.iter().filter(|page| is_intact(page)).collect();
    let Some(record) = intact.iter().max_by_key(|page| u64_at(page, 56)) else {
        // A later format may have moved even the checksum, so its number alone says enough.
        if let Some(page) = copies.iter().find(|page| is_newer(page)) {
            return Err(unsupported_format(shown, u32_at(page, 40)));
        }
        return Err(Error::corrupt(format!(
            "both copies of the volume header in {shown}/volume are damaged; restore that file \
             from a backup of this volume"
        )));
    };
    if u32_at(record, 40) != FORMAT_VERSION || u32_at(record, 44) as usize != BLOCK_LEN {
        return Err(unsupported_format(shown, u32_at(record, 40)));
    }
    let features = u64_at(record, 48);
    if features & !KNOWN_FEATURES != 0 {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "{shown} uses features this version does not know (flags {:#x}); use a newer \
                 byokfs",
                features & !KNOWN_FEATURES
            ),
        ));
    }
    let header = VolumeHeader {
        uuid: array_at(record, 64),
        features,
        generation: u64_at(record, 56),
        created: u64_at(record, 80),
        volume_key_id: u32_at(record, 88),
        log_id: array_at(record, 96),
        wrapped_metadata_key: array_at(record, METADATA_KEY_AT),
        mac: array_at(record, MAC_AT),
    };
    Ok((header, intact.len() < copies.len()))
}

fn array_at<const LEN: usize>(bytes: &[u8], at: usize) -> [u8; LEN] {
    let mut array = [0; LEN];
    array.copy_from_slice(&bytes[at..at + LEN]);
    array
}

fn is_newer(page: &[u8]) -> bool {
    &page[32..40] == MAGIC && u32_at(page, 40) > FORMAT_VERSION
}

fn unsupported_format(shown: &str, version: u32) -> Error {
    Error::new(
        Kind::Unsupported,
        format!(
            "{shown} has volume format {version}, this version of byokfs knows format \
             {FORMAT_VERSION}; use a byokfs that knows it"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::secret::Secret;

    fn key(byte: u8) -> MacKey {
        MacKey::new(&Secret::new_with(|key| key.fill(byte)).unwrap()).unwrap()
    }

    fn keys(byte: u8) -> MacKeys {
        MacKeys::of_one(7, key(byte))
    }

    fn pages() -> Vec<u8> {
        let mut header = VolumeHeader {
            uuid: [3; 16],
            features: 0,
            generation: 1,
            created: 1_700_000_000,
            volume_key_id: 7,
            log_id: [4; 16],
            wrapped_metadata_key: [5; WRAPPED_LEN],
            mac: [0; MAC_LEN],
        };
        header.encode(&key(1))
    }

    fn reseal(page: &mut [u8]) {
        let sum = digest(&SHA256, &page[SUM_LEN..RECORD_LEN]);
        page[..SUM_LEN].copy_from_slice(sum.as_ref());
    }

    #[test]
    fn either_copy_serves() {
        let (header, damaged) = decode(&pages(), "v").unwrap();
        assert!(!damaged && header.is_authentic(&keys(1)) && !header.is_authentic(&keys(2)));
        assert_eq!(header.uuid, [3; 16]);
        for copy in [0, BLOCK_LEN] {
            for at in [0, 33, 41, 50, 70, 100, 120, 300, 511, 4095] {
                let mut pages = pages();
                pages[copy + at] ^= 0x10;
                assert_eq!(decode(&pages, "v").unwrap(), (header.clone(), true), "byte {at}");
                pages[BLOCK_LEN - copy + 70] ^= 1;
                let kind = decode(&pages, "v").unwrap_err().kind;
                assert!(matches!(kind, Kind::Corrupt | Kind::Unsupported), "byte {at}: {kind:?}");
            }
        }
    }

    #[test]
    fn other_files_formats_and_features_are_named() {
        let kind = |pages: &[u8]| decode(pages, "v").unwrap_err().kind;
        assert_eq!(kind(&[0; 2 * BLOCK_LEN]), Kind::NotAVolume);
        let change = |at: usize, value: u8, sum: bool| {
            let mut pages = pages();
            for copy in [0, BLOCK_LEN] {
                pages[copy + at] = value;
                if sum {
                    reseal(&mut pages[copy..]);
                }
            }
            pages
        };
        assert_eq!(kind(&change(40, 9, true)), Kind::Unsupported);
        assert_eq!(kind(&change(40, 9, false)), Kind::Unsupported);
        assert_eq!(kind(&change(50, 2, true)), Kind::Unsupported);
        assert_eq!(kind(&change(70, 9, false)), Kind::Corrupt);
        let forged = decode(&change(70, 9, true), "v").unwrap().0;
        assert!(!forged.is_authentic(&keys(1)));
    }
}
