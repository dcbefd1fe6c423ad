//! The volume header: what kind of volume this is, readable without any key.
//!
//! The file `volume` is two pages with the same record. A checksum finds damage without a key;
//! a MAC, checked when the key is there, finds a forgery.

use ring::digest::{SHA256, digest};

use super::layout::BLOCK_LEN;
use super::page::{u32_at, u64_at};
use super::{FEATURE_PLAINTEXT_NAMES, FORMAT_VERSION, VolumeInfo};
use crate::backing::{FileRef, NodeRef};
use crate::crypto::mac::{MAC_LEN, MacKey};
use crate::error::{Context, Error, Kind, Result};

pub(super) const FILE: &[u8] = b"volume";
const MAGIC: &[u8; 8] = b"BYOKFSVL";
const DOMAIN: &[u8; 16] = b"byokfs volume 1\0";
const RECORD_LEN: usize = 512;
const SUM_LEN: usize = 32;
const MAC_AT: usize = 128;
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
    mac: [u8; MAC_LEN],
}

impl VolumeHeader {
    pub(super) fn new(
        uuid: [u8; 16],
        log_id: [u8; 16],
        features: u64,
        created: u64,
    ) -> VolumeHeader {
        VolumeHeader {
            uuid,
            features,
            generation: 1,
            created,
            volume_key_id: 1,
            log_id,
            mac: [0; MAC_LEN],
        }
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
        record
    }

    pub(super) fn encode(&mut self, key: &MacKey) -> Vec<u8> {
        let mut record = self.record();
        self.mac = key.mac(&[DOMAIN, &record[SUM_LEN..MAC_AT]]);
        record[MAC_AT..MAC_AT + MAC_LEN].copy_from_slice(&self.mac);
        let sum = digest(&SHA256, &record[SUM_LEN..]);
        record[..SUM_LEN].copy_from_slice(sum.as_ref());
        let mut pages = vec![0; 2 * BLOCK_LEN];
        pages[..RECORD_LEN].copy_from_slice(&record);
        pages[BLOCK_LEN..][..RECORD_LEN].copy_from_slice(&record);
        pages
    }

    /// False for a header that was not written with this volume key.
    pub(super) fn is_authentic(&self, key: &MacKey) -> bool {
        key.verify(&[DOMAIN, &self.record()[SUM_LEN..MAC_AT]], &self.mac)
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
    let file = node
        .open(crate::backing::Access::Read)
        .context(|| format!("cannot open {shown}/volume"))?;
    decode(&read_pages(&file, shown)?, shown)
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
    let intact: Vec<&&[u8]> = copies
        .iter()
        .filter(|page| {
            page[..SUM_LEN] == *digest(&SHA256, &page[SUM_LEN..RECORD_LEN]).as_ref()
                && page[RECORD_LEN..].iter().all(|&byte| byte == 0)
        })
        .collect();
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
    let mut header = VolumeHeader::new([0; 16], [0; 16], features, u64_at(record, 80));
    header.log_id.copy_from_slice(&record[96..112]);
    header.uuid.copy_from_slice(&record[64..80]);
    header.generation = u64_at(record, 56);
    header.volume_key_id = u32_at(record, 88);
    header.mac.copy_from_slice(&record[MAC_AT..MAC_AT + MAC_LEN]);
    Ok((header, intact.len() < copies.len()))
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

    fn pages() -> Vec<u8> {
        VolumeHeader::new([3; 16], [4; 16], 0, 1_700_000_000).encode(&key(1))
    }

    fn reseal(page: &mut [u8]) {
        let sum = digest(&SHA256, &page[SUM_LEN..RECORD_LEN]);
        page[..SUM_LEN].copy_from_slice(sum.as_ref());
    }

    #[test]
    fn either_copy_serves() {
        let (header, damaged) = decode(&pages(), "v").unwrap();
        assert!(!damaged && header.is_authentic(&key(1)) && !header.is_authentic(&key(2)));
        assert_eq!(header.uuid, [3; 16]);
        for copy in [0, BLOCK_LEN] {
            for at in [0, 33, 41, 50, 70, 100, 300, 511, 4095] {
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
        assert!(!forged.is_authentic(&key(1)));
    }
}
